"""How long blocks stay on disk that nobody uses.

Owns the rule and the times of use. A block ends when it was stored `ttl_s` ago or longer and neither it nor anything on disk
that follows it in its chain was used, or stored, since. Uses are not remembered across a restart; after it the time of storing
counts, which is in the journal. What ends is removed for good: a restart doesn't bring it back. Never looks at HOST.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kvpool.block_pool import BlockPool
from kvpool.keys import Key

MAX_REMOVED = 1024
"""Blocks that are removed in one go."""
PERIOD_PART = 1 / 8
"""Of `ttl_s`: so much longer may blocks live, but not longer than `MAX_PERIOD_S`."""
MAX_PERIOD_S = 60.0
MIN_PERIOD_S = 0.1
PORTION_PAUSE_S = 0.01


class Expiring(Protocol):
    """What is asked of the DISK tier."""

    @property
    def pool(self) -> BlockPool:
        """What is on disk."""

    def stored_before(self, unix_s: float) -> list[Key]:
        """The blocks that were stored before that time."""

    def children(self, key: Key, limit: int) -> list[Key]:
        """Up to `limit` of the blocks on disk that follow `key`."""

    def remove(self, keys: Iterable[Key]) -> None:
        """Forgets these blocks for good."""


class Expiry:
    """Ends blocks of one disk tier. `used` and `tick` are told the time of one clock, `tick` the Unix time too."""

    def __init__(self, disk: Expiring, ttl_s: float) -> None:
        self._disk = disk
        self._ttl_s = ttl_s
        self._period_s = min(max(MIN_PERIOD_S, ttl_s * PERIOD_PART), MAX_PERIOD_S)
        self._used_s: dict[Key, float] = {}
        """When keys were last used, the oldest first; none older than `ttl_s`, and a period."""
        self._ending: list[Key] = []
        self._next_s = float("-inf")

    def used(self, keys: Iterable[Key], now_s: float) -> None:
        """Somebody was given these blocks, from wherever."""
        for key in keys:
            self._used_s.pop(key, None)
            self._used_s[key] = now_s
        if len(self._used_s) > 2 * self._disk.pool.num_blocks:
            self._used_s = {key: used_s for key, used_s in self._used_s.items() if self._disk.pool.contains(key)}

    def tick(self, now_s: float, unix_s: float) -> float:
        """Removes what has lived long enough, a portion at a time; when to call again."""
        if not self._ending and now_s >= self._next_s:
            self._next_s = now_s + self._period_s
            self._forget_uses(now_s)
            self._ending = self._idle(unix_s)
        if self._ending:
            portion, self._ending = self._ending[:MAX_REMOVED], self._ending[MAX_REMOVED:]
            self._disk.remove(key for key in portion if key not in self._used_s)
            return now_s + PORTION_PAUSE_S if self._ending else self._next_s
        return self._next_s

    def _forget_uses(self, now_s: float) -> None:
        while self._used_s:
            key = next(iter(self._used_s))
            if self._used_s[key] + self._ttl_s > now_s:
                return
            del self._used_s[key]

    def _idle(self, unix_s: float) -> list[Key]:
        """What ends now. A block that stays keeps those before it."""
        pool = self._disk.pool
        ending = dict.fromkeys(key for key in self._disk.stored_before(unix_s - self._ttl_s) if key not in self._used_s)
        for key in list(ending):
            kept: Key = key
            if all(child in ending for child in self._disk.children(key, pool.num_blocks)):
                continue
            while kept in ending:
                del ending[kept]
                record = pool.lookup(kept)
                if record is None:
                    break
                kept = record.parent
        return list(ending)
