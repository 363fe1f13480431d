"""One contract, all transports: what `kvpool/transport/base.py` promises, over each of them and over the faulty fake."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kernels.block_copy import checksum_blocks
from kvpool.transport.base import Channel, ReadResult
from tandem.errors import TransportError
from tests.kvpool.processes import wait_for
from tests.kvpool.transport_worlds import NUM_BLOCKS, OTHER_EPOCH, FaultyWorld, ShmWorld, TcpWorld, UcxWorld, World

WORLDS: dict[str, Callable[[], World]] = {
    "shm": ShmWorld,
    "ucx": UcxWorld,
    "tcp": TcpWorld,
    "faulty": FaultyWorld,
}


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = WORLDS[request.param]()
    yield world
    world.close()


@pytest.fixture
def channel(world: World) -> Iterator[Channel]:
    channel = world.transport.connect(world.source())
    yield channel
    channel.close()


def results_of(world: World, num: int) -> list[ReadResult]:
    results: list[ReadResult] = []

    def step() -> None:
        world.step()
        results.extend(world.transport.poll())

    wait_for(lambda: len(results) >= num, step=step)
    assert len(results) == num
    return results


def test_bytes_and_their_checksums_arrive_and_nothing_else_changes(world: World, channel: Channel) -> None:
    channel.start_read(7, [5, 0, 5], [2, 3, 4])
    (result,) = results_of(world, 1)
    assert (result.read_id, result.error) == (7, "")
    assert result.checksums is not None
    assert result.checksums.tolist() == checksum_blocks(None, world.theirs.array, [5, 0, 5]).tolist()
    for into, location in {2: 5, 3: 0, 4: 5}.items():
        assert np.array_equal(world.ours.array[into], world.theirs.array[location])
    assert not world.ours.array[[0, 1, *range(5, NUM_BLOCKS)]].any()


def test_several_reads_all_end_once(world: World, channel: Channel) -> None:
    for i in range(NUM_BLOCKS):
        channel.start_read(i, [i], [i])
    assert sorted(result.read_id for result in results_of(world, NUM_BLOCKS)) == list(range(NUM_BLOCKS))
    assert np.array_equal(world.ours.array, world.theirs.array)
    assert world.transport.poll() == []
    assert not world.transport.busy


def test_several_channels_share_a_transport(world: World, channel: Channel) -> None:
    other = world.transport.connect(world.source())
    for i in range(0, NUM_BLOCKS, 2):
        channel.start_read(i, [i], [i])
        other.start_read(i + 1, [i + 1], [i + 1])
    assert all(result.checksums is not None for result in results_of(world, NUM_BLOCKS))
    assert np.array_equal(world.ours.array, world.theirs.array)
    other.close()
    channel.start_read(99, [3], [4])
    (result,) = results_of(world, 1)
    assert (result.read_id, result.error) == (99, "")


def test_one_read_of_every_block(world: World, channel: Channel) -> None:
    channel.start_read(1, range(NUM_BLOCKS), range(NUM_BLOCKS)[::-1])
    (result,) = results_of(world, 1)
    assert result.checksums is not None
    assert np.array_equal(world.ours.array[::-1], world.theirs.array)


@pytest.mark.parametrize("location", [NUM_BLOCKS, 2**53 - 1, 2**53])
def test_a_location_outside_the_arena_fails_that_read_and_writes_nothing(
    world: World, channel: Channel, location: int
) -> None:
    channel.start_read(1, [0, location], [0, 1])
    channel.start_read(2, [3], [2])
    by_id = {result.read_id: result for result in results_of(world, 2)}
    assert by_id[1].checksums is None
    assert by_id[1].error
    assert by_id[2].checksums is not None
    assert not world.ours.array[:2].any()
    assert not channel.closed_because


def test_another_epoch_closes_the_channel_and_fails_its_reads(world: World) -> None:
    channel = world.transport.connect(world.source(epoch=OTHER_EPOCH))
    channel.start_read(1, [0], [0])
    (result,) = results_of(world, 1)
    assert result.checksums is None
    assert channel.closed_because
    assert not world.ours.array.any()


def test_the_end_of_the_peer_closes_the_channel_and_ends_every_read(world: World, channel: Channel) -> None:
    channel.start_read(1, [0], [0])
    results_of(world, 1)
    channel.start_read(2, [0], [1])
    channel.start_read(3, [0], [2])
    world.die()
    assert world.transport.busy or select.select([world.transport.fileno()], [], [], 5)[0], "it must wake a poller"
    results = results_of(world, 2)
    assert [(result.read_id, result.checksums) for result in results] == [(2, None), (3, None)]
    assert channel.closed_because
    channel.start_read(4, [0], [3])
    assert world.transport.busy, "its failure waits to be picked up"
    assert [(result.read_id, result.checksums) for result in world.transport.poll()] == [(4, None)]
    assert not world.ours.array[1:].any()


def test_an_aborted_read_ends_quietly_without_a_result(world: World, channel: Channel) -> None:
    channel.start_read(1, [0], [0])
    channel.start_read(2, [1], [1])
    assert channel.abort(1) is True
    assert channel.abort(99) is True
    assert [result.read_id for result in results_of(world, 1)] == [2]
    assert not world.ours.array[0].any()
    assert np.array_equal(world.ours.array[1], world.theirs.array[1])


def test_an_abort_in_the_middle_of_a_read_leaves_the_rest_of_its_memory_alone(world: World, channel: Channel) -> None:
    channel.start_read(1, range(NUM_BLOCKS), range(NUM_BLOCKS))
    for _ in range(3):
        world.step()
    if world.transport.poll():
        return  # so fast that there is no middle
    assert channel.abort(1) is True
    world.ours.array[:] = 0
    channel.start_read(2, [1], [1])
    assert [result.read_id for result in results_of(world, 1)] == [2]
    assert np.array_equal(world.ours.array[1], world.theirs.array[1])
    assert not world.ours.array[[0, *range(2, NUM_BLOCKS)]].any()


def test_close_is_final_and_repeatable(world: World, channel: Channel) -> None:
    channel.start_read(1, [0], [0])
    channel.close()
    channel.close()
    assert channel.closed_because
    assert [(result.read_id, result.checksums) for result in world.transport.poll()] == [(1, None)]


def test_a_source_that_is_not_there_is_an_error_at_once_or_a_closed_channel(world: World) -> None:
    try:
        channel = world.transport.connect(world.nobody())
    except TransportError:
        return
    channel.start_read(1, [0], [0])
    (result,) = results_of(world, 1)
    assert result.checksums is None
    assert channel.closed_because


def test_no_descriptor_and_no_mapping_stays_behind(world: World) -> None:
    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
        return len(list(Path("/proc/self/fd").iterdir())), sum("memfd:tandem" in line for line in maps)

    before = held()
    for _ in range(5):
        channel = world.transport.connect(world.source())
        channel.start_read(1, [0], [0])
        results_of(world, 1)
        channel.close()

        def step() -> None:
            world.step()
            world.transport.poll()

        wait_for(lambda: held() == before, step=step)


def test_closing_a_transport_ends_everything(world: World, channel: Channel) -> None:
    channel.start_read(1, [0], [0])
    world.transport.close()
    world.transport.close()
    assert channel.closed_because
