"""A bounded region of message buffers: where receives land before their blocks are copied out, and where small blocks are
gathered before they are sent.

Owns the memory and which slot is free, taken or retired; knows no connection. The region is made and touched once, so
that RDMA registers it once and no transfer waits for a page. Slots are used last in, first out: the next message lands where
the last one was just copied out, warm in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvpool.transport.ucx_frames import Frame, blocks_per_message

MIN_SLOTS = 4


class Slots:
    """`num_slots` slots of `blocks` `[num_slots, blocks_per_slot, slab_bytes]` uint8; about `num_bytes`, at least `MIN_SLOTS`.

    `array` is the binding's class that wraps memory for it.
    """

    def __init__(self, slab_bytes: int, num_bytes: int, array: Any) -> None:
        self.blocks_per_slot = blocks_per_message(slab_bytes)
        self.slot_bytes = self.blocks_per_slot * slab_bytes
        self.num_slots = max(num_bytes // self.slot_bytes, MIN_SLOTS)
        self.blocks: Frame = np.empty((self.num_slots, self.blocks_per_slot, slab_bytes), dtype=np.uint8)
        self.blocks.fill(0)
        self.indices = np.arange(self.blocks_per_slot, dtype=np.int64)
        """Of a slot's blocks, in order."""
        self._array = array
        self._whole = [array(slot) for slot in self.blocks]
        self._free = list(range(self.num_slots))
        self.num_retired = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A free slot; None if there is none."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Back again: nothing reads or writes it any more."""
        self._free.append(slot)

    def retire(self) -> None:
        """A taken slot is never used again: something may still write to it."""
        self.num_retired += 1

    def buffer(self, slot: int, num_blocks: int) -> Any:
        """The slot's first `num_blocks` blocks, for the binding."""
        return self._whole[slot] if num_blocks == self.blocks_per_slot else self._array(self.blocks[slot, :num_blocks])
