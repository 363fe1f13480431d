"""What is on disk, and where: the index of the DISK tier, rebuilt from the journals when it opens.

Owns the pool of blocks, which slot of which directory each of them is, what follows what in a chain, when each was stored, and
the blocks that are *doomed*: bad, expired or lost, never given out again, and forgotten as soon as nothing holds them. No
files, no threads, no clock.

The pool never lets a block go before the blocks after it in its chain, so what follows a doomed block is doomed too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kvpool.block_pool import BlockPool, BlockRecord
from kvpool.eviction import Policy
from kvpool.keys import Key
from kvpool.tiers.disk.children import Children
from kvpool.tiers.disk.journal import Entry, Records, split
from kvpool.tiers.disk.placement import placement, recovered


class DiskIndex:
    """The blocks of directories with `num_slots` slots each, of which `live`, the records of each, are in use."""

    def __init__(
        self,
        num_slots: Sequence[int],
        live: Sequence[Records],
        block_size: int,
        *,
        policy: Policy,
        quota: float,
        ttl_s: float | None,
    ) -> None:
        self._where = placement(num_slots)
        num_blocks = len(self._where.slots)
        self.pool = BlockPool(num_blocks, block_size, "DISK", policy=policy, quota=quota, ttl_s=ttl_s)
        self._keys: list[Key | None] = [None] * num_blocks
        self._stored_at_s = np.zeros(num_blocks, dtype=np.int64)
        self._children = Children(num_blocks)
        self._doomed: dict[Key, None] = {}
        self._failed: set[int] = set()
        self.num_recovered = 0
        self.next_sequence = 1
        """Greater than that of every record."""
        self._recover([records[records["num_tokens"] == block_size] for records in live])

    def _recover(self, live: Sequence[Records]) -> None:
        """Fills the pool, the oldest first."""
        blocks, records = recovered(self._where, live)
        if not len(records):
            return
        self.num_recovered = len(records)
        self.next_sequence = int(records["sequence"].max()) + 1
        self._stored_at_s[blocks] = records["stored_at_s"]
        block_ids = blocks.tolist()
        keys, parents, checksums, writers, owners = (
            split(records[column]) for column in ("key", "parent", "checksum", "writer", "owner")
        )
        sizes = [self.pool.block_size] * len(records)
        self.pool.restore(zip(block_ids, keys, parents, sizes, checksums, writers, owners, strict=True))
        for block_id, key, parent in zip(block_ids, keys, parents, strict=True):
            self._keys[block_id] = key
            self._children.link(block_id, parent)

    # --- what there is ----------------------------------------------------------------------------------------------

    def lookup(self, key: Key) -> BlockRecord | None:
        """What is known of the block `key`, if it may be given out."""
        return None if key in self._doomed else self.pool.lookup(key)

    def is_doomed(self, key: Key) -> bool:
        return key in self._doomed

    def children(self, key: Key) -> Iterable[Key]:
        """The blocks after `key` in their chains that may be given out, newest first."""
        return (record.key for block_id in self._children.of(key) if (record := self._held(block_id)) is not None)

    def stored_before(self, unix_s: float) -> list[Key]:
        old = np.flatnonzero(self._stored_at_s < unix_s).tolist()
        return [record.key for block_id in old if (record := self._held(block_id)) is not None]

    def places(self, block_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The directory of each block, and which of its slots it is."""
        return self._where.directories[block_ids].tolist(), self._where.slots[block_ids].tolist()

    def _held(self, block_id: int) -> BlockRecord | None:
        key = self._keys[block_id]  # of what was stored there last, which may have been evicted since
        record = None if key is None else self.lookup(key)
        return record if record is not None and record.block_id == block_id else None

    # --- what comes and goes ----------------------------------------------------------------------------------------

    def allocate(self, num_blocks: int) -> list[int]:
        """Up to `num_blocks` blocks in directories that work, ascending; evicts as the pool says."""
        found: list[int] = []
        while len(found) < num_blocks:
            more = min(num_blocks - len(found), self.pool.stats().allocatable)
            block_ids = self.pool.allocate(more) if more else None
            if not block_ids:
                break
            for block_id in block_ids:
                self._children.unlink(block_id)
                self._keys[block_id] = None
            lost = [block_id for block_id in block_ids if int(self._where.directories[block_id]) in self._failed]
            self.pool.retire(lost)
            found += set(block_ids).difference(lost)
        return sorted(found)

    def publish(self, block_id: int, entry: Entry) -> None:
        """The block, which the caller allocated, is stored."""
        self.pool.publish(
            block_id,
            entry.key,
            entry.parent,
            entry.num_tokens,
            entry.checksum,
            writer=entry.writer,
            owner=entry.owner,
        )
        self._keys[block_id] = entry.key
        self._stored_at_s[block_id] = entry.stored_at_s
        self._children.link(block_id, entry.parent)
        if entry.parent in self._doomed:
            self.doom([entry.key])

    def doom(self, keys: Iterable[Key]) -> None:
        """These blocks, held or being stored, and what follows them, are not given out any more, and are to be forgotten."""
        reached = list(keys)
        for key in reached:
            if key not in self._doomed:
                self._doomed[key] = None
                reached += self.children(key)

    def spare(self, key: Key) -> None:
        """Nothing of that name came to be stored."""
        self._doomed.pop(key, None)

    def bury(self) -> None:
        """Forgets the doomed blocks that nobody holds, a chain from its end."""
        while self._doomed and (gone := self.pool.evict(list(reversed(self._doomed)))):
            for key in gone:
                del self._doomed[key]

    def disable(self, directory: int) -> int:
        """Dooms what the directory holds, and gives its slots out no more; how many blocks it held."""
        self._failed.add(directory)
        inside = np.flatnonzero(self._where.directories == directory).tolist()
        lost = [record.key for block_id in inside if (record := self._held(block_id)) is not None]
        self.doom(lost)
        return len(lost)
