"""What moves a block's bytes from a source's arena into ours: the contract that every transport keeps.

Owns the Protocol and its result; knows no transport. The contract test (`tests/kvpool/test_transport_contract.py`) runs
over all of them. A transport only ever writes into the destinations of a read that it was given, never verifies what the
bytes mean, and never makes them visible: that is the sink's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protos.control import Source


@dataclass(frozen=True, slots=True)
class BlockRead:
    """One block of a read: `location` as the source issued it; `destination` is private, writable, `[slab_bytes]`."""

    location: int
    destination: memoryview


@dataclass(frozen=True, slots=True)
class ReadResult:
    """How a read ended. `checksums` are of the destinations' bytes as they landed, in the read's order; None after an
    `error`, and then the destinations hold anything. Either way nothing will write into them any more."""

    read_id: int
    checksums: tuple[bytes, ...] | None
    error: str = ""


class Channel(Protocol):
    """The way to one incarnation of one source. Not thread-safe; nothing in it blocks."""

    def fileno(self) -> int:
        """Becomes readable when `poll` has news of the peer; -1 once closed."""

    @property
    def closed(self) -> bool:
        """Whether the peer is gone, refused us or broke the contract; then every read has ended and nothing of the peer's
        memory is held."""

    @property
    def busy(self) -> bool:
        """Whether `poll` can move bytes right now, whatever `fileno` says."""

    def start_read(self, read_id: int, blocks: Sequence[BlockRead]) -> None:
        """Begins to read `blocks`; the result comes from `poll`. `read_id` is the caller's and not in use."""

    def poll(self) -> list[ReadResult]:
        """Goes on for a bounded time and returns the reads that ended."""

    def abort(self, read_id: int) -> bool:
        """Gives a read up; no result follows. True if nothing can write into its destinations any more."""

    def close(self) -> None:
        """Gives everything up. Idempotent."""


class Transport(Protocol):
    """Opens channels to the sources that this transport can reach."""

    @property
    def name(self) -> str:
        """As in the configuration and in reports."""

    def reaches(self, source: Source) -> bool:
        """Whether `connect` is worth trying."""

    def connect(self, source: Source) -> Channel:
        """A channel that checks by itself that it talks to `source.epoch`. Raises TransportError if it can't be reached."""
