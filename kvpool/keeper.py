"""What a pool node still has to get from one worker, and which nodes keep what which worker announces. Pure.

Owns the order and the tries; `follower` knows what the worker holds, the pool what is here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from kvpool.follower import EventFollower
from kvpool.keys import Key
from protos.control import Source

MAX_BLOCKS_PER_FETCH = 64
MAX_TRIES = 8
"""A block that a worker announces but doesn't deliver is tried so often."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 8.0
"""After a batch of which nothing came the worker is left alone, each time for twice as long: it may be out of reach, and its
blocks must not be given up for that."""
MAX_REMEMBERED_TRIES = 10_000
SPARE_QUEUED = 4096
"""The queue is rid of what the worker holds no more when it is longer than what it holds by so much."""


def keepers_of(worker: Source, pools: Sequence[Source], num_copies: int) -> list[str]:
    """The pool nodes that keep what `worker` announces: that of its machine, then nodes of other machines, each machine once,
    in an order of the worker's own (rendezvous hashing: Thaler and Ravishankar, 1998), so that nodes agree without a word
    and a node that joins or leaves moves few. Fewer than `num_copies` where there are fewer machines."""

    def rank(pool: Source) -> tuple[bool, bytes]:
        near = pool.endpoints.machine_id == worker.endpoints.machine_id
        return not near, hashlib.sha256(f"{worker.process}\0{pool.process}".encode()).digest()

    chosen: dict[str, str] = {}
    for pool in sorted(pools, key=rank):
        chosen.setdefault(pool.endpoints.machine_id, pool.process)
    return list(chosen.values())[:num_copies]


class Keeper:
    """The blocks of one worker, in the order they were announced. `has(key)` tells whether some tier of the node holds it."""

    def __init__(self, follower: EventFollower, has: Callable[[Key], bool]) -> None:
        self.follower = follower
        self._has = has
        self._queue: dict[Key, None] = {}
        self._tries: dict[Key, int] = {}
        self._kept: list[Key] = []
        self._pause_s = FIRST_PAUSE_S
        self.paused_until_s = float("-inf")
        """Until then `next_batch` has nothing."""

    def take_in(self) -> None:
        """Queues what the worker has stored since and is not here."""
        for key in self.follower.take_stored():
            self._tries.pop(key, None)
            if self._has(key):
                self._kept.append(key)
            else:
                self._queue[key] = None
        announced = self.follower.announced
        if len(self._queue) > len(announced) + SPARE_QUEUED:
            self._queue = {key: None for key in self._queue if key in announced}

    def next_batch(self, busy: set[Key], most: int, now_s: float) -> list[tuple[Key, Key]]:
        """Up to `most` pairs `(key, parent)` that the worker holds and nobody here has or fetches."""
        batch: list[tuple[Key, Key]] = []
        put_back: list[Key] = []
        while self._queue and len(batch) < most and now_s >= self.paused_until_s:
            key = next(iter(self._queue))
            del self._queue[key]
            parent = self.follower.announced.get(key)
            if parent is None:
                self._tries.pop(key, None)
            elif self._has(key):
                self._tries.pop(key, None)
                self._kept.append(key)
            elif key in busy:
                put_back.append(key)
            elif self._tries.get(key, 0) < MAX_TRIES:
                batch.append((key, parent))
        self._queue |= dict.fromkeys(put_back)
        return batch

    def put_back(self, keys: Sequence[Key]) -> None:
        """There was no room for these; they stay first in line."""
        self._queue = dict.fromkeys(keys) | self._queue

    def on_fetched(self, committed: Sequence[Key], missing: Sequence[Key], now_s: float) -> None:
        """How a batch of this worker ended: what is missing is tried again, but not for ever, unless it is announced anew."""
        for key in committed:
            self._tries.pop(key, None)
        self._kept += committed
        for key in missing:
            self._tries[key] = self._tries.get(key, 0) + 1
        self._offer(missing)
        if committed or not missing:
            self._pause_s = FIRST_PAUSE_S
        else:
            self.paused_until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if len(self._tries) > MAX_REMEMBERED_TRIES:
            self._tries = {key: tries for key, tries in self._tries.items() if key in self.follower.announced}

    def on_others(self, committed: Sequence[Key], missing: Sequence[Key]) -> None:
        """How a batch of another worker ended: what came is a copy of this one's blocks too, and what didn't is tried from here,
        if this one has not failed to deliver it."""
        self._kept += [key for key in committed if key in self.follower.announced]
        self._offer(missing)

    def take_kept(self) -> list[Key]:
        """Blocks of this worker of which the node has a copy, as they come."""
        kept, self._kept = self._kept, []
        return kept

    def _offer(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if key in self.follower.announced and self._tries.get(key, 0) < MAX_TRIES:
                self._queue[key] = None
