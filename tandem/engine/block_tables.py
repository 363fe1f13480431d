"""The blocks in sequences' tables: how they become findable, and what takes their place.

Owns what happens to a `block_table` between its admission and its release: a block gets its key, or gives way to
another one that holds the same, that somebody is fetching, or that belongs to this sequence alone. The scheduler gives
sequences their blocks and takes them back; the runner and the sink fill them. This never schedules, fetches or decides.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Many

from kvpool.block_pool import BlockId, BlockPool
from kvpool.keys import Key, KeyChain, owner_of
from protos.control import ReadyBlock
from tandem.engine.memory import Memory
from tandem.engine.sequence import Sequence


class BlockTables:
    """Changes tables and the references of the `BlockPool` together. `writer` is the epoch of this process: blocks that
    it computes carry it."""

    def __init__(self, pool: BlockPool, memory: Memory, *, block_size: int, writer: bytes) -> None:
        self._pool = pool
        self._memory = memory
        self._block_size = block_size
        self.writer = writer

    # --- blocks become findable --------------------------------------------------------------------------------------

    def publish_computed(self, sequence: Sequence) -> int:
        """Publishes the blocks that a step has filled; returns how many there were."""
        chain = sequence.chain
        first = sequence.num_published_blocks
        for i in range(first, sequence.num_computed_tokens // self._block_size):
            block = sequence.block_table[i]
            self._publish(
                sequence,
                block,
                chain.keys[i],
                chain.parent_of(i),
                self._memory.checksum(block),
                writer=self.writer,
                owner=owner_of(chain.root),
            )
            sequence.num_published_blocks = i + 1
        return sequence.num_published_blocks - first

    def publish_fetched(self, sequence: Sequence, block: BlockId, found: ReadyBlock) -> None:
        """Publishes the next block of the table, a full one, which came as `found`."""
        self._publish(sequence, block, found.key, found.parent, found.checksum, writer=found.writer, owner=found.owner)
        sequence.num_published_blocks += 1

    def publish_partial(self, sequence: Sequence) -> None:
        """Makes the last block, if it is not full, findable for a hand-over: unannounced, as long as the sequence holds
        it."""
        num_tokens = sequence.num_computed_tokens
        index, num_tail_tokens = divmod(num_tokens, self._block_size)
        if not num_tail_tokens:
            return
        chain = KeyChain(sequence.chain.root, self._block_size, sequence.tokens[:num_tokens])
        key = chain.partial_key()
        assert key is not None
        block = sequence.block_table[index]
        self._memory.zero_unused(block, num_tail_tokens)
        with self._pool.lock:
            if not self._pool.publish(
                block,
                key,
                chain.parent_of(index),
                num_tail_tokens,
                self._memory.checksum(block),
                announce=False,
                writer=self.writer,
                owner=owner_of(chain.root),
            ):
                # Another job holds the same prompt: this one holds its block too, or it would go with that job.
                sequence.block_table[index : index + 1] = self._pool.match([key])
                self._pool.release([block])

    def _publish(
        self, sequence: Sequence, block: BlockId, key: Key, parent: Key, checksum: bytes, *, writer: bytes, owner: bytes
    ) -> None:
        """Makes a full block of `sequence` findable. If another one was first, `sequence` goes on with that block: a duplicate
        would hold the other one against eviction, as its parent, and never be found itself."""
        with self._pool.lock:
            known = self._pool.lookup(key)
            if known is not None and known.block_id == block:
                return  # it came for two
            if not self._pool.publish(block, key, parent, self._block_size, checksum, writer=writer, owner=owner):
                index = sequence.block_table.index(block)
                sequence.block_table[index : index + 1] = self._pool.match([key])
                self._pool.release([block])

    # --- blocks of several sequences ---------------------------------------------------------------------------------

    def fork(self, sequence: Sequence, index: int) -> Sequence:
        """Another sample of the same job, which shares all blocks; whoever writes to a shared block copies it first."""
        chain = KeyChain(sequence.chain.root, self._block_size, sequence.tokens)
        table = list(sequence.block_table)
        sibling = Sequence(sequence.job, index, list(sequence.tokens), chain, sequence.draws, sequence.state, table)
        sibling.num_computed_tokens = sequence.num_computed_tokens
        sibling.num_published_blocks = sequence.num_published_blocks
        self._pool.retain(sibling.block_table)
        return sibling

    def share(self, sequence: Sequence, block: BlockId, theirs: BlockId) -> None:
        """Puts `theirs`, a block that another sequence holds, in the place of its own `block`."""
        self._pool.retain([theirs])
        sequence.block_table[sequence.block_table.index(block)] = theirs
        self._pool.release([block])

    def make_private(self, sequence: Sequence, blocks: Many[BlockId]) -> bool:
        """Puts blocks of its own in the place of those of `blocks` that another sequence owns too, into which nothing can be
        fetched. False if there is no room for them; computing makes it."""
        shared = [block for block in blocks if self._pool.is_shared(block)]
        fresh = self._pool.allocate(len(shared))
        if fresh is None:
            return False
        for old, new in zip(shared, fresh, strict=True):
            sequence.block_table[sequence.block_table.index(old)] = new
            self._pool.release([old])
        return True

    # --- tainted blocks ----------------------------------------------------------------------------------------------

    def let_go(self, sequence: Sequence, tainted: Collection[BlockId]) -> None:
        """Its owner retires these blocks; a sequence that is about to start over needs no table without holes."""
        shared = [block for block in sequence.block_table if block in tainted]
        sequence.block_table = [block for block in sequence.block_table if block not in tainted]
        self._pool.release(shared)

    def retire(self, sequence: Sequence, tainted: Collection[BlockId]) -> None:
        """Takes blocks that a transport may still write to out of the table, with all that follow, and out of use."""
        bad = [block for block in sequence.block_table if block in tainted]
        first = min(sequence.block_table.index(block) for block in bad)
        kept, dropped = sequence.block_table[:first], sequence.block_table[first:]
        self._pool.retire(bad)
        self._pool.release([block for block in dropped if block not in tainted])
        sequence.block_table = kept
