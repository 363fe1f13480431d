"""What workers that publish no events are taken to hold: what was sent there of late.

Owns the guesses and when they end; they are in the prefix index under the worker's number, like what others publish. A worker
caches what it computes and drops what it used longest ago: so a prompt's blocks count as held for `expiry_s` after their last
use, and of a worker at most as many as it has room for, the latest used. Of one prompt the first blocks are the last to go. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from kvpool.keys import Key
from router.prefix_index import PrefixIndex

EXPIRY_S = 120.0


class Approximate:
    """Guesses for workers that have `join`ed the index and this, by their numbers there. Times don't go back."""

    def __init__(self, index: PrefixIndex, expiry_s: float = EXPIRY_S) -> None:
        self._index = index
        self._expiry_s = expiry_s
        self._rooms: dict[int, int] = {}
        self._expires_at_s: dict[int, OrderedDict[Key, float]] = {}
        """By number; what goes first is first."""

    def join(self, number: int, num_blocks: int) -> None:
        """A worker with room for so many blocks; nothing was sent there yet."""
        self._rooms[number] = num_blocks
        self._expires_at_s[number] = OrderedDict()

    def forget(self, number: int) -> None:
        """It is gone; the index forgets it by itself. Unknown ones are ignored."""
        self._rooms.pop(number, None)
        self._expires_at_s.pop(number, None)

    def num_blocks_of(self, number: int) -> int:
        """That it is taken to hold."""
        return len(self._expires_at_s.get(number, ()))

    def routed(self, number: int, keys: Sequence[Key], now_s: float) -> None:
        """A prompt with these full blocks, from its first one on, was sent there. Unknown numbers are ignored: they publish."""
        held = self._expires_at_s.get(number)
        if held is None:
            return
        room = self._rooms[number]
        keys = keys[:room]
        expires_at_s = now_s + self._expiry_s
        for key in reversed(keys):
            held[key] = expires_at_s
            held.move_to_end(key)
        too_many = list(islice(held, max(0, len(held) - room)))
        self._drop(number, held, too_many)
        self._index.assume(number, keys)

    def tick(self, now_s: float) -> None:
        """Time passes: what was not used for long is not held any more."""
        for number, held in self._expires_at_s.items():
            expired: list[Key] = []
            for key, expires_at_s in held.items():
                if expires_at_s > now_s:
                    break
                expired.append(key)
            self._drop(number, held, expired)

    def _drop(self, number: int, held: OrderedDict[Key, float], keys: list[Key]) -> None:
        for key in keys:
            del held[key]
        self._index.unassume(number, keys)
