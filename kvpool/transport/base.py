"""Moves blocks' bytes from a source's arena into ours: the contract that every transport keeps.

Owns the Protocols and their result; knows no transport. The contract test (`tests/kvpool/test_transport_contract.py`) runs
over all of them. A transport only ever writes into the destinations of a read that it was given, never verifies what the
bytes mean, and never makes them visible: that is the sink's part. As a source it only reads its arena, never outside it,
whatever a peer asks for.

One object a process and kind has both sides: it serves our arena to others and opens channels to theirs. One thread calls
it; nothing in it blocks. The caller polls `fileno` and calls `poll` when it is readable, or at once while `busy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from protos.control import Source

POLL_BYTES = 16 * 1024 * 1024
"""A poll stops after about so many bytes, so that its thread goes on heartbeating: a few milliseconds of copying."""


@dataclass(frozen=True, slots=True)
class ReadResult:
    """How a read ended. `checksums` (`[num_blocks]` uint64, in the read's order) are xxh3-64 of the destinations' bytes as they
    landed; None after an `error`, and then the destinations hold anything. Either way nothing will write into them any
    more."""

    read_id: int
    checksums: NDArray[np.uint64] | None
    error: str = ""


class Channel(Protocol):
    """The way to one incarnation of one source."""

    @property
    def closed_because(self) -> str:
        """Why the channel closed: the peer is gone, refused us or broke the contract, or `close`. Empty while it is open.
        Once closed nothing of the peer's memory is held, and every read has ended."""

    def start_read(self, read_id: int, locations: Sequence[int], block_ids: Sequence[int]) -> None:
        """Begins to read the peer's `locations`, as it issued them, into our arena's blocks `block_ids`, which are the
        caller's private ones. The result comes from the transport's `poll`, also on a closed channel. `read_id` is the
        caller's, and not in use on any channel of the transport."""

    def abort(self, read_id: int) -> bool:
        """Gives a read up; no result follows. True if nothing can write into its destinations any more."""

    def close(self) -> None:
        """Gives everything up; reads that had not ended get a result with an error. Idempotent."""


class Transport(Protocol):
    """Serves our arena and reaches others', in one way."""

    @property
    def name(self) -> str:
        """As in the configuration, in reports, and as the field of `Endpoints` that `endpoint` goes into."""

    @property
    def endpoint(self) -> str:
        """Where others reach our arena by this transport."""

    @property
    def busy(self) -> bool:
        """Whether `poll` can do something right now, whatever `fileno` says."""

    @property
    def num_readers(self) -> int:
        """Connections that others have to our arena."""

    def fileno(self) -> int:
        """Becomes readable when `poll` has something to do; the same until `close`."""

    def reaches(self, source: Source) -> bool:
        """Whether `connect` is worth trying."""

    def connect(self, source: Source) -> Channel:
        """A channel that checks by itself that it talks to `source.epoch`, and closes otherwise. Doesn't wait for the peer.
        Raises TransportError if it is known at once that it can't be reached."""

    def poll(self) -> list[ReadResult]:
        """Lets readers in, serves them, and goes on with our reads, all for a bounded time; the reads that ended."""

    def close(self) -> None:
        """Ends every channel and connection. Idempotent."""
