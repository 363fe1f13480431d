"""KV events as vLLM sends them (`vllm/distributed/kv_events.py`): what of them says which tokens a block holds.

Owns the decoding. A batch is an array `[ts, events, data_parallel_rank]`; an event an array that begins with its name (until
0.10) or a map with its name under `type` (since), of which fields that are not listed here are ignored. Hashes are bytes or
unsigned 64-bit integers, of the sender's own making: what they stand for is told by `token_ids` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from protos.kv_events import MAX_BATCH_BYTES, BlockHash

_Hashes = Annotated[list[BlockHash], Meta(max_length=65_536)]
_Tokens = Annotated[list[Annotated[int, Meta(ge=0, lt=2**32)]], Meta(max_length=4_194_304)]


class Stored(Struct, gc=False):
    """Blocks after `parent_block_hash`, `block_size` tokens each, whose tokens are all of `token_ids` in order. `extra_keys` has
    for each block what else decides its content (adapter, images, salt); `group_idx` is 0 or None for the attention that sees
    everything."""

    block_hashes: _Hashes
    parent_block_hash: BlockHash | None
    token_ids: _Tokens
    block_size: Annotated[int, Meta(ge=1, le=65_535)]
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class Removed(Struct, gc=False):
    """Blocks can no longer be read in `medium`."""

    block_hashes: _Hashes
    medium: str | None = None
    group_idx: int | None = None


class Cleared(Struct, gc=False):
    """Nothing is held any more."""


class _StoredMap(Stored, tag="BlockStored", tag_field="type", gc=False):
    pass


class _RemovedMap(Removed, tag="BlockRemoved", tag_field="type", gc=False):
    pass


class _ClearedMap(Cleared, tag="AllBlocksCleared", tag_field="type", gc=False):
    pass


class _StoredArray(Stored, tag="BlockStored", array_like=True, gc=False):
    pass


class _RemovedArray(Removed, tag="BlockRemoved", array_like=True, gc=False):
    pass


class _ClearedArray(Cleared, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


class _Batch(Struct, array_like=True, gc=False):
    ts: float
    events: Annotated[list[Raw], Meta(max_length=65_536)]


ForeignEvent = Stored | Removed | Cleared

_batches = msgspec.msgpack.Decoder(_Batch)
_maps: msgspec.msgpack.Decoder[_StoredMap | _RemovedMap | _ClearedMap] = msgspec.msgpack.Decoder(
    _StoredMap | _RemovedMap | _ClearedMap
)
_arrays: msgspec.msgpack.Decoder[_StoredArray | _RemovedArray | _ClearedArray] = msgspec.msgpack.Decoder(
    _StoredArray | _RemovedArray | _ClearedArray
)


def decode_foreign_batch(payload: bytes) -> Sequence[ForeignEvent]:
    """The events of a batch. Raises msgspec.DecodeError on anything that is none, ValueError on one past `MAX_BATCH_BYTES`."""
    if len(payload) > MAX_BATCH_BYTES:
        raise ValueError(f"event batch has {len(payload)} bytes, the limit is {MAX_BATCH_BYTES}")
    try:
        return [_event(raw) for raw in _batches.decode(payload).events]
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through
        raise msgspec.DecodeError(f"not an event batch: {error}") from error


def _event(raw: Raw) -> ForeignEvent:
    view = memoryview(raw)
    is_map = len(view) > 0 and (0x80 <= view[0] <= 0x8F or view[0] in (0xDE, 0xDF))
    return _maps.decode(raw) if is_map else _arrays.decode(raw)
