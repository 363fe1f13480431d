"""Every block of one arena: who references it, who leases or pins it, what it is called, and which may go.

Owns the free list, references, names, leases, pins and the outbox of KV events, under one lock that every method takes (an
engine thread and a transfer thread share a pool). Never touches the blocks' bytes, sockets or clocks: time is what
`expire` and `grant` were last told.

A block is in exactly one class:

    FREE        no reference, no key
    REFERENCED  somebody holds it (a sequence, a fetch that writes it)
    CACHED      no reference, an announced key; it may be leased or pinned
    LENT        no reference, an unannounced key, a lease or a pin: a hand-over block that a sink may still be reading
    RETIRED     a transport might still write into it

`free + referenced + cached + lent + retired == num_blocks` (`check`). Leases and pins only forbid eviction and reuse.

Eviction takes cached blocks, when `allocate` needs room or they were idle for too long, and keeps the *chain rule*: a block
never goes before the announced blocks after it in its chain, so nothing unreachable stays behind. It may go iff neither
it nor any announced descendant is referenced, leased or pinned (`kvpool/chains.py`; a chain ends where a block isn't
announced here). Which of those goes first, and what quotas and copies elsewhere do to that, is in `kvpool/eviction.py`.

A use, for policies and idle time, is a `match`, a lease granted, a reference given back, or a `restore`, one each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvpool.chains import NO_BLOCK, Chains
from kvpool.eviction import EvictionQueue, Policy, order_of
from kvpool.holds import Holds
from kvpool.keys import Key, digest_of
from kvpool.leases import Lease, LeaseTable
from kvpool.names import BlockId, BlockRecord, Names
from kvpool.outbox import Outbox
from protos.control import NOBODY, Tier, TierHoldings
from protos.kv_events import Event

__all__ = ["BlockId", "BlockPool", "BlockRecord", "Lease", "PoolStats", "Restored"]

MAX_CHECKED_BLOCKS = 65_536
"""Checking more in an audit would hold the pool up for some tenths of a second."""

Restored = tuple[BlockId, Key, Key, int, bytes, bytes, bytes]
"""What `restore` takes: block_id, key, parent, num_tokens, checksum, writer, owner, as in `BlockRecord`."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks by class, and totals since the pool was made. `leased` and `pinned` count blocks of any class; `allocatable` is
    what `allocate` could give now. `dropped_total` are evicted blocks of which no keeper had a copy although some keeper
    was known."""

    num_blocks: int
    free: int
    referenced: int
    cached: int
    lent: int
    retired: int
    leased: int
    pinned: int
    allocatable: int
    num_leases: int
    evicted_total: int
    dropped_total: int
    expired_leases_total: int
    granted_leases_total: int


class BlockPool:
    """The blocks of one arena. Every method is atomic; hold `lock` to make several so.

    With `keep_events=False` nothing collects in the outbox (a pool that nobody publishes for). `quota` is the fraction of all
    blocks that one owner's cached blocks may take while others need room; `ttl_s` is what `expire_idle` goes by.
    Raises ValueError on what makes no pool.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        medium: Tier,
        *,
        keep_events: bool = True,
        policy: Policy = "lru",
        quota: float = 1.0,
        ttl_s: float | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks; must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.medium: Tier = medium
        self.lock = threading.RLock()
        self._free: list[BlockId] = list(range(num_blocks - 1, -1, -1))
        self._refs = Holds(num_blocks, "reference")
        self._names = Names(num_blocks)
        self._lent: set[BlockId] = set()
        self._retired: set[BlockId] = set()
        self._pins = Holds(num_blocks, "pin")
        self._leases = LeaseTable(num_blocks)
        self._chains = Chains(num_blocks)
        self._queue = EvictionQueue(num_blocks, self._chains, order_of(policy, num_blocks), quota, ttl_s)
        self._outbox = Outbox(block_size, medium) if keep_events else None
        self._ttl_s = ttl_s
        self._evicted_total = 0
        self._dropped_total = 0
        self._expired_total = 0
        self._num_kept_losses = 0

    # --- references -------------------------------------------------------------------------------------------------

    def allocate(self, num_blocks: int) -> list[BlockId] | None:
        """Private blocks for writing, one reference each; evicts as the module says. None if there is not enough room;
        then nothing was evicted. Their bytes are whatever they were."""
        with self.lock:
            if num_blocks > self._chains.num_unblocked:
                return None
            while len(self._free) < num_blocks:
                victim = self._queue.lowest()
                assert victim is not None, "blocks that may go, but no leaf"
                self._queue.order.evicted(victim)
                self._evict(victim)
            taken = [self._free.pop() for _ in range(num_blocks)]
            self._chains.block(self._refs.add(taken))
            return taken

    def retain(self, block_ids: Sequence[BlockId]) -> None:
        """One more reference on each; they must be referenced already (`match` is how to get at others)."""
        with self.lock:
            fresh = self._refs.add(block_ids)
            assert not fresh, f"retain of blocks {fresh}, which nobody references"

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """One reference less on each. At none, an announced block becomes cached; another is freed without leases or pins."""
        with self.lock:
            unheld = self._refs.remove(block_ids)
            self._queue.use(block_ids)
            self._queue.count_cached(unheld, 1)
            self._settle(self._chains.unblock(unheld))
            if self._names.unannounced:
                self._lent |= self._names.unannounced.intersection(unheld)

    def is_shared(self, block_id: BlockId) -> bool:
        """Whether more than one reference is on the block: then whoever writes to it copies it first."""
        with self.lock:
            return self._refs.counts[block_id] > 1

    def retire(self, block_ids: Sequence[BlockId]) -> None:
        """Quarantines private blocks into which a transport might still write; consumes the caller's only reference."""
        with self.lock:
            for block_id in block_ids:
                count = self._refs.counts[block_id]
                assert count == 1, f"retire of block {block_id} with {count} references"
                assert self._names.records[block_id] is None, f"retire of block {block_id}, which is published"
            self._retired.update(self._refs.remove(block_ids))  # what blocked them goes on doing so

    # --- names ------------------------------------------------------------------------------------------------------

    def publish(
        self,
        block_id: BlockId,
        key: Key,
        parent: Key,
        num_tokens: int,
        checksum: bytes,
        *,
        announce: bool = True,
        writer: bytes = NOBODY,
        owner: bytes = NOBODY,
    ) -> bool:
        """Makes a referenced block findable and immutable. False, and the block stays private, if another holds `key`.

        With `announce` (full blocks only) it goes into the events and stays cached when unreferenced; without, it is
        findable only as long as it is referenced, leased or pinned. `writer` and `owner` are `BlockRecord`'s.

        Whoever kept a private duplicate and then publishes what follows it blocks the other's eviction for nothing: it should
        take the other (`match`) and release its own.
        """
        with self.lock:
            assert self._refs.counts[block_id], f"publish of block {block_id}, which nobody references"
            assert num_tokens <= self.block_size, f"{num_tokens} tokens in a block of {self.block_size}"
            assert num_tokens == self.block_size or not announce, "a partial block is never announced"
            if key in self._names.by_key:
                return False
            self._name(BlockRecord(block_id, key, parent, num_tokens, checksum, announce, writer, owner))
            if self._outbox is not None:
                self._outbox.published(key, parent, announce)
            return True

    def restore(self, entries: Iterable[Restored]) -> list[BlockId]:
        """Publishes what free blocks hold already (a tier that outlived its process): announced and cached at once, each used
        once, later entries later. Returns the blocks that stay free because their key is held elsewhere."""
        with self.lock:
            free = set(self._free)
            refused: list[BlockId] = []
            restored: list[BlockRecord] = []
            for block_id, key, parent, num_tokens, checksum, writer, owner in entries:
                assert block_id in free, f"restore of block {block_id}, which isn't free"
                assert num_tokens == self.block_size, f"{num_tokens} tokens in a restored block of {self.block_size}"
                if key in self._names.by_key:
                    refused.append(block_id)
                    continue
                free.remove(block_id)
                record = BlockRecord(block_id, key, parent, num_tokens, checksum, True, writer, owner)
                self._name(record)
                self._queue.use((block_id,))
                restored.append(record)
            self._free = [block_id for block_id in self._free if block_id in free]
            block_ids = [record.block_id for record in restored]
            self._queue.count_cached(block_ids, 1)
            self._settle(block_id for block_id in block_ids if self._chains.is_leaf(block_id))
            if self._outbox is not None:
                self._outbox.restored([(record.key, record.parent) for record in restored])
            return refused

    def match(self, keys: Sequence[Key]) -> list[BlockId]:
        """The blocks of the longest run of leading `keys` that are held; takes a reference on each."""
        with self.lock:
            find = self._names.by_key.get
            found: list[BlockId] = []
            for key in keys:
                block_id = find(key)
                if block_id is None:
                    break
                found.append(block_id)
            unheld = self._refs.add(found)
            self._queue.use(found)
            self._queue.count_cached(unheld, -1)
            self._chains.block(unheld)
            if self._lent:
                self._lent.difference_update(unheld)
            return found

    def lookup(self, key: Key) -> BlockRecord | None:
        """What is known of the block that holds `key`; takes no reference."""
        with self.lock:
            block_id = self._names.by_key.get(key)
            return None if block_id is None else self._names.records[block_id]

    def lookup_all(self, keys: Iterable[Key]) -> list[BlockRecord]:
        """What is known of the blocks that hold those of `keys` that are held, in that order; takes no references."""
        with self.lock:
            return [self._names.record(block_id) for block_id in self._names.holders(keys)]

    def contains(self, key: Key) -> bool:
        with self.lock:
            return key in self._names.by_key

    # --- leases and pins --------------------------------------------------------------------------------------------

    def grant(self, keys: Sequence[Key], duration_s: float, now_s: float) -> Lease | None:
        """Keeps every one of `keys` readable for `duration_s`; None if one of them isn't held."""
        with self.lock:
            block_ids = self._names.holders(unique := tuple(dict.fromkeys(keys)))
            if len(block_ids) < len(unique):
                return None
            self._queue.advance(now_s)
            lease, newly_leased = self._leases.add(unique, block_ids, now_s + duration_s)
            self._queue.use(block_ids)
            self._chains.block(newly_leased)
            return lease

    def end_lease(self, lease_id: int) -> bool:
        """The reader is done. False if that lease is over already."""
        with self.lock:
            freed = self._leases.end(lease_id)
            if freed is None:
                return False
            self._settle(self._chains.unblock(freed))
            return True

    def expire(self, now_s: float) -> int:
        """Ends every lease whose time is over, one by one; returns how many. Uses from now on count as of `now_s`."""
        with self.lock:
            self._queue.advance(now_s)
            num_ended = 0
            while (due := self._leases.next_expiry()) is not None and due[0] <= now_s:
                num_ended += self.end_lease(due[1])
            self._expired_total += num_ended
            return num_ended

    def next_expiry(self) -> float | None:
        """When the next lease ends by itself; None without leases."""
        with self.lock:
            due = self._leases.next_expiry()
            return None if due is None else due[0]

    def pin(self, keys: Sequence[Key]) -> list[Key]:
        """Holds the blocks of `keys` against eviction until as many `unpin`s; returns the keys that aren't held here, which are
        not pinned."""
        with self.lock:
            self._chains.block(self._pins.add(self._names.holders(keys)))
            return [key for key in keys if key not in self._names.by_key]

    def unpin(self, keys: Sequence[Key]) -> list[Key]:
        """Takes back one `pin` of each; returns the keys that weren't pinned."""
        with self.lock:
            not_pinned: list[Key] = []
            let_go: list[BlockId] = []
            for key in keys:
                block_id = self._names.by_key.get(key, NO_BLOCK)
                if block_id < 0 or not self._pins.counts[block_id]:
                    not_pinned.append(key)
                else:
                    let_go += self._pins.remove((block_id,))
            self._settle(self._chains.unblock(let_go))
            return not_pinned

    # --- copies elsewhere -------------------------------------------------------------------------------------------

    def mark_kept(self, keys: Sequence[Key], by: int) -> None:
        """The pool node `by` (0 to 31) holds copies of `keys`. Keys that aren't held here are passed over, and a mark goes with
        its block: whoever holds a copy of a key that is published again says so again. Raises ValueError on another `by`."""
        with self.lock:
            self._queue.keepers.mark(self._names.holders(keys), by)

    def unmark_kept(self, keys: Sequence[Key], by: int) -> None:
        """The pool node `by` holds no copies of `keys` any more."""
        with self.lock:
            self._queue.keepers.unmark(self._names.holders(keys), by)
            self._num_kept_losses += 1

    def forget_keeper(self, by: int) -> None:
        """The pool node `by` is gone, with all its copies. O(num_blocks)."""
        with self.lock:
            self._queue.keepers.forget(by)
            self._num_kept_losses += 1

    @property
    def num_kept_losses(self) -> int:
        """How many times pool nodes lost copies: what `num_kept` said before such a time may be too much now."""
        return self._num_kept_losses

    @property
    def has_keepers(self) -> bool:
        """Whether some pool node keeps copies of blocks of this pool."""
        return self._queue.keepers.known != 0

    def num_kept(self, block_ids: Sequence[BlockId], start: int = 0) -> int:
        """How many of `block_ids` from `start` on, without a gap, are kept by some pool node."""
        with self.lock:
            masks = self._queue.keepers.masks
            end = start
            while end < len(block_ids) and masks[block_ids[end]]:
                end += 1
            return end - start

    # --- eviction ---------------------------------------------------------------------------------------------------

    def coldest(self, num_blocks: int) -> list[BlockRecord]:
        """The next victims (fewer if fewer may go), in the order in which `allocate` would take them if nothing else happened.
        O(num_blocks asked for, times the logarithm of all)."""
        with self.lock:
            gone: list[BlockRecord] = []
            while len(gone) < num_blocks and (block_id := self._queue.lowest()) is not None:
                record = self._names.record(block_id)
                self._queue.discard(block_id)
                self._queue.count_cached((block_id,), -1)
                parent_id = self._chains.unlink(block_id, record.parent)
                if parent_id >= 0:
                    self._queue.add(parent_id)
                gone.append(record)
            for record in gone:
                self._chains.link(record.block_id, record.key, record.parent, self._names.announced_at(record.parent))
                self._queue.count_cached((record.block_id,), 1)
            self._settle(record.block_id for record in gone)
            return gone

    def expire_idle(self, now_s: float, max_blocks: int = 1024) -> tuple[int, float | None]:
        """Evicts blocks that were not used for `ttl_s`, children first, up to `max_blocks`; returns how many, and when to call
        again: `now_s` if more are due, None without `ttl_s`. What a lease or a pin holds is late by as long."""
        with self.lock:
            self._queue.advance(now_s)
            num_evicted = 0
            while (idle := self._queue.most_idle()) is not None and idle[0] <= now_s and num_evicted < max_blocks:
                self._evict(idle[1])
                num_evicted += 1
            if idle is not None:
                return num_evicted, max(idle[0], now_s)
            return num_evicted, None if self._ttl_s is None else now_s + self._ttl_s

    def evict(self, keys: Iterable[Key]) -> list[Key]:
        """Evicts those of `keys` (bad blocks, say) that may go and are the last announced of their chains when their turn
        comes; returns them."""
        with self.lock:
            gone: list[Key] = []
            for key in keys:
                block_id = self._names.announced_at(key)
                if block_id >= 0 and self._chains.is_leaf(block_id):
                    self._evict(block_id)
                    gone.append(key)
            return gone

    def clear_cached(self) -> int:
        """Evicts everything that may be; returns how many blocks."""
        with self.lock:
            before = self._evicted_total
            while (block_id := self._queue.lowest()) is not None:
                self._evict(block_id)
            return self._evicted_total - before

    # --- what the world is told -------------------------------------------------------------------------------------

    def take_events(self) -> list[Event]:
        """What happened to announced blocks since the last call, in order."""
        with self.lock:
            return [] if self._outbox is None else self._outbox.take_events()

    def take_published(self) -> list[Key]:
        """Keys published since the last call, unannounced ones too: parked fetches wake on these."""
        with self.lock:
            return [] if self._outbox is None else self._outbox.take_published()

    def snapshot(self) -> list[Event]:
        """Everything announced, as `BlockStored` events, parents before children."""
        with self.lock:
            outbox = self._outbox or Outbox(self.block_size, self.medium)
            records = (record for record in self._names.records if record is not None and record.announced)
            return list(outbox.in_chains((record.key, record.parent) for record in records))

    def stats(self) -> PoolStats:
        with self.lock:
            num_free, num_retired, num_lent = len(self._free), len(self._retired), len(self._lent)
            num_referenced = self._refs.num_held
            return PoolStats(
                num_blocks=self.num_blocks,
                free=num_free,
                referenced=num_referenced,
                cached=self.num_blocks - num_free - num_retired - num_lent - num_referenced,
                lent=num_lent,
                retired=num_retired,
                leased=self._leases.holds.num_held,
                pinned=self._pins.num_held,
                allocatable=self._chains.num_unblocked,
                num_leases=len(self._leases),
                evicted_total=self._evicted_total,
                dropped_total=self._dropped_total,
                expired_leases_total=self._expired_total,
                granted_leases_total=self._leases.num_granted,
            )

    def holdings(self, now_s: float) -> TierHoldings:
        """What an audit wants to know, of one moment. O(num_blocks); a pool of more than `MAX_CHECKED_BLOCKS` isn't checked."""
        with self.lock:
            stats = self.stats()
            keys = [key for key, block_id in self._names.by_key.items() if block_id not in self._names.unannounced]
            first_s, last_s = self._leases.times() or (now_s, now_s)
            fault = ""
            if self.num_blocks <= MAX_CHECKED_BLOCKS:
                try:
                    self.check()
                except AssertionError as error:
                    fault = str(error)[:512] or "check failed"
            return TierHoldings(
                tier=self.medium,
                num_blocks=self.num_blocks,
                free=stats.free,
                referenced=stats.referenced,
                cached=stats.cached,
                lent=stats.lent,
                retired=stats.retired,
                leased=stats.leased,
                pinned=stats.pinned,
                num_leases=stats.num_leases,
                lease_left_s=max(0.0, last_s - now_s),
                lease_overdue_s=max(0.0, now_s - first_s),
                num_keys=len(keys),
                digest=digest_of(keys),
                fault=fault,
            )

    def check(self) -> None:
        """Raises AssertionError unless every block is in exactly one class and all indices agree. O(num_blocks), and owners."""
        with self.lock:
            free = set(self._free)
            assert len(free) == len(self._free), "a block is on the free list twice"
            self._names.check()
            self._refs.check()
            self._pins.check()
            self._leases.check(self._names.by_key)
            holds: list[int] = []
            announced: dict[BlockId, BlockRecord] = {}
            cached: set[BlockId] = set()
            for block_id, record in enumerate(self._names.records):
                referenced, retired = self._refs.counts[block_id] > 0, block_id in self._retired
                leased, pinned = self._leases.holds.counts[block_id] > 0, self._pins.counts[block_id] > 0
                lent = record is not None and not record.announced and not referenced
                if record is not None and record.announced:
                    announced[block_id] = record
                    if not referenced:
                        cached.add(block_id)
                classes = [block_id in free, referenced, block_id in cached, lent, retired]
                assert sum(classes) == 1, f"block {block_id} is in classes {classes}"
                assert (block_id in self._lent) == lent, f"block {block_id} in the lent set: {block_id in self._lent}"
                assert not lent or leased or pinned, f"block {block_id} is lent to nobody"
                kept = self._queue.keepers.masks[block_id] != 0
                assert record or not (leased or pinned or kept), f"block {block_id} has no key, but more than it may"
                holds.append(referenced + retired + leased + pinned)
            by_key = {record.key: block_id for block_id, record in announced.items()}
            self._chains.check(holds, by_key, {block_id: record.parent for block_id, record in announced.items()})
            leaves = [block_id for block_id in announced if self._chains.is_leaf(block_id)]
            self._queue.check(leaves, cached, {block_id: record.owner for block_id, record in announced.items()})
            stats = self.stats()
            assert stats.cached == len(cached), f"{stats}, but {len(cached)} blocks are cached"

    # --- inside -----------------------------------------------------------------------------------------------------

    def _name(self, record: BlockRecord) -> None:
        self._names.add(record)
        if record.announced:
            self._queue.enter(record.block_id, record.owner)
            self._chains.link(record.block_id, record.key, record.parent, self._names.announced_at(record.parent))

    def _settle(self, block_ids: Iterable[BlockId]) -> None:
        """Blocks that nothing holds any more go where they belong."""
        num_children = self._chains.num_children
        for block_id in block_ids:
            if num_children[block_id]:
                continue
            record = self._names.records[block_id]
            if record is None:
                self._free.append(block_id)
            elif record.announced:
                self._queue.add(block_id)
            else:
                self._lent.discard(block_id)
                self._forget(record)

    def _evict(self, block_id: BlockId) -> None:
        queue, record = self._queue, self._names.records[block_id]
        assert record is not None, f"eviction of block {block_id}, which has no key"
        kept = queue.keepers.kept
        if kept is not None and not kept[block_id]:
            self._dropped_total += 1
        self._evicted_total += 1
        queue.leave(block_id)
        parent_id = self._chains.unlink(block_id, record.parent)
        if parent_id >= 0:
            queue.add(parent_id)
        self._forget(record)
        if self._outbox is not None:
            self._outbox.removed(record.key)

    def _forget(self, record: BlockRecord) -> None:
        self._names.remove(record)
        self._queue.keepers.masks[record.block_id] = 0
        self._free.append(record.block_id)
