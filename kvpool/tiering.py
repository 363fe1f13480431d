"""What moves between the HOST pool and the DISK tier of one node, and when.

Owns the policy: which blocks go down, which come up, how far ahead is read. Never touches bytes; the DISK tier moves them, the
HOST pool holds them, the node tells the world. Called by the node's thread.

Down, by the configured policy:

    write-through   every full block, as soon as it is in HOST
    after-hits      as soon as it was used so many times
    write-back      when HOST runs short of free blocks, the coldest first: those that would be evicted next

Blocks go down in batches: the first waits for others up to `GATHER_S`. What the disk refuses is tried again after `RETRY_S`, and
what its write rate has no room for waits, as long as HOST holds it. Blocks that are being written are pinned, not
referenced: going down is no use of them. While the disk gets on, and its rate isn't limited, whoever copies blocks here waits
for it rather than push out what is about to be written (`has_room`).

Up: what somebody asks for, and then what follows it in its chain, as far as nothing is evicted for it that isn't on disk too.
What HOST has no room for waits until it has; when nothing moves for `UP_PATIENCE_S`, whoever asked is told that it won't come.

Each pool is told of the other: of the blocks that HOST would evict next, those that the disk keeps go first, and what is used
in HOST counts as used on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from kvpool.block_pool import BlockPool, BlockRecord
from kvpool.eviction import MAX_KEEPERS
from kvpool.keys import Key
from kvpool.tiers.disk.requests import Loaded, LoadFailed, LoadRequest, NotStored, Stored
from kvpool.tiers.disk.tier import DiskTier

WritePolicy = Literal["write-through", "after-hits", "write-back"]

GATHER_S = 0.05
GATHER_BLOCKS = 16
RETRY_S = 1.0
MAX_TRIES = 5
CLEAN_PART = 1 / 8
"""Write-back begins when less than this part of HOST is free, and looks at this part of it, or at `CLEAN_BLOCKS`."""
CLEAN_BLOCKS = 512
UP_PATIENCE_S = 1.5
"""Less than a sink waits for an answer."""
MAX_PENDING_BLOCKS = 16_384
MAX_LOADING_PART = 1 / 2
"""Of HOST, at most this part is being read into at once, …"""
MAX_AHEAD_PART = 1 / 8
"""… and nothing is read ahead beyond this one."""
PATIENCE_S = 0.5
"""A disk of which nothing is heard for so long is not waited for."""
DISK = MAX_KEEPERS - 1
"""As a keeper of HOST's blocks."""
TOUCH_S = 1.0
"""The disk learns so often what was used in HOST."""


class Tiering:
    """`on_up(keys)` is called when blocks came up and are published in HOST, `on_absent(keys)` when they will not come. `on_used`
    hears, some time later, which blocks were used. `is_paced`: the disk's write rate is limited."""

    def __init__(
        self,
        host: BlockPool,
        disk: DiskTier,
        *,
        policy: WritePolicy,
        hits: int,
        read_ahead_blocks: int,
        is_paced: bool,
        on_up: Callable[[list[Key]], None],
        on_absent: Callable[[list[Key]], None],
        on_used: Callable[[Iterable[Key], float], None] = lambda keys, now_s: None,
    ) -> None:
        self._host = host
        self._disk = disk
        self._policy = policy
        self._hits = hits
        self._read_ahead_blocks = read_ahead_blocks
        self._is_paced = is_paced
        self._on_up = on_up
        self._on_absent = on_absent
        self._on_used = on_used
        self._waiting: dict[Key, None] = {}
        self._gathered_since_s: float | None = None
        self._not_before_s = float("-inf")
        self._tries: dict[Key, int] = {}
        self._storing: set[Key] = set()
        self._progress_s = float("-inf")
        self._loading: set[Key] = set()
        self._pending: dict[Key, None] = {}
        """Wanted, on disk, and without room in HOST, in the order that they are needed."""
        self._pending_since_s: float | None = None
        self._ahead_of: dict[Key, None] = {}
        self._uses: dict[Key, int] = {}
        self._touched: dict[Key, None] = {}
        self._touched_s = float("-inf")
        self._num_new = 0
        self._cleaned_s = float("-inf")
        self.num_not_stored = 0
        """Blocks that should be on disk by the policy, and are not: refused too often, or evicted first."""

    @property
    def num_coming_up(self) -> int:
        """Blocks of HOST that are being read into."""
        return len(self._loading)

    # --- up ----------------------------------------------------------------------------------------------------------

    def bring_up(self, keys: Sequence[Key]) -> set[Key]:
        """Starts to read those of `keys` that are on disk, the first ones first, as soon as HOST has room; which ones come, those
        already under way included."""
        coming = {key for key in keys if key in self._loading}
        wanted = [
            key for key in keys if key not in coming and self._disk.contains(key) and not self._host.contains(key)
        ]
        wanted = wanted[: max(0, MAX_PENDING_BLOCKS - len(self._pending))]
        self._pending |= dict.fromkeys(wanted)
        coming.update(wanted)
        self._load_pending()
        if keys and keys[-1] in coming:
            self._ahead_of[keys[-1]] = None  # read after everything that is needed
        return coming

    def used(self, keys: Iterable[Key]) -> None:
        """Somebody was given these blocks."""
        used = dict.fromkeys(keys)
        self._touched |= used
        if used:
            self._ahead_of[next(reversed(used))] = None
        if self._policy != "after-hits":
            return
        for key in used:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] >= self._hits:
                self._want_stored(key)

    # --- down --------------------------------------------------------------------------------------------------------

    def arrived(self, keys: Iterable[Key]) -> None:
        """These full blocks are new in HOST."""
        for key in keys:
            self._num_new += 1
            if self._policy == "write-through":
                self._want_stored(key)

    def has_room(self, num_blocks: int, now_s: float) -> bool:
        """Whether HOST gives so many blocks without forgetting what goes to disk in a moment."""
        num_evicted = num_blocks - self._host.stats().free
        if num_evicted <= 0 or not self._waiting or self._is_paced or now_s >= self._progress_s + PATIENCE_S:
            return True
        return not any(record.key in self._waiting for record in self._host.coldest(num_evicted))

    def evicted_below(self, keys: Sequence[Key]) -> None:
        """The disk holds these no more. What it lost (a bad block takes with it what follows, a drive all) and HOST still has is
        written again; what made room for others would only push those out in turn."""
        self._host.unmark_kept(keys, DISK)
        if self._disk.pool.stats().free:
            self.arrived([key for key in keys if self._host.contains(key)])

    def evicted(self, keys: Iterable[Key]) -> None:
        """HOST holds these no more, and neither does the disk."""
        for key in keys:
            self.num_not_stored += key in self._waiting or self._policy == "write-back"
            self._waiting.pop(key, None)
            self._tries.pop(key, None)
            self._uses.pop(key, None)

    def tick(self, now_s: float) -> float | None:
        """Starts what is due; when to call again, if at all."""
        if now_s - self._touched_s >= TOUCH_S:
            self._touch(now_s)
        self._wait_for_room(now_s)
        self._read_ahead()
        if self._policy == "write-back":
            self._clean(now_s)
        if not self._waiting:
            self._gathered_since_s = None
            return None
        if self._gathered_since_s is None:
            self._gathered_since_s = now_s
            self._progress_s = now_s if not self._storing else self._progress_s
        due_s = max(self._gathered_since_s + GATHER_S, self._not_before_s)
        if now_s < self._not_before_s or (len(self._waiting) < GATHER_BLOCKS and now_s < due_s):
            return due_s
        self._store_waiting()
        return now_s + GATHER_S if self._waiting else None

    def flush(self, now_s: float) -> bool:
        """Starts to write what the policy has not written yet, gathered or not, as far as the disk takes it now. Whether there is
        something to wait for: then `poll` and call again."""
        if self._policy == "write-back":
            for record in self._host.coldest(self._host.num_blocks):
                self._want_stored(record.key)
        if now_s >= self._not_before_s:
            self._store_waiting()
        return bool(self._storing)

    # --- both --------------------------------------------------------------------------------------------------------

    def poll(self, now_s: float) -> None:
        """Takes in what the disk has done."""
        stored: list[Key] = []
        up: list[Key] = []
        absent: list[Key] = []
        free: list[int] = []
        for result in self._disk.poll():
            match result:
                case Stored(key=key):
                    self._storing.discard(key)
                    self._tries.pop(key, None)
                    self._progress_s = now_s
                    stored.append(key)
                case NotStored(key=key):
                    self._refused(key, now_s)
                case Loaded(key=key, block_id=block_id) as loaded:
                    self._loading.discard(key)
                    self._host.publish(
                        block_id,
                        key,
                        loaded.parent,
                        loaded.num_tokens,
                        loaded.checksum,
                        writer=loaded.writer,
                        owner=loaded.owner,
                    )
                    up.append(key)
                    free.append(block_id)
                case LoadFailed(key=key, block_id=block_id):
                    self._loading.discard(key)
                    absent.append(key)
                    free.append(block_id)
        # What was forgotten again meanwhile isn't kept.
        self._host.mark_kept([key for key in [*stored, *up] if self._disk.contains(key)], DISK)
        self._host.unpin(stored)
        if up:
            self._on_up(up)  # before they are let go: whoever waits has a lease by then
        if absent:
            self._on_absent(absent)
        self._host.release(free)
        self._load_pending()

    # --- inside: up --------------------------------------------------------------------------------------------------

    def _load_pending(self) -> None:
        """Reads what waits for room, as far as there is some."""
        room = max(1, int(self._host.num_blocks * MAX_LOADING_PART)) - len(self._loading)
        if not self._pending or room <= 0:
            return
        started = self._load(list(self._pending)[:room])
        for key in started:
            del self._pending[key]
        if started:
            self._pending_since_s = None

    def _wait_for_room(self, now_s: float) -> None:
        """Gives up what waited too long."""
        self._load_pending()
        if not self._pending:
            self._pending_since_s = None
        elif self._pending_since_s is None:
            self._pending_since_s = now_s
        elif now_s >= self._pending_since_s + UP_PATIENCE_S:
            absent = list(self._pending)
            self._pending.clear()
            self._on_absent(absent)

    def _load(self, keys: Sequence[Key]) -> set[Key]:
        """Those of `keys`, the first ones, for which HOST has room."""
        keys = keys[: self._host.stats().allocatable]
        blocks = self._host.allocate(len(keys)) if keys else None
        if not blocks:
            return set()
        self._num_new += len(blocks)
        self._loading.update(keys)
        self._disk.load([LoadRequest(key, block_id) for key, block_id in zip(keys, blocks, strict=True)])
        return set(keys)

    def _read_ahead(self) -> None:
        """What follows the blocks that were asked for, along the newest branch."""
        for key in self._ahead_of:
            ahead: list[Key] = []
            for _ in range(self._read_ahead_blocks):
                children = self._disk.children(key, 1)
                if not children:
                    break
                key = children[0]
                if key not in self._loading and key not in self._pending and not self._host.contains(key):
                    ahead.append(key)
            room = int(self._host.num_blocks * MAX_AHEAD_PART) - len(self._loading) - len(self._pending)
            self._load(ahead[: self._expendable(min(len(ahead), room))])
        self._ahead_of.clear()

    def _expendable(self, num_blocks: int) -> int:
        """How many of `num_blocks` blocks HOST would give without forgetting what is nowhere else."""
        num_free = self._host.stats().free
        if num_blocks <= num_free:
            return max(0, num_blocks)
        for record in self._host.coldest(num_blocks - num_free):
            if not self._disk.contains(record.key):
                break
            num_free += 1
        return num_free

    def _touch(self, now_s: float) -> None:
        """Has what was used in HOST count as used on disk, and there as long as it is used anywhere."""
        self._touched_s = now_s
        if not self._touched:
            return
        touched, self._touched = self._touched, {}
        pool = self._disk.pool
        with pool.lock:
            lease = pool.grant([key for key in touched if pool.contains(key)], 0.0, now_s)
            assert lease is not None, "a block went although the pool was locked"
            pool.expire(now_s)
        self._on_used(touched, now_s)

    # --- inside: down ------------------------------------------------------------------------------------------------

    def _want_stored(self, key: Key) -> None:
        if key not in self._storing and not self._disk.contains(key):
            self._waiting[key] = None

    def _clean(self, now_s: float) -> None:
        """Has the coldest blocks written before they must go. Nothing has to be done while nothing comes."""
        if not self._num_new or (self._num_new < CLEAN_BLOCKS // 8 and now_s < self._cleaned_s + GATHER_S):
            return
        self._num_new = 0
        self._cleaned_s = now_s
        part = int(self._host.num_blocks * CLEAN_PART)
        if self._host.stats().free < part:
            for record in self._host.coldest(max(CLEAN_BLOCKS, part)):
                self._want_stored(record.key)

    def _store_waiting(self) -> None:
        """As many as the disk takes now, those that have waited longest first."""
        self._gathered_since_s = None
        records: list[BlockRecord] = []
        for key in list(self._waiting)[: self._disk.store_room()]:
            del self._waiting[key]
            with self._host.lock:
                record = self._host.lookup(key)
                self._host.pin([key])
            if record is None:
                self.num_not_stored += 1
                continue
            self._storing.add(key)
            records.append(record)
        if records:
            self._disk.store(records)

    def _refused(self, key: Key, now_s: float) -> None:
        self._storing.discard(key)
        self._host.unpin([key])
        self._tries[key] = self._tries.get(key, 0) + 1
        if self._tries[key] < MAX_TRIES:
            self._waiting[key] = None
            self._not_before_s = now_s + RETRY_S
        else:
            del self._tries[key]
            self.num_not_stored += 1
