"""A transport inside one process whose faults a test can choose; it keeps the `Channel` contract like any other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvpool.arena import Arena, checksum_of
from kvpool.transport.base import BlockRead, ReadResult
from protos.control import Source
from tandem.errors import TransportError


@dataclass
class Faults:
    """What goes wrong from now on, on every channel of a transport."""

    refuse: bool = False
    corrupt: bool = False
    stall: bool = False
    noisy_abort: bool = False
    """An abort can't prove that nothing will be written any more."""


class FaultyChannel:
    def __init__(self, arena: Arena, faults: Faults, epoch_fits: bool) -> None:
        self._arena: Arena | None = arena
        self._faults = faults
        self._fd = os.eventfd(0)
        self._queue: list[tuple[int, Sequence[BlockRead]]] = []
        self._failed: list[ReadResult] = []
        self._error = ""
        if not epoch_fits:
            self.lose("another epoch")

    def fileno(self) -> int:
        return self._fd

    @property
    def closed(self) -> bool:
        return self._arena is None

    @property
    def busy(self) -> bool:
        return bool(self._failed or (self._queue and not self._faults.stall))

    def start_read(self, read_id: int, blocks: Sequence[BlockRead]) -> None:
        if self._arena is None:
            self._failed.append(ReadResult(read_id, None, self._error))
        else:
            self._queue.append((read_id, blocks))

    def poll(self) -> list[ReadResult]:
        results, self._failed = self._failed, []
        if self._arena is None or self._faults.stall or not self._queue:
            return results
        read_id, blocks = self._queue.pop(0)
        if any(not 0 <= block.location < self._arena.num_blocks for block in blocks):
            return [*results, ReadResult(read_id, None, "a location outside the arena")]
        for block in blocks:
            block.destination[:] = self._arena.slab(block.location)
            if self._faults.corrupt:
                block.destination[0] ^= 0xFF
        return [*results, ReadResult(read_id, tuple(checksum_of(block.destination) for block in blocks))]

    def abort(self, read_id: int) -> bool:
        self._queue = [read for read in self._queue if read[0] != read_id]
        self._failed = [result for result in self._failed if result.read_id != read_id]
        return not self._faults.noisy_abort

    def lose(self, error: str) -> None:
        """The peer is gone."""
        if self._arena is None:
            return
        self._arena = None
        self._error = error
        self._failed += [ReadResult(read_id, None, error) for read_id, _ in self._queue]
        self._queue.clear()
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        self.lose("closed by us")


@dataclass
class FaultyTransport:
    """Reaches the arenas in `served`, by process name and epoch."""

    served: dict[str, tuple[bytes, Arena]]
    faults: Faults = field(default_factory=Faults)
    channels: list[FaultyChannel] = field(default_factory=list)
    name: str = "faulty"

    def reaches(self, source: Source) -> bool:
        return True

    def connect(self, source: Source) -> FaultyChannel:
        if self.faults.refuse or source.process not in self.served:
            raise TransportError(f"{source.process} is not there")
        epoch, arena = self.served[source.process]
        self.channels.append(FaultyChannel(arena, self.faults, epoch == source.epoch))
        return self.channels[-1]
