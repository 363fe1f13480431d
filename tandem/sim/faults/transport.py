"""A virtual transport: bytes from arena to arena in virtual time, with everything that may go wrong on the way.

Owns the reads that run, and the contract of `kvpool/transport/base.py`. `shm` reads the memory of a process of the same machine,
`tcp` and `ucx` that of any. A frozen or unreachable source sends nothing. `ucx` plays a transport that receives straight into the
arena (ours has a bounce region): an abort of a read whose source is stalled can't prove that nothing will be written any more,
and then something is written, later. Half of a read is copied when it begins and half when it
ends, so that memory that changes meanwhile gives bytes of neither.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import xxhash

from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.transport.base import ReadResult
from protos.control import Source
from tandem.errors import TransportError
from tandem.sim.faults.network import Network
from tandem.sim.faults.world import Process, World

BLOCK_S = 0.0005
"""Of one block, on a line that isn't slow."""
RUBBISH = 0xEE
RETRY_S = 0.05


@dataclass(eq=False, slots=True)
class Memory:
    """The arena of one incarnation of a process, as others reach it."""

    process: Process
    arena: Arena
    pool: BlockPool
    epoch: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.epoch = self.process.epoch

    @property
    def is_gone(self) -> bool:
        """Nobody serves it any more: the process has died, or is another incarnation by now."""
        return not self.process.alive or self.process.epoch != self.epoch


@dataclass(eq=False, slots=True)
class Read:
    """One read. `source` and `sink` are memories."""

    channel: VirtualChannel
    read_id: int
    locations: tuple[int, ...]
    block_ids: tuple[int, ...]


@dataclass(slots=True)
class Watch:
    """Who is told of reads, to judge them."""

    began: Callable[[Read], None] = lambda read: None
    ended: Callable[[Read], None] = lambda read: None
    given_up: Callable[[Read], None] = lambda read: None
    wrote_late: Callable[[Read], None] = lambda read: None


class Memories:
    """Every arena, by the endpoint that others reach it by; what happens to reads is drawn here."""

    def __init__(self, world: World, network: Network) -> None:
        self.world = world
        self.network = network
        self.rng: random.Random = world.generator("reads")
        self.by_endpoint: dict[str, Memory] = {}
        self.watch = Watch()
        self.corruption = 0.0
        """The chance of a block to come damaged."""
        self.interrupt: Callable[[Read], None] | None = None
        """Happens once, in the middle of the next read between machines."""
        self.filenos = count(-2, -1)
        self.num_corrupted = self.num_late_writes = 0


class VirtualTransport:
    """`kvpool.transport.base.Transport`."""

    num_readers = 0

    def __init__(self, name: str, memories: Memories, ours: Memory) -> None:
        self.name = name
        self.memories = memories
        self.ours = ours
        self.endpoint = f"{name}:{ours.process.name}:{ours.process.epoch.hex()}"
        self.results: list[ReadResult] = []
        self._fileno = next(memories.filenos)
        self._channels: list[VirtualChannel] = []
        memories.by_endpoint[self.endpoint] = ours

    @property
    def busy(self) -> bool:
        return bool(self.results)

    def fileno(self) -> int:
        return self._fileno

    def reaches(self, source: Source) -> bool:
        endpoint: str = getattr(source.endpoints, self.name)
        same_machine = source.endpoints.machine_id == self.ours.process.machine
        return bool(endpoint) and (self.name != "shm" or same_machine)

    def connect(self, source: Source) -> VirtualChannel:
        theirs = self.memories.by_endpoint[getattr(source.endpoints, self.name)]
        if theirs.is_gone and self.name == "shm":
            raise TransportError(f"{source.process} is gone")
        channel = VirtualChannel(self, theirs)
        self._channels.append(channel)
        return channel

    def poll(self) -> list[ReadResult]:
        for channel in self._channels:
            channel.look()
        results, self.results = self.results, []
        return results

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels.clear()


class VirtualChannel:
    """`kvpool.transport.base.Channel`."""

    def __init__(self, transport: VirtualTransport, theirs: Memory) -> None:
        self.transport = transport
        self.theirs = theirs
        self.closed_because = ""
        self._reads: dict[int, Read] = {}

    @property
    def _world(self) -> World:
        return self.transport.memories.world

    def start_read(self, read_id: int, locations: Sequence[int], block_ids: Sequence[int]) -> None:
        read = Read(self, read_id, tuple(locations), tuple(block_ids))
        self._reads[read_id] = read
        if self.closed_because:
            self._fail(read)
            return
        memories = self.transport.memories
        memories.watch.began(read)
        if memories.interrupt is not None and self.transport.name != "shm":
            interrupt, memories.interrupt = memories.interrupt, None
            self._world.after(BLOCK_S / 2, lambda: interrupt(read))
        half = len(read.locations) // 2
        self._copy(read, 0, half)
        ours, theirs = self.transport.ours.process.name, self.theirs.process.name
        slower_s = memories.network.delay_s(ours, theirs) if self.transport.name != "shm" else 0.0
        self._world.after(len(read.locations) * (BLOCK_S + slower_s), lambda: self._go_on(read))

    def abort(self, read_id: int) -> bool:
        read = self._reads.pop(read_id, None)
        if read is None:  # it is over, and nobody has heard of that yet
            self.transport.results = [result for result in self.transport.results if result.read_id != read_id]
            return True
        memories = self.transport.memories
        memories.watch.given_up(read)
        if self.transport.name != "ucx" or not self._is_stalled():
            return True
        self._world.after(memories.rng.uniform(0.01, 2.0), lambda: self._write_late(read))
        return False

    def close(self) -> None:
        self.lose("closed by us")

    def lose(self, reason: str) -> None:
        if not self.closed_because:
            self.closed_because = reason
            for read in list(self._reads.values()):
                if self.transport.name != "ucx" or not self._is_stalled():
                    self._fail(read)

    def look(self) -> None:
        """Notices that the other side is gone, where that can be noticed."""
        theirs = self.theirs.process
        if self.theirs.is_gone and (self.transport.name == "shm" or not theirs.unreachable):
            self.lose(f"{theirs.name} is gone")

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _is_stalled(self) -> bool:
        ours, theirs = self.transport.ours.process, self.theirs.process
        if self.transport.name == "shm":
            return False
        network = self.transport.memories.network
        return theirs.frozen or (not theirs.alive and theirs.unreachable) or network.are_parted(ours.name, theirs.name)

    def _go_on(self, read: Read) -> None:
        if self._reads.get(read.read_id) is not read or not self.transport.ours.process.alive:
            return
        if self._is_stalled():
            self._world.after(RETRY_S, lambda: self._go_on(read))
            return
        if self.theirs.is_gone:
            self.look()
            self.transport.ours.process.wake()
            return
        memories = self.transport.memories
        self._copy(read, len(read.locations) // 2, len(read.locations))
        memories.watch.ended(read)
        for block_id in read.block_ids:
            if memories.corruption and memories.rng.random() < memories.corruption:
                memories.num_corrupted += 1
                self._slab(block_id)[0] ^= 1
        del self._reads[read.read_id]
        sums = [xxhash.xxh3_64_intdigest(self._slab(block_id)) for block_id in read.block_ids]
        self.transport.results.append(ReadResult(read.read_id, np.array(sums, dtype=np.uint64)))
        self.transport.ours.process.wake()

    def _copy(self, read: Read, begin: int, end: int) -> None:
        source, target = self.theirs.arena.array, self.transport.ours.arena.array
        for location, block_id in zip(read.locations[begin:end], read.block_ids[begin:end], strict=True):
            target[block_id] = source[location]

    def _write_late(self, read: Read) -> None:
        if self.transport.ours.process.alive:
            memories = self.transport.memories
            memories.num_late_writes += 1
            memories.watch.wrote_late(read)
            for block_id in read.block_ids:
                self.transport.ours.arena.array[block_id] = RUBBISH

    def _fail(self, read: Read) -> None:
        del self._reads[read.read_id]
        self.transport.memories.watch.given_up(read)
        self.transport.results.append(ReadResult(read.read_id, None, self.closed_because))
        self.transport.ours.process.wake()

    def _slab(self, block_id: int) -> memoryview:
        return self.transport.ours.arena.slab(block_id)
