"""How many times each block is held in one way: by references, by leases, by pins.

Owns the counts. What holding means, and who may, is its owner's business. Not thread-safe: its pool's lock covers it.
"""

from __future__ import annotations

from collections.abc import Iterable


class Holds:
    """Counts of one kind of hold, `what`, on `num_blocks` blocks."""

    __slots__ = ("_what", "counts", "num_held")

    def __init__(self, num_blocks: int, what: str) -> None:
        self.counts = [0] * num_blocks
        self.num_held = 0
        self._what = what

    def add(self, block_ids: Iterable[int]) -> list[int]:
        """One more on each; those of them that had none."""
        counts = self.counts
        newly_held: list[int] = []
        for block_id in block_ids:
            count = counts[block_id]
            counts[block_id] = count + 1
            if not count:
                newly_held.append(block_id)
        self.num_held += len(newly_held)
        return newly_held

    def remove(self, block_ids: Iterable[int]) -> list[int]:
        """One less on each, which must have one; those of them that have none any more."""
        counts = self.counts
        let_go: list[int] = []
        for block_id in block_ids:
            count = counts[block_id] - 1
            assert count >= 0, f"block {block_id} has no {self._what} to take back"
            counts[block_id] = count
            if not count:
                let_go.append(block_id)
        self.num_held -= len(let_go)
        return let_go

    def check(self) -> None:
        """Raises AssertionError unless the counts agree."""
        assert min(self.counts) >= 0, f"a block has {min(self.counts)} {self._what}s"
        assert self.num_held == sum(count > 0 for count in self.counts), f"blocks with a {self._what} are miscounted"
