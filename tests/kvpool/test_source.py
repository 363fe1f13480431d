"""The source's core under a virtual clock: parking, promises, leases, bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.block_pool import BlockPool
from kvpool.source import MAX_BATCH_BLOCKS, MAX_KEEPERS, Answers, FetchServer
from protos.control import Cancel, Done, Fetch, Kept, Lost, Miss, Parked, Ready
from tests.kvpool.named_blocks import ROOT, SIZE, key_of

LEASE_S = 5.0
GRACE_S = 2.0
EPOCH = b"epoch-01"
SINK = b"sink@1"


def fetch_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def fetch(number: int, names: Sequence[object], *, wait: bool = False, deadline_s: float = 60.0) -> Fetch:
    return Fetch(fetch_id(number), "request", [key_of(name) for name in names], wait, deadline_s)


class World:
    def __init__(self, num_blocks: int = 64, **bounds: int) -> None:
        self.pool = BlockPool(num_blocks, SIZE, "DEVICE")
        self.server = FetchServer(self.pool, EPOCH, lease_s=LEASE_S, grace_s=GRACE_S, **bounds)

    def put(self, names: Sequence[object], *, tell_at_s: float | None = None) -> Answers:
        blocks = self.pool.allocate(len(names))
        assert blocks is not None
        for block_id, name in zip(blocks, names, strict=True):
            self.pool.publish(block_id, key_of(name), ROOT, SIZE, key_of(name)[8:])
        self.pool.release(blocks)
        return [] if tell_at_s is None else self.server.on_published(self.pool.take_published(), tell_at_s)


def ready_names(answers: Answers) -> list[str]:
    return [b.key.decode().strip() for _, m in answers if isinstance(m, Ready) for b in m.blocks]


def missed_names(answers: Answers) -> list[str]:
    return [key.decode().strip() for _, m in answers if isinstance(m, Miss) for key in m.keys]


def test_what_is_held_is_leased_and_told_with_what_the_sink_needs_to_verify() -> None:
    world = World()
    world.put("a")
    answers = world.server.on_message(SINK, fetch(1, "ab"), 100.0)
    (sink, ready), (_, miss) = answers
    assert sink == SINK
    assert isinstance(ready, Ready)
    assert (ready.fetch_id, ready.batch, ready.epoch, ready.lease_s) == (fetch_id(1), 0, EPOCH, LEASE_S)
    record = world.pool.lookup(key_of("a"))
    (block,) = ready.blocks
    assert record is not None
    assert (block.location, block.num_tokens, block.checksum, block.parent) == (
        record.block_id,
        SIZE,
        record.checksum,
        ROOT,
    )
    assert isinstance(miss, Miss)
    assert missed_names(answers) == ["b"]
    assert world.pool.next_expiry() == 100.0 + LEASE_S


def test_done_ends_one_batch_and_cancel_all() -> None:
    world = World(num_blocks=2 * MAX_BATCH_BLOCKS)
    names = range(MAX_BATCH_BLOCKS + 1)
    world.put(names)
    answers = world.server.on_message(SINK, fetch(1, names), 0.0)
    assert [len(m.blocks) for _, m in answers if isinstance(m, Ready)] == [MAX_BATCH_BLOCKS, 1]
    assert world.pool.stats().num_leases == 2
    world.server.on_message(SINK, Done(fetch_id(1), 0), 0.0)
    world.server.on_message(SINK, Done(fetch_id(1), 0), 0.0)
    world.server.on_message(b"another sink", Done(fetch_id(1), 1), 0.0)
    assert world.pool.stats().num_leases == 1
    world.server.on_message(SINK, Cancel(fetch_id(1)), 0.0)
    assert (world.pool.stats().num_leases, world.server.num_fetches) == (0, 0)


def test_a_lease_that_the_sink_never_ends_expires_and_the_fetch_with_it() -> None:
    world = World()
    world.put("a")
    world.server.on_message(SINK, fetch(1, "a"), 0.0)
    assert world.server.next_deadline() is not None
    world.server.tick(LEASE_S - 0.1)
    assert (world.pool.stats().num_leases, world.server.num_fetches) == (1, 1)
    world.server.tick(LEASE_S)
    assert (world.pool.stats().num_leases, world.server.num_fetches) == (0, 0)
    assert world.server.next_deadline() is None


def test_a_waiting_fetch_is_answered_block_by_block_and_holds_no_lease_meanwhile() -> None:
    world = World()
    assert world.server.on_message(SINK, fetch(1, "abc", wait=True), 0.0) == []
    assert world.pool.stats().num_leases == 0
    answers = world.put("b", tell_at_s=0.5)
    assert ready_names(answers) == ["b"]
    assert [m.waited_s for _, m in answers if isinstance(m, Ready)] == [0.5]
    answers = world.put("ac", tell_at_s=1.0)
    assert ready_names(answers) == ["a", "c"]
    assert [m.batch for _, m in answers if isinstance(m, Ready)] == [1]
    assert world.server.num_parked == 0


def test_two_sinks_that_wait_for_one_key_both_get_it() -> None:
    world = World()
    world.server.on_message(SINK, fetch(1, "a", wait=True), 0.0)
    world.server.on_message(b"other", fetch(1, "a", wait=True), 0.0)
    assert sorted(sink for sink, _ in world.put("a", tell_at_s=1.0)) == [b"other", SINK]
    assert world.pool.stats().num_leases == 2


def test_unknown_keys_are_missed_when_the_grace_time_is_over() -> None:
    world = World()
    world.server.on_message(SINK, fetch(1, "ab", wait=True), 10.0)
    assert world.server.next_deadline() == 10.0 + GRACE_S
    assert world.server.tick(10.0 + GRACE_S - 0.01) == []
    assert missed_names(world.server.tick(10.0 + GRACE_S)) == ["a", "b"]
    assert world.server.num_fetches == 0


@pytest.mark.parametrize("promised_first", [True, False])
def test_promised_keys_outlast_the_grace_time_until_the_fetch_or_the_promise_ends(promised_first: bool) -> None:
    world = World()
    if promised_first:
        world.server.promise("job", [key_of("a"), key_of("b")])
    world.server.on_message(SINK, fetch(1, "a", wait=True, deadline_s=20.0), 0.0)
    world.server.on_message(SINK, fetch(2, "b", wait=True, deadline_s=50.0), 0.0)
    if not promised_first:
        world.server.promise("job", [key_of("a"), key_of("b")])
    assert world.server.tick(GRACE_S) == []
    assert world.server.tick(19.9) == []
    assert missed_names(world.server.tick(20.0)) == ["a"]
    assert world.server.tick(29.9) == []
    assert missed_names(world.server.withdraw("job", 30.0)) == ["b"]


def test_a_failed_prefill_answers_its_waiters_at_once() -> None:
    world = World()
    world.server.promise("job", [key_of("a")])
    world.server.on_message(SINK, fetch(1, "ab", wait=True), 0.0)
    assert missed_names(world.server.withdraw("job", 0.1)) == ["a"]
    assert world.server.num_parked == 1
    world.server.on_message(SINK, fetch(2, "a", wait=True), 0.1)
    assert missed_names(world.server.tick(0.1 + GRACE_S)) == ["b", "a"], "the promise is over too"


def test_what_another_still_promises_is_waited_for() -> None:
    world = World()
    world.server.promise("one", [key_of("a"), key_of("b")])
    world.server.promise("other", [key_of("a")])
    world.server.on_message(SINK, fetch(1, "ab", wait=True, deadline_s=50.0), 0.0)
    assert missed_names(world.server.withdraw("one", 0.1)) == ["b"]
    assert world.server.tick(GRACE_S + 1.0) == []
    assert missed_names(world.server.withdraw("other", 9.0)) == ["a"]
    assert not world.server._promised


def test_a_block_that_was_published_and_evicted_before_we_looked_is_a_miss() -> None:
    world = World(num_blocks=1)
    world.server.on_message(SINK, fetch(1, "a", wait=True), 0.0)
    world.put("a")
    world.put("b")
    assert missed_names(world.server.on_published(world.pool.take_published(), 0.1)) == ["a"]


def test_a_block_published_before_the_fetch_came_is_ready_at_once() -> None:
    world = World()
    world.put("a")
    assert ready_names(world.server.on_message(SINK, fetch(1, "a", wait=True), 0.0)) == ["a"]
    assert world.server.on_published(world.pool.take_published(), 0.1) == []


def test_a_repeated_fetch_changes_nothing_and_is_told_that_it_is_known() -> None:
    world = World()
    world.put("a")
    world.server.on_message(SINK, fetch(1, "ab", wait=True), 0.0)
    assert world.server.on_message(SINK, fetch(1, "ab", wait=True), 0.1) == [(SINK, Parked(fetch_id(1)))]
    assert world.pool.stats().num_leases == 1
    world.server.on_message(SINK, Cancel(fetch_id(99)), 0.2)
    assert world.server.num_fetches == 1


def test_what_is_past_a_sinks_bounds_is_a_miss_and_harms_nobody_else() -> None:
    world = World(max_fetches_per_sink=2, max_parked_per_sink=3)
    assert world.server.on_message(SINK, fetch(1, "ab", wait=True), 0.0) == []
    assert missed_names(world.server.on_message(SINK, fetch(2, "cde", wait=True), 0.0)) == ["d", "e"]
    assert missed_names(world.server.on_message(SINK, fetch(3, "f", wait=True), 0.0)) == ["f"]
    assert world.server.on_message(b"other", fetch(1, "abc", wait=True), 0.0) == []
    world.server.on_message(SINK, Cancel(fetch_id(1)), 0.0)
    assert world.server.on_message(SINK, fetch(4, "xy", wait=True), 0.0) == []


def test_a_fetch_that_comes_again_is_answered_again_when_the_leases_of_the_lost_answer_are_over() -> None:
    world = World()
    first = fetch(1, "abc", wait=True, deadline_s=100.0)
    world.server.promise("job", [key_of(name) for name in "abc"])
    world.server.on_message(SINK, first, 0.0)
    world.put("ab", tell_at_s=1.0)  # this answer is lost
    assert world.server.on_message(SINK, first, 2.0) == [(SINK, Parked(fetch_id(1)))], "it may be on its way"
    ((_, again),) = world.server.on_message(SINK, first, 50.0)
    assert isinstance(again, Ready)
    assert [block.key for block in again.blocks] == [key_of("a"), key_of("b")]
    assert again.batch != 0
    assert again.waited_s == 50.0
    assert world.server.num_parked == 1
    ((_, last),) = world.put("c", tell_at_s=51.0)
    assert isinstance(last, Ready)
    ((_, whole),) = world.server.on_message(SINK, first, 99.0)
    assert isinstance(whole, Ready)
    assert len(whole.blocks) == 3, "nothing waits any more"


def test_a_sink_that_is_said_to_be_gone_waits_for_nothing_and_may_read_until_its_leases_end() -> None:
    world = World()
    world.put("a")
    world.server.on_message(SINK, fetch(1, "ab", wait=True), 0.0)
    world.server.on_message(b"other", fetch(1, "ab", wait=True), 0.0)
    world.server.forget_sink(SINK)
    assert (world.server.num_parked, world.pool.stats().num_leases) == (1, 2)
    assert [sink for sink, _ in world.put("b", tell_at_s=0.1)] == [b"other"]
    world.server.tick(1000.0)
    assert (world.server.num_fetches, world.pool.stats().num_leases) == (0, 0)


@pytest.mark.parametrize("deadline_s", [math.nan, -1.0, -math.inf, 0.0])
def test_a_deadline_that_makes_no_sense_waits_for_nothing(deadline_s: float) -> None:
    world = World()
    answers = world.server.on_message(SINK, fetch(1, "a", wait=True, deadline_s=deadline_s), 5.0)
    answers += world.server.tick(5.0)
    assert missed_names(answers) == ["a"]


def test_another_group_or_shard_is_not_here() -> None:
    world = World()
    world.put("a")
    other = Fetch(fetch_id(1), "r", [key_of("a")], False, 1.0, group=1)
    assert missed_names(world.server.on_message(SINK, other, 0.0)) == ["a"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_key_of_every_fetch_is_answered_once_by_its_deadline_and_no_lease_stays(data: st.DataObject) -> None:
    world = World(num_blocks=6)
    names = "abcdefgh"
    now = 0.0
    asked: dict[tuple[bytes, bytes], list[bytes]] = {}
    answered: dict[tuple[bytes, bytes], list[bytes]] = {}
    cancelled: set[tuple[bytes, bytes]] = set()

    def note(answers: Answers) -> None:
        for sink, message in answers:
            keys = [b.key for b in message.blocks] if isinstance(message, Ready) else message.keys
            answered.setdefault((sink, message.fetch_id), []).extend(keys)
            assert (sink, message.fetch_id) not in cancelled

    for number in range(data.draw(st.integers(1, 25))):
        now += data.draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]))
        sink = data.draw(st.sampled_from([b"s1", b"s2"]))
        some = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
        match data.draw(st.sampled_from(["fetch", "fetch", "put", "promise", "withdraw", "done", "cancel", "tick"])):
            case "fetch":
                asked[sink, fetch_id(number)] = [key_of(n) for n in some]
                wait, deadline_s = data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 10.0]))
                note(world.server.on_message(sink, fetch(number, some, wait=wait, deadline_s=deadline_s), now))
            case "put":
                blocks = world.pool.allocate(len(some))
                if blocks is not None:
                    for block_id, name in zip(blocks, some, strict=True):
                        world.pool.publish(block_id, key_of(name), ROOT, SIZE, bytes(8))
                    world.pool.release(blocks)
                    note(world.server.on_published(world.pool.take_published(), now))
            case "promise":
                world.server.promise(number, [key_of(n) for n in some])
            case "withdraw":
                note(world.server.withdraw(data.draw(st.integers(0, number)), now))
            case "done":
                old = fetch_id(data.draw(st.integers(0, number)))
                note(world.server.on_message(sink, Done(old, data.draw(st.integers(0, 2))), now))
            case "cancel":
                old = fetch_id(data.draw(st.integers(0, number)))
                note(world.server.on_message(sink, Cancel(old), now))
                if (sink, old) in asked:
                    cancelled.add((sink, old))
            case "tick":
                note(world.server.tick(now))
        world.pool.check()
    while (deadline := world.server.next_deadline()) is not None:
        assert deadline <= now + 20.0
        note(world.server.tick(deadline))
    for name, keys in asked.items():
        if name not in cancelled:
            assert sorted(answered.get(name, [])) == sorted(keys)
    assert (world.server.num_fetches, world.server.num_parked, world.pool.stats().num_leases) == (0, 0, 0)
    assert not world.server._waiters
    for owner in range(25):
        world.server.withdraw(owner, now)
    assert not world.server._promised
    assert not world.server._promises
    world.pool.check()


# --- tiers below ---------------------------------------------------------------------------------------------------------


class FakeBelow:
    """A tier that holds names and brings them up when the test says so; `room` is how many it takes at once."""

    def __init__(self, names: Sequence[object], room: int = 100) -> None:
        self.held = {key_of(name) for name in names}
        self.room = room
        self.coming: list[bytes] = []
        self.uses: list[bytes] = []

    def bring_up(self, keys: Sequence[bytes]) -> set[bytes]:
        coming = [key for key in keys if key in self.held][: self.room]
        self.coming += coming
        return set(coming)

    def used(self, keys: Iterable[bytes]) -> None:
        self.uses += keys


class TieredWorld(World):
    def __init__(self, names: Sequence[object], room: int = 100, num_blocks: int = 64, **bounds: int) -> None:
        super().__init__(num_blocks)
        self.below = FakeBelow(names, room)
        self.server = FetchServer(self.pool, EPOCH, lease_s=LEASE_S, grace_s=GRACE_S, below=self.below, **bounds)


def test_what_a_tier_below_holds_is_ready_when_it_is_up_though_the_fetch_does_not_wait() -> None:
    world = TieredWorld("bc")
    world.put("a", tell_at_s=0.0)
    answers = world.server.on_message(SINK, fetch(1, "abcd"), 0.0)
    assert (ready_names(answers), missed_names(answers)) == (["a"], ["d"])
    assert world.below.coming == [key_of("b"), key_of("c")]
    assert ready_names(world.put("bc", tell_at_s=0.5)) == ["b", "c"]
    assert world.below.uses == [key_of(name) for name in "abc"], "what is given is used"


def test_what_does_not_come_up_is_missed_at_once() -> None:
    world = TieredWorld("ab")
    world.server.on_message(SINK, fetch(1, "ab"), 0.0)
    world.server.on_message(b"other@2", fetch(2, "b", wait=True), 0.0)
    answers = world.server.on_absent([key_of("b"), key_of("unasked")], 0.5)
    assert sorted(sink for sink, _ in answers) == [b"other@2", SINK]
    assert missed_names(answers) == ["b", "b"]
    assert ready_names(world.put("a", tell_at_s=0.6)) == ["a"]
    assert world.server.num_parked == 0


def test_what_does_not_come_up_but_is_promised_is_still_waited_for() -> None:
    world = TieredWorld("a")
    world.server.promise("prefill", [key_of("a")])
    world.server.on_message(SINK, fetch(1, "a", wait=True), 0.0)
    assert world.server.on_absent([key_of("a")], 0.5) == []
    assert ready_names(world.put("a", tell_at_s=1.0)) == ["a"]


def test_what_came_up_by_another_way_is_no_miss() -> None:
    world = TieredWorld("a")
    world.server.on_message(SINK, fetch(1, "a"), 0.0)
    world.put("a")
    assert world.server.on_absent([key_of("a")], 0.5) == []
    assert ready_names(world.server.on_published(world.pool.take_published(), 0.5)) == ["a"]


def test_what_there_is_no_room_for_above_is_missed_at_once() -> None:
    world = TieredWorld("abc", room=1)
    assert missed_names(world.server.on_message(SINK, fetch(1, "abc"), 0.0)) == ["b", "c"]


def test_a_sink_with_too_much_parked_gets_a_miss_for_what_would_come_up() -> None:
    world = TieredWorld("abc", max_parked_per_sink=2)
    assert missed_names(world.server.on_message(SINK, fetch(1, "abc"), 0.0)) == ["c"]
    assert ready_names(world.put("abc", tell_at_s=0.1)) == ["a", "b"]


def test_what_was_evicted_before_we_looked_comes_up_again() -> None:
    world = TieredWorld("a", num_blocks=1)
    world.server.on_message(SINK, fetch(1, "a"), 0.0)
    world.put("a")
    world.pool.clear_cached()
    assert world.server.on_published(world.pool.take_published(), 0.5) == []
    assert world.below.coming == [key_of("a")] * 2
    assert ready_names(world.put("a", tell_at_s=1.0)) == ["a"]


def test_nothing_waits_for_a_slow_tier_longer_than_the_grace_time() -> None:
    world = TieredWorld("a")
    world.server.on_message(SINK, fetch(1, "a"), 0.0)
    assert missed_names(world.server.tick(GRACE_S)) == ["a"]
    assert world.put("a", tell_at_s=GRACE_S + 1) == []
    assert world.server.num_fetches == 0


# --- copies elsewhere ----------------------------------------------------------------------------------------------------


def kept_names(world: World, names: Sequence[object]) -> str:
    kept = ""
    for name in names:
        [block_id] = world.pool.match([key_of(name)])
        kept += str(name) if world.pool.num_kept([block_id]) else ""
        world.pool.release([block_id])
    return kept


def test_what_pool_nodes_keep_and_lose_is_noted_node_by_node() -> None:
    told: list[int] = []
    world = World()
    world.server = FetchServer(world.pool, EPOCH, lease_s=LEASE_S, grace_s=GRACE_S, on_kept=lambda: told.append(1))
    world.put("abc")
    assert world.server.on_message(b"pool-0@1", Kept([key_of("a"), key_of("b"), key_of("unknown")]), 0.0) == []
    world.server.on_message(b"pool-1@1", Kept([key_of("b")]), 0.0)
    assert len(told) == 2
    assert kept_names(world, "abc") == "ab"
    world.server.on_message(b"pool-0@1", Lost([key_of("a"), key_of("b")]), 1.0)
    assert kept_names(world, "abc") == "b"
    world.server.on_message(b"pool-2@1", Lost([key_of("b")]), 1.0)
    assert kept_names(world, "abc") == "b", "a node that kept nothing loses nothing"
    assert len(told) == 2


def test_a_pool_node_that_is_gone_keeps_nothing_and_its_place_is_free() -> None:
    world = World()
    world.put("a")
    for number in range(MAX_KEEPERS):
        world.server.on_message(b"pool-%d@1" % number, Kept([key_of("a")]), 0.0)
    for number in range(MAX_KEEPERS):
        assert kept_names(world, "a") == "a"
        world.server.forget_sink(b"pool-%d@1" % number)
    assert kept_names(world, "a") == ""
    assert not world.pool.has_keepers
    world.server.on_message(b"pool-new@1", Kept([key_of("a")]), 0.0)
    assert kept_names(world, "a") == "a"


def test_more_pool_nodes_than_can_be_told_apart_are_not_believed() -> None:
    world = World()
    world.put("ab")
    for number in range(MAX_KEEPERS + 1):
        world.server.on_message(b"pool-%d@1" % number, Kept([key_of("a" if number < MAX_KEEPERS else "b")]), 0.0)
    assert kept_names(world, "ab") == "a"


def test_a_source_that_is_closed_is_kept_for_by_nobody_and_its_leases_stand() -> None:
    world = World()
    world.put("a")
    world.server.on_message(SINK, fetch(1, "a", wait=False), 0.0)
    world.server.on_message(b"pool-0@1", Kept([key_of("a")]), 0.0)
    assert world.pool.has_keepers
    world.server.close()
    assert not world.pool.has_keepers
    assert world.pool.stats().num_leases == 1


def test_a_fetch_that_waits_for_everything_is_told_that_it_is_known_too() -> None:
    world = World()
    world.server.promise("job", [key_of("a")])
    world.server.on_message(SINK, fetch(1, "a", wait=True, deadline_s=100.0), 0.0)
    assert world.server.on_message(SINK, fetch(1, "a", wait=True, deadline_s=97.0), 3.0) == [
        (SINK, Parked(fetch_id(1)))
    ]
