"""What decides the order of eviction: policies, and the queue of leaves at scale."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.chains import NO_BLOCK, Chains
from kvpool.eviction import LOOK_AHEAD, EvictionQueue, LfuAged, Lru, Policy, order_of

POLICIES: list[Policy] = ["lru", "lfu"]


def ranked(order: Lru | LfuAged, num_blocks: int) -> list[int]:
    return sorted(range(num_blocks), key=lambda block_id: (order.scores[block_id], block_id))


def queue_of(num_blocks: int, *, quota: float = 1.0, owners: list[bytes] | None = None) -> EvictionQueue:
    """Blocks of chains of one block each, all cached, used in the order of their ids."""
    queue = EvictionQueue(num_blocks, Chains(num_blocks), Lru(num_blocks), quota, None)
    for block_id in range(num_blocks):
        queue.enter(block_id, owners[block_id] if owners else bytes(8))
        queue.use([block_id])
        queue.count_cached([block_id], 1)
        queue.add(block_id)
    return queue


def drain(queue: EvictionQueue) -> list[int]:
    gone = []
    while (block_id := queue.lowest()) is not None:
        queue.leave(block_id)
        gone.append(block_id)
    return gone


def test_lru_ranks_by_the_last_use() -> None:
    order = Lru(4)
    for block_ids in ([0, 1], [2], [3], [0]):
        order.use(block_ids)
    assert ranked(order, 4) == [1, 2, 3, 0]


def test_lfu_ranks_by_uses_and_then_by_the_last_one() -> None:
    order = LfuAged(4)
    for block_ids in ([0], [1], [2], [3], [1], [0], [0]):
        order.use(block_ids)
    assert ranked(order, 4) == [2, 3, 1, 0]


def test_lfu_lets_go_of_what_was_popular_once() -> None:
    order = LfuAged(3)
    for _ in range(5):
        order.use([0])
    num_evictions = 0
    while ranked(order, 3)[0] != 0:
        victim = ranked(order, 3)[0]
        order.evicted(victim)
        order.begin(victim)
        order.use([victim])
        num_evictions += 1
        assert num_evictions < 20, "a block that nobody uses any more stays for ever"
    assert num_evictions >= 5


def test_lfu_forgets_the_uses_of_what_the_block_held_before() -> None:
    order = LfuAged(2)
    order.use([0])
    order.use([0])
    order.begin(0)
    order.use([0])
    order.use([1])
    assert ranked(order, 2) == [0, 1]


@pytest.mark.parametrize("policy", POLICIES)
@given(uses=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=30), victim=st.integers(0, 5))
def test_the_score_of_a_block_never_sinks_while_it_keeps_its_key(
    policy: Policy, uses: list[list[int]], victim: int
) -> None:
    order = order_of(policy, 6)
    before = list(order.scores)
    for block_ids in uses:
        order.use(block_ids)
        order.evicted(victim)
        assert all(new >= old for new, old in zip(order.scores, before, strict=True))
        assert all(order.scores[block_id] > before[block_id] for block_id in block_ids)
        before = list(order.scores)


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'random'"):
        order_of("random", 4)  # type: ignore[arg-type]


def test_owners_over_the_quota_give_in_the_order_of_their_blocks_and_then_everybody_does() -> None:
    owners = [*(b"small %02d" % i for i in range(10)), *[b"large  1"] * 50, *[b"large  2"] * 50]
    gone = drain(queue_of(110, quota=0.3, owners=owners))  # 33 blocks each
    over = [*range(10, 27), *range(60, 77)]
    assert gone == [*over, *sorted(set(range(110)) - set(over))]


@pytest.mark.parametrize("num_kept", [0, 1, 40])
def test_the_search_for_kept_leaves_ends_and_forgets_none(num_kept: int) -> None:
    queue, rng = queue_of(300), random.Random(7)
    kept = set(rng.sample(range(300), num_kept))
    queue.keepers.mark([0], 3)
    queue.keepers.unmark([0], 3)
    queue.keepers.mark(kept, 3)
    left, expected = list(range(300)), []
    while left:
        window = left[:LOOK_AHEAD]
        expected.append(next((block_id for block_id in window if block_id in kept), window[0]))
        left.remove(expected[-1])
    assert drain(queue) == expected


def test_using_blocks_again_and_again_leaves_the_queue_as_small_as_it_is() -> None:
    chains = Chains(8)
    queue = EvictionQueue(8, chains, LfuAged(8), 0.5, 10.0)
    for block_id in range(8):
        queue.enter(block_id, bytes(8))
        chains.link(block_id, b"%16d" % block_id, bytes(16), NO_BLOCK)
    for i in range(5000):
        block_id = i % 8
        chains.block([block_id])
        queue.use([block_id])
        if i % 3 == 0:
            queue.discard(block_id)  # as if it held something else next
        chains.unblock([block_id])
        queue.add(block_id)
    heaps = [queue._leaves, queue._idle, queue._owners[bytes(8)].leaves]
    assert max(len(heap._heap) for heap in heaps) <= 2 * 8 + 65


@pytest.mark.parametrize("order", ["from the head", "from the tail", "shuffled"])
def test_holding_and_letting_go_a_chain_costs_a_step_a_block(order: str) -> None:
    num = 3000
    chains = Chains(num)
    for block_id in range(num):
        chains.link(block_id, b"%16d" % block_id, b"%16d" % (block_id - 1), block_id - 1)
    steps = Counted(chains._parents)
    chains._parents = steps
    block_ids = list(range(num))
    if order == "from the tail":
        block_ids.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(block_ids)
    chains.block(block_ids)
    assert chains.num_unblocked == 0
    assert sorted(chains.unblock(block_ids)) == sorted(block_ids)
    assert chains.num_unblocked == num
    assert steps.num_reads <= 2 * num


class Counted(list[int]):
    """A list that counts how often it is read."""

    num_reads = 0

    def __getitem__(self, index: object) -> int:  # type: ignore[override]
        self.num_reads += 1
        return super().__getitem__(index)  # type: ignore[index]
