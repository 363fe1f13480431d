"""What only the ucx transport promises: admission, messages and gathering, the bounce region, peers that die or stop."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import select
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.block_copy import checksum_blocks
from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.transport import ucx_channel, ucx_library, ucx_source
from kvpool.transport import ucx_frames as frames
from kvpool.transport.base import ReadResult
from kvpool.transport.ucx import UcxTransport
from kvpool.transport.ucx_channel import UcxChannel
from protos.control import Endpoints, Source
from tandem.errors import TransportError
from tests.kvpool.processes import wait_for
from tests.kvpool.transport_process import TransportProcess
from tests.kvpool.transport_worlds import EPOCH, NUM_BLOCKS, SINK_EPOCH, UcxWorld, bytes_served

SLAB = 512 * 1024
SMALL = 5000


@pytest.fixture
def world() -> Iterator[UcxWorld]:
    world = UcxWorld()
    yield world
    world.close()


class Sink:
    """Our side alone, with `num_blocks` blocks of zeros."""

    def __init__(self, num_blocks: int, slab_bytes: int) -> None:
        self.arena = Arena(num_blocks, slab_bytes)
        self.transport = UcxTransport(self.arena, SINK_EPOCH, "127.0.0.1", native())
        self.results: list[ReadResult] = []

    def step(self) -> None:
        self.results += self.transport.poll()

    def wait(self, num: int) -> list[ReadResult]:
        wait_for(lambda: len(self.results) >= num, step=self.step)
        results, self.results = self.results, []
        return results

    def close(self) -> None:
        self.transport.close()
        self.arena.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink(NUM_BLOCKS, SLAB)
    yield sink
    sink.close()


def both(world: UcxWorld) -> list[ReadResult]:
    world.step()
    return world.transport.poll()


def results_of(world: UcxWorld, num: int) -> list[ReadResult]:
    results: list[ReadResult] = []
    wait_for(lambda: len(results) >= num, step=lambda: results.extend(both(world)))
    return results


def connect(world: UcxWorld) -> UcxChannel:
    """A channel that is open."""
    channel = world.transport.connect(world.source())
    assert isinstance(channel, UcxChannel)
    channel.start_read(10**6, [0], [0])
    (result,) = results_of(world, 1)
    assert not result.error
    world.ours.array[0] = 0
    return channel


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def all_free(transport: UcxTransport) -> bool:
    return transport.slots.num_free == transport.slots.num_slots


# --- the library -------------------------------------------------------------------------------------------------------


def test_loading_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_LOG_LEVEL", "error")
    before = dict(os.environ)
    ucx_library.load.__wrapped__()
    assert dict(os.environ) == before


def test_without_the_package_the_transport_is_off_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("kvpool.transport.ucx.load", ucx_library.load.__wrapped__)
    monkeypatch.setattr(importlib, "import_module", missing)
    arena = Arena(1, SMALL)
    with pytest.raises(TransportError, match="ucx is off.*ucxx"):
        UcxTransport(arena, EPOCH, "127.0.0.1", None)
    arena.close()


def test_the_machines_library_goes_first_only_with_rdma_and_if_it_is_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not ucx_library.prefers_system(tmp_path / "none")
    assert not ucx_library.prefers_system(tmp_path), "no device"
    (tmp_path / "mlx5_0").touch()
    # The wheel's own UCX, put where the loader looks for the machine's.
    libucx = importlib.util.find_spec("libucx")
    assert libucx is not None
    assert libucx.origin is not None
    monkeypatch.setenv("LD_LIBRARY_PATH", str(Path(libucx.origin).parent / "lib"))
    assert ucx_library.prefers_system(tmp_path)
    monkeypatch.setattr(ucx_library, "MIN_VERSION", (99, 0))
    assert not ucx_library.prefers_system(tmp_path), "too old for the binding"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert ucx_library.system_version() is None
    monkeypatch.setattr(ucx_library, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(ucx_library, "_PROBE_S", 0.05)
    assert ucx_library.system_version() is None, "one that hangs is none"
    monkeypatch.setattr(ucx_library, "_PROBE_S", 60.0)
    monkeypatch.setattr(ucx_library, "_PROBE", "print('UCX 1.21')")
    assert ucx_library.system_version() is None, "nor one that says something else"


def test_the_users_settings_go_before_ours_but_a_message_is_never_sent_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TCP_TX_SEG_SIZE", "64k")
    monkeypatch.setenv("UCX_RNDV_THRESH", "inf")
    configuration = ucx_library.configuration()
    assert configuration["TCP_RX_SEG_SIZE"] == "512k"
    assert "TCP_TX_SEG_SIZE" not in configuration
    assert ucx_library.load().context().config["RNDV_THRESH"].lower() == "intra:2k,inter:2k"


# --- frames ------------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, frames.REPLY_SEQ - 1),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=frames.MAX_ASKED),
    st.integers(0, 2**64 - 1),
    st.text(max_size=400),
)
@settings(max_examples=50)
def test_frames_come_back_as_they_went(seq: int, locations: list[int], number: int, why: str) -> None:
    ask = frames.unpack_frame(frames.pack_ask(seq, locations))
    assert isinstance(ask, frames.Ask)
    assert (ask.seq, ask.locations.tolist()) == (seq, locations)
    hello = frames.Hello(b"s" * 16, b"e" * 8, number, seq)
    assert frames.unpack_frame(frames.pack_hello(hello)) == hello
    assert frames.unpack_greeting(frames.pack_greeting(number)) == number
    reply = frames.unpack_reply(frames.pack_reply(frames.Reply(number, why)))
    assert reply.num_blocks == number
    assert why.startswith(reply.refused.rstrip("\ufffd"))


@given(st.binary(min_size=frames.FRAME_BYTES, max_size=frames.FRAME_BYTES))
@settings(max_examples=50)
def test_any_bytes_are_a_frame_or_an_error(data: bytes) -> None:
    frame = np.frombuffer(data, dtype=np.uint8)
    for unpack in (frames.unpack_frame, frames.unpack_greeting, frames.unpack_reply):
        try:
            unpack(frame)
        except TransportError:
            pass


# --- admission ---------------------------------------------------------------------------------------------------------


def test_the_endpoint_fits_its_field_and_others_are_refused_at_once(world: UcxWorld) -> None:
    assert len(world.far.endpoint) <= 512
    for endpoint in ("", "tcp://127.0.0.1:1/x", "ucx://127.0.0.1:99999/" + "0" * 32, world.far.endpoint[:-1]):
        source = Source("p", EPOCH, "DEVICE", Endpoints("", "", "", ucx=endpoint))
        with pytest.raises(TransportError):
            world.transport.connect(source)
    assert world.transport.reaches(world.source())
    assert not world.transport.reaches(Source("p", EPOCH, "DEVICE", Endpoints("", "", "")))


def test_a_wrong_secret_closes_the_channel_with_the_reason(world: UcxWorld) -> None:
    endpoint = world.far.endpoint[:-32] + "0" * 32
    channel = world.transport.connect(Source("p", EPOCH, "DEVICE", Endpoints("", "", "", ucx=endpoint)))
    channel.start_read(1, [0], [0])
    (result,) = results_of(world, 1)
    assert result.error == channel.closed_because == "refused: another secret"
    assert world.far.num_readers == 0


def test_slabs_of_another_size_close_the_channel_with_both_sizes(world: UcxWorld) -> None:
    sink = Sink(2, SMALL)
    channel = sink.transport.connect(world.source())
    channel.start_read(1, [0], [0])

    def step() -> None:
        world.step()
        sink.step()

    wait_for(lambda: channel.closed_because, step=step)
    assert str(SMALL) in channel.closed_because
    assert str(world.theirs.slab_bytes) in channel.closed_because
    sink.close()


def test_a_reader_that_asks_outside_the_arena_is_refused_and_no_other(world: UcxWorld) -> None:
    liar, honest = connect(world), connect(world)
    assert world.far.num_readers == 2
    liar._num_blocks = 2**60
    liar.start_read(1, [NUM_BLOCKS], [1])
    honest.start_read(2, [3], [2])
    by_id = {result.read_id: result for result in results_of(world, 2)}
    assert f"location {NUM_BLOCKS} is not in an arena of {NUM_BLOCKS} blocks" in by_id[1].error
    assert by_id[2].checksums is not None
    assert not world.ours.array[1].any()
    wait_for(lambda: world.far.num_readers == 1, step=lambda: both(world))


def test_an_ask_before_a_hello_is_refused(world: UcxWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "pack_hello", lambda _: frames.pack_ask(0, [0]))
    channel = world.transport.connect(world.source())
    channel.start_read(1, [0], [1])
    wait_for(lambda: world.far._source._readers, step=lambda: both(world))
    wait_for(lambda: any(r.refused for r in world.far._source._readers.values()), step=lambda: both(world))
    assert world.far.num_readers == 0
    channel.close()
    assert not world.ours.array.any()


def test_strangers_are_few(world: UcxWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_source, "MAX_STRANGERS", 2)
    good = connect(world)
    monkeypatch.setattr(frames, "pack_hello", lambda _: frames.pack_ask(0, [0]))
    bad = [world.transport.connect(world.source()) for _ in range(5)]
    wait_for(lambda: sum(bool(channel.closed_because) for channel in bad) >= 3, step=lambda: both(world))
    assert len(world.far._source._readers) <= 3
    good.start_read(1, [4], [4])
    assert not results_of(world, 1)[0].error


# --- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slab_bytes", [40, SMALL, 368_640, 3 * 1024 * 1024])
def test_blocks_of_every_size_arrive_scattered_and_in_runs(slab_bytes: int) -> None:
    num = min(700, 48 * 1024 * 1024 // slab_bytes)
    near, far = Sink(num, slab_bytes), Sink(num, slab_bytes)
    rng = np.random.default_rng(5)
    far.arena.array[:] = rng.integers(0, 256, far.arena.array.shape, dtype=np.uint8)
    channel = near.transport.connect(Source("p", SINK_EPOCH, "HOST", Endpoints("", "", "", ucx=far.transport.endpoint)))
    half = num // 2
    plans = [
        (rng.permutation(num)[:half], np.arange(half)),
        (np.arange(num - half), rng.permutation(num - half) + half),
    ]
    for i, (locations, blocks) in enumerate(plans):
        channel.start_read(i, locations.tolist(), blocks.tolist())

    def step() -> None:
        far.step()
        near.step()

    wait_for(lambda: len(near.results) == 2, step=step)
    for result in near.results:
        locations, blocks = plans[result.read_id]
        assert result.checksums is not None, result.error
        assert np.array_equal(near.arena.array[blocks], far.arena.array[locations])
        assert np.array_equal(result.checksums, checksum_blocks(None, far.arena.array, locations))
    assert all_free(near.transport)
    near.close()
    far.close()


def test_a_read_of_nothing_ends(world: UcxWorld) -> None:
    channel = world.transport.connect(world.source())
    channel.start_read(1, [], [])
    (result,) = results_of(world, 1)
    assert result.checksums is not None
    assert len(result.checksums) == 0


def test_a_short_read_of_one_channel_does_not_wait_for_a_long_one_of_another(world: UcxWorld) -> None:
    long, short = connect(world), connect(world)
    for i in range(8):
        long.start_read(i, range(NUM_BLOCKS), range(NUM_BLOCKS))
    short.start_read(99, [7], [7])
    order = [result.read_id for result in results_of(world, 9)]
    assert order.index(99) < 4


def test_no_channel_holds_more_than_its_share_of_the_bounce_region(world: UcxWorld) -> None:
    channels = [connect(world) for _ in range(6)]
    for i, channel in enumerate(channels):
        channel.start_read(i, range(NUM_BLOCKS), range(NUM_BLOCKS))
    slots = world.transport.slots
    results: list[ReadResult] = []
    held: list[int] = []
    while len(results) < len(channels):
        results += both(world)
        held.append(max(len(channel._messages) for channel in channels))
        assert sum(len(channel._messages) for channel in channels) == slots.num_slots - slots.num_free
    assert 1 < max(held) <= slots.num_slots // 4
    assert all_free(world.transport)


def test_more_channels_than_slots_all_get_their_turn(world: UcxWorld) -> None:
    channels = [connect(world) for _ in range(6)]
    held = [world.transport.slots.take() for _ in range(world.transport.slots.num_slots - 3)]
    for i, channel in enumerate(channels):
        for j in range(4):
            channel.start_read(10 * i + j, range(10), range(10))
    order = [result.read_id for result in results_of(world, 24)]
    assert {read_id // 10 for read_id in order[:12]} == set(range(6)), "none waits until another has got all"
    for slot in held:
        assert slot is not None
        world.transport.slots.give(slot)
    assert all_free(world.transport)


def test_asking_wakes_a_source_that_sleeps(world: UcxWorld) -> None:
    def asleep() -> bool:
        transports = (world.far, world.transport)
        return not any(t.busy or select.select([t.fileno()], [], [], 0)[0] for t in transports)

    wait_for(asleep, step=lambda: both(world))
    channel = world.transport.connect(world.source())
    wait_for(lambda: select.select([world.far.fileno()], [], [], 0)[0], step=world.transport.poll)
    channel.start_read(1, [0], [0])
    assert not results_of(world, 1)[0].error
    wait_for(asleep, step=lambda: both(world))
    channel.start_read(2, [1], [1])
    world.transport.poll()
    assert select.select([world.far.fileno()], [], [], 5)[0]
    assert not results_of(world, 1)[0].error


def test_two_processes_that_sleep_whenever_they_may_never_oversleep(sink: Sink) -> None:
    with TransportProcess("ucx", NUM_BLOCKS, SLAB) as far:
        channel = sink.transport.connect(far.source)
        for i in range(80):
            channel.start_read(i, range(NUM_BLOCKS), range(NUM_BLOCKS))
            while not sink.results:
                assert sink.transport.busy or select.select([sink.transport.fileno()], [], [], 5)[0]
                sink.step()
            assert not sink.wait(1)[0].error


def test_what_came_while_it_lingered_is_looked_at_before_it_sleeps(
    world: UcxWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = connect(world)
    wait_for(lambda: not world.transport.busy, step=lambda: both(world))
    monkeypatch.setattr(channel, "lingers", lambda: True)
    world.transport.wake(channel.fd)
    world.transport.poll()
    assert world.transport.busy
    monkeypatch.undo()
    wait_for(lambda: not world.transport.busy, step=lambda: both(world))


# --- ends --------------------------------------------------------------------------------------------------------------


def test_what_goes_wrong_inside_a_channel_closes_it_and_nothing_else(
    world: UcxWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = connect(world), connect(world)

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bad, "_land", fail)
    bad.start_read(1, [0], [1])
    good.start_read(2, [1], [2])
    by_id = {result.read_id: result.error for result in results_of(world, 2)}
    assert by_id == {1: "out of luck", 2: ""}
    assert all_free(world.transport)


@pytest.mark.parametrize("polls", range(6))
@pytest.mark.parametrize("order", ["channel", "sink", "source"])
def test_everything_can_be_closed_at_any_time_in_any_order(
    world: UcxWorld, order: str, polls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ucx_channel, "CONNECT_S", 0.3)
    channels = [world.transport.connect(world.source()) for _ in range(2)]
    for i, channel in enumerate(channels):
        channel.start_read(i, range(NUM_BLOCKS), range(NUM_BLOCKS))
    for _ in range(polls):
        both(world)
    if order == "channel":
        channels[0].close()
        both(world)
    elif order == "sink":
        world.transport.close()
        world.step()
    else:
        world.die()
        wait_for(lambda: all(channel.closed_because for channel in channels), step=world.transport.poll)
        assert all_free(world.transport)
    world.close()
    assert all(channel.closed_because for channel in channels)


def test_fifty_channels_one_after_the_other_leave_nothing_behind(world: UcxWorld) -> None:
    connect(world).close()
    wait_for(lambda: world.far.num_readers == 0, step=lambda: both(world))
    before = descriptors()
    for i in range(50):
        channel = connect(world)
        channel.start_read(i, range(NUM_BLOCKS), range(NUM_BLOCKS))
        for _ in range(i % 5):
            both(world)
        channel.close()
        world.transport.poll()
    assert all_free(world.transport)
    wait_for(lambda: descriptors() <= before, step=lambda: both(world))
    assert not world.far._source._readers


def test_a_killed_peer_ends_its_reads_in_the_middle(sink: Sink) -> None:
    with TransportProcess("ucx", NUM_BLOCKS, SLAB) as far:
        channel = sink.transport.connect(far.source)
        channel.start_read(0, range(NUM_BLOCKS), range(NUM_BLOCKS))
        assert not sink.wait(1)[0].error
        before = descriptors()
        for i in range(1, 9):
            channel.start_read(i, range(NUM_BLOCKS), range(NUM_BLOCKS))
        wait_for(lambda: sink.transport.slots.num_free < sink.transport.slots.num_slots, step=sink.step)
        far.kill()
        results = sink.wait(8)
    assert len(results) == 8
    assert results[-1].error == channel.closed_because != ""
    assert all_free(sink.transport), "the worker is gone, and with it whoever could write"
    assert descriptors() < before


def test_late_bytes_of_an_aborted_read_never_reach_the_arena(sink: Sink) -> None:
    with TransportProcess("ucx", NUM_BLOCKS, SLAB) as far:
        channel = sink.transport.connect(far.source)
        assert isinstance(channel, UcxChannel)
        channel.start_read(1, [0], [0])
        assert not sink.wait(1)[0].error
        far.stop()
        blocks = list(range(1, 7))
        channel.start_read(2, blocks, blocks)
        wait_for(lambda: channel._messages, step=sink.step)
        assert channel.abort(2) is True
        assert channel.num_quarantined > 0
        far.go_on()
        wait_for(lambda: channel.num_quarantined == 0, step=sink.step)
        assert not sink.arena.array[1:].any()
        assert all_free(sink.transport)
        channel.start_read(3, [9], [9])
        (result,) = sink.wait(1)
        assert (result.read_id, result.error) == (3, "")
        assert np.array_equal(sink.arena.array[9], bytes_served(NUM_BLOCKS, SLAB)[9])


def test_a_peer_that_lets_its_whole_share_be_quarantined_loses_its_channel_and_can_write_no_more(sink: Sink) -> None:
    with TransportProcess("ucx", NUM_BLOCKS, SLAB) as far:
        channel = sink.transport.connect(far.source)
        channel.start_read(1, [0], [0])
        assert not sink.wait(1)[0].error
        for i in range(2, 6):  # more than the sockets between take: it stops in the middle of a message
            channel.start_read(i, range(NUM_BLOCKS), range(NUM_BLOCKS))
        sink.step()
        far.stop()
        wait_for(lambda: sink.transport.slots.num_free <= sink.transport.slots.num_slots - sink.transport.share)
        for i in range(2, 6):
            assert channel.abort(i) is True
        assert "never came" in channel.closed_because
        assert all_free(sink.transport)
        sink.results.clear()
        sink.arena.array[:] = 0
        sink.transport.slots.blocks.fill(0)
        far.go_on()
        again = sink.transport.connect(far.source)
        again.start_read(9, [5], [5])
        (result,) = sink.wait(1)
        assert (result.read_id, result.error) == (9, "")
        sink.arena.array[5] = 0
        assert not sink.arena.array.any()
        assert np.count_nonzero(sink.transport.slots.blocks) == SLAB, "one block, and no late byte beside it"


def test_past_its_budget_of_memory_that_may_still_be_written_the_transport_switches_itself_off(
    sink: Sink, caplog: pytest.LogCaptureFixture
) -> None:
    held = []
    with TransportProcess("ucx", NUM_BLOCKS, SLAB) as far, caplog.at_level(logging.ERROR):
        bystander = sink.transport.connect(far.source)
        while not bystander.closed_because:
            assert sink.transport.slots.num_retired <= sink.transport.slots.num_slots // 2
            far.go_on()
            channel = sink.transport.connect(far.source)
            assert isinstance(channel, UcxChannel)
            channel.start_read(1, [0], [0])
            assert not sink.wait(1)[0].error
            far.stop()
            channel.start_read(2, range(NUM_BLOCKS), range(NUM_BLOCKS))
            wait_for(lambda: channel._messages, step=sink.step)  # noqa: B023
            held.append(channel._worker)  # as a request that UCX never gives back would
            channel.close()
            sink.wait(1)
        with pytest.raises(TransportError, match="ucx is off: late messages may still write into"):
            sink.transport.connect(far.source)
        assert not sink.transport.reaches(far.source)
        assert bystander.closed_because.startswith("ucx is off")
        assert sink.transport.poll() == []
        assert sum("ucx is off" in record.message for record in caplog.records) == 1
        assert sink.transport.num_readers == 0
