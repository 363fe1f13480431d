"""Every block of one arena: who references it, who leases it, what it is called, and what the world must be told.

Owns the free list, references, keys, leases, the LRU order and the outbox of KV events, under one lock that every
method takes (an engine thread and a transfer thread share a pool). Never touches the blocks' bytes, sockets or clocks.

A block is in exactly one class:

    FREE        no reference, no key, no lease
    REFERENCED  somebody holds it (a sequence, a fetch that writes it)
    CACHED      no reference, an announced key; evictable unless leased
    LENT        no reference, an unannounced key, a lease: a hand-over block that a sink may still be reading
    RETIRED     a transport might still write into it

`free + referenced + cached + lent + retired == num_blocks` (`check`). A lease only forbids eviction and reuse.

Eviction: the least recently used cached block that has no announced child goes first, so a chain goes from its tail to
its head and nothing unreachable stays behind. Only when every evictable block has children that can't go (they are
referenced or leased) does the least recently used of those go before its children.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvpool.keys import KEY_BYTES, Key
from protos.control import Tier
from protos.kv_events import BlockRemoved, BlockStored, Event

BlockId = int
"""Index of a slab in one arena."""

MAX_HASHES_PER_EVENT = 4096
"""Merging stops here, so that a publisher can cut its batches between events."""


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What is known of a published block. `parent` is the key before it in its chain, the root for a first block."""

    block_id: BlockId
    key: Key
    parent: Key
    num_tokens: int
    checksum: bytes
    announced: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """A promise that `keys` stay readable until `expires_at_s` (the pool's owner's clock)."""

    lease_id: int
    keys: tuple[Key, ...]
    expires_at_s: float


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks by class, and totals since the pool was made. `leased` counts blocks under a lease, of any class;
    `allocatable` is what `allocate` could give now."""

    num_blocks: int
    free: int
    referenced: int
    cached: int
    lent: int
    retired: int
    leased: int
    allocatable: int
    num_leases: int
    evicted_total: int
    expired_leases_total: int


class BlockPool:
    """The blocks of one arena. Every method is atomic; hold `lock` to make several so.

    With `keep_events=False` nothing collects in the outboxes (a pool that nobody publishes for).
    """

    def __init__(self, num_blocks: int, block_size: int, medium: Tier, *, keep_events: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks; must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.medium: Tier = medium
        self.lock = threading.RLock()
        self._free: list[BlockId] = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._num_leases = [0] * num_blocks
        self._records: list[BlockRecord | None] = [None] * num_blocks
        self._used_at = [0] * num_blocks
        self._by_key: dict[Key, BlockId] = {}
        self._num_children: dict[Key, int] = {}
        self._evictable: set[BlockId] = set()
        self._leaves: list[tuple[int, BlockId]] = []
        self._retired: set[BlockId] = set()
        self._lent: set[BlockId] = set()
        self._num_referenced = 0
        self._num_leased_blocks = 0
        self._leases: dict[int, Lease] = {}
        self._expiries: list[tuple[float, int]] = []
        self._next_lease_id = 1
        self._tick = 0
        self._evicted_total = 0
        self._expired_total = 0
        self._keep_events = keep_events
        self._events: list[Event] = []
        self._open_chains: dict[Key, BlockStored] = {}
        self._published: list[Key] = []

    # --- references -------------------------------------------------------------------------------------------------

    def allocate(self, num_blocks: int) -> list[BlockId] | None:
        """Private blocks for writing, one reference each; evicts as the module says. None if there is not enough room;
        then nothing was evicted. Their bytes are whatever they were."""
        with self.lock:
            if num_blocks > len(self._free) + len(self._evictable):
                return None
            while len(self._free) < num_blocks:
                self._evict(self._pick_victim())
            taken = [self._free.pop() for _ in range(num_blocks)]
            for block_id in taken:
                self._refs[block_id] = 1
            self._num_referenced += num_blocks
            return taken

    def retain(self, block_ids: Sequence[BlockId]) -> None:
        """One more reference on each; they must be referenced already (`match` is how to get at others)."""
        with self.lock:
            for block_id in block_ids:
                assert self._refs[block_id] > 0, f"retain of block {block_id}, which nobody references"
                self._refs[block_id] += 1

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """One reference less on each. At none, an announced block becomes cached; another is freed without leases."""
        with self.lock:
            self._tick += 1
            for block_id in block_ids:
                assert self._refs[block_id] > 0, f"release of block {block_id}, which nobody references"
                self._refs[block_id] -= 1
                if self._refs[block_id] == 0:
                    self._num_referenced -= 1
                    self._used_at[block_id] = self._tick
                    self._settle(block_id)

    def is_shared(self, block_id: BlockId) -> bool:
        """Whether more than one reference is on the block: then whoever writes to it copies it first."""
        with self.lock:
            return self._refs[block_id] > 1

    def retire(self, block_ids: Sequence[BlockId]) -> None:
        """Quarantines private blocks into which a transport might still write; consumes the caller's only reference."""
        with self.lock:
            for block_id in block_ids:
                assert self._refs[block_id] == 1, f"retire of block {block_id} with {self._refs[block_id]} references"
                assert self._records[block_id] is None, f"retire of block {block_id}, which is published"
                self._refs[block_id] = 0
                self._num_referenced -= 1
                self._retired.add(block_id)

    def unretire(self, block_ids: Sequence[BlockId]) -> None:
        """The transport is proven quiet: the blocks are free again."""
        with self.lock:
            for block_id in block_ids:
                self._retired.remove(block_id)
                self._free.append(block_id)

    # --- names ------------------------------------------------------------------------------------------------------

    def publish(
        self, block_id: BlockId, key: Key, parent: Key, num_tokens: int, checksum: bytes, *, announce: bool = True
    ) -> bool:
        """Makes a referenced block findable and immutable. False, and the block stays private, if another holds `key`.

        With `announce` (full blocks only) it goes into the events and stays cached when unreferenced; without, it is
        findable only as long as it is referenced or leased.
        """
        with self.lock:
            assert self._refs[block_id] > 0, f"publish of block {block_id}, which nobody references"
            assert self._records[block_id] is None, f"publish of block {block_id}, which has a key already"
            assert len(key) == KEY_BYTES, f"a key of {len(key)} bytes"
            assert len(checksum) == 8, f"a checksum of {len(checksum)} bytes"
            assert 0 < num_tokens <= self.block_size, f"{num_tokens} tokens in a block of {self.block_size}"
            assert num_tokens == self.block_size or not announce, "a partial block is never announced"
            if key in self._by_key:
                return False
            self._records[block_id] = BlockRecord(block_id, key, parent, num_tokens, checksum, announce)
            self._by_key[key] = block_id
            if announce:
                self._num_children[parent] = self._num_children.get(parent, 0) + 1
            if self._keep_events:
                self._published.append(key)
                if announce:
                    self._tell_stored(key, parent)
            return True

    def match(self, keys: Sequence[Key]) -> list[BlockId]:
        """The blocks of the longest run of leading `keys` that are held; takes a reference on each."""
        with self.lock:
            found: list[BlockId] = []
            for key in keys:
                block_id = self._by_key.get(key)
                if block_id is None:
                    break
                if self._refs[block_id] == 0:
                    self._evictable.discard(block_id)
                    self._lent.discard(block_id)
                    self._num_referenced += 1
                self._refs[block_id] += 1
                found.append(block_id)
            return found

    def lookup(self, key: Key) -> BlockRecord | None:
        """What is known of the block that holds `key`; takes no reference."""
        with self.lock:
            block_id = self._by_key.get(key)
            return None if block_id is None else self._records[block_id]

    def contains(self, key: Key) -> bool:
        with self.lock:
            return key in self._by_key

    # --- leases -----------------------------------------------------------------------------------------------------

    def grant(self, keys: Sequence[Key], duration_s: float, now_s: float) -> Lease | None:
        """Keeps every one of `keys` readable for `duration_s`; None if one of them isn't held."""
        with self.lock:
            unique = tuple(dict.fromkeys(keys))
            if not all(key in self._by_key for key in unique):
                return None
            lease = Lease(self._next_lease_id, unique, now_s + duration_s)
            self._next_lease_id += 1
            self._leases[lease.lease_id] = lease
            heapq.heappush(self._expiries, (lease.expires_at_s, lease.lease_id))
            self._tick += 1
            for key in unique:
                block_id = self._by_key[key]
                self._num_leased_blocks += self._num_leases[block_id] == 0
                self._num_leases[block_id] += 1
                self._used_at[block_id] = self._tick
                self._evictable.discard(block_id)
            return lease

    def end_lease(self, lease_id: int) -> bool:
        """The reader is done. False if that lease is over already."""
        with self.lock:
            lease = self._leases.pop(lease_id, None)
            if lease is None:
                return False
            for key in lease.keys:
                block_id = self._by_key[key]
                self._num_leases[block_id] -= 1
                if self._num_leases[block_id] == 0:
                    self._num_leased_blocks -= 1
                    if self._refs[block_id] == 0:
                        self._lent.discard(block_id)
                        self._settle(block_id)
            return True

    def expire(self, now_s: float) -> int:
        """Ends every lease whose time is over, one by one; returns how many."""
        with self.lock:
            num_ended = 0
            while (due := self.next_expiry()) is not None and due <= now_s:
                num_ended += self.end_lease(heapq.heappop(self._expiries)[1])
            self._expired_total += num_ended
            return num_ended

    def next_expiry(self) -> float | None:
        """When the next lease ends by itself; None without leases."""
        with self.lock:
            while self._expiries and self._expiries[0][1] not in self._leases:
                heapq.heappop(self._expiries)
            return self._expiries[0][0] if self._expiries else None

    # --- what the world is told -------------------------------------------------------------------------------------

    def take_events(self) -> list[Event]:
        """What happened to announced blocks since the last call, in order."""
        with self.lock:
            events, self._events = self._events, []
            self._open_chains.clear()
            return events

    def take_published(self) -> list[Key]:
        """Keys published since the last call, unannounced ones too: parked fetches wake on these."""
        with self.lock:
            published, self._published = self._published, []
            return published

    def snapshot(self) -> list[Event]:
        """Everything announced, as `BlockStored` events, parents before children."""
        with self.lock:
            children: dict[Key, list[Key]] = {}
            heads: list[tuple[Key, Key]] = []
            for record in self._records:
                if record is None or not record.announced:
                    continue
                children.setdefault(record.parent, []).append(record.key)
                above = self._announced(record.parent)
                if above is None:
                    heads.append((record.key, record.parent))
            events: list[Event] = []
            while heads:
                key, parent = heads.pop()
                run = [key]
                while (below := children.get(run[-1])) and len(run) < MAX_HASHES_PER_EVENT:
                    heads.extend((other, run[-1]) for other in below[1:])
                    run.append(below[0])
                else:
                    heads.extend((other, run[-1]) for other in below or [])
                events.append(self._stored(run, parent))
            return events

    def clear_cached(self) -> int:
        """Evicts everything that may be; returns how many blocks."""
        with self.lock:
            num_evicted = len(self._evictable)
            while self._evictable:
                self._evict(self._pick_victim())
            return num_evicted

    def stats(self) -> PoolStats:
        with self.lock:
            num_free, num_retired, num_lent = len(self._free), len(self._retired), len(self._lent)
            return PoolStats(
                num_blocks=self.num_blocks,
                free=num_free,
                referenced=self._num_referenced,
                cached=self.num_blocks - num_free - num_retired - num_lent - self._num_referenced,
                lent=num_lent,
                retired=num_retired,
                leased=self._num_leased_blocks,
                allocatable=num_free + len(self._evictable),
                num_leases=len(self._leases),
                evicted_total=self._evicted_total,
                expired_leases_total=self._expired_total,
            )

    def check(self) -> None:
        """Raises AssertionError unless every block is in exactly one class and all indices agree. O(num_blocks)."""
        with self.lock:
            free = set(self._free)
            assert len(free) == len(self._free), "a block is on the free list twice"
            leased: dict[BlockId, int] = {}
            for lease in self._leases.values():
                for key in lease.keys:
                    assert key in self._by_key, f"lease {lease.lease_id} names a key that is not held"
                    leased[self._by_key[key]] = leased.get(self._by_key[key], 0) + 1
            num_cached = 0
            children: dict[Key, int] = {}
            for block_id in range(self.num_blocks):
                record = self._records[block_id]
                referenced = self._refs[block_id] > 0
                cached = not referenced and record is not None and record.announced
                lent = not referenced and record is not None and not record.announced
                classes = [block_id in free, referenced, cached, lent, block_id in self._retired]
                assert sum(classes) == 1, f"block {block_id} is in classes {classes}"
                assert (block_id in self._lent) == lent, f"block {block_id} in the lent set: {block_id in self._lent}"
                assert self._num_leases[block_id] == leased.get(block_id, 0), f"block {block_id}: leases miscounted"
                assert not lent or block_id in leased, f"block {block_id} is lent without a lease"
                evictable = cached and block_id not in leased
                assert (block_id in self._evictable) == evictable, f"block {block_id}: evictable should be {evictable}"
                num_cached += cached
                if record is not None:
                    assert self._by_key.get(record.key) == block_id, f"the key of block {block_id} leads elsewhere"
                    if record.announced:
                        children[record.parent] = children.get(record.parent, 0) + 1
            num_named = sum(record is not None for record in self._records)
            assert num_named == len(self._by_key), f"{num_named} records, {len(self._by_key)} keys"
            assert children == self._num_children, "child counts are wrong"
            on_heap = set(self._leaves)
            for block_id in self._evictable:
                record = self._records[block_id]
                leaf = record is not None and record.key not in self._num_children
                assert not leaf or (self._used_at[block_id], block_id) in on_heap, f"leaf {block_id} can't be evicted"
            stats = self.stats()
            assert (stats.cached, stats.leased) == (num_cached, len(leased)), f"{stats} is wrong"
            assert stats.free + stats.referenced + stats.cached + stats.lent + stats.retired == self.num_blocks

    # --- inside -----------------------------------------------------------------------------------------------------

    def _announced(self, key: Key) -> BlockRecord | None:
        block_id = self._by_key.get(key)
        record = None if block_id is None else self._records[block_id]
        return record if record is not None and record.announced else None

    def _settle(self, block_id: BlockId) -> None:
        """Puts a block without references into its class."""
        record = self._records[block_id]
        if record is None:
            self._free.append(block_id)
        elif self._num_leases[block_id]:
            if not record.announced:
                self._lent.add(block_id)
        elif record.announced:
            self._evictable.add(block_id)
            self._note_leaf(block_id, record)
        else:
            self._forget(record)

    def _note_leaf(self, block_id: BlockId, record: BlockRecord) -> None:
        if record.key in self._num_children:
            return
        if len(self._leaves) > 4 * self.num_blocks:  # entries of blocks that were used again since
            self._leaves = [entry for entry in set(self._leaves) if self._is_leaf(entry)]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (self._used_at[block_id], block_id))

    def _is_leaf(self, entry: tuple[int, BlockId]) -> bool:
        used_at, block_id = entry
        record = self._records[block_id]
        return (
            block_id in self._evictable
            and self._used_at[block_id] == used_at
            and record is not None
            and record.key not in self._num_children
        )

    def _pick_victim(self) -> BlockId:
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if self._is_leaf(entry):
                return entry[1]
        return min(self._evictable, key=lambda block_id: self._used_at[block_id])

    def _evict(self, block_id: BlockId) -> None:
        record = self._records[block_id]
        assert record is not None
        self._evictable.remove(block_id)
        self._evicted_total += 1
        self._forget(record)
        if self._keep_events:
            self._tell_removed(record.key)

    def _forget(self, record: BlockRecord) -> None:
        """Frees the block of a record that nobody references or leases."""
        del self._by_key[record.key]
        self._records[record.block_id] = None
        self._free.append(record.block_id)
        if not record.announced:
            return
        self._num_children[record.parent] -= 1
        if self._num_children[record.parent] == 0:
            del self._num_children[record.parent]
            above = self._announced(record.parent)
            if above is not None and above.block_id in self._evictable:
                self._note_leaf(above.block_id, above)

    def _stored(self, keys: list[Key], parent: Key) -> BlockStored:
        return BlockStored(list(keys), parent, [], self.block_size, None, self.medium)

    def _tell_stored(self, key: Key, parent: Key) -> None:
        event = self._open_chains.pop(parent, None)
        if event is None or len(event.block_hashes) >= MAX_HASHES_PER_EVENT:
            event = self._stored([key], parent)
            self._events.append(event)
        else:
            event.block_hashes.append(key)
        self._open_chains[key] = event

    def _tell_removed(self, key: Key) -> None:
        self._open_chains.clear()  # a later store must not move before this removal
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and len(last.block_hashes) < MAX_HASHES_PER_EVENT:
            last.block_hashes.append(key)
        else:
            self._events.append(BlockRemoved([key], self.medium))
