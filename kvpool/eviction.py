"""In which order cached blocks go: by policy, owner, copies kept elsewhere, and idle time.

Owns the policies (`Lru`, `LfuAged`), the marks of copies that pool nodes keep (`Keepers`), and the queue of *leaves*: announced
blocks that may go now because nothing holds them and nothing announced hangs on them (`kvpool/chains.py` says which those
are). Only leaves are ever chosen, so a parent never goes before its children, whatever the rules below say:

1. While some owner has more cached blocks than the quota, only leaves of such owners are chosen from, if they have any.
2. Among these the lowest score goes first.
3. While keepers are known, the first of the `LOOK_AHEAD` lowest that somebody keeps goes before the others.

Never frees anything itself, and knows neither keys nor clocks. Not thread-safe: its pool's lock covers it.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

from kvpool.chains import Chains

Policy = Literal["lru", "lfu"]

LOOK_AHEAD = 32
"""So many of the lowest leaves are searched for one that is kept elsewhere."""

MAX_KEEPERS = 32
"""Keepers are numbered below this."""

_NOT_QUEUED = math.inf
_TICK_BITS = 40


class EvictionOrder(Protocol):
    """What a policy is: a score per block, made when the block is used. The lowest leaf goes first."""

    @property
    def scores(self) -> Sequence[int]:
        """`[num_blocks]`, always the same object. A block's score only rises while it keeps its key."""

    def begin(self, block_id: int) -> None:
        """The block got a key: what it held before no longer counts."""

    def use(self, block_ids: Iterable[int]) -> None:
        """The blocks are used once more, in one go."""

    def evicted(self, block_id: int) -> None:
        """The block made room for others."""


class Lru:
    """Least recently used first: the score is the number of the last use."""

    __slots__ = ("_tick", "scores")

    def __init__(self, num_blocks: int) -> None:
        self.scores = [0] * num_blocks
        self._tick = 0

    def begin(self, block_id: int) -> None:
        pass

    def use(self, block_ids: Iterable[int]) -> None:
        self._tick += 1
        scores, tick = self.scores, self._tick
        for block_id in block_ids:
            scores[block_id] = tick

    def evicted(self, block_id: int) -> None:
        pass


class LfuAged:
    """Least frequently used first, with dynamic aging: a block's value is its uses plus the value of the last block that made
    room, as of its last use, so blocks that were popular once don't stay for ever. Ties go to the least recently used.

    LFUDA of Arlitt, Cherkasova, Dilley, Friedrich, Jin, "Evaluating Content Management Techniques for Web Proxy Caches",
    ACM SIGMETRICS Performance Evaluation Review 27(4), 2000. The value that ages never sinks here: quotas and kept
    copies may make a block go that isn't the lowest.
    """

    __slots__ = ("_age", "_hits", "_tick", "scores")

    def __init__(self, num_blocks: int) -> None:
        self.scores = [0] * num_blocks
        self._hits = [0] * num_blocks
        self._tick = 0
        self._age = 0

    def begin(self, block_id: int) -> None:
        self._hits[block_id] = 0

    def use(self, block_ids: Iterable[int]) -> None:
        self._tick += 1
        scores, hits, tick, age = self.scores, self._hits, self._tick, self._age
        for block_id in block_ids:
            hits[block_id] += 1
            scores[block_id] = (hits[block_id] + age) << _TICK_BITS | tick

    def evicted(self, block_id: int) -> None:
        self._age = max(self._age, self.scores[block_id] >> _TICK_BITS)


def order_of(policy: Policy, num_blocks: int) -> EvictionOrder:
    """The policy of that name. Raises ValueError if there is none."""
    if policy == "lru":
        return Lru(num_blocks)
    if policy == "lfu":
        return LfuAged(num_blocks)
    raise ValueError(f"eviction policy {policy!r} is neither 'lru' nor 'lfu'")


class Keepers:
    """Which pool nodes keep a copy of which block: per block a set of small numbers, as bits."""

    __slots__ = ("kept", "known", "masks")

    def __init__(self, num_blocks: int) -> None:
        self.masks = [0] * num_blocks
        self.known = 0
        self.kept: Sequence[int] | None = None
        """`masks`, or None while no keeper is known."""

    def mark(self, block_ids: Iterable[int], by: int) -> None:
        bit = self._bit(by)
        self.known |= bit
        self.kept = self.masks
        for block_id in block_ids:
            self.masks[block_id] |= bit

    def unmark(self, block_ids: Iterable[int], by: int) -> None:
        bit = self._bit(by)
        for block_id in block_ids:
            self.masks[block_id] &= ~bit

    def forget(self, by: int) -> None:
        """That keeper is gone, and its copies with it. O(num_blocks) if it was known."""
        bit = self._bit(by)
        if self.known & bit:
            self.known &= ~bit
            self.kept = self.masks if self.known else None
            self.unmark(range(len(self.masks)), by)

    @staticmethod
    def _bit(by: int) -> int:
        if not 0 <= by < MAX_KEEPERS:
            raise ValueError(f"keeper {by} is not within 0 to {MAX_KEEPERS - 1}")
        return 1 << by


class LeafHeap:
    """Leaves, lowest score first.

    A block has one entry that counts, `queued[block]`; it is added when the block becomes a leaf and may be out of date: its
    score a lower bound, the block no leaf any more. Whoever comes across an entry puts it right, so using a block that
    is queued costs nothing. Heaps whose blocks are distinct may share `queued`.
    """

    __slots__ = ("_blockers", "_bound", "_heap", "_near", "_num_children", "_scores", "queued")

    def __init__(self, chains: Chains, scores: Sequence[float], queued: list[float]) -> None:
        self.queued = queued
        self._blockers = chains.blockers
        self._num_children = chains.num_children
        self._scores = scores
        self._heap: list[tuple[float, int]] = []
        self._near: list[tuple[float, int]] = []  # the lowest entries, sorted, while they are searched for kept ones
        self._bound = 64

    def add(self, block_id: int) -> None:
        """The block is a leaf now."""
        if self.queued[block_id] != _NOT_QUEUED:
            return
        score = self.queued[block_id] = self._scores[block_id]
        heapq.heappush(self._heap, (score, block_id))
        if len(self._heap) > self._bound:  # drop entries that don't count any more: they may be most
            self._heap[:] = {entry for entry in self._heap if entry[0] == self.queued[entry[1]]}
            heapq.heapify(self._heap)
            self._bound = 2 * len(self._heap) + 64

    def lowest(self, kept: Sequence[int] | None = None) -> int | None:
        """The leaf that goes first, None without leaves; it stays queued. With `kept`, the first of the `LOOK_AHEAD` lowest for
        which that is not 0, if there is one. O(log n), amortised over changes."""
        near, heap = self._near, self._heap
        while near and not self._counts(near[0]):
            del near[0]
        while heap:
            score, block_id = heap[0]
            if score == self.queued[block_id] and self._counts(heap[0]):
                break
            heapq.heappop(heap)
        if near and not (heap and heap[0] < near[0]):
            first = near[0][1]
        elif heap:
            first = heap[0][1]
        else:
            return None
        if kept is None or kept[first]:
            return first
        near[:] = [entry for entry in near if self._counts(entry)]
        while heap and (len(near) < LOOK_AHEAD or heap[0] < near[-1]):
            entry = heapq.heappop(heap)
            if self._counts(entry) and entry not in near:
                insort(near, entry)
                if len(near) > LOOK_AHEAD:
                    heapq.heappush(heap, near.pop())
        return next((block_id for _, block_id in near if kept[block_id]), first)

    def _counts(self, entry: tuple[float, int]) -> bool:
        """Whether the entry is up to date; if not it must be dropped, and another is queued where the block is a leaf."""
        score, block_id = entry
        if score != self.queued[block_id]:
            return False
        if self._blockers[block_id] or self._num_children[block_id]:
            self.queued[block_id] = _NOT_QUEUED
            return False
        if score != self._scores[block_id]:
            score = self.queued[block_id] = self._scores[block_id]
            heapq.heappush(self._heap, (score, block_id))
            return False
        return True

    def check(self, leaves: Iterable[int]) -> None:
        """Raises AssertionError unless each of `leaves` will be found here."""
        entries = {*self._heap, *self._near}
        for block_id in leaves:
            entry = (self.queued[block_id], block_id)
            assert entry in entries, f"leaf {block_id} can't be found"
            assert entry[0] <= self._scores[block_id], f"leaf {block_id} will be found too late"


class _Owner:
    """One owner's announced blocks, and those of its leaves that are queued."""

    __slots__ = ("leaves", "name", "num_blocks", "num_cached")

    def __init__(self, name: bytes, leaves: LeafHeap) -> None:
        self.name = name
        self.leaves = leaves
        self.num_blocks = 0
        self.num_cached = 0


class EvictionQueue:
    """Every leaf of a pool, by the rules of this module and by idle time.

    `quota` (0 < quota <= 1) is a fraction of all blocks; with 1 owners aren't told apart. With `ttl_s` idle time is kept, in
    the time of `advance`: uses count as of the last one, uses before the first as of the first.
    """

    def __init__(
        self, num_blocks: int, chains: Chains, order: EvictionOrder, quota: float, ttl_s: float | None
    ) -> None:
        if not 0 < quota <= 1:
            raise ValueError(f"a quota of {quota} of the pool; must be over 0 and at most 1")
        if ttl_s is not None and not ttl_s > 0:
            raise ValueError(f"idle blocks live for {ttl_s} s; must be over 0")
        self.order = order
        self.keepers = Keepers(num_blocks)
        self._chains = chains
        self._leaves = LeafHeap(chains, order.scores, [_NOT_QUEUED] * num_blocks)
        self._queued = [self._leaves.queued]
        self._limit = quota * num_blocks
        self._has_quota = quota < 1
        self._owners: dict[bytes, _Owner] = {}
        self._owner_of: list[_Owner | None] = [None] * num_blocks
        self._over: set[_Owner] = set()
        self._queued_by_owner: list[float] = [_NOT_QUEUED] * num_blocks
        if self._has_quota:
            self._queued.append(self._queued_by_owner)
        self._ttl_s = ttl_s
        self._now_s: float | None = None
        self._used_s = [0.0] * num_blocks
        self._idle = LeafHeap(chains, self._used_s, [_NOT_QUEUED] * num_blocks)
        if ttl_s is not None:
            self._queued.append(self._idle.queued)

    # --- blocks come, are used, and go ------------------------------------------------------------------------------

    def enter(self, block_id: int, owner: bytes) -> None:
        """The block is announced; it isn't cached yet."""
        self.order.begin(block_id)
        if not self._has_quota:
            return
        found = self._owners.get(owner)
        if found is None:
            found = _Owner(owner, LeafHeap(self._chains, self.order.scores, self._queued_by_owner))
            self._owners[owner] = found
        found.num_blocks += 1
        self._owner_of[block_id] = found

    def leave(self, block_id: int) -> None:
        """The block, which is cached, is forgotten."""
        for queued in self._queued:
            queued[block_id] = _NOT_QUEUED
        if not self._has_quota:
            return
        self.count_cached((block_id,), -1)
        owner = self._owner(block_id)
        self._owner_of[block_id] = None
        owner.num_blocks -= 1
        if not owner.num_blocks:
            del self._owners[owner.name]

    def count_cached(self, block_ids: Iterable[int], change: Literal[1, -1]) -> None:
        """Those of the blocks that are announced become cached (1), or are it no longer (-1)."""
        if not self._has_quota:
            return
        for block_id in block_ids:
            owner = self._owner_of[block_id]
            if owner is None:
                continue
            owner.num_cached += change
            if owner.num_cached > self._limit:
                self._over.add(owner)
            else:
                self._over.discard(owner)

    def use(self, block_ids: Sequence[int]) -> None:
        """The blocks are used once more, now."""
        self.order.use(block_ids)
        if self._ttl_s is not None and self._now_s is not None:
            used_s, now_s = self._used_s, self._now_s
            for block_id in block_ids:
                used_s[block_id] = now_s

    def advance(self, now_s: float) -> None:
        """Time goes on; it never goes back."""
        if self._now_s is None:
            self._used_s[:] = [now_s] * len(self._used_s)
            self._now_s = now_s
        self._now_s = max(self._now_s, now_s)

    # --- leaves -----------------------------------------------------------------------------------------------------

    def add(self, block_id: int) -> None:
        """The block is a leaf now."""
        self._leaves.add(block_id)
        if self._has_quota:
            self._owner(block_id).leaves.add(block_id)
        if self._ttl_s is not None:
            self._idle.add(block_id)

    def discard(self, block_id: int) -> None:
        """The block is no leaf any more. (Needed only where what it holds may change: others are noticed.)"""
        for queued in self._queued:
            queued[block_id] = _NOT_QUEUED

    def lowest(self) -> int | None:
        """The leaf that goes first; None without leaves. O(log num_blocks), and each owner over the quota is looked at: there
        are fewer than 1 / quota."""
        kept = self.keepers.kept
        if not self._over:
            return self._leaves.lowest(kept)
        found = [block_id for owner in self._over if (block_id := owner.leaves.lowest(kept)) is not None]
        if not found:
            return self._leaves.lowest(kept)
        scores = self.order.scores
        if kept is not None and any(kept[block_id] for block_id in found):
            found = [block_id for block_id in found if kept[block_id]]
        return min(found, key=lambda block_id: (scores[block_id], block_id))

    def most_idle(self) -> tuple[float, int] | None:
        """When the leaf that wasn't used for the longest time has been idle for `ttl_s`, and which it is. None without leaves
        or `ttl_s`."""
        if self._ttl_s is None or (block_id := self._idle.lowest()) is None:
            return None
        return self._used_s[block_id] + self._ttl_s, block_id

    def check(self, leaves: Sequence[int], cached: set[int], owners: Mapping[int, bytes]) -> None:
        """Raises AssertionError unless everything agrees with which blocks are leaves, which are cached, and the owner of each
        announced one."""
        self._leaves.check(leaves)
        if self._ttl_s is not None:
            self._idle.check(leaves)
        for block_id, mask in enumerate(self.keepers.masks):
            assert not mask & ~self.keepers.known, f"block {block_id} is kept by somebody unknown: {mask:#x}"
        if not self._has_quota:
            return
        found = {block_id: owner.name for block_id, owner in enumerate(self._owner_of) if owner is not None}
        assert found == owners, "owners disagree"
        num_blocks, num_cached = Counter(owners.values()), Counter(owners[block_id] for block_id in cached)
        assert set(self._owners) == set(num_blocks), "owners without blocks, or blocks without owners"
        over = {owner.name for owner in self._over}
        assert over == {name for name, count in num_cached.items() if count > self._limit}, f"over their quota: {over}"
        for name, owner in self._owners.items():
            counts = num_blocks[name], num_cached[name]
            assert (owner.num_blocks, owner.num_cached) == counts, f"blocks of owner {name.hex()} are miscounted"
            owner.leaves.check([block_id for block_id in leaves if owners[block_id] == name])

    def _owner(self, block_id: int) -> _Owner:
        owner = self._owner_of[block_id]
        assert owner is not None, f"block {block_id} has no owner"
        return owner
