"""Which processes hold which blocks, in which tiers: the memory of the prefix index.

Owns key → places and nothing else: no names, no events, no time. Processes are numbers, small ones: what they stand for is
the caller's. `BlockMapRef` says what the native one (`native/block_map.cpp`) does in the same order, some hundred times faster,
in a tenth of the memory; it is used where that wasn't built.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvpool.keys import KEY_BYTES, Key, digest_of

if TYPE_CHECKING:
    from router._block_map import BlockMap

log = logging.getLogger(__name__)

NUM_TIERS = 3
"""DEVICE, HOST and DISK are 0, 1 and 2: the lower one is preferred where a process holds a block in several."""
MAX_PROCESSES = 1 << 16

Counts = NDArray[np.int32]
"""`[num_processes, NUM_TIERS]`"""


class BlockMapRef:
    """Key → places, for at most `max_keys` keys; past that the keys that came first are dropped (by the native one sometimes a
    little early, just after a process left). A process is a number below `MAX_PROCESSES`, a place one of its tiers. Raises
    ValueError for others."""

    def __init__(self, max_keys: int) -> None:
        if not 1 <= max_keys < 2**32 - 1:
            raise ValueError(f"max_keys is {max_keys}, must be within 1 to {2**32 - 2}")
        self._max_keys = max_keys
        self._places: OrderedDict[Key, set[tuple[int, int]]] = OrderedDict()
        self._held: dict[int, int] = {}
        self.num_ignored = 0
        """Names in what was added and removed that are no keys."""

    def __len__(self) -> int:
        """Keys that somebody holds."""
        return len(self._places)

    @property
    def num_entries(self) -> int:
        """Keys, counted once for each place that holds them."""
        return sum(self._held.values())

    @property
    def num_place_sets(self) -> int:
        """Different sets of places that hold keys."""
        return len({frozenset(places) for places in self._places.values()})

    @property
    def num_bytes(self) -> int:
        """Of memory, about."""
        return 300 * len(self._places) + 100 * self.num_entries

    def add(self, process: int, tier: int, keys: Sequence[bytes | int]) -> int:
        """`keys`, in this order, are held there now. How many of them were not before."""
        num_new = 0
        for key in self._own(process, tier, keys):
            places = self._places.get(key)
            if places is None:
                while len(self._places) >= self._max_keys:
                    _, dropped = self._places.popitem(last=False)
                    for other, _ in dropped:
                        self._held[other] -= 1
                places = self._places[key] = set()
            if (process, tier) not in places:
                places.add((process, tier))
                self._held[process] = self._held.get(process, 0) + 1
                num_new += 1
        return num_new

    def remove(self, process: int, tier: int, keys: Sequence[bytes | int]) -> int:
        """`keys` are not held there any more. How many of them were."""
        num_gone = 0
        for key in self._own(process, tier, keys):
            places = self._places.get(key)
            if places is not None and (process, tier) in places:
                places.remove((process, tier))
                self._held[process] -= 1
                num_gone += 1
                if not places:
                    del self._places[key]
        return num_gone

    def clear(self, process: int) -> None:
        """The process holds nothing any more, in any tier."""
        self._check(process, 0)
        for key in list(self._places):
            places = {place for place in self._places[key] if place[0] != process}
            if places:
                self._places[key] = places
            else:
                del self._places[key]
        self._held.pop(process, None)

    def longest(self, keys: Sequence[bytes], counts: Counts) -> tuple[list[int], int]:
        """How many leading `keys` each process holds, each counted in the first of its tiers that has it, into `counts`;
        processes past its rows are left out. Returns the processes that hold the first key, in order, and how many leading keys
        some process holds. Raises ValueError for what is no key."""
        for key in keys:
            if not (isinstance(key, bytes) and len(key) == KEY_BYTES):
                raise ValueError(f"{key!r} is no key of {KEY_BYTES} bytes")
        counts[:] = 0
        alive: set[int] | None = None
        found: list[int] = []
        longest = 0
        for number, key in enumerate(keys):
            places = self._places.get(key, set())
            here = {process for process, _ in places}
            alive = here if alive is None else alive & here
            if not number:
                found = sorted(alive)
            longest += bool(alive)
            for process in alive:
                if process < len(counts):
                    counts[process, min(tier for other, tier in places if other == process)] += 1
        return found, longest

    def num_held(self, process: int) -> int:
        """Keys that the process holds, counted once for each tier."""
        self._check(process, 0)
        return self._held.get(process, 0)

    def digest(self, process: int, tier: int) -> tuple[int, bytes]:
        """How many keys that place holds, and all of them XORed (`kvpool.keys.digest_of`). Looks at every key."""
        self._check(process, tier)
        keys = [key for key, places in self._places.items() if (process, tier) in places]
        return len(keys), digest_of(keys)

    def sound(self) -> bool:
        """Whether what is counted is so. Looks at every key."""
        held: dict[int, int] = {}
        for places in self._places.values():
            for process, _ in places:
                held[process] = held.get(process, 0) + 1
        return held == {process: num for process, num in self._held.items() if num}

    def _own(self, process: int, tier: int, keys: Sequence[bytes | int]) -> list[Key]:
        self._check(process, tier)
        own = [key for key in keys if isinstance(key, bytes) and len(key) == KEY_BYTES]
        self.num_ignored += len(keys) - len(own)
        return own

    @staticmethod
    def _check(process: int, tier: int) -> None:
        if not (0 <= process < MAX_PROCESSES and 0 <= tier < NUM_TIERS):
            raise ValueError(f"process {process}, tier {tier}: must be below {MAX_PROCESSES} and {NUM_TIERS}")


def new_block_map(max_keys: int) -> BlockMap | BlockMapRef:
    """The native one, where it was built."""
    try:
        from router._block_map import BlockMap
    except ImportError as error:
        log.warning("the prefix index is slow: its native part was not built (%s)", error)
        return BlockMapRef(max_keys)
    return BlockMap(max_keys)
