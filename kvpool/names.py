"""What the blocks of one pool are called, and what is known of those that have a name.

Owns the records and where each key is held. A block has at most one name, a name at most one block. Knows nothing of who
holds a block or when it goes. Not thread-safe: its pool's lock covers it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvpool.chains import NO_BLOCK
from kvpool.keys import KEY_BYTES, Key

BlockId = int
"""Index of a slab in one arena."""


class BlockRecord(NamedTuple):
    """What is known of a published block; a tuple, since one is made for every block that fills.

    `parent` is the key before it in its chain, the root for a first block. `checksum`, `writer` (epoch of the process that
    computed it) and `owner` (the root of its chain, so its tenant, adapter and model; quotas count by it) are 8 bytes.
    """

    block_id: BlockId
    key: Key
    parent: Key
    num_tokens: int
    checksum: bytes
    announced: bool
    writer: bytes
    owner: bytes


class Names:
    """The names of `num_blocks` blocks."""

    __slots__ = ("by_key", "records", "unannounced")

    def __init__(self, num_blocks: int) -> None:
        self.records: list[BlockRecord | None] = [None] * num_blocks
        self.by_key: dict[Key, BlockId] = {}
        self.unannounced: set[BlockId] = set()

    def add(self, record: BlockRecord) -> None:
        """The block is called `record.key` now; nothing else is."""
        block_id, key, _, num_tokens, checksum, announced, writer, owner = record
        assert self.records[block_id] is None, f"block {block_id} has a key already"
        assert len(key) == KEY_BYTES, f"a key of {len(key)} bytes"
        assert len(checksum) == len(writer) == len(owner) == 8, f"not 8 bytes: {checksum!r}, {writer!r} or {owner!r}"
        assert num_tokens > 0, f"a block of {num_tokens} tokens"
        self.records[block_id] = record
        self.by_key[key] = block_id
        if not announced:
            self.unannounced.add(block_id)

    def remove(self, record: BlockRecord) -> None:
        """The block has no name any more."""
        del self.by_key[record.key]
        self.records[record.block_id] = None
        if not record.announced:
            self.unannounced.remove(record.block_id)

    def record(self, block_id: BlockId) -> BlockRecord:
        """The record of a block that has a name."""
        record = self.records[block_id]
        assert record is not None, f"block {block_id} has no key"
        return record

    def announced_at(self, key: Key) -> BlockId:
        """The block that holds `key` announced, or NO_BLOCK."""
        block_id = self.by_key.get(key, NO_BLOCK)
        return NO_BLOCK if block_id in self.unannounced else block_id

    def holders(self, keys: Iterable[Key]) -> list[BlockId]:
        """The blocks of those `keys` that are held."""
        find = self.by_key.get
        return [block_id for key in keys if (block_id := find(key)) is not None]

    def check(self) -> None:
        """Raises AssertionError unless keys and records agree."""
        named = [record for record in self.records if record is not None]
        assert len(named) == len(self.by_key), f"{len(named)} records, {len(self.by_key)} keys"
        for record in named:
            assert self.records[record.block_id] is record, f"{record} is filed under another block"
            assert self.by_key.get(record.key) == record.block_id, f"the key of {record} leads elsewhere"
        unannounced = {record.block_id for record in named if not record.announced}
        assert unannounced == self.unannounced, "announced blocks are taken for unannounced ones, or the other way"
