"""What a simulated tier holds: keys, the least recently used of which go first, leaves before what they follow.

Owns what is held and in what order it goes; time, and what a tier is, are the caller's. `CacheRef` says what the native one
(`native/chain_cache.cpp`) does in the same order, some five times faster; it is used where that wasn't built.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from kvpool.keys import Key
from protos.kv_events import BlockHash

log = logging.getLogger(__name__)


class Cache(Protocol):
    """At most `capacity` keys; `capacity` may shrink and grow."""

    capacity: int

    def __len__(self) -> int: ...

    def __contains__(self, key: Key, /) -> bool: ...

    def match(self, keys: Sequence[Key], /) -> int:
        """How many leading ones are here; they count as used."""

    def store(self, keys: Sequence[Key], /) -> tuple[list[BlockHash], list[BlockHash]]:
        """A chain is here now; returns what is new, and what had to go: lists of the caller's own, as
        KV events have them."""

    def shrink(self) -> list[BlockHash]:
        """What has to go."""


class CacheRef:
    """As `Cache` says, in plain Python."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def match(self, keys: Sequence[Key]) -> int:
        held, num = self._keys, 0
        for key in keys:
            if key not in held:
                break
            num += 1
        for key in reversed(keys[:num]):
            held.move_to_end(key)
        return num

    def store(self, keys: Sequence[Key]) -> tuple[list[BlockHash], list[BlockHash]]:
        held = self._keys
        new: list[BlockHash] = []
        for key in reversed(keys):
            if key in held:
                held.move_to_end(key)
            else:
                held[key] = None
                new.append(key)
        new.reverse()
        return new, self.shrink()

    def shrink(self) -> list[BlockHash]:
        gone: list[BlockHash] = []
        while len(self._keys) > self.capacity:
            gone.append(self._keys.popitem(last=False)[0])
        return gone


def _kind() -> Callable[[int], Cache]:
    try:
        from tandem.sim._chain_cache import Cache as Native
    except ImportError as error:
        log.warning("simulation is slow: its native part was not built (%s)", error)
        return CacheRef
    return Native


new_cache = _kind()
"""One that holds at most so many keys: the native one, where it was built."""
