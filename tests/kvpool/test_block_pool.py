"""The block pool: conservation of blocks, leases, eviction order, events."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.block_pool import MAX_HASHES_PER_EVENT, BlockPool
from protos.kv_events import BlockRemoved, BlockStored, Event

SIZE = 16


def key_of(name: object) -> bytes:
    return f"{name!s:>16}".encode()[-16:]


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


def test_a_parent_goes_before_its_child_only_if_the_child_cannot_go() -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    parent, child = put_chain(pool, "ab")
    pool.release([parent])
    taken = pool.allocate(1)
    assert taken == [parent]
    assert names_held(pool, "ab") == "b"
    pool.release([child, *taken])
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
    assert pool.allocate(1) == [blocks[0]], "a is free to go, b is still leased by the other reader"
    assert not pool.end_lease(lease.lease_id)
    assert pool.end_lease(other.lease_id)
    assert pool.allocate(1) == [blocks[1]]
    assert pool.next_expiry() is None
    assert pool.stats().expired_leases_total == 1


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


def test_retired_blocks_are_out_of_reach_until_they_come_back() -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.retire(blocks[:1])
    pool.release(blocks[1:])
    assert pool.allocate(2) is None
    pool.check()
    pool.unretire(blocks[:1])
    assert pool.allocate(2) is not None


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
    assert pool.clear_cached() == 2
    assert names_held(pool, "axyz") == "ay"
    assert apply(pool.take_events(), set()) == {key_of("a"), key_of("y")}
    pool.check()


def test_without_events_nothing_collects() -> None:
    pool = BlockPool(2, SIZE, "DEVICE", keep_events=False)
    for name in "abcdef":
        pool.release(put_chain(pool, name))
    assert pool.take_events() == []
    assert pool.take_published() == []


def test_reuse_does_not_grow_the_eviction_heap_without_bound() -> None:
    pool = BlockPool(4, SIZE, "DEVICE")
    pool.release(put_chain(pool, "a"))
    for _ in range(1000):
        pool.release(pool.match([key_of("a")]))
    assert len(pool._leaves) <= 4 * 4 + 1
    pool.check()


@pytest.mark.parametrize("misuse", ["release", "retain", "publish"])
def test_using_a_block_without_a_reference_is_caught(misuse: str) -> None:
    pool = BlockPool(2, SIZE, "DEVICE")
    uses = {
        "release": lambda: pool.release([0]),
        "retain": lambda: pool.retain([0]),
        "publish": lambda: pool.publish(0, key_of("a"), ROOT, SIZE, sum_of("a")),
    }
    with pytest.raises(AssertionError, match="nobody references"):
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


class BlockPoolMachine(RuleBasedStateMachine):
    """Any order of allocate, publish, match, grant, release, expire, retire and crash-of-a-reader keeps every block
    accounted for, never hands out a block that somebody may still read or write, and tells the world exactly what is
    announced."""

    NUM_BLOCKS = 8

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(self.NUM_BLOCKS, SIZE, "DEVICE")
        self.now = 0.0
        self.refs: dict[int, int] = {}
        self.names: dict[bytes, tuple[int, bytes, bool]] = {}  # key → block, parent, announced
        self.leases: dict[int, tuple[set[bytes], float]] = {}
        self.retired: set[int] = set()
        self.told: set[bytes] = set()
        self.published: list[bytes] = []
        self.next_name = 0

    # the model's view
    def leased_keys(self) -> set[bytes]:
        return {key for keys, _ in self.leases.values() for key in keys}

    def drop_names(self) -> None:
        """Unannounced blocks that nobody references or leases are gone."""
        leased = self.leased_keys()
        for key, (block_id, _, announced) in list(self.names.items()):
            if not announced and not self.refs.get(block_id) and key not in leased:
                del self.names[key]

    def busy_blocks(self) -> set[int]:
        leased = self.leased_keys()
        held = {block for key, (block, _, announced) in self.names.items() if key in leased}
        return {b for b, n in self.refs.items() if n} | held | self.retired

    @rule(num=st.integers(0, 4))
    def allocate(self, num: int) -> None:
        taken = self.pool.allocate(num)
        room = self.NUM_BLOCKS - len(self.busy_blocks())
        assert (taken is None) == (num > room)
        if taken is None:
            return
        assert len(set(taken)) == num
        assert not set(taken) & self.busy_blocks()
        for block_id in taken:
            self.refs[block_id] = 1
        for key, (block_id, _, _) in list(self.names.items()):
            if block_id in taken:
                del self.names[key]
        still = {key for key in self.names if self.pool.contains(key)}
        gone = set(self.names) - still
        assert not gone, "evicted without being handed out"

    def private(self) -> list[int]:
        named = {block for block, _, _ in self.names.values()}
        return sorted(b for b, n in self.refs.items() if n and b not in named)

    @precondition(lambda self: self.private())
    @rule(data=st.data(), announce=st.booleans(), duplicate=st.booleans())
    def publish(self, data: st.DataObject, announce: bool, duplicate: bool) -> None:
        block_id = data.draw(st.sampled_from(self.private()))
        parents = [ROOT, *sorted(k for k, (_, _, announced) in self.names.items() if announced)]
        parent = data.draw(st.sampled_from(parents))
        if duplicate and self.names:
            key = data.draw(st.sampled_from(sorted(self.names)))
            assert not self.pool.publish(block_id, key, parent, SIZE, sum_of("dup"))
            return
        self.next_name += 1
        key = key_of(self.next_name)
        tokens = SIZE if announce else 3
        assert self.pool.publish(block_id, key, parent, tokens, sum_of(self.next_name), announce=announce)
        self.names[key] = (block_id, parent, announce)
        self.published.append(key)

    @precondition(lambda self: any(self.refs.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(b for b, n in self.refs.items() if n)))
        self.pool.release([block_id])
        self.refs[block_id] -= 1
        self.drop_names()

    @precondition(lambda self: any(self.refs.values()))
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(b for b, n in self.refs.items() if n)))
        self.pool.retain([block_id])
        self.refs[block_id] += 1

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def match(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from([*sorted(self.names), key_of("?")]), max_size=3))
        expected = []
        for key in keys:
            if key not in self.names:
                break
            expected.append(self.names[key][0])
        assert self.pool.match(keys) == expected
        for block_id in expected:
            self.refs[block_id] = self.refs.get(block_id, 0) + 1

    @precondition(lambda self: self.names)
    @rule(data=st.data(), duration=st.sampled_from([1.0, 5.0]))
    def grant(self, data: st.DataObject, duration: float) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.names)), min_size=1, max_size=3))
        lease = self.pool.grant(keys, duration, self.now)
        assert lease is not None
        assert lease.expires_at_s == self.now + duration
        self.leases[lease.lease_id] = (set(keys), lease.expires_at_s)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def reader_is_done(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        assert self.pool.end_lease(lease_id)
        del self.leases[lease_id]
        self.drop_names()

    @rule(seconds=st.sampled_from([0.5, 1.0, 6.0]))
    def time_passes_over_crashed_readers(self, seconds: float) -> None:
        self.now += seconds
        due = [lease_id for lease_id, (_, at) in self.leases.items() if at <= self.now]
        assert self.pool.expire(self.now) == len(due)
        for lease_id in due:
            del self.leases[lease_id]
        self.drop_names()

    @precondition(lambda self: any(self.refs[b] == 1 for b in self.private()))
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from([b for b in self.private() if self.refs[b] == 1]))
        self.pool.retire([block_id])
        self.refs[block_id] = 0
        self.retired.add(block_id)

    @precondition(lambda self: self.retired)
    @rule()
    def unretire(self) -> None:
        self.pool.unretire(sorted(self.retired))
        self.retired.clear()

    @rule()
    def drain(self) -> None:
        self.told = apply(self.pool.take_events(), self.told)
        assert self.told == {key for key, (_, _, announced) in self.names.items() if announced}
        assert self.pool.take_published() == self.published
        self.published = []

    @rule()
    def clear(self) -> None:
        self.pool.clear_cached()
        leased = self.leased_keys()
        for key, (block_id, _, announced) in list(self.names.items()):
            if announced and not self.refs.get(block_id) and key not in leased:
                del self.names[key]

    @invariant()
    def everything_agrees(self) -> None:
        self.pool.check()
        assert {key for key in self.names if self.pool.contains(key)} == set(self.names)
        stats = self.pool.stats()
        assert stats.referenced == sum(1 for n in self.refs.values() if n)
        assert stats.retired == len(self.retired)
        assert stats.num_leases == len(self.leases)
        assert stats.allocatable == self.NUM_BLOCKS - len(self.busy_blocks())
        assert apply(self.pool.snapshot(), set()) == {k for k, (_, _, announced) in self.names.items() if announced}


BlockPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase
