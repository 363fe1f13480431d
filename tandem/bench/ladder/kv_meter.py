"""How much of the KV memory that is reserved for sequences holds nothing.

Owns the definition:

    wasted = 1 - (slot-seconds with KV) / (slot-seconds reserved)

A slot is room for one token's KV. It is reserved while it belongs to a sequence, for its present or its future tokens, and
no other sequence could be given it. It has KV from the step that writes it until its sequence ends. So what is reserved for
answers yet to come, what is left empty at the end of a block, and what is kept for sequences that have ended is all waste.
Memory that nobody has reserved is free, and blocks that only wait in a prefix cache can be evicted: neither is counted. A
slot that several sequences share counts once. This is "reserved" and "internal fragmentation" of Kwon et al., "Efficient
Memory Management for Large Language Model Serving with PagedAttention" (SOSP '23), figure 2; no allocator here has external
fragmentation.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


class KVMeter:
    """Sums up slot-seconds."""

    def __init__(self) -> None:
        self._reserved = 0.0
        self._used = 0.0

    def add(self, seconds: float, reserved_slots: int, used_slots: int) -> None:
        """For `seconds`, `used_slots` of the `reserved_slots` had KV."""
        self._reserved += seconds * reserved_slots
        self._used += seconds * used_slots

    @property
    def wasted(self) -> float | None:
        """The share of 0 to 1; None if nothing was reserved."""
        return 1 - self._used / self._reserved if self._reserved else None


def slots(sequences: Iterable[tuple[Sequence[Hashable], int]], block_size: int) -> tuple[int, int]:
    """Slots reserved and slots with KV, for sequences given as `(block_table, tokens with KV)`; shared blocks count once."""
    used: dict[Hashable, int] = {}
    for block_table, num_tokens in sequences:
        for index, block in enumerate(block_table):
            filled = min(block_size, max(0, num_tokens - index * block_size))
            used[block] = max(filled, used.get(block, 0))
    return len(used) * block_size, sum(used.values())
