"""One contract, all transports: what `kvpool/transport/base.py` promises, over shm and over the faulty fake."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from kvpool.arena import Arena, checksum_of
from kvpool.transport.base import BlockRead, Channel, ReadResult, Transport
from kvpool.transport.shm import ShmListener, ShmTransport
from protos.control import Endpoints, Source
from tandem.errors import TransportError
from tests.kvpool.faulty_transport import FaultyTransport
from tests.kvpool.processes import wait_for

SLAB = 1024 * 1024
NUM_BLOCKS = 40
EPOCH = b"epoch-01"


class World(Protocol):
    """A source that serves `arena`, and the transport to it."""

    arena: Arena
    transport: Transport

    def source(self, epoch: bytes = EPOCH) -> Source: ...
    def nobody(self) -> Source: ...
    def step(self) -> None: ...
    def die(self) -> None: ...
    def close(self) -> None: ...


class ShmWorld:
    def __init__(self) -> None:
        self.arena = Arena(NUM_BLOCKS, SLAB)
        self.listener = ShmListener(self.arena, EPOCH)
        self.transport = ShmTransport("here", SLAB)
        self.alive = True

    def source(self, epoch: bytes = EPOCH) -> Source:
        return Source("p", epoch, "DEVICE", Endpoints("", "", "", self.listener.endpoint, "here"))

    def nobody(self) -> Source:
        return Source("p", EPOCH, "DEVICE", Endpoints("", "", "", "@tandem-" + "0" * 32, "here"))

    def step(self) -> None:
        if self.alive:
            self.listener.handle()

    def die(self) -> None:
        self.alive = False
        self.listener.close()

    def close(self) -> None:
        self.listener.close()
        self.arena.close()


class FaultyWorld:
    def __init__(self) -> None:
        self.arena = Arena(NUM_BLOCKS, SLAB)
        self.transport = FaultyTransport({"p": (EPOCH, self.arena)})

    def source(self, epoch: bytes = EPOCH) -> Source:
        return Source("p", epoch, "DEVICE", Endpoints("", "", ""))

    def nobody(self) -> Source:
        return Source("nobody", EPOCH, "DEVICE", Endpoints("", "", ""))

    def step(self) -> None:
        pass

    def die(self) -> None:
        for channel in self.transport.channels:
            channel.lose("the peer is gone")

    def close(self) -> None:
        self.die()
        self.arena.close()


@pytest.fixture(params=[ShmWorld, FaultyWorld], ids=["shm", "faulty"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    build: Callable[[], World] = request.param
    world = build()
    rng = np.random.default_rng(7)
    world.arena.array[:] = rng.integers(0, 256, world.arena.array.shape, dtype=np.uint8)
    yield world
    world.close()


@pytest.fixture
def channel(world: World) -> Iterator[Channel]:
    channel = world.transport.connect(world.source())
    yield channel
    channel.close()


@pytest.fixture
def ours() -> Iterator[Arena]:
    arena = Arena(NUM_BLOCKS, SLAB)
    yield arena
    arena.close()


def results_of(world: World, channel: Channel, num: int) -> list[ReadResult]:
    results: list[ReadResult] = []

    def step() -> None:
        world.step()
        results.extend(channel.poll())

    wait_for(lambda: len(results) >= num, step=step)
    assert len(results) == num
    return results


def test_bytes_and_their_checksums_arrive_and_nothing_else_changes(world: World, channel: Channel, ours: Arena) -> None:
    channel.start_read(7, [BlockRead(5, ours.slab(2)), BlockRead(0, ours.slab(3)), BlockRead(5, ours.slab(4))])
    (result,) = results_of(world, channel, 1)
    assert (result.read_id, result.error) == (7, "")
    assert result.checksums == tuple(checksum_of(world.arena.slab(i)) for i in (5, 0, 5))
    for into, location in {2: 5, 3: 0, 4: 5}.items():
        assert np.array_equal(ours.array[into], world.arena.array[location])
    assert not ours.array[[0, 1, *range(5, NUM_BLOCKS)]].any()


def test_several_reads_all_end_once(world: World, channel: Channel, ours: Arena) -> None:
    for i in range(NUM_BLOCKS):
        channel.start_read(i, [BlockRead(i, ours.slab(i))])
    assert sorted(result.read_id for result in results_of(world, channel, NUM_BLOCKS)) == list(range(NUM_BLOCKS))
    assert np.array_equal(ours.array, world.arena.array)
    assert not channel.busy
    assert channel.poll() == []


@pytest.mark.parametrize("location", [NUM_BLOCKS, 2**63, 2**64 - 1])
def test_a_location_outside_the_arena_fails_that_read_and_writes_nothing(
    world: World, channel: Channel, ours: Arena, location: int
) -> None:
    channel.start_read(1, [BlockRead(0, ours.slab(0)), BlockRead(location, ours.slab(1))])
    channel.start_read(2, [BlockRead(3, ours.slab(2))])
    failed, good = results_of(world, channel, 2)
    assert failed.checksums is None
    assert failed.error
    assert good.checksums is not None
    assert not ours.array[:2].any()
    assert not channel.closed


def test_another_epoch_closes_the_channel_and_fails_its_reads(world: World, ours: Arena) -> None:
    channel = world.transport.connect(world.source(epoch=b"epoch-02"))
    channel.start_read(1, [BlockRead(0, ours.slab(0))])
    (result,) = results_of(world, channel, 1)
    assert result.checksums is None
    assert channel.closed
    assert channel.fileno() == -1
    assert not ours.array.any()


def test_the_end_of_the_peer_closes_the_channel_and_ends_every_read(
    world: World, channel: Channel, ours: Arena
) -> None:
    channel.start_read(1, [BlockRead(0, ours.slab(0))])
    results_of(world, channel, 1)
    fd = channel.fileno()
    channel.start_read(2, [BlockRead(0, ours.slab(1))])
    channel.start_read(3, [BlockRead(0, ours.slab(2))])
    world.die()
    assert channel.closed or select.select([fd], [], [], 5)[0], "the end must wake a poller"
    assert [(r.read_id, r.checksums) for r in results_of(world, channel, 2)] == [(2, None), (3, None)]
    assert channel.closed
    assert channel.fileno() == -1
    channel.start_read(4, [BlockRead(0, ours.slab(3))])
    assert channel.busy, "its failure waits to be picked up"
    assert [(r.read_id, r.checksums) for r in channel.poll()] == [(4, None)]
    assert not ours.array[1:].any()


def test_an_aborted_read_ends_quietly_without_a_result(world: World, channel: Channel, ours: Arena) -> None:
    channel.start_read(1, [BlockRead(0, ours.slab(0))])
    channel.start_read(2, [BlockRead(1, ours.slab(1))])
    assert channel.abort(1) is True
    assert channel.abort(99) is True
    assert [result.read_id for result in results_of(world, channel, 1)] == [2]
    assert not ours.array[0].any()


def test_close_is_final_and_repeatable(world: World, channel: Channel, ours: Arena) -> None:
    channel.start_read(1, [BlockRead(0, ours.slab(0))])
    channel.close()
    channel.close()
    assert channel.closed
    assert [(r.read_id, r.checksums) for r in channel.poll()] == [(1, None)]


def test_a_source_that_is_not_there_is_an_error_at_once(world: World) -> None:
    with pytest.raises(TransportError):
        world.transport.connect(world.nobody())


def test_no_descriptor_and_no_mapping_stays_behind(world: World, ours: Arena) -> None:
    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
        return len(list(Path("/proc/self/fd").iterdir())), sum("memfd:tandem" in line for line in maps)

    before = held()
    for _ in range(5):
        channel = world.transport.connect(world.source())
        channel.start_read(1, [BlockRead(0, ours.slab(0))])
        results_of(world, channel, 1)
        channel.close()
        wait_for(lambda: held() == before, step=world.step)
