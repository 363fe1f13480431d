"""Two services in one process: fetches, events, replay, and what is not believed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import pytest
import zmq

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.service import KVService
from kvpool.sink import FetchedBatch, FetchEnded, FetchPlan
from kvpool.transport.shm import ShmTransport
from protos import control, kv_events
from protos.control import Counters, Ready, ReadyBlock, Source
from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from tandem.clock import now_s
from tests.kvpool import named_blocks
from tests.kvpool.faulty_transport import FaultyTransport
from tests.kvpool.named_blocks import ROOT, SIZE, key_of
from tests.kvpool.processes import wait_for

SLAB = 8192
MACHINE = "machine-under-test"


@dataclass(frozen=True)
class Came:
    """A block that arrived."""

    key: bytes
    block_id: int
    process: str
    tier: str
    transport: str


class Node:
    """A pool, an arena and a service on one poller; `names` are published blocks whose bytes follow from the name."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], process: str, num_blocks: int = 64, **options: object
    ) -> None:
        self.process = process
        self.epoch = os.urandom(8)
        self.pool = BlockPool(num_blocks, SIZE, "DEVICE")
        self.arena = Arena(num_blocks, SLAB)
        self.blocks: dict[bytes, list[Came]] = {}
        self.ended: dict[bytes, FetchEnded] = {}
        settings: dict[str, object] = {
            "bind_host": "127.0.0.1",
            "machine_id": MACHINE,
            "lease_s": 5.0,
            "grace_s": 0.3,
            **options,
        }
        if "transports" not in settings:
            settings["transports"] = [ShmTransport(self.arena, self.epoch, MACHINE, native())]
        self.service = KVService(
            context=context, pool=self.pool, arena=self.arena, process=process, epoch=self.epoch,
            on_blocks=self._on_blocks, on_ended=self._on_ended, **settings,  # type: ignore[arg-type]
        )  # fmt: skip
        self.poller = zmq.Poller()
        self.service.register(self.poller)

    def _on_blocks(self, fetch_id: bytes, batch: FetchedBatch) -> None:
        source = batch.source
        self.blocks.setdefault(fetch_id, []).extend(
            Came(block.key, block_id, source.process, source.tier, batch.transport)
            for block, block_id in zip(batch.blocks, batch.block_ids, strict=True)
        )

    @property
    def counters(self) -> Counters:
        return self.service.add_counters(Counters())

    def _on_ended(self, ended: FetchEnded) -> None:
        assert ended.fetch_id not in self.ended, "a fetch ended twice"
        self.ended[ended.fetch_id] = ended

    @property
    def source(self) -> Source:
        return Source(self.process, self.epoch, "DEVICE", self.service.endpoints)

    def put(self, names: Sequence[str], parent: bytes = ROOT) -> list[int]:
        return named_blocks.put(self.pool, self.arena, names, parent)

    def fetch(self, names: Sequence[str], sources: Sequence[Source], **options: object) -> FetchPlan:
        plan = named_blocks.plan(self.pool, names, sources, **options)  # type: ignore[arg-type]
        self.service.start_fetch(plan, now_s())
        return plan

    def step(self) -> None:
        self.service.handle(dict(self.poller.poll(1)), now_s())
        self.service.publish_pool_events(now_s())
        self.service.tick(now_s())

    def close(self) -> None:
        self.service.close()
        self.arena.close()


def run_until(nodes: Sequence[Node], done: Callable[[], object], seconds: float = 10.0) -> None:
    wait_for(done, seconds, lambda: [node.step() for node in nodes])


def linger_free(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket that the `context` fixture closes."""
    socket = context.socket(kind)
    socket.linger = 0
    OPEN.append(socket)
    return socket


OPEN: list[zmq.Socket[bytes]] = []


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    while OPEN:
        OPEN.pop().close()
    context.destroy(linger=0)


@pytest.fixture
def make(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def build(process: str, **options: object) -> Node:
        nodes.append(Node(context, process, **options))  # type: ignore[arg-type]
        return nodes[-1]

    yield build
    for node in nodes:
        node.close()


Make = Callable[..., Node]


def test_held_blocks_arrive_with_their_bytes_and_leave_no_lease(make: Make) -> None:
    source, sink = make("source"), make("sink")
    source.pool.release(source.put("abc"))
    plan = sink.fetch("abc", [source.source])
    run_until([source, sink], lambda: plan.fetch_id in sink.ended)
    ended = sink.ended[plan.fetch_id]
    assert (ended.committed, ended.missing, ended.tainted) == (tuple(map(key_of, "abc")), (), ())
    for block, name in zip(sink.blocks[plan.fetch_id], "abc", strict=True):
        assert sink.arena.slab(block.block_id).tobytes() == name.encode() * SLAB
        assert (block.process, block.tier, block.transport) == ("source", "DEVICE", "shm")
    run_until([source, sink], lambda: source.pool.stats().num_leases == 0, seconds=2)
    assert source.counters.served_blocks == 3
    assert sink.counters.fetched_bytes == 3 * SLAB
    source.pool.check()


def test_a_wait_overlaps_the_computation(make: Make) -> None:
    source, sink = make("source"), make("sink")
    source.service.promise("job", [key_of(n) for n in "abc"])
    plan = sink.fetch("abc", [source.source], wait="source")
    for i, name in enumerate("abc"):
        source.put([name], key_of("abc"[i - 1]) if i else ROOT)
        run_until([source, sink], lambda n=i: len(sink.blocks.get(plan.fetch_id, [])) == n + 1)
    run_until([source, sink], lambda: plan.fetch_id in sink.ended)
    assert sink.ended[plan.fetch_id].missing == ()


def test_an_unknown_key_is_a_miss_after_the_grace_time_and_at_once_without_wait(make: Make) -> None:
    source, sink = make("source"), make("sink")
    source.put("a")
    begun = now_s()
    quick = sink.fetch("ab", [source.source])
    run_until([source, sink], lambda: quick.fetch_id in sink.ended)
    assert now_s() - begun < 0.3
    begun = now_s()
    waiting = sink.fetch("yz", [source.source], wait="source")
    run_until([source, sink], lambda: waiting.fetch_id in sink.ended)
    assert now_s() - begun >= 0.3
    assert sink.ended[quick.fetch_id].missing == (key_of("b"),)
    assert sink.ended[waiting.fetch_id].missing == tuple(map(key_of, "yz"))
    assert sink.counters.fetch_misses == 3


def test_a_failed_prefill_is_a_miss_at_once(make: Make) -> None:
    source, sink = make("source", grace_s=30.0), make("sink")
    source.service.promise("job", [key_of("a"), key_of("b")])
    plan = sink.fetch("ab", [source.source], wait="source", seconds=30.0)
    run_until([source, sink], lambda: source.service._server.num_parked == 2)
    source.service.withdraw("job", now_s())
    run_until([source, sink], lambda: plan.fetch_id in sink.ended, seconds=2)
    assert sink.ended[plan.fetch_id].missing == tuple(map(key_of, "ab"))


def test_what_one_source_lacks_or_garbles_comes_from_the_next(make: Make) -> None:
    first, second, sink = make("first"), make("second"), make("sink")
    blocks = first.put("ab")
    first.arena.slab(blocks[1])[7] ^= 1  # after its checksum was made
    second.put("abc")
    plan = sink.fetch("abc", [first.source, second.source])
    run_until([first, second, sink], lambda: plan.fetch_id in sink.ended)
    assert sink.ended[plan.fetch_id].missing == ()
    came = {block.key: block for block in sink.blocks[plan.fetch_id]}
    assert {name: came[key_of(name)].process for name in "abc"} == {"a": "first", "b": "second", "c": "second"}
    assert sink.arena.slab(came[key_of("b")].block_id).tobytes() == b"b" * SLAB
    assert sink.counters.fetch_corrupt == 1


def test_another_epoch_than_the_named_one_is_not_read(make: Make) -> None:
    source, sink = make("source"), make("sink")
    source.put("a")
    stale = msgspec.structs.replace(source.source, epoch=os.urandom(8))
    plan = sink.fetch("a", [stale])
    run_until([source, sink], lambda: plan.fetch_id in sink.ended)
    assert sink.ended[plan.fetch_id].missing == (key_of("a"),)
    assert plan.fetch_id not in sink.blocks


def test_a_block_with_another_parent_than_wanted_is_not_read(make: Make) -> None:
    source, sink = make("source"), make("sink")
    source.put("a", parent=b"x" * 16)
    plan = sink.fetch("a", [source.source])
    run_until([source, sink], lambda: plan.fetch_id in sink.ended)
    assert sink.ended[plan.fetch_id].missing == (key_of("a"),)


def test_without_transports_everything_is_missing_at_once(make: Make) -> None:
    source, sink = make("source"), make("sink", transports=[])
    source.put("a")
    plan = sink.fetch("a", [source.source])
    assert sink.ended[plan.fetch_id].missing == (key_of("a"),)
    assert sink.service.endpoints.shm == ""


def test_a_source_on_another_machine_is_out_of_reach_of_shm(make: Make) -> None:
    source, sink = make("source", machine_id="elsewhere"), make("sink")
    source.put("a")
    plan = sink.fetch("a", [source.source])
    assert sink.ended[plan.fetch_id].missing == (key_of("a"),)


def test_cancel_ends_the_fetch_and_what_the_source_parked(make: Make) -> None:
    source, sink = make("source", grace_s=30.0), make("sink")
    source.put("a")
    plan = sink.fetch("ab", [source.source], wait="source", seconds=30.0)
    run_until([source, sink], lambda: source.service._server.num_parked == 1)
    sink.service.cancel_fetch(plan.fetch_id, now_s())
    assert sink.ended[plan.fetch_id].missing[-1] == key_of("b")
    run_until([source, sink], lambda: source.service._server.num_fetches == 0, seconds=2)
    assert source.pool.stats().num_leases == 0


def test_a_dropped_peer_is_forgotten_on_both_sides(make: Make) -> None:
    source, sink = make("source", grace_s=30.0), make("sink")
    plan = sink.fetch("ab", [source.source], wait="source", seconds=30.0)
    run_until([source, sink], lambda: source.service._server.num_parked == 2)
    source.service.drop_peer("sink", sink.epoch, now_s())
    assert source.service._server.num_fetches == 0
    sink.service.drop_peer("source", source.epoch, now_s())
    assert sink.ended[plan.fetch_id].missing == tuple(map(key_of, "ab"))
    source.put("ab")
    late = sink.fetch("ab", [source.source], wait="source", seconds=30.0)
    assert sink.ended[late.fetch_id].missing == tuple(map(key_of, "ab")), "who left is not asked"
    run_until([source, sink], lambda: source.service.num_readers == 0, seconds=2)


def test_many_fetches_at_once_all_end_and_conserve_blocks(make: Make) -> None:
    source, sink = make("source", num_blocks=64), make("sink", num_blocks=256)
    names = [chr(65 + i) for i in range(26)]
    source.put(names)
    plans = [sink.fetch(names[:8], [source.source]) for _ in range(20)]
    run_until([source, sink], lambda: len(sink.ended) == 20)
    assert all(not ended.missing for ended in sink.ended.values())
    for plan in plans:
        sink.pool.release([wanted.block_id for wanted in plan.wanted])
    sink.pool.check()
    assert sink.pool.stats().free == 256


@pytest.mark.parametrize("payload", [b"", b"\xff" * 50, b"\x81\xa1t\xa5fetch", b"\xc1"])
def test_frames_that_are_no_messages_are_counted_and_dropped(
    make: Make, context: zmq.Context[zmq.Socket[bytes]], payload: bytes
) -> None:
    node = make("source")
    dealer = linger_free(context, zmq.DEALER)
    dealer.connect(node.service.endpoints.fetch)
    dealer.send(payload)
    dealer.send_multipart([b"two", b"frames"])
    run_until([node], lambda: node.service.num_undecodable == 2)
    replay = linger_free(context, zmq.DEALER)
    replay.connect(node.service.endpoints.replay)
    replay.send_multipart([b"", b"short"])
    run_until([node], lambda: node.service.num_undecodable == 3)


# --- events ------------------------------------------------------------------------------------------------------------


class Asker:
    """A follower that subscribes and asks for replays, and keeps what it was told."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], node: Node) -> None:
        self.node = node
        self.sub = linger_free(context, zmq.SUB)
        self.sub.subscribe(kv_events.TOPIC)
        self.sub.connect(node.service.endpoints.events)
        self.dealer = linger_free(context, zmq.DEALER)
        self.dealer.connect(node.service.endpoints.replay)

    def replay(self, start_seq: int) -> list[tuple[int, kv_events.EventBatch]]:
        self.dealer.send_multipart([b"", kv_events.encode_seq(start_seq)])
        batches: list[tuple[int, kv_events.EventBatch]] = []
        while True:
            run_until([self.node], lambda: self.dealer.poll(0))
            empty, seq, payload = self.dealer.recv_multipart()
            assert empty == b""
            if seq == kv_events.END_OF_REPLAY:
                assert payload == b""
                return batches
            batches.append((kv_events.decode_seq(seq), kv_events.decode_batch(payload)))

    def live(self) -> tuple[int, kv_events.EventBatch]:
        run_until([self.node], lambda: self.sub.poll(0))
        topic, seq, payload = self.sub.recv_multipart()
        assert topic == kv_events.TOPIC
        return kv_events.decode_seq(seq), kv_events.decode_batch(payload)


def held(batches: Sequence[tuple[int, kv_events.EventBatch]]) -> set[bytes]:
    keys: set[bytes] = set()
    for _, batch in batches:
        for event in batch.events:
            match event:
                case BlockStored():
                    keys |= set(event.block_hashes)  # type: ignore[arg-type]
                case BlockRemoved():
                    keys -= set(event.block_hashes)  # type: ignore[arg-type]
                case AllBlocksCleared():
                    keys.clear()
    return keys


def test_events_are_live_numbered_and_replayed(make: Make, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    node = make("worker")
    asker = Asker(context, node)
    assert asker.replay(0) == []
    node.put("ab")
    node.service.publish_pool_events(now_s())
    assert node.service.events_seq == 0
    assert asker.replay(0)[0][1].epoch == node.epoch
    run_until([node], lambda: asker.sub.poll(0) or not node.put([os.urandom(8).hex()]))  # until the subscription took
    seq, batch = asker.live()
    assert batch.epoch == node.epoch
    assert [s for s, _ in asker.replay(0)] == list(range(node.service.events_seq + 1))
    assert asker.replay(node.service.events_seq + 1) == []
    assert next(s for s, _ in asker.replay(seq)) == seq


def test_a_history_that_is_too_short_becomes_a_snapshot_that_carries_its_number(
    make: Make, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    node = make("worker", history_batches=2, num_blocks=4)
    asker = Asker(context, node)
    for name in "abcdef":  # four blocks: a and b are evicted again
        node.pool.release(node.put([name]))
        node.service.publish_pool_events(now_s())
    last = node.service.events_seq
    answer = asker.replay(0)
    assert isinstance(answer[0][1].events[0], AllBlocksCleared)
    assert {seq for seq, _ in answer} == {last}
    assert held(answer) == {key_of(n) for n in "cdef"}
    assert [seq for seq, _ in asker.replay(last - 1)] == [last - 1, last]
    assert held(asker.replay(last + 100)) == held(answer)


def test_a_snapshot_includes_what_was_not_published_yet(make: Make, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    node = make("worker", history_batches=1)
    asker = Asker(context, node)
    for name in "abc":
        node.put([name])
        node.service.publish_pool_events(now_s())
    node.put(["d"])
    answer = node.service._publisher._batches_from(0)
    assert {seq for seq, _ in answer} == {3}
    decoded = [(seq, kv_events.decode_batch(payload)) for seq, payload in answer]
    assert held(decoded) == {key_of(n) for n in "abcd"}
    assert held(asker.replay(3)) == {key_of("d")}


def test_blocks_that_were_there_before_are_the_first_event(context: zmq.Context[zmq.Socket[bytes]], make: Make) -> None:
    old = make("worker")
    old.pool.release(old.put("abc"))
    settings = {
        "bind_host": "127.0.0.1",
        "transports": [],
        "machine_id": "",
        "lease_s": 1,
        "grace_s": 1,
    }
    again = KVService(
        context=context, pool=old.pool, arena=old.arena, process="worker", epoch=b"8 bytes!",
        on_blocks=lambda *_: None, on_ended=lambda _: None, **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        assert again.events_seq == 0
        assert held([(0, kv_events.decode_batch(again._publisher._history[0][1]))]) == {key_of(n) for n in "abc"}
    finally:
        again.close()


def test_large_batches_are_cut(make: Make) -> None:
    node = make("worker")
    events = [BlockStored([key_of(i)] * 4096, ROOT, [], SIZE) for i in range(20)]
    payloads = node.service._publisher._payloads(events)
    assert len(payloads) == 3
    assert all(len(payload) < control.MAX_MESSAGE_BYTES // 8 for payload in payloads)
    assert [e for p in payloads for e in kv_events.decode_batch(p).events] == events


# --- a transport that fails ------------------------------------------------------------------------------------------


class FaultySink(Node):
    """A sink that reaches `sources` by the faulty transport alone."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], *sources: Node, num_blocks: int = 64) -> None:
        served = {node.process: (node.epoch, node.arena) for node in sources}
        self.transport = FaultyTransport(Arena(num_blocks, SLAB), served)
        super().__init__(context, "sink", num_blocks, transports=[self.transport])
        self.transport.ours = self.arena


@pytest.fixture
def faulty(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Callable[..., FaultySink]]:
    sinks: list[FaultySink] = []

    def build(*sources: Node, **options: int) -> FaultySink:
        sinks.append(FaultySink(context, *sources, **options))
        return sinks[-1]

    yield build
    for sink in sinks:
        sink.close()


Faulty = Callable[..., FaultySink]


def test_memory_under_an_abort_that_is_not_quiet_is_reported_as_tainted(make: Make, faulty: Faulty) -> None:
    source = make("source")
    sink = faulty(source)
    source.put("ab")
    transport = sink.transport
    transport.faults.stall = transport.faults.noisy_abort = True
    plan = sink.fetch("ab", [source.source], seconds=30.0)
    run_until([source, sink], lambda: transport.channels and transport.channels[0].queue)
    sink.service.cancel_fetch(plan.fetch_id, now_s())
    ended = sink.ended[plan.fetch_id]
    assert ended.tainted == tuple(sorted(w.block_id for w in plan.wanted))
    assert ended.missing == (key_of("a"), key_of("b"))
    assert not sink.service._fetcher._readings
    assert not sink.service._fetcher._reading_ids
    assert source.pool.stats().num_leases == 1, "a lease under a read that may still run ends by itself alone"


def test_a_transport_that_taints_too_much_is_switched_off_and_the_others_go_on(make: Make, faulty: Faulty) -> None:
    source = make("source")
    sink = faulty(source)
    source.put("abcdefgh")
    transport = sink.transport
    transport.faults.stall = transport.faults.noisy_abort = True
    for names, open_after in (("ab", True), ("cde", False)):
        plan = sink.fetch(names, [source.source], seconds=30.0, root=key_of("b") if names == "cde" else ROOT)
        run_until([source, sink], lambda: transport.channels and transport.channels[0].queue)
        sink.service.cancel_fetch(plan.fetch_id, now_s())
        assert (transport.fd >= 0) == open_after
    plan = sink.fetch("f", [source.source], root=key_of("e"))
    assert sink.ended[plan.fetch_id].missing == (key_of("f"),)
    run_until([source, sink], lambda: sink.service.tick(now_s()))


def test_a_transport_that_corrupts_everything_commits_nothing(make: Make, faulty: Faulty) -> None:
    source = make("source")
    sink = faulty(source)
    source.put("ab")
    sink.transport.faults.corrupt = True
    plan = sink.fetch("ab", [source.source])
    run_until([source, sink], lambda: plan.fetch_id in sink.ended)
    assert sink.ended[plan.fetch_id].missing == (key_of("a"), key_of("b"))
    assert plan.fetch_id not in sink.blocks
    assert sink.counters.fetch_corrupt == 2


def test_a_channel_that_dies_under_its_reads_moves_the_fetch_to_the_next_source(make: Make, faulty: Faulty) -> None:
    first, second = make("first"), make("second")
    sink = faulty(first, second)
    first.put("ab")
    second.put("ab")
    transport = sink.transport
    transport.faults.stall = True
    plan = sink.fetch("ab", [first.source, second.source])
    run_until([first, second, sink], lambda: transport.channels and transport.channels[0].queue)
    transport.faults.stall = False
    transport.channels[0].lose("cable pulled")
    run_until([first, second, sink], lambda: plan.fetch_id in sink.ended)
    assert {block.process for block in sink.blocks[plan.fetch_id]} == {"second"}
    assert sink.service.num_sources_lost == 1


def test_a_source_whose_bytes_do_not_come_is_given_up_and_left_alone_for_a_while(make: Make, faulty: Faulty) -> None:
    first, second = make("first"), make("second")
    sink = faulty(first, second)
    first.put("ab")
    second.put("ab")
    transport = sink.transport
    transport.faults.stall = True
    plan = sink.fetch("ab", [first.source, second.source], seconds=30.0)
    run_until([first, second, sink], lambda: transport.channels and transport.channels[0].queue)
    began = now_s()
    run_until([first, second, sink], lambda: len(transport.channels) == 2)
    assert now_s() - began > 2.5
    transport.faults.stall = False
    run_until([first, second, sink], lambda: plan.fetch_id in sink.ended)
    assert {block.process for block in sink.blocks[plan.fetch_id]} == {"second"}
    served = first.counters.served_blocks
    again = sink.fetch("ab", [first.source], root=ROOT)
    assert sink.ended[again.fetch_id].missing == (key_of("a"), key_of("b")), "it is in quarantine"
    assert first.counters.served_blocks == served


def test_reads_that_were_given_up_before_they_began_never_write(make: Make, faulty: Faulty) -> None:
    source = make("source")
    sink = faulty(source)
    blocks = source.put("ab")
    fetcher = sink.service._fetcher
    fetcher._max_read_blocks = 1
    plan = sink.fetch("ab", [source.source])
    machine = fetcher._machines[plan.fetch_id]
    (ask,) = machine._asks
    records = [source.pool.lookup(key_of(name)) for name in "ab"]
    ready = [ReadyBlock(r.key, r.block_id, SIZE, r.checksum, r.parent) for r in records if r is not None]
    actions = machine.on_message(Ready(ask, 0, source.epoch, 5.0, ready), now_s())
    fetcher._lose(fetcher._peers[source.process, source.epoch], "it left in between", now_s())
    fetcher._line(source.source)
    fetcher._do(machine, actions, now_s())
    assert sink.ended[plan.fetch_id].missing == (key_of("a"), key_of("b"))
    assert not fetcher._readings
    sink.step()
    assert not sink.transport.channels[0].queue
    source.pool.release(blocks)
