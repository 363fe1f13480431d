"""Which blocks follow which key: the way down a chain, which read-ahead goes.

Owns the links alone; knows neither the blocks' keys nor whether they are still held.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from kvpool.keys import Key

_NONE = -1


class Children:
    """Blocks `0 … num_blocks - 1`, each linked to at most one parent. Children of one parent are a doubly linked list, newest
    first, so that linking and unlinking cost the same below a root with a hundred thousand children."""

    def __init__(self, num_blocks: int) -> None:
        self._first: dict[Key, int] = {}
        self._parents: list[Key | None] = [None] * num_blocks
        self._next = array("q", [_NONE]) * num_blocks
        self._previous = array("q", [_NONE]) * num_blocks

    def link(self, block_id: int, parent: Key) -> None:
        """Block `block_id`, which has no parent, follows `parent`."""
        assert self._parents[block_id] is None, f"block {block_id} has a parent already"
        self._parents[block_id] = parent
        after = self._first.get(parent, _NONE)
        self._first[parent] = block_id
        self._next[block_id] = after
        self._previous[block_id] = _NONE
        if after != _NONE:
            self._previous[after] = block_id

    def unlink(self, block_id: int) -> None:
        """Block `block_id` follows nothing any more, if it did."""
        parent = self._parents[block_id]
        if parent is None:
            return
        self._parents[block_id] = None
        before, after = self._previous[block_id], self._next[block_id]
        if after != _NONE:
            self._previous[after] = before
        if before != _NONE:
            self._next[before] = after
        elif after != _NONE:
            self._first[parent] = after
        else:
            del self._first[parent]

    def of(self, parent: Key) -> Iterator[int]:
        """The blocks that follow `parent`, newest first. Nothing may be linked or unlinked meanwhile."""
        block_id = self._first.get(parent, _NONE)
        while block_id != _NONE:
            yield block_id
            block_id = self._next[block_id]
