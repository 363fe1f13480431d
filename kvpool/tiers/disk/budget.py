"""How fast the DISK tier may write: drives wear out.

Owns one token bucket. Pure: time is an argument.
"""

from __future__ import annotations

BURST_S = 1.0
"""What isn't used adds up to so many seconds' worth."""


class WriteBudget:
    """`bytes_per_s` on average; 0 is no limit."""

    def __init__(self, bytes_per_s: int, slot_bytes: int, now: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._slot_bytes = slot_bytes
        self._most_bytes = max(bytes_per_s * BURST_S, float(slot_bytes))
        self._bytes = self._most_bytes
        self._at_s = now

    def blocks(self, num_blocks: int, now: float) -> int:
        """How many of `num_blocks` blocks may be written now."""
        if not self._bytes_per_s:
            return num_blocks
        self._bytes = min(self._most_bytes, self._bytes + (now - self._at_s) * self._bytes_per_s)
        self._at_s = now
        return min(num_blocks, int(self._bytes // self._slot_bytes))

    def spend(self, num_blocks: int) -> None:
        """So many blocks are written."""
        self._bytes -= num_blocks * self._slot_bytes
