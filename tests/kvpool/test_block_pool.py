"""The block pool: conservation of blocks, leases, eviction order, events."""

from __future__ import annotations

import copy
import itertools
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool import eviction
from kvpool.block_pool import BlockPool, BlockRecord, Restored
from kvpool.eviction import LOOK_AHEAD, Policy
from kvpool.outbox import MAX_HASHES_PER_EVENT
from protos.kv_events import BlockRemoved, BlockStored, Event
from tests.kvpool.named_blocks import SIZE, key_of


def sum_of(name: object) -> bytes:
    return f"{name!s:>8}".encode()[-8:]


ROOT = key_of("root")


def put_chain(pool: BlockPool, names: str, parent: bytes = ROOT) -> list[int]:
    """Allocates and publishes one block per letter, each the child of the one before; they stay referenced."""
    blocks = pool.allocate(len(names))
    assert blocks is not None
    for block_id, name in zip(blocks, names, strict=True):
        assert pool.publish(block_id, key_of(name), parent, SIZE, sum_of(name))
        parent = key_of(name)
    return blocks


def apply(events: list[Event], held: set[bytes]) -> set[bytes]:
    for event in events:
        if isinstance(event, BlockStored):
            held |= set(event.block_hashes)  # type: ignore[arg-type]
        elif isinstance(event, BlockRemoved):
            held -= set(event.block_hashes)  # type: ignore[arg-type]
    return held


def names_held(pool: BlockPool, names: str) -> str:
    return "".join(name for name in names if pool.contains(key_of(name)))


def test_allocation_past_the_room_gives_none_and_evicts_nothing() -> None:
    pool = BlockPool(4, SIZE, "DEVICE")
    held = put_chain(pool, "ab")
    pool.release(put_chain(pool, "xy"))
    assert pool.allocate(3) is None
    assert names_held(pool, "abxy") == "abxy"
    taken = pool.allocate(2)
    assert taken is not None
    assert not set(taken) & set(held)
    assert names_held(pool, "abxy") == "ab"


def test_the_least_recently_used_chain_goes_first_from_its_tail() -> None:
    pool = BlockPool(6, SIZE, "DEVICE")
    pool.release(put_chain(pool, "abc"))
    pool.release(put_chain(pool, "xyz"))
    pool.release(pool.match([key_of("a")]))  # the head of the older chain is used again
    gone = []
    for _ in range(6):
        before = names_held(pool, "abcxyz")
        taken = pool.allocate(1)
        assert taken is not None
        gone.append(set(before) - set(names_held(pool, "abcxyz")))
    assert gone == [{"c"}, {"b"}, {"z"}, {"y"}, {"x"}, {"a"}]


def test_a_parent_stays_as_long_as_a_block_after_it_is_in_use() -> None:
    pool = BlockPool(4, SIZE, "DEVICE")
    blocks = put_chain(pool, "abc")
    pool.release(blocks[:2])
    assert pool.stats().allocatable == 1
    assert pool.allocate(2) is None, "c is referenced, so neither b nor a may go"
    assert pool.coldest(3) == []
    pool.release(blocks[2:])
    assert pool.stats().allocatable == 4
    assert pool.allocate(4) is not None
    assert names_held(pool, "abc") == ""
    pool.check()


def test_a_parent_that_arrives_after_its_children_stays_for_them() -> None:
    pool = BlockPool(4, SIZE, "HOST")
    child = put_chain(pool, "b", key_of("a"))
    pool.release(put_chain(pool, "c", key_of("a")))
    pool.release(put_chain(pool, "a"))
    pool.check()
    assert [record.key for record in pool.coldest(9)] == [key_of("c")]
    assert pool.allocate(3) is None
    assert pool.allocate(2) is not None
    assert names_held(pool, "abc") == "ab"
    pool.release(child)
    assert [record.key for record in pool.coldest(9)] == [key_of("b"), key_of("a")]
    pool.check()


def test_a_hand_over_block_holds_nothing_before_it() -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    pool.release(put_chain(pool, "a"))
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], key_of("p"), key_of("a"), 3, sum_of("p"), announce=False)
    assert pool.allocate(1) is not None
    assert names_held(pool, "ap") == "p"
    pool.check()


def test_match_takes_references_on_the_longest_leading_run() -> None:
    pool = BlockPool(4, SIZE, "DEVICE")
    blocks = put_chain(pool, "abc")
    pool.release(blocks)
    assert pool.match([key_of("b"), key_of("?"), key_of("c")]) == [blocks[1]]
    assert pool.match([key_of("?"), key_of("a")]) == []
    assert pool.stats().referenced == 1
    assert pool.allocate(4) is None
    pool.release([blocks[1]])
    assert pool.allocate(4) is not None


def test_a_second_block_with_the_same_key_stays_private_and_is_freed() -> None:
    pool = BlockPool(4, SIZE, "DEVICE")
    (first,) = put_chain(pool, "a")
    second = pool.allocate(1)
    assert second is not None
    pool.take_events(), pool.take_published()
    assert not pool.publish(second[0], key_of("a"), ROOT, SIZE, sum_of("other"))
    assert pool.take_events() == []
    assert pool.take_published() == []
    pool.release(second)
    assert pool.stats().free == 3
    record = pool.lookup(key_of("a"))
    assert record is not None
    assert (record.block_id, record.checksum) == (first, sum_of("a"))


def test_a_leased_block_is_neither_evicted_nor_reused_until_the_lease_is_over() -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    blocks = put_chain(pool, "ab")
    pool.release(blocks)
    lease = pool.grant([key_of("a"), key_of("b")], 5.0, now_s=100.0)
    other = pool.grant([key_of("b")], 9.0, now_s=100.0)
    assert lease is not None
    assert other is not None
    assert pool.allocate(1) is None
    assert pool.next_expiry() == 105.0
    assert pool.expire(104.9) == 0
    assert pool.expire(105.0) == 1
    assert pool.stats().leased == 1
    assert pool.allocate(1) is None, "b is still leased by the other reader, and a is before it"
    assert not pool.end_lease(lease.lease_id)
    assert pool.end_lease(other.lease_id)
    assert pool.allocate(2) == [blocks[0], blocks[1]]
    assert pool.next_expiry() is None
    assert (pool.stats().granted_leases_total, pool.stats().expired_leases_total) == (2, 1)


def test_a_lease_on_a_key_that_is_not_held_is_refused_whole() -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    pool.release(put_chain(pool, "a"))
    assert pool.grant([key_of("a"), key_of("?")], 1.0, 0.0) is None
    assert pool.stats().leased == 0


def test_an_unannounced_block_is_findable_but_leaves_no_trace() -> None:
    pool = BlockPool(3, SIZE, "DEVICE")
    blocks = pool.allocate(2)
    assert blocks is not None
    for block_id, name in zip(blocks, "pq", strict=True):
        assert pool.publish(block_id, key_of(name), ROOT, 3, sum_of(name), announce=False)
    assert pool.take_published() == [key_of("p"), key_of("q")]
    record = pool.lookup(key_of("p"))
    assert record is not None
    assert record.num_tokens == 3
    assert not record.announced
    lease = pool.grant([key_of("p")], 1.0, 0.0)
    assert lease is not None
    pool.release(blocks)
    assert names_held(pool, "pq") == "p"
    assert (pool.stats().lent, pool.stats().free) == (1, 2)
    pool.check()
    assert pool.allocate(3) is None
    pool.expire(1.0)
    assert names_held(pool, "pq") == ""
    assert pool.stats().free == 3
    assert pool.take_events() == []
    assert pool.snapshot() == []


def test_a_lent_block_that_is_found_again_is_referenced_and_then_lent_again() -> None:
    pool = BlockPool(1, SIZE, "DEVICE")
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], key_of("p"), ROOT, 3, sum_of("p"), announce=False)
    pool.grant([key_of("p")], 1.0, 0.0)
    pool.release(blocks)
    assert pool.match([key_of("p")]) == blocks
    pool.check()
    assert (pool.stats().lent, pool.stats().referenced) == (0, 1)
    pool.release(blocks)
    assert (pool.stats().lent, pool.stats().referenced) == (1, 0)
    pool.check()


def test_retired_blocks_are_out_of_reach_for_good() -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.retire(blocks[:1])
    pool.release(blocks[1:])
    assert pool.allocate(2) is None
    assert pool.allocate(1) == blocks[1:]
    assert pool.stats().retired == 1
    pool.check()


def test_a_block_is_shared_while_it_has_a_second_holder() -> None:
    pool = BlockPool(3, SIZE, "DEVICE")
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.retain(blocks[:1])
    assert [pool.is_shared(block_id) for block_id in blocks] == [True, False]
    pool.release(blocks[:1])
    assert not pool.is_shared(blocks[0])


def test_interleaved_chains_merge_into_one_event_each() -> None:
    pool = BlockPool(8, SIZE, "HOST")
    blocks = pool.allocate(6)
    assert blocks is not None
    order = [("a", ROOT), ("x", ROOT), ("b", key_of("a")), ("y", key_of("x")), ("c", key_of("b")), ("z", key_of("y"))]
    for block_id, (name, parent) in zip(blocks, order, strict=True):
        pool.publish(block_id, key_of(name), parent, SIZE, sum_of(name))
    events = pool.take_events()
    assert [list(e.block_hashes) for e in events] == [[*map(key_of, "abc")], [*map(key_of, "xyz")]]  # type: ignore[union-attr]
    assert events[0] == BlockStored([*map(key_of, "abc")], ROOT, [], SIZE, None, "HOST")
    assert pool.take_events() == []


def test_a_store_never_moves_before_the_removal_of_the_same_key() -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    child = put_chain(pool, "b", key_of("a"))
    put_chain(pool, "a")
    pool.release(child)
    taken = pool.allocate(1)  # evicts b
    assert taken is not None
    assert pool.publish(taken[0], key_of("b"), key_of("a"), SIZE, sum_of("b"))
    assert apply(pool.take_events(), set()) == {key_of("a"), key_of("b")}


def test_long_chains_are_cut_into_bounded_events() -> None:
    num = MAX_HASHES_PER_EVENT + 10
    pool = BlockPool(num, SIZE, "DEVICE")
    blocks = pool.allocate(num)
    assert blocks is not None
    parent = ROOT
    for block_id in blocks:
        pool.publish(block_id, key_of(block_id), parent, SIZE, sum_of(block_id))
        parent = key_of(block_id)
    for events in (pool.take_events(), pool.snapshot()):
        assert [len(e.block_hashes) for e in events] == [MAX_HASHES_PER_EVENT, 10]  # type: ignore[union-attr]
        assert events[1].parent_block_hash == events[0].block_hashes[-1]  # type: ignore[union-attr]


def test_the_snapshot_names_parents_before_children_and_every_block_once() -> None:
    pool = BlockPool(16, SIZE, "DEVICE")
    put_chain(pool, "abcd")
    put_chain(pool, "xy", key_of("b"))
    put_chain(pool, "z", key_of("b"))
    put_chain(pool, "o", key_of("evicted parent"))
    seen = {ROOT, key_of("evicted parent")}
    for event in pool.snapshot():
        assert isinstance(event, BlockStored)
        assert event.parent_block_hash in seen
        for key in event.block_hashes:
            assert key not in seen
            seen.add(key)  # type: ignore[arg-type]
    assert seen - {ROOT, key_of("evicted parent")} == {key_of(n) for n in "abcdxyzo"}


def test_clear_cached_leaves_what_is_in_use() -> None:
    pool = BlockPool(6, SIZE, "DEVICE")
    put_chain(pool, "a")
    pool.release(put_chain(pool, "xyz"))
    pool.grant([key_of("y")], 1.0, 0.0)
    assert pool.clear_cached() == 1
    assert names_held(pool, "axyz") == "axy"
    assert apply(pool.take_events(), set()) == {key_of(name) for name in "axy"}
    pool.check()


def test_without_events_nothing_collects() -> None:
    pool = BlockPool(2, SIZE, "DEVICE", keep_events=False)
    for name in "abcdef":
        pool.release(put_chain(pool, name))
    assert pool.take_events() == []
    assert pool.take_published() == []


def spend(pool: BlockPool, names: str) -> str:
    """The order in which the blocks of `names`, which all may go, are evicted; leaves nothing allocated."""
    gone = ""
    taken: list[int] = []
    while held := names_held(pool, names):
        more = pool.allocate(pool.stats().free + 1)
        assert more is not None
        taken += more
        gone += "".join(name for name in held if not pool.contains(key_of(name)))
    pool.release(taken)
    return gone


def test_what_was_used_often_outlives_what_was_used_lately_with_lfu() -> None:
    for policy, expected in (("lru", "axyzb"), ("lfu", "xyzba")):
        pool = BlockPool(5, SIZE, "HOST", policy=policy)  # type: ignore[arg-type]
        pool.release(put_chain(pool, "a"))
        for _ in range(3):
            pool.release(pool.match([key_of("a")]))
        for name in "xyzb":
            pool.release(put_chain(pool, name))
        pool.release(pool.match([key_of("b")]))
        assert spend(pool, "abxyz") == expected


def test_a_record_says_who_computed_the_block_and_whose_it_is() -> None:
    pool = BlockPool(2, SIZE, "HOST")
    blocks = pool.allocate(2)
    assert blocks is not None
    assert pool.publish(blocks[0], key_of("a"), ROOT, SIZE, sum_of("a"), writer=b"writer 1", owner=b"tenant 1")
    assert pool.publish(blocks[1], key_of("b"), ROOT, SIZE, sum_of("b"))
    first, second = pool.lookup(key_of("a")), pool.lookup(key_of("b"))
    assert first is not None
    assert second is not None
    assert (first.writer, first.owner) == (b"writer 1", b"tenant 1")
    assert (second.writer, second.owner) == (bytes(8), bytes(8))


def test_an_owner_over_the_quota_loses_its_blocks_first() -> None:
    pool = BlockPool(8, SIZE, "HOST", quota=0.5)
    blocks = pool.allocate(8)
    assert blocks is not None
    for block_id, name in zip(blocks, "xyabcdef", strict=True):  # x and y are the oldest, and another owner's
        owner = b"modest.." if name in "xy" else b"greedy.."
        pool.publish(block_id, key_of(name), ROOT, SIZE, sum_of(name), owner=owner)
        pool.release([block_id])
    assert spend(pool, "xyabcdef") == "abxycdef", "two over the quota, then the oldest of all"


def test_an_owner_alone_may_fill_the_pool_and_then_loses_its_own() -> None:
    pool = BlockPool(4, SIZE, "HOST", quota=0.25)
    for name in "abcdef":
        pool.release(put_chain(pool, name))
    assert names_held(pool, "abcdef") == "cdef"


@pytest.mark.parametrize("quota", [0.0, -1.0, 1.5, float("nan")])
def test_a_quota_that_is_no_fraction_is_refused(quota: float) -> None:
    with pytest.raises(ValueError, match="quota"):
        BlockPool(4, SIZE, "HOST", quota=quota)


def test_idle_blocks_expire_from_the_end_of_their_chain_and_used_ones_stay() -> None:
    pool = BlockPool(8, SIZE, "HOST", ttl_s=10.0)
    pool.release(put_chain(pool, "abc"))  # before the pool knows the time
    assert pool.expire_idle(1000.0) == (0, 1010.0)
    pool.expire(1004.0)
    pool.release(pool.match([key_of("a")]))
    assert pool.expire_idle(1009.9) == (0, 1010.0)
    assert pool.expire_idle(1010.0, max_blocks=1) == (1, 1010.0)
    assert names_held(pool, "abc") == "ab"
    assert pool.expire_idle(1010.0) == (1, 1014.0)
    assert names_held(pool, "abc") == "a"
    assert pool.expire_idle(1014.0) == (1, 1024.0)
    assert pool.stats().free == 8
    assert pool.stats().evicted_total == 3


def test_without_a_time_to_live_nothing_expires() -> None:
    pool = BlockPool(2, SIZE, "HOST")
    pool.release(put_chain(pool, "a"))
    assert pool.expire_idle(1e9) == (0, None)


def test_a_pinned_block_and_what_is_before_it_stay_until_the_last_unpin() -> None:
    pool = BlockPool(3, SIZE, "HOST")
    pool.release(put_chain(pool, "abc"))
    assert pool.pin([key_of("b"), key_of("?")]) == [key_of("?")]
    assert pool.pin([key_of("b")]) == []
    assert pool.allocate(2) is None
    assert pool.stats().pinned == 1
    assert pool.unpin([key_of("b"), key_of("c")]) == [key_of("c")]
    assert pool.stats().allocatable == 1
    assert pool.unpin([key_of("b")]) == []
    assert pool.unpin([key_of("b")]) == [key_of("b")]
    assert pool.allocate(3) is not None
    pool.check()


def test_blocks_that_somebody_keeps_go_before_others_that_are_about_as_cold() -> None:
    pool = BlockPool(6, SIZE, "DEVICE")
    for name in "abcdef":
        pool.release(put_chain(pool, name))
    pool.mark_kept([key_of("c"), key_of("e"), key_of("?")], 7)
    pool.mark_kept([key_of("e")], 31)
    assert [record.key for record in pool.coldest(4)] == [key_of(name) for name in "ceab"]
    pool.unmark_kept([key_of("c")], 7)
    assert spend(pool, "abcdef") == "eabcdf"
    assert (pool.stats().evicted_total, pool.stats().dropped_total) == (6, 5)
    for name in "ab":
        pool.release(put_chain(pool, name))
    pool.forget_keeper(7)
    pool.forget_keeper(31)
    assert spend(pool, "ab") == "ab"
    assert pool.stats().dropped_total == 5, "nobody is there that could have kept them"


def test_a_block_far_from_its_end_is_not_given_up_for_being_kept() -> None:
    names = "".join(chr(0x4E00 + i) for i in range(LOOK_AHEAD + 1))
    pool = BlockPool(len(names), SIZE, "DEVICE")
    for name in names:
        pool.release(put_chain(pool, name))
    pool.mark_kept([key_of(names[-1])], 0)
    for _ in range(2 * LOOK_AHEAD):  # looking again finds the same again
        first, second = pool.coldest(2)
        assert first.key == key_of(names[0])
        assert second.key == key_of(names[-1]), "now it is among the lowest"


def test_of_several_owners_over_the_quota_one_whose_block_is_kept_gives_first() -> None:
    pool = BlockPool(4, SIZE, "DEVICE", quota=0.25)
    for name, owner in (("a", b"owner  1"), ("b", b"owner  1"), ("c", b"owner  2"), ("d", b"owner  2")):
        (block_id,) = pool.allocate(1) or []
        pool.publish(block_id, key_of(name), ROOT, SIZE, sum_of(name), owner=owner)
        pool.release([block_id])
    pool.mark_kept([key_of("d")], 0)
    assert spend(pool, "abcd") == "dabc"


def test_what_is_kept_is_counted_from_a_place_on_up_to_the_first_gap() -> None:
    pool = BlockPool(5, SIZE, "DEVICE")
    blocks = put_chain(pool, "abcd")
    assert pool.num_kept(blocks) == 0
    pool.mark_kept([key_of("b"), key_of("c")], 0)
    assert [pool.num_kept(blocks, start) for start in range(5)] == [0, 2, 1, 0, 0]
    pool.mark_kept([key_of("a")], 1)
    assert pool.num_kept(blocks) == 3
    pool.forget_keeper(0)
    assert pool.num_kept(blocks) == 1


@pytest.mark.parametrize("by", [-1, 32])
def test_a_keeper_without_a_number_of_its_own_is_refused(by: int) -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    for call in (lambda: pool.mark_kept([], by), lambda: pool.unmark_kept([], by), lambda: pool.forget_keeper(by)):
        with pytest.raises(ValueError, match=str(by)):
            call()


def test_a_mark_goes_with_its_block() -> None:
    pool = BlockPool(1, SIZE, "DEVICE")
    pool.release(put_chain(pool, "a"))
    pool.mark_kept([key_of("a")], 0)
    assert pool.clear_cached() == 1
    assert pool.num_kept(put_chain(pool, "b")) == 0


def test_the_coldest_are_the_next_victims_and_looking_changes_nothing() -> None:
    pool = BlockPool(7, SIZE, "HOST", quota=0.4)
    pool.release(put_chain(pool, "abc"))
    pool.release(put_chain(pool, "xyz", key_of("a")))
    pool.release(pool.match([key_of("a"), key_of("b")]))
    before = pool.stats()
    for _ in range(50):
        cold = pool.coldest(4)
        assert [record.key for record in cold] == [key_of(name) for name in "czyx"]
        pool.check()
    assert pool.stats() == before
    assert pool.coldest(0) == []
    assert spend(pool, "abcxyz") == "czyxba"


def test_blocks_are_evicted_by_name_from_the_end_of_a_chain_alone() -> None:
    pool = BlockPool(4, SIZE, "DISK")
    pool.release(put_chain(pool, "abc"))
    pool.release(put_chain(pool, "x"))
    held = pool.match([key_of("x")])
    assert pool.evict([key_of("b"), key_of("c"), key_of("x"), key_of("?"), key_of("a")]) == [key_of("c")]
    assert pool.evict([key_of("b"), key_of("a")]) == [key_of("b"), key_of("a")]
    assert names_held(pool, "abcx") == "x"
    pool.release(held)
    pool.check()


def restored(names: str, blocks: list[int]) -> list[Restored]:
    """Entries of a chain."""
    parents = [ROOT, *map(key_of, names)]
    return [
        (block_id, key_of(name), parent, SIZE, sum_of(name), b"writer 1", b"tenant 1")
        for block_id, name, parent in zip(blocks, names, parents, strict=False)
    ]


def test_a_restart_finds_its_blocks_again_in_their_places() -> None:
    pool = BlockPool(8, SIZE, "DISK", quota=0.5, ttl_s=5.0)
    entries = restored("abc", [6, 1, 4]) + restored("x", [2])
    assert pool.restore(entries[::-1]) == []
    pool.check()
    record = pool.lookup(key_of("b"))
    assert record == BlockRecord(1, key_of("b"), key_of("a"), SIZE, sum_of("b"), True, b"writer 1", b"tenant 1")
    assert sorted(pool.take_published()) == sorted(map(key_of, "abcx"))
    events = pool.take_events()
    assert BlockStored([*map(key_of, "abc")], ROOT, [], SIZE, None, "DISK") in events
    assert len(events) == 2
    assert (pool.stats().cached, pool.stats().allocatable) == (4, 8)
    assert [r.key for r in pool.coldest(4)] == [key_of(n) for n in "xcba"], "later entries count as used later"
    assert pool.match([*map(key_of, "abc")]) == [6, 1, 4]


def test_what_is_held_already_is_not_restored_again_and_its_place_stays_free() -> None:
    pool = BlockPool(4, SIZE, "DISK")
    pool.release(put_chain(pool, "b", key_of("a")))
    taken = pool.lookup(key_of("b"))
    assert taken is not None
    places = [block_id for block_id in range(4) if block_id != taken.block_id]
    assert pool.restore(restored("ab", places)) == [places[1]]
    assert pool.stats().free == 2
    assert [record.key for record in pool.coldest(4)] == [key_of("b"), key_of("a")]
    pool.check()


def test_a_restored_parent_of_a_block_in_use_may_not_go() -> None:
    pool = BlockPool(4, SIZE, "DISK")
    child = put_chain(pool, "c", key_of("b"))
    pool.restore(restored("ab", [block_id for block_id in range(4) if block_id not in child]))
    pool.check()
    assert pool.allocate(2) is None
    pool.release(child)
    assert pool.allocate(4) is not None


def test_restoring_into_a_block_that_is_not_free_is_caught() -> None:
    pool = BlockPool(4, SIZE, "DISK")
    blocks = put_chain(pool, "a")
    with pytest.raises(AssertionError, match="isn't free"):
        pool.restore(restored("x", blocks))
    with pytest.raises(AssertionError, match="isn't free"):
        pool.restore(restored("x", [3]) + restored("y", [3]))


@pytest.mark.parametrize("misuse", ["release", "retain", "publish", "retire"])
def test_using_a_block_without_a_reference_is_caught(misuse: str) -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    uses = {
        "release": lambda: pool.release([0]),
        "retain": lambda: pool.retain([0]),
        "publish": lambda: pool.publish(0, key_of("a"), ROOT, SIZE, sum_of("a")),
        "retire": lambda: pool.retire([0]),
    }
    with pytest.raises(AssertionError, match="block"):
        uses[misuse]()


def test_two_threads_keep_every_block_accounted_for() -> None:
    pool = BlockPool(32, SIZE, "DEVICE")
    errors: list[BaseException] = []

    def engine(name: str) -> None:
        try:
            for i in range(400):
                blocks = pool.allocate(3)
                if blocks is None:
                    continue
                for j, block_id in enumerate(blocks):
                    pool.publish(block_id, key_of(f"{name}{i % 20}.{j}"), ROOT, SIZE, sum_of("s"))
                pool.release(blocks)
        except BaseException as error:
            errors.append(error)

    def reader() -> None:
        try:
            for i in range(800):
                keys = [key_of(f"e{i % 20}.{j}") for j in range(3)]
                pool.release(pool.match(keys))
                pool.grant(keys, 1.0, float(i))
                pool.expire(float(i))
                pool.take_events()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=engine, args=("e",)), threading.Thread(target=reader)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    pool.expire(1e9)
    pool.check()
    assert pool.stats().referenced == 0
    assert pool.stats().leased == 0


TTL_S = 4.0


@dataclass
class Named:
    """What the model knows of a published block."""

    block_id: int
    announced: bool
    used_s: float | None
    hits: int = 0
    score: tuple[int, ...] = ()
    pins: int = 0
    kept: set[int] = field(default_factory=set)


class BlockPoolMachine(RuleBasedStateMachine):
    """Any order of everything a pool does keeps every block accounted for, never hands out a block that somebody may still
    read or write, never leaves a block without the one before it, evicts exactly what the rules say in the order they
    say, and tells the world exactly what is announced. The model below is written for plainness: it looks at everything
    each time."""

    NUM_BLOCKS = 9
    NUM_KEYS = 14

    @initialize(
        parents=st.lists(st.integers(0, 10**6), min_size=NUM_KEYS, max_size=NUM_KEYS),
        policy=st.sampled_from(["lru", "lfu"]),
        quota=st.sampled_from([1.0, 0.5, 0.3]),
        look_ahead=st.sampled_from([2, 32]),
    )
    def start(self, parents: list[int], policy: Policy, quota: float, look_ahead: int) -> None:
        """The keys are a forest, as they are in life: the key of a parent is part of what makes a key."""
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(eviction, "LOOK_AHEAD", look_ahead)
        self.look_ahead, self.policy, self.quota = look_ahead, policy, quota
        self.pool = BlockPool(self.NUM_BLOCKS, SIZE, "DEVICE", policy=policy, quota=quota, ttl_s=TTL_S)
        self.keys = [key_of(i) for i in range(self.NUM_KEYS)]
        self.parents: dict[bytes, bytes] = {}
        self.owners: dict[bytes, bytes] = {}
        for i, key in enumerate(self.keys):
            parent = parents[i] % (i + 1) - 1  # -1: the first of a chain
            self.parents[key] = ROOT if parent < 0 else self.keys[parent]
            self.owners[key] = sum_of(f"owner {i % 2}") if parent < 0 else self.owners[self.keys[parent]]
        self.now: float | None = None
        self.tick = 0
        self.age = 0
        self.refs: dict[int, int] = {}
        self.named: dict[bytes, Named] = {}
        self.leases: dict[int, tuple[set[bytes], float]] = {}
        self.retired: set[int] = set()
        self.told: set[bytes] = set()
        self.published: list[bytes] = []
        self.keepers: set[int] = set()
        self.num_evicted = 0
        self.num_dropped = 0

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    # --- what the model says ---

    def is_leased(self, key: bytes) -> bool:
        return any(key in keys for keys, _ in self.leases.values())

    def is_held(self, key: bytes) -> bool:
        named = self.named[key]
        return bool(self.refs.get(named.block_id)) or self.is_leased(key) or named.pins > 0

    def children(self, key: bytes) -> list[bytes]:
        return [other for other, named in self.named.items() if named.announced and self.parents[other] == key]

    def may_go(self, key: bytes) -> bool:
        """By the definition: nothing holds it or anything announced after it."""
        return not self.is_held(key) and all(self.may_go(child) for child in self.children(key))

    def num_allocatable(self) -> int:
        held = sum(not (named.announced and self.may_go(key)) for key, named in self.named.items())
        private = sum(1 for block_id, count in self.refs.items() if count and block_id not in self.named_blocks())
        return self.NUM_BLOCKS - held - private - len(self.retired)

    def named_blocks(self) -> set[int]:
        return {named.block_id for named in self.named.values()}

    def private(self) -> list[int]:
        return sorted(b for b, n in self.refs.items() if n and b not in self.named_blocks())

    def first_of(self, leaves: list[bytes]) -> bytes | None:
        """The lowest, or one that is kept and not far from it."""
        ranked = sorted(leaves, key=lambda key: (self.named[key].score, self.named[key].block_id))
        if self.keepers:
            kept = [key for key in ranked[: self.look_ahead] if self.named[key].kept]
            ranked = kept or ranked
        return ranked[0] if ranked else None

    def next_victim(self) -> bytes | None:
        leaves = [k for k, named in self.named.items() if named.announced and self.may_go(k) and not self.children(k)]
        cached = [self.owners[k] for k, n in self.named.items() if n.announced and not self.refs.get(n.block_id)]
        over = {owner for owner in cached if self.quota < 1 and cached.count(owner) > self.quota * self.NUM_BLOCKS}
        firsts = [self.first_of([key for key in leaves if self.owners[key] == owner]) for owner in over]
        candidates = [key for key in firsts if key is not None]
        if not candidates:
            return self.first_of(leaves)
        if self.keepers:
            candidates = [key for key in candidates if self.named[key].kept] or candidates
        return min(candidates, key=lambda key: (self.named[key].score, self.named[key].block_id))

    # --- what happens in the model ---

    def note_time(self, now: float) -> None:
        if self.now is None:
            for named in self.named.values():
                named.used_s = now
        self.now = now

    def use(self, *block_ids: int) -> None:
        self.tick += 1
        for block_id in block_ids:
            for named in self.named.values():
                if named.block_id == block_id:
                    named.hits += 1
                    named.score = (self.tick,) if self.policy == "lru" else (named.hits + self.age, self.tick)
                    named.used_s = self.now

    def drop_unheld(self) -> None:
        for key, named in list(self.named.items()):
            if not named.announced and not self.is_held(key):
                del self.named[key]

    def gone(self, key: bytes) -> None:
        assert self.may_go(key)
        assert not self.children(key), "a block went before one after it"
        self.num_evicted += 1
        self.num_dropped += bool(self.keepers and not self.named[key].kept)
        del self.named[key]

    def removals(self) -> list[bytes]:
        """What the pool evicted since the last call, in order."""
        events = self.pool.take_events()
        self.told = apply(events, self.told)
        return [key for event in events if isinstance(event, BlockRemoved) for key in event.block_hashes]  # type: ignore[misc]

    # --- rules ---

    @rule(num=st.integers(0, 5))
    def allocate(self, num: int) -> None:
        self.take(num)

    def take(self, num: int) -> list[int] | None:
        self.removals()
        expected, room = [], self.num_allocatable()
        num_free = self.NUM_BLOCKS - len(self.named) - len(self.private()) - len(self.retired)
        taken = self.pool.allocate(num)
        assert (taken is None) == (num > room)
        if taken is not None:
            for _ in range(num - num_free):
                victim = self.next_victim()
                assert victim is not None
                if self.policy == "lfu":
                    self.age = max(self.age, self.named[victim].score[0])
                expected.append(victim)
                self.gone(victim)
            assert len(set(taken)) == num
            assert not set(taken) & (self.named_blocks() | set(self.private()) | self.retired)
            self.refs.update(dict.fromkeys(taken, 1))
        assert self.removals() == expected
        return taken

    @rule(data=st.data(), ends=st.lists(st.integers(0, NUM_KEYS - 1), min_size=1, max_size=4))
    def sequences_come_and_go(self, data: st.DataObject, ends: list[int]) -> None:
        """As an engine does it: match, allocate, publish, release."""
        for end in ends:
            path = [self.keys[end]]
            while (parent := self.parents[path[0]]) != ROOT:
                path.insert(0, parent)
            matched = self.find(path)
            fresh = self.take(len(path) - len(matched)) or []
            for block_id, key in zip(fresh, path[len(matched) :], strict=False):
                self.name(block_id, key, SIZE, True)
            self.give([*matched, *fresh][:: data.draw(st.sampled_from([1, -1]))])

    @precondition(lambda self: self.private())
    @rule(data=st.data(), announce=st.sampled_from([True, True, True, False]))
    def publish(self, data: st.DataObject, announce: bool) -> None:
        block_id = data.draw(st.sampled_from(self.private()))
        key = data.draw(st.sampled_from(self.keys))
        self.name(block_id, key, SIZE if announce else data.draw(st.sampled_from([3, SIZE])), announce)

    def name(self, block_id: int, key: bytes, size: int, announce: bool) -> None:
        done = self.pool.publish(
            block_id, key, self.parents[key], size, sum_of("s"), announce=announce, owner=self.owners[key]
        )
        assert done == (key not in self.named)
        if done:
            self.named[key] = Named(block_id, announce, self.now)
            self.published.append(key)

    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        busy = self.named_blocks() | set(self.private()) | self.retired
        free = [block_id for block_id in range(self.NUM_BLOCKS) if block_id not in busy]
        keys = data.draw(st.lists(st.sampled_from(self.keys), unique=True, max_size=min(4, len(free))))
        places = data.draw(st.permutations(free))
        entries = [
            (b, k, self.parents[k], SIZE, sum_of("s"), sum_of("w"), self.owners[k])
            for b, k in zip(places, keys, strict=False)
        ]
        assert self.pool.restore(entries) == [entry[0] for entry in entries if entry[1] in self.named]
        new = [entry for entry in entries if entry[1] not in self.named]
        for block_id, key, *_ in new:
            self.named[key] = Named(block_id, True, self.now)
            self.use(block_id)
            self.published.append(key)

    @precondition(lambda self: any(self.refs.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = [block_id for block_id, count in self.refs.items() for _ in range(count)]
        order = data.draw(st.permutations(sorted(held)))
        self.give(order[: data.draw(st.integers(1, len(order)))])

    def give(self, given: list[int]) -> None:
        self.pool.release(given)
        for block_id in given:
            self.refs[block_id] -= 1
        self.use(*given)
        self.drop_unheld()

    @precondition(lambda self: any(self.refs.values()))
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(b for b, n in self.refs.items() if n)))
        self.pool.retain([block_id])
        self.refs[block_id] += 1

    @rule(data=st.data())
    def match(self, data: st.DataObject) -> None:
        self.find(data.draw(st.lists(st.sampled_from(sorted([*self.named, key_of("?")])), max_size=4)))

    def find(self, keys: list[bytes]) -> list[int]:
        expected = [self.named[key].block_id for key in itertools.takewhile(self.named.__contains__, keys)]
        assert self.pool.match(keys) == expected
        for block_id in expected:
            self.refs[block_id] = self.refs.get(block_id, 0) + 1
        self.use(*expected)
        return expected

    @rule(data=st.data(), duration=st.sampled_from([1.0, 5.0]))
    def grant(self, data: st.DataObject, duration: float) -> None:
        now = self.now or 100.0
        keys = data.draw(st.lists(st.sampled_from(sorted([*self.named, key_of("?")])), max_size=3))
        lease = self.pool.grant(keys, duration, now)
        assert (lease is None) == (key_of("?") in keys)
        if lease is None:
            return
        self.note_time(now)
        assert lease.expires_at_s == now + duration
        self.use(*{self.named[key].block_id for key in keys})
        self.leases[lease.lease_id] = (set(keys), lease.expires_at_s)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def reader_is_done(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        assert self.pool.end_lease(lease_id)
        del self.leases[lease_id]
        self.drop_unheld()

    @rule(seconds=st.sampled_from([0.5, 1.0, 6.0]))
    def time_passes_over_crashed_readers(self, seconds: float) -> None:
        self.note_time((self.now or 100.0) + seconds)
        due = [lease_id for lease_id, (_, at) in self.leases.items() if at <= (self.now or 0)]
        assert self.pool.expire(self.now or 0) == len(due)
        for lease_id in due:
            del self.leases[lease_id]
        self.drop_unheld()

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0]), most=st.integers(0, 5))
    def idle_blocks_expire(self, seconds: float, most: int) -> None:
        self.removals()
        now = (self.now or 100.0) + seconds
        self.note_time(now)
        num, again = self.pool.expire_idle(now, most)
        removed = self.removals()
        assert len(removed) == num <= most
        for key in removed:
            used_s = self.named[key].used_s
            assert used_s is not None
            assert used_s + TTL_S <= now
            self.gone(key)
        leaves = [
            named.used_s or 0
            for k, named in self.named.items()
            if self.may_go(k) and not self.children(k) and named.announced
        ]
        due = min(leaves, default=now) + TTL_S
        assert again == max(due, now)
        assert num == most or due > now

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(self.keys), max_size=2))
        assert self.pool.pin(keys) == [key for key in keys if key not in self.named]
        for key in keys:
            if key in self.named:
                self.named[key].pins += 1

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = sorted(key for key, named in self.named.items() for _ in range(named.pins))
        keys = data.draw(st.lists(st.sampled_from([*pinned, key_of("?")]), max_size=3))
        not_pinned = []
        for key in keys:
            if key in self.named and self.named[key].pins:
                self.named[key].pins -= 1
            else:
                not_pinned.append(key)
        assert self.pool.unpin(keys) == not_pinned
        self.drop_unheld()

    @rule(data=st.data(), by=st.sampled_from([0, 31]), kept=st.booleans())
    def keeper_tells(self, data: st.DataObject, by: int, kept: bool) -> None:
        keys = data.draw(st.lists(st.sampled_from(self.keys), max_size=6))
        (self.pool.mark_kept if kept else self.pool.unmark_kept)(keys, by)
        if kept:
            self.keepers.add(by)
        for key in keys:
            if key in self.named:
                (self.named[key].kept.add if kept else self.named[key].kept.discard)(by)

    @rule(by=st.sampled_from([0, 31]))
    def keeper_dies(self, by: int) -> None:
        self.pool.forget_keeper(by)
        self.keepers.discard(by)
        for named in self.named.values():
            named.kept.discard(by)

    @rule(num=st.integers(0, 10))
    def look_at_the_coldest(self, num: int) -> None:
        before = copy.deepcopy(self.named)
        expected = []
        while len(expected) < num and (victim := self.next_victim()) is not None:
            expected.append(victim)
            del self.named[victim]
        self.named = before
        assert [record.key for record in self.pool.coldest(num)] == expected

    @rule(data=st.data())
    def evict_by_name(self, data: st.DataObject) -> None:
        self.removals()
        expected = []
        keys = data.draw(st.lists(st.sampled_from(self.keys), max_size=4))
        evicted = self.pool.evict(keys)
        for key in keys:
            if key in self.named and self.named[key].announced and self.may_go(key) and not self.children(key):
                self.gone(key)
                expected.append(key)
        assert evicted == self.removals() == expected

    @precondition(lambda self: any(self.refs[b] == 1 for b in self.private()))
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from([b for b in self.private() if self.refs[b] == 1]))
        if len(self.retired) < 2:
            self.pool.retire([block_id])
            self.refs[block_id] = 0
            self.retired.add(block_id)

    @rule()
    def clear(self) -> None:
        self.removals()
        going = {key for key, named in self.named.items() if named.announced and self.may_go(key)}
        assert self.pool.clear_cached() == len(going)
        removed = self.removals()
        assert set(removed) == going
        for key in removed:
            self.gone(key)

    @rule()
    def drain(self) -> None:
        assert sorted(self.pool.take_published()) == sorted(self.published)
        self.published = []

    @invariant()
    def everything_agrees(self) -> None:
        self.pool.check()
        assert {key for key in self.keys if self.pool.contains(key)} == set(self.named)
        stats = self.pool.stats()
        assert stats.referenced == sum(1 for n in self.refs.values() if n)
        assert stats.retired == len(self.retired)
        assert stats.num_leases == len(self.leases)
        assert stats.leased == sum(map(self.is_leased, self.named))
        assert stats.pinned == sum(named.pins > 0 for named in self.named.values())
        assert stats.allocatable == self.num_allocatable()
        assert (stats.evicted_total, stats.dropped_total) == (self.num_evicted, self.num_dropped)
        announced = {key for key, named in self.named.items() if named.announced}
        assert apply(self.pool.snapshot(), set()) == announced
        self.removals()
        assert self.told == announced
        for key, named in self.named.items():
            record = self.pool.lookup(key)
            assert record is not None
            assert (record.block_id, record.parent, record.announced) == (
                named.block_id,
                self.parents[key],
                named.announced,
            )
            assert self.pool.num_kept([named.block_id]) == bool(named.kept)


BlockPoolMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase
