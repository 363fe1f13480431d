"""The DISK tier: blocks in files, below the HOST arena of one pool node.

Owns the directories, the index of what is in them, what may be written how fast, and the threads that move bytes. Never
decides which blocks are worth keeping, and never hands a block to anyone: what it reads goes up into the caller's HOST
blocks, and counts only after its bytes were compared with the checksum that its producer made.

    store ──> slots from `pool` ──> writer of each directory: bytes, then journal ──> poll: published, `Stored`
    load  ──> held in `pool`    ──> readers of each directory: bytes, verified    ──> poll: let go, `Loaded`

A directory that fails is disabled and its blocks are forgotten; the others go on. What this means for crashes
is in `journal`.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from kernels.cpu import Native
from kvpool.arena import Arena
from kvpool.block_pool import BlockPool, BlockRecord
from kvpool.eviction import Policy
from kvpool.keys import Key
from kvpool.tiers.disk.budget import WriteBudget
from kvpool.tiers.disk.directory import Directory
from kvpool.tiers.disk.index import DiskIndex
from kvpool.tiers.disk.io_threads import (
    DirectoryFailed,
    IoThreads,
    Outbox,
    ReadEnded,
    ReadRun,
    WriteBatch,
    WriteEnded,
)
from kvpool.tiers.disk.journal import Entry, Removal
from kvpool.tiers.disk.requests import (
    Loaded,
    LoadFailed,
    LoadRequest,
    NotStored,
    Result,
    Stored,
)
from kvpool.tiers.disk.segments import slot_bytes_for
from kvpool.tiers.disk.stats import DirectoryState, DiskStats
from tandem.clock import now_s
from tandem.errors import ConfigError, StorageFault

log = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20
"""Blocks are recorded, and acknowledged, after about so many bytes."""
QUEUED_BYTES = 128 << 20
"""Most bytes that wait to be written, for each directory: so much of HOST is held by stores."""


class DiskTier:
    """Blocks on disk, in `directories`, each with `bytes_per_directory` preallocated. One thread calls it; nothing but opening
    and closing waits for a disk.

    `arena` is the HOST arena between which and the files bytes move; `group` is the 32-byte digest of the routing group whose
    blocks these are; `policy`, `quota` and `ttl_s` are those of `pool`. Poll `fileno` and call `poll` when it is readable.

    Raises ConfigError if a directory is missing, not writable, too small, in use, or of another version, slab size or group;
    StorageFault if every directory fails.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        *,
        bytes_per_directory: int,
        arena: Arena,
        block_size: int,
        group: bytes,
        native: Native | None,
        write_bytes_per_s: int = 0,
        policy: Policy = "lru",
        quota: float = 1.0,
        ttl_s: float | None = None,
    ) -> None:
        if not directories:
            raise ConfigError("a DISK tier needs at least one directory")
        slot_bytes = slot_bytes_for(arena.slab_bytes)
        self._arena = arena
        self._closed = False
        self._directories: list[Directory] = []
        self._unopened: list[DirectoryState] = []
        self._failed: dict[int, str] = {}
        self._threads: list[IoThreads] = []
        self._outbox = Outbox()
        try:
            self._open(directories, bytes_per_directory, group, native)
            self._index = DiskIndex(
                [directory.slots for directory in self._directories],
                [directory.live for directory in self._directories],
                block_size,
                policy=policy,
                quota=quota,
                ttl_s=ttl_s,
            )
            self._next_sequence = self._index.next_sequence
            for index, directory in enumerate(self._directories):
                self._threads.append(IoThreads(index, directory, self._outbox))
        except BaseException:
            self._close_directories(0.0)
            self._outbox.close()
            raise
        self._budget = WriteBudget(write_bytes_per_s, slot_bytes, now_s())
        self._batch_blocks = max(1, BATCH_BYTES // slot_bytes)
        self._most_storing = max(1, QUEUED_BYTES // slot_bytes) * len(self._directories)
        self._storing: set[Key] = set()
        self._num_loading = self._num_stored = self._num_not_stored = self._num_loaded = self._num_corrupt = 0

    def fileno(self) -> int:
        """Readable while `poll` has something to do; the same until `close`."""
        return self._outbox.fileno()

    @property
    def pool(self) -> BlockPool:
        """What is on disk. Its events are those of the DISK tier; nobody else may allocate from it, publish to it or take
        references in it."""
        return self._index.pool

    def contains(self, key: Key) -> bool:
        """Whether `load` may succeed."""
        return self._index.lookup(key) is not None

    def children(self, key: Key, limit: int = 16) -> list[Key]:
        """Up to `limit` of the blocks on disk that follow `key` in their chains, newest first: what to read ahead."""
        return list(itertools.islice(self._index.children(key), limit))

    def stored_before(self, unix_s: float) -> list[Key]:
        """The blocks that were stored before that time: what a time to live ends."""
        return self._index.stored_before(unix_s)

    # --- down -------------------------------------------------------------------------------------------------------

    def store_room(self) -> int:
        """How many blocks `store` would take now, as far as queue and rate go."""
        return self._budget.blocks(max(0, self._most_storing - len(self._storing)), now_s())

    def store(self, blocks: Sequence[BlockRecord]) -> None:
        """Begins to store full blocks as HOST's pool knows them, which stay where they are until the result; the first ones of a
        chain first, if not all of it is to be lost when there isn't room for all. Each gets a `Stored` (at once if it is on
        disk already) or a `NotStored`."""
        fresh: list[BlockRecord] = []
        taken: set[Key] = set()
        for request in blocks:
            if request.key in self._storing or request.key in taken or self._index.is_doomed(request.key):
                self._refuse_stores([request], "it is being stored or removed right now")
            elif self.pool.contains(request.key):
                self._outbox.put([Stored(request.key, request.block_id)])
            else:
                taken.add(request.key)
                fresh.append(request)
        num_room = self.store_room()
        self._refuse_stores(fresh[num_room:], "the write queue is full or the write rate used up")
        fresh = fresh[:num_room]
        disk_ids = self._index.allocate(len(fresh))
        self._refuse_stores(fresh[len(disk_ids) :], "everything on disk is in use, or every directory failed")
        fresh = fresh[: len(disk_ids)]
        if not fresh:
            return
        self._budget.spend(len(fresh))
        self._storing.update(request.key for request in fresh)
        self._queue_writes(fresh, disk_ids)

    def remove(self, keys: Iterable[Key]) -> None:
        """Forgets these blocks, held or not, and has that survive crashes as soon as it is its turn to be written: they are bad,
        expired, or not wanted. What follows them in their chains goes with them until the next opening, since nobody would
        reach it. What is being loaded right now may still be loaded."""
        named = list(keys)
        for threads in self._threads:
            threads.write([Removal(self._take_sequence(), key) for key in named])
        self._index.doom(key for key in named if key in self._storing or self.pool.contains(key))
        self._index.bury()

    # --- up ---------------------------------------------------------------------------------------------------------

    def load(self, wanted: Sequence[LoadRequest]) -> None:
        """Begins to read blocks, those first that come first. Each gets a `Loaded` or a `LoadFailed`; one whose bytes are wrong
        is forgotten."""
        held: list[tuple[LoadRequest, BlockRecord]] = []
        for request in wanted:
            record = self._index.lookup(request.key)
            if record is None:
                self._outbox.put([LoadFailed(request.key, request.block_id, "it is not on disk")])
                continue
            self.pool.match([request.key])
            held.append((request, record))
        self._num_loading += len(held)
        places, slots = self._index.places([record.block_id for _, record in held])
        of_directory: dict[int, list[tuple[int, LoadRequest, BlockRecord]]] = {}
        for place, slot, (request, record) in zip(places, slots, held, strict=True):
            of_directory.setdefault(place, []).append((slot, request, record))
        for place, reads in of_directory.items():
            its_slots, requests, records = zip(*reads, strict=True)
            self._threads[place].read(
                [
                    ReadRun(its_slots[run.start], requests[run], records[run])
                    for run in self._directories[place].segments.runs(its_slots)
                ]
            )

    # --- results ----------------------------------------------------------------------------------------------------

    def poll(self) -> list[Result]:
        """What ended since."""
        results: list[Result] = []
        for outcome in self._outbox.take():
            match outcome:
                case WriteEnded():
                    self._end_write(outcome, results)
                case ReadEnded():
                    self._end_read(outcome, results)
                case DirectoryFailed():
                    self._disable(outcome)
                case _:
                    results.append(outcome)
        self._index.bury()
        return results

    def stats(self) -> DiskStats:
        return DiskStats(
            recovered_blocks=self._index.num_recovered,
            stored_blocks=self._num_stored,
            not_stored_blocks=self._num_not_stored,
            loaded_blocks=self._num_loaded,
            corrupt_blocks=self._num_corrupt,
            storing_blocks=len(self._storing),
            loading_blocks=self._num_loading,
            directories=(
                *(
                    DirectoryState(
                        directory.path,
                        directory.slots,
                        directory.num_records,
                        directory.segments.direct,
                        self._failed.get(index, ""),
                    )
                    for index, directory in enumerate(self._directories)
                ),
                *self._unopened,
            ),
        )

    def close(self, timeout_s: float = 5.0) -> list[Result]:
        """Cancels loads, finishes stores for up to `timeout_s` and cancels the others, syncs, and gives the directories up.
        Returns the last results: every request has ended but those that a hanging disk holds. Idempotent."""
        if self._closed:
            return []
        self._closed = True
        self._close_directories(timeout_s)
        results = self.poll()
        self._outbox.close()
        return results

    # --- inside -----------------------------------------------------------------------------------------------------

    def _close_directories(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        for threads in self._threads:
            threads.begin_stop()
        for index, directory in enumerate(self._directories):
            if index >= len(self._threads) or self._threads[index].join(deadline_s):
                directory.close()
            else:
                log.error("%s: its disk doesn't answer; it stays open until this process ends", directory.path)

    def _open(self, paths: Sequence[Path], num_bytes: int, group: bytes, native: Native | None) -> None:
        for path in paths:
            try:
                self._directories.append(
                    Directory(path, num_bytes=num_bytes, memory=self._arena.array, group=group, native=native)
                )
            except StorageFault as error:
                log.error("a directory of the DISK tier is disabled: %s", error)
                self._unopened.append(DirectoryState(path, 0, 0, False, str(error)))
        if not self._directories:
            reasons = "; ".join(state.failed for state in self._unopened)
            raise StorageFault(f"no directory of the DISK tier works: {reasons}")

    def _take_sequence(self) -> int:
        self._next_sequence += 1
        return self._next_sequence - 1

    def _refuse_stores(self, requests: Sequence[BlockRecord], reason: str) -> None:
        self._num_not_stored += len(requests)
        self._outbox.put([NotStored(request.key, request.block_id, reason) for request in requests])

    def _queue_writes(self, requests: Sequence[BlockRecord], disk_ids: Sequence[int]) -> None:
        stored_at_s = int(time.time())
        places, slots = self._index.places(disk_ids)
        of_directory: dict[int, list[tuple[Entry, int, int]]] = {}
        for request, disk_id, place, slot in zip(requests, disk_ids, places, slots, strict=True):
            entry = Entry(
                slot,
                self._take_sequence(),
                stored_at_s,
                request.key,
                request.parent,
                request.num_tokens,
                request.checksum,
                request.writer,
                request.owner,
            )
            of_directory.setdefault(place, []).append((entry, request.block_id, disk_id))
        for place, writes in of_directory.items():
            for begin in range(0, len(writes), self._batch_blocks):
                entries, host_ids, ids = zip(*writes[begin : begin + self._batch_blocks], strict=True)
                self._threads[place].write(WriteBatch(entries, host_ids, ids))

    def _end_write(self, ended: WriteEnded, results: list[Result]) -> None:
        batch = ended.batch
        self._storing.difference_update(entry.key for entry in batch.entries)
        stored = not ended.error and ended.directory not in self._failed
        for entry, host_id, disk_id in zip(batch.entries, batch.host_ids, batch.disk_ids, strict=True):
            if stored:
                self._index.publish(disk_id, entry)
                results.append(Stored(entry.key, host_id))
            else:
                self._index.spare(entry.key)
                results.append(NotStored(entry.key, host_id, ended.error or self._failed[ended.directory]))
        self._num_stored += len(batch.entries) if stored else 0
        self._num_not_stored += 0 if stored else len(batch.entries)
        self.pool.release(batch.disk_ids)

    def _end_read(self, ended: ReadEnded, results: list[Result]) -> None:
        run = ended.run
        self._num_loading -= len(run.requests)
        self.pool.release([record.block_id for record in run.records])
        bad: list[Key] = []
        for request, record, good in zip(run.requests, run.records, ended.good.tolist(), strict=True):
            if good:
                self._num_loaded += 1
                results.append(
                    Loaded(
                        record.key,
                        request.block_id,
                        record.parent,
                        record.num_tokens,
                        record.checksum,
                        record.writer,
                        record.owner,
                    )
                )
                continue
            results.append(LoadFailed(record.key, request.block_id, ended.error or "its bytes on disk are wrong"))
            if not ended.error:
                bad.append(record.key)
        if bad:
            self._num_corrupt += len(bad)
            path = self._directories[ended.directory].path
            log.error("%s: %d blocks have wrong bytes and are forgotten", path, len(bad))
            self.remove(bad)

    def _disable(self, failure: DirectoryFailed) -> None:
        self._failed[failure.directory] = failure.error
        num_lost = self._index.disable(failure.directory)
        path = self._directories[failure.directory].path
        log.error("%s is disabled, and %d blocks are forgotten: %s", path, num_lost, failure.error)
