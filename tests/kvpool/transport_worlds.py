"""A source and a sink inside one process for each transport: what the contract test runs over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.transport.base import Transport
from kvpool.transport.shm import ShmTransport
from kvpool.transport.tcp import TcpTransport
from kvpool.transport.ucx import UcxTransport
from protos.control import Endpoints, Source
from tests.kvpool.faulty_transport import FaultyTransport

NUM_BLOCKS = 40
SLAB = 1024 * 1024
EPOCH = b"epoch-01"
OTHER_EPOCH = b"epoch-02"
SINK_EPOCH = b"epoch-99"


def bytes_served(num_blocks: int, slab_bytes: int) -> NDArray[np.uint8]:
    """What a source's arena holds: `[num_blocks, slab_bytes]`, none of them 0."""
    return np.random.default_rng(7).integers(1, 256, (num_blocks, slab_bytes), dtype=np.uint8)


class World(Protocol):
    """`transport` is the sink's; it writes into `ours`. `step` lets the source go on."""

    theirs: Arena
    ours: Arena
    transport: Transport

    def source(self, epoch: bytes = EPOCH) -> Source: ...
    def nobody(self) -> Source: ...
    def step(self) -> None: ...
    def die(self) -> None: ...
    def close(self) -> None: ...


class _Base:
    def __init__(self) -> None:
        self.theirs = Arena(NUM_BLOCKS, SLAB)
        self.ours = Arena(NUM_BLOCKS, SLAB)
        self.theirs.array[:] = bytes_served(NUM_BLOCKS, SLAB)


class RealWorld(_Base):
    """Two transports of one kind, made by `build(arena, epoch)`."""

    def __init__(self, build: Callable[[Arena, bytes], Transport], nowhere: str) -> None:
        super().__init__()
        self.far = build(self.theirs, EPOCH)
        self.transport = build(self.ours, SINK_EPOCH)
        self.nowhere = nowhere
        self.alive = True

    def _source(self, epoch: bytes, endpoint: str) -> Source:
        return Source("p", epoch, "DEVICE", Endpoints("", "", "", machine_id="here", **{self.far.name: endpoint}))

    def source(self, epoch: bytes = EPOCH) -> Source:
        return self._source(epoch, self.far.endpoint)

    def nobody(self) -> Source:
        return self._source(EPOCH, self.nowhere)

    def step(self) -> None:
        if self.alive:
            assert self.far.poll() == []

    def die(self) -> None:
        self.alive = False
        self.far.close()

    def close(self) -> None:
        self.transport.close()
        self.far.close()
        self.theirs.close()
        self.ours.close()


class ShmWorld(RealWorld):
    def __init__(self) -> None:
        super().__init__(lambda arena, epoch: ShmTransport(arena, epoch, "here", native()), "@tandem-" + "0" * 32)


class TcpWorld(RealWorld):
    def __init__(self) -> None:
        super().__init__(
            lambda arena, epoch: TcpTransport(arena, epoch, "127.0.0.1", native()), "tcp://127.0.0.1:9/" + "0" * 32
        )


class UcxWorld(RealWorld):
    far: UcxTransport
    transport: UcxTransport

    def __init__(self) -> None:
        super().__init__(
            lambda arena, epoch: UcxTransport(arena, epoch, "127.0.0.1", native()), "ucx://127.0.0.1:9/" + "0" * 32
        )


class FaultyWorld(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.transport: FaultyTransport = FaultyTransport(self.ours, {"p": (EPOCH, self.theirs)})

    def source(self, epoch: bytes = EPOCH) -> Source:
        return Source("p", epoch, "DEVICE", Endpoints("", "", ""))

    def nobody(self) -> Source:
        return Source("nobody", EPOCH, "DEVICE", Endpoints("", "", ""))

    def step(self) -> None:
        pass

    def die(self) -> None:
        self.transport.lose_all("the peer is gone")

    def close(self) -> None:
        self.transport.close()
        self.theirs.close()
        self.ours.close()
