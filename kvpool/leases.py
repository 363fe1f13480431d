"""Promises of a duration that blocks stay readable.

Owns the leases of one pool, their expiries, and how many are on each block; what that means for a block is its pool's
business. Never reads a clock. Not thread-safe: its pool's lock covers it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from kvpool.holds import Holds
from kvpool.keys import Key


@dataclass(frozen=True, slots=True)
class Lease:
    """A promise that `keys` stay readable until `expires_at_s` (the pool's owner's clock)."""

    lease_id: int
    keys: tuple[Key, ...]
    expires_at_s: float


class LeaseTable:
    """The leases on `num_blocks` blocks."""

    __slots__ = ("_expiries", "_leases", "_next_id", "holds")

    def __init__(self, num_blocks: int) -> None:
        self.holds = Holds(num_blocks, "lease")
        self._leases: dict[int, tuple[Lease, Sequence[int]]] = {}
        self._expiries: list[tuple[float, int]] = []
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def num_granted(self) -> int:
        """Leases that there ever were."""
        return self._next_id - 1

    def add(self, keys: tuple[Key, ...], block_ids: Sequence[int], expires_at_s: float) -> tuple[Lease, list[int]]:
        """A lease on `keys`, which `block_ids` hold, and those of the blocks that had none before. No key twice."""
        lease = Lease(self._next_id, keys, expires_at_s)
        self._next_id += 1
        self._leases[lease.lease_id] = (lease, block_ids)
        heapq.heappush(self._expiries, (expires_at_s, lease.lease_id))
        return lease, self.holds.add(block_ids)

    def end(self, lease_id: int) -> list[int] | None:
        """Forgets a lease; the blocks that have none any more. None if it is over already."""
        entry = self._leases.pop(lease_id, None)
        if entry is None:
            return None
        return self.holds.remove(entry[1])

    def next_expiry(self) -> tuple[float, int] | None:
        """When the next lease ends by itself, and its id; None without leases."""
        while self._expiries and self._expiries[0][1] not in self._leases:
            heapq.heappop(self._expiries)
        return self._expiries[0] if self._expiries else None

    def times(self) -> tuple[float, float] | None:
        """When the first and the last of them end by themselves; None without leases."""
        ends = [lease.expires_at_s for lease, _ in self._leases.values()]
        return (min(ends), max(ends)) if ends else None

    def check(self, by_key: dict[Key, int]) -> None:
        """Raises AssertionError unless every lease is on the blocks that hold its keys, and counted."""
        counts = [0] * len(self.holds.counts)
        due = set(self._expiries)
        for lease, block_ids in self._leases.values():
            assert [by_key.get(key) for key in lease.keys] == list(block_ids), f"{lease} is on {block_ids}"
            assert (lease.expires_at_s, lease.lease_id) in due, f"{lease} never expires"
            for block_id in block_ids:
                counts[block_id] += 1
        assert counts == self.holds.counts, "leases are miscounted"
        self.holds.check()
