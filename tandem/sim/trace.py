"""Recorded requests in Mooncake's format: when each came, how long it was, and which of its blocks others had too.

Owns the reading. A line is one JSON object: `timestamp` (milliseconds from the begin), `input_length` and `output_length` in
tokens, and `hash_ids`, one number for each 512 tokens of the prompt: equal numbers are equal blocks after equal blocks. The
format is that of Mooncake's repository (`FAST25-release/traces`; Qin et al., *Mooncake: Trading More Storage for Less
Computation*, FAST 2025).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from tandem.errors import ConfigError

BLOCK_TOKENS = 512
MAX_LINE_BYTES = 16 << 20


class TraceRequest(Struct, frozen=True):
    """One request. The last of `hash_ids` may name a block that is not full."""

    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=0)]
    hash_ids: Annotated[list[Annotated[int, Meta(ge=0, le=2**62)]], Meta(min_length=1)]

    @property
    def arrival_s(self) -> float:
        return self.timestamp / 1000.0


_decoder = msgspec.json.Decoder(TraceRequest)


def read_trace(path: Path) -> list[TraceRequest]:
    """All requests, in the order of their arrival, of a file that may be compressed (`.gz`). Raises ConfigError for one that
    can't be read or is none, with the line."""
    requests: list[TraceRequest] = []
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{path}, line {number}: {len(line)} bytes, the limit is {MAX_LINE_BYTES}")
                if not line.strip():
                    continue
                try:
                    request = _decoder.decode(line)
                except msgspec.MsgspecError as error:
                    raise ConfigError(f"{path}, line {number}: {error}") from error
                expected = -(-request.input_length // BLOCK_TOKENS)
                if len(request.hash_ids) != expected:
                    raise ConfigError(
                        f"{path}, line {number}: {len(request.hash_ids)} hash_ids for {request.input_length} tokens, must be "
                        f"{expected}"
                    )
                requests.append(request)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    if not requests:
        raise ConfigError(f"{path}: no requests")
    return sorted(requests, key=lambda request: request.timestamp)


def infinite_cache_hit_rate(requests: Sequence[TraceRequest]) -> float:
    """The part of all blocks that came before, in any request: what a cache that never forgets finds."""
    seen: set[int] = set()
    num_found = num_blocks = 0
    for request in requests:
        num_blocks += len(request.hash_ids)
        for block in request.hash_ids:
            num_found += block in seen
        seen.update(request.hash_ids)
    return num_found / num_blocks
