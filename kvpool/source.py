"""The source's side of a fetch: what to answer to whom, and which leases that takes (design §5).

Owns the fetches that sinks have open here: their parked keys and their batches' leases. A pure core: messages and time in,
messages out. Never reads a block's bytes and never sends anything itself; `service` does.

A key is answered with Ready as soon as the pool holds it. A key that it doesn't hold, but a tier below, is brought up and
parked meanwhile. Any other is answered with Miss at once, or, in a fetch that waits, parked. Parked it stays until the first of
- it is published: Ready (Miss if it was evicted again before we looked),
- it will not come up, or the work that was to compute it is over without it: Miss,
- the fetch's deadline: Miss,
- the grace time after the fetch came, unless the key is promised: Miss.
Parked keys hold no lease. Each Ready is one batch under one lease, which ends with Done, Cancel or by itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvpool.block_pool import BlockPool
from kvpool.keys import Key
from protos.control import Cancel, Done, Fetch, Kept, Lost, Miss, Parked, Ready, ReadyBlock, ToSink, ToSource

MAX_BATCH_BLOCKS = 512
"""Blocks of one Ready: reading them takes well under a lease."""
MAX_DEADLINE_S = 3600.0

Answers = list[tuple[bytes, ToSink]]
"""`(sink_id, message)`, in sending order."""


class Below(Protocol):
    """The tiers below the pool (`kvpool.tiering`)."""

    def bring_up(self, keys: Sequence[Key]) -> set[Key]:
        """Starts to bring those of `keys` up that can be; each of the returned ones is published or given up some time."""

    def used(self, keys: Iterable[Key]) -> None:
        """Somebody was given these blocks."""


MAX_KEEPERS = 32


@dataclass(slots=True)
class _Served:
    """One fetch of one sink. `batches` maps a batch number to its lease."""

    sink_id: bytes
    fetch_id: bytes
    received_s: float
    deadline_s: float
    grace_until_s: float
    parked: dict[Key, None] = field(default_factory=dict)
    batches: dict[int, int] = field(default_factory=dict)
    num_batches: int = 0
    leased_until_s: float = 0.0


class FetchServer:
    """Answers sinks from one `BlockPool`. Called by one thread; others may use the pool meanwhile.

    A sink's fetches and parked keys are bounded; what is past a bound is a Miss, which sends the sink elsewhere. `on_kept` is
    called when a pool node said that it keeps blocks of ours.
    """

    def __init__(
        self,
        pool: BlockPool,
        epoch: bytes,
        *,
        lease_s: float,
        grace_s: float,
        below: Below | None = None,
        on_kept: Callable[[], None] = lambda: None,
        max_fetches_per_sink: int = 4096,
        max_parked_per_sink: int = 262_144,
    ) -> None:
        self._pool = pool
        self._epoch = epoch
        self._lease_s = lease_s
        self._grace_s = grace_s
        self._max_fetches = max_fetches_per_sink
        self._max_parked = max_parked_per_sink
        self._below = below
        self._on_kept = on_kept
        self._keepers: dict[bytes, int] = {}
        """Pool nodes that keep copies of our blocks, as the pool numbers them."""
        self._sinks: dict[bytes, dict[bytes, _Served]] = {}
        self._num_parked: dict[bytes, int] = {}
        self._waiters: dict[Key, dict[tuple[bytes, bytes], _Served]] = {}
        self._promises: dict[Hashable, tuple[Key, ...]] = {}
        self._promised: dict[Key, int] = {}
        self._due: list[tuple[float, bytes, bytes]] = []
        self.num_served_blocks = 0
        self.num_missed_keys = 0

    @property
    def num_fetches(self) -> int:
        return sum(len(fetches) for fetches in self._sinks.values())

    @property
    def num_parked(self) -> int:
        return sum(self._num_parked.values())

    def on_message(self, sink_id: bytes, message: ToSource, now_s: float) -> Answers:
        """Takes in what a sink sent. A repeated or unknown id changes nothing, but a fetch that comes again
        after its leases are over is answered again."""
        match message:
            case Fetch():
                return self._on_fetch(sink_id, message, now_s)
            case Done(fetch_id=fetch_id, batch=batch):
                served = self._sinks.get(sink_id, {}).get(fetch_id)
                lease_id = None if served is None else served.batches.pop(batch, None)
                if served is not None and lease_id is not None:
                    self._pool.end_lease(lease_id)
                    self._drop_if_over(served, now_s)
            case Cancel(fetch_id=fetch_id):
                served = self._sinks.get(sink_id, {}).get(fetch_id)
                if served is not None:
                    self._drop(served)
            case Kept(keys=keys):
                if (number := self._keeper(sink_id)) is not None:
                    self._pool.mark_kept(keys, number)
                    self._on_kept()
            case Lost(keys=keys):
                if sink_id in self._keepers:
                    self._pool.unmark_kept(keys, self._keepers[sink_id])
        return []

    def on_absent(self, keys: Iterable[Key], now_s: float) -> Answers:
        """These keys will not come up: their waiters are told, unless somebody computes them."""
        return self._miss_waiters((key for key in keys if key not in self._promised), now_s)

    def on_published(self, keys: Iterable[Key], now_s: float) -> Answers:
        """These keys are in the pool now (or were, a moment ago): their waiters are answered."""
        ready: dict[tuple[bytes, bytes], tuple[_Served, list[Key]]] = {}
        for key in keys:
            for name, served in self._waiters.get(key, {}).items():
                ready.setdefault(name, (served, []))[1].append(key)
        answers: Answers = []
        for served, found in ready.values():
            self._unpark(served, found)
            answers += self._answer(served, found, now_s, park=False)
            self._drop_if_over(served, now_s)
        return answers

    def promise(self, owner: Hashable, keys: Iterable[Key]) -> None:
        """`owner` is work that will publish these keys: fetches that wait for them outlast the grace time until it withdraws.
        An owner promises once."""
        assert owner not in self._promises, "an owner promised twice"
        kept = tuple(dict.fromkeys(keys))
        self._promises[owner] = kept
        for key in kept:
            self._promised[key] = self._promised.get(key, 0) + 1

    def withdraw(self, owner: Hashable, now_s: float) -> Answers:
        """The work is over, done or not: those who wait for keys that nobody promises any more are told. Unknown owners are
        ignored."""
        over: list[Key] = []
        for key in self._promises.pop(owner, ()):
            self._promised[key] -= 1
            if self._promised[key] == 0:
                del self._promised[key]
                over.append(key)
        return self._miss_waiters(over, now_s)

    def forget_sink(self, sink_id: bytes) -> None:
        """That sink is said to be gone: it waits for nothing, and keeps nothing of ours. What it may still read stays leased
        until that ends by itself: it may live, cut off from those who say so."""
        for served in list(self._sinks.get(sink_id, {}).values()):
            self._unpark(served, list(served.parked))
            if not served.batches:
                self._drop(served)
        if (number := self._keepers.pop(sink_id, None)) is not None:
            self._pool.forget_keeper(number)

    def close(self) -> None:
        """Nobody is answered any more: what pool nodes said that they keep is forgotten. Leases end by themselves, since somebody
        may be reading still."""
        for number in self._keepers.values():
            self._pool.forget_keeper(number)
        self._keepers.clear()

    def tick(self, now_s: float) -> Answers:
        """Ends leases and parked keys whose time is over."""
        self._pool.expire(now_s)
        answers: Answers = []
        while self._due and self._due[0][0] <= now_s:
            _, sink_id, fetch_id = heapq.heappop(self._due)
            served = self._sinks.get(sink_id, {}).get(fetch_id)
            if served is None:
                continue
            late = [key for key in served.parked if self._parked_until(served, key) <= now_s]
            answers += self._miss_parked(served, late, now_s)
            if not self._drop_if_over(served, now_s):
                self._schedule(served)
        return answers

    def next_deadline(self) -> float | None:
        """When `tick` has something to do."""
        times = [self._due[0][0]] if self._due else []
        expiry = self._pool.next_expiry()
        return min([*times, expiry]) if expiry is not None else min(times, default=None)

    def _on_fetch(self, sink_id: bytes, fetch: Fetch, now_s: float) -> Answers:
        fetches = self._sinks.get(sink_id, {})
        if (known := fetches.get(fetch.fetch_id)) is not None:
            return self._on_repeated(known, fetch, now_s)
        if len(fetches) >= self._max_fetches or fetch.group or fetch.shard:
            self.num_missed_keys += len(fetch.keys)
            return [(sink_id, Miss(fetch.fetch_id, fetch.keys))]
        wait_s = min(fetch.deadline_s, MAX_DEADLINE_S) if fetch.deadline_s > 0 else 0.0  # also for NaN
        served = _Served(sink_id, fetch.fetch_id, now_s, now_s + wait_s, now_s + self._grace_s)
        self._sinks.setdefault(sink_id, {})[fetch.fetch_id] = served
        answers = self._answer(served, list(dict.fromkeys(fetch.keys)), now_s, park=fetch.wait)
        if not self._drop_if_over(served, now_s):
            self._schedule(served)
        return answers

    def _on_repeated(self, served: _Served, fetch: Fetch, now_s: float) -> Answers:
        """The sink lacks these keys. What was answered is on its way as long as its lease runs; after that the answer is lost."""
        if now_s < served.leased_until_s:
            return [(served.sink_id, Parked(served.fetch_id))]
        answers = self._answer(
            served, [key for key in dict.fromkeys(fetch.keys) if key not in served.parked], now_s, park=fetch.wait
        )
        if not self._drop_if_over(served, now_s):
            self._schedule(served)
        return answers or [(served.sink_id, Parked(served.fetch_id))]

    def _answer(self, served: _Served, keys: Sequence[Key], now_s: float, *, park: bool) -> Answers:
        answers: Answers = []
        missing: list[Key] = []
        for start in range(0, len(keys), MAX_BATCH_BLOCKS):
            part = keys[start : start + MAX_BATCH_BLOCKS]
            with self._pool.lock:  # what is looked up is leased before anybody can evict it
                records = self._pool.lookup_all(part)
                found = [record.key for record in records]
                lease = self._pool.grant(found, self._lease_s, now_s) if found else None
            if len(found) < len(part):
                held = set(found)
                missing += [key for key in part if key not in held]
            if lease is None:
                continue
            if self._below is not None:
                self._below.used(found)
            blocks = [
                ReadyBlock(key, block_id, num_tokens, checksum, parent, writer, owner)
                for block_id, key, parent, num_tokens, checksum, _, writer, owner in records
            ]
            served.batches[served.num_batches] = lease.lease_id
            served.leased_until_s = lease.expires_at_s
            waited_s = now_s - served.received_s
            ready = Ready(served.fetch_id, served.num_batches, self._epoch, self._lease_s, blocks, waited_s)
            answers.append((served.sink_id, ready))
            served.num_batches += 1
            self.num_served_blocks += len(blocks)
        coming = self._below.bring_up(missing) if self._below is not None and missing else set()
        if park or coming:
            room = max(0, self._max_parked - self._num_parked.get(served.sink_id, 0))
            waiting = [key for key in missing if park or key in coming][:room]
            self._park(served, waiting)
            missing = [key for key in missing if key not in served.parked]
        if missing:
            self.num_missed_keys += len(missing)
            answers.append((served.sink_id, Miss(served.fetch_id, missing)))
        return answers

    def _keeper(self, sink_id: bytes) -> int | None:
        """The number of that pool node; None if there are too many."""
        if sink_id not in self._keepers:
            free = set(range(MAX_KEEPERS)) - set(self._keepers.values())
            if not free:
                return None
            self._keepers[sink_id] = min(free)
        return self._keepers[sink_id]

    def _miss_waiters(self, keys: Iterable[Key], now_s: float) -> Answers:
        failed: dict[tuple[bytes, bytes], tuple[_Served, list[Key]]] = {}
        for key in keys:
            if self._pool.contains(key):
                continue  # published, and about to be answered
            for name, served in self._waiters.get(key, {}).items():
                failed.setdefault(name, (served, []))[1].append(key)
        return [answer for served, missed in failed.values() for answer in self._miss_parked(served, missed, now_s)]

    def _miss_parked(self, served: _Served, keys: list[Key], now_s: float) -> Answers:
        if not keys:
            return []
        self._unpark(served, keys)
        self._drop_if_over(served, now_s)
        self.num_missed_keys += len(keys)
        return [(served.sink_id, Miss(served.fetch_id, keys))]

    def _parked_until(self, served: _Served, key: Key) -> float:
        return served.deadline_s if key in self._promised else min(served.deadline_s, served.grace_until_s)

    def _schedule(self, served: _Served) -> None:
        """Notes when this fetch must be looked at again. A promise made later only lengthens that."""
        if served.parked:
            at = min(self._parked_until(served, key) for key in served.parked)
        else:
            at = served.leased_until_s
        heapq.heappush(self._due, (at, served.sink_id, served.fetch_id))

    def _park(self, served: _Served, keys: Sequence[Key]) -> None:
        for key in keys:
            served.parked[key] = None
            self._waiters.setdefault(key, {})[(served.sink_id, served.fetch_id)] = served
        self._num_parked[served.sink_id] = self._num_parked.get(served.sink_id, 0) + len(keys)

    def _unpark(self, served: _Served, keys: Iterable[Key]) -> None:
        for key in keys:
            del served.parked[key]
            self._num_parked[served.sink_id] -= 1
            waiters = self._waiters[key]
            del waiters[(served.sink_id, served.fetch_id)]
            if not waiters:
                del self._waiters[key]

    def _drop_if_over(self, served: _Served, now_s: float) -> bool:
        """Forgets a fetch with nothing parked and no lease left."""
        if served.parked or (served.batches and now_s < served.leased_until_s):
            return False
        self._drop(served)
        return True

    def _drop(self, served: _Served) -> None:
        fetches = self._sinks.get(served.sink_id, {})
        if fetches.pop(served.fetch_id, None) is None:
            return
        self._unpark(served, list(served.parked))
        for lease_id in served.batches.values():
            self._pool.end_lease(lease_id)
        if not fetches:
            del self._sinks[served.sink_id]
            self._num_parked.pop(served.sink_id, None)
