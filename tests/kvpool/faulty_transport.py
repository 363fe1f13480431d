"""A transport inside one process whose faults a test can choose; it keeps the contract like any other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from kernels.block_copy import checksum_blocks
from kvpool.arena import Arena
from kvpool.transport.base import ReadResult
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


@dataclass
class FaultyChannel:
    transport: FaultyTransport
    source: Source
    theirs: Arena
    closed_because: str = ""
    queue: list[tuple[int, Sequence[int], Sequence[int]]] = field(default_factory=list)

    def start_read(self, read_id: int, locations: Sequence[int], block_ids: Sequence[int]) -> None:
        if self.closed_because:
            self.transport.failed.append(ReadResult(read_id, None, self.closed_because))
        else:
            self.queue.append((read_id, locations, block_ids))

    def abort(self, read_id: int) -> bool:
        self.queue = [read for read in self.queue if read[0] != read_id]
        self.transport.failed = [result for result in self.transport.failed if result.read_id != read_id]
        return not self.transport.faults.noisy_abort

    def lose(self, error: str) -> None:
        """The peer is gone."""
        if self.closed_because:
            return
        self.closed_because = error
        self.transport.failed += [ReadResult(read[0], None, error) for read in self.queue]
        self.queue.clear()
        os.eventfd_write(self.transport.fd, 1)

    def close(self) -> None:
        self.lose("closed by us")


@dataclass
class FaultyTransport:
    """Reaches the arenas in `served`, by process name and epoch."""

    ours: Arena
    served: dict[str, tuple[bytes, Arena]]
    faults: Faults = field(default_factory=Faults)
    channels: list[FaultyChannel] = field(default_factory=list)
    failed: list[ReadResult] = field(default_factory=list)
    name: str = "faulty"
    endpoint: str = ""
    num_readers: int = 0
    fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))

    def fileno(self) -> int:
        return self.fd

    @property
    def busy(self) -> bool:
        return bool(self.failed or (not self.faults.stall and any(channel.queue for channel in self.channels)))

    def reaches(self, source: Source) -> bool:
        return True

    def connect(self, source: Source) -> FaultyChannel:
        if self.faults.refuse or source.process not in self.served:
            raise TransportError(f"{source.process} is not there")
        epoch, theirs = self.served[source.process]
        channel = FaultyChannel(self, source, theirs)
        self.channels.append(channel)
        if epoch != source.epoch:
            channel.lose("another epoch")
        return channel

    def poll(self) -> list[ReadResult]:
        results, self.failed = self.failed, []
        for channel in self.channels:
            if channel.queue and not self.faults.stall:
                results.append(self._copy(channel, *channel.queue.pop(0)))
        return results

    def lose_all(self, error: str) -> None:
        for channel in self.channels:
            channel.lose(error)

    def close(self) -> None:
        self.lose_all("closed by us")
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _copy(
        self, channel: FaultyChannel, read_id: int, locations: Sequence[int], block_ids: Sequence[int]
    ) -> ReadResult:
        if any(not 0 <= location < channel.theirs.num_blocks for location in locations):
            return ReadResult(read_id, None, "a location outside the arena")
        for location, block_id in zip(locations, block_ids, strict=True):
            self.ours.slab(block_id)[:] = channel.theirs.slab(location)
            if self.faults.corrupt:
                self.ours.slab(block_id)[0] ^= 0xFF
        return ReadResult(read_id, checksum_blocks(None, self.ours.array, block_ids))
