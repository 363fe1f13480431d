"""Which announced blocks hang on which, and which of them may go: the chain rule of eviction.

Owns the links from a block to the announced block before it in its chain, and per block the number of its *blockers*:
what holds it directly (its pool's business: a reference, a lease, a pin, a quarantine: one each, however many of a kind
there are) plus its announced children that are blocked themselves. So a block has no blockers iff nothing holds it or
anything after it in its chain, and what has none may go, children first.

Blocks whose parent isn't announced here wait under the parent's key until it is. A change goes up the links only as long
as it makes ancestors blocked or free of blockers, so holding or letting go a chain of n blocks costs n steps in any order.

Knows block ids and keys, never records, owners, time or bytes. Not thread-safe: its pool's lock covers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvpool.keys import Key

NO_BLOCK = -1


class Chains:
    """The links and blockers of `num_blocks` blocks; at first none is linked or blocked."""

    __slots__ = ("_orphans", "_parents", "blockers", "num_children", "num_unblocked")

    def __init__(self, num_blocks: int) -> None:
        self.blockers = [0] * num_blocks
        self.num_children = [0] * num_blocks
        self.num_unblocked = num_blocks
        self._parents = [NO_BLOCK] * num_blocks
        self._orphans: dict[Key, set[int]] = {}

    def is_leaf(self, block_id: int) -> bool:
        """Whether an announced block may go now: neither a blocker nor a child."""
        return not self.blockers[block_id] and not self.num_children[block_id]

    def block(self, block_ids: Iterable[int]) -> None:
        """One blocker more on each."""
        blockers, parents = self.blockers, self._parents
        num_newly_blocked = 0
        for block_id in block_ids:
            while block_id >= 0:
                count = blockers[block_id]
                blockers[block_id] = count + 1
                if count:
                    break
                num_newly_blocked += 1
                block_id = parents[block_id]
        self.num_unblocked -= num_newly_blocked

    def unblock(self, block_ids: Iterable[int]) -> list[int]:
        """One blocker less on each; all blocks, ancestors too, that have none any more."""
        blockers, parents = self.blockers, self._parents
        free: list[int] = []
        for block_id in block_ids:
            while block_id >= 0:
                count = blockers[block_id] - 1
                blockers[block_id] = count
                if count:
                    break
                free.append(block_id)
                block_id = parents[block_id]
        self.num_unblocked += len(free)
        return free

    def link(self, block_id: int, key: Key, parent: Key, parent_id: int) -> None:
        """The block is announced now as `key`, after `parent`, which `parent_id` holds (NO_BLOCK: nobody announced it)."""
        self._parents[block_id] = parent_id
        if parent_id >= 0:
            self.num_children[parent_id] += 1
            if self.blockers[block_id]:
                self.block((parent_id,))
        elif (siblings := self._orphans.get(parent)) is None:
            self._orphans[parent] = {block_id}
        else:
            siblings.add(block_id)
        if key in self._orphans:
            children = self._orphans.pop(key)
            self.num_children[block_id] = len(children)
            for child in children:
                self._parents[child] = block_id
                if self.blockers[child]:
                    self.block((block_id,))

    def unlink(self, block_id: int, parent: Key) -> int:
        """The leaf is no longer announced. Returns the block before it if that is a leaf now, else NO_BLOCK."""
        num_children = self.num_children
        assert not num_children[block_id], f"block {block_id} has announced children"
        assert not self.blockers[block_id], f"block {block_id} is held, but has no children"
        parent_id = self._parents[block_id]
        if parent_id >= 0:
            self._parents[block_id] = NO_BLOCK
            num_children[parent_id] -= 1
            return NO_BLOCK if num_children[parent_id] or self.blockers[parent_id] else parent_id
        siblings = self._orphans[parent]
        siblings.remove(block_id)
        if not siblings:
            del self._orphans[parent]
        return NO_BLOCK

    def check(self, holds: Sequence[int], announced: Mapping[Key, int], parents: Mapping[int, Key]) -> None:
        """Raises AssertionError unless everything agrees with how many kinds of things hold each block (`holds`), where the
        announced keys are, and what is before each announced block."""
        children: list[list[int]] = [[] for _ in holds]
        orphans: dict[Key, set[int]] = {}
        for block_id, parent in parents.items():
            parent_id = announced.get(parent, NO_BLOCK)
            assert self._parents[block_id] == parent_id, f"block {block_id} hangs on {self._parents[block_id]}"
            if parent_id >= 0:
                children[parent_id].append(block_id)
            else:
                orphans.setdefault(parent, set()).add(block_id)
        assert orphans == self._orphans, "blocks without a parent are filed wrongly"
        for block_id, num_holds in enumerate(holds):
            num_blocked = sum(self.blockers[child] > 0 for child in children[block_id])
            assert self.num_children[block_id] == len(children[block_id]), f"block {block_id}: children miscounted"
            assert self.blockers[block_id] == num_holds + num_blocked, (
                f"block {block_id} has {self.blockers[block_id]} blockers, not {num_holds} and {num_blocked} children"
            )
            assert block_id in parents or self._parents[block_id] == NO_BLOCK, f"block {block_id} is linked"
        assert self.num_unblocked == self.blockers.count(0), f"{self.num_unblocked} blocks without blockers?"
