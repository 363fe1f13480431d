"""The prefix index: which places hold which blocks, by key.

Owns key → places, fed by each process' KV events in the order of their sequence numbers. Pure: it tells its caller when
batches are missing, and never asks for them itself. It may be behind the truth: a hit that is gone is a fetch's miss.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvpool.keys import KEY_BYTES, Key
from protos.control import Tier
from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch

MAX_HELD_BATCHES = 1024
REPLAY_RETRY_S = 10.0
"""A replay that has brought nothing for so long is asked for again. Longer than the shell waits for a batch: it is the shell
that says when a replay breaks off, this is for one whose end is never said."""
_TIERS: dict[str, Tier] = {"DEVICE": "DEVICE", "HOST": "HOST", "DISK": "DISK", "GPU": "DEVICE", "CPU": "HOST"}


class Place(NamedTuple):
    """Where a block can be fetched: one tier of one process."""

    process: str
    tier: Tier


@dataclass(slots=True)
class _Holders:
    """The places that hold some keys, sorted: one object for all keys that exactly these hold."""

    places: tuple[Place, ...]
    num_keys: int = 0


@dataclass(slots=True)
class _Feed:
    """One process' stream of batches. While a replay runs, live batches are held back and applied after it."""

    epoch: bytes
    tier: Tier
    next_seq: int = 0
    replay_since_s: float | None = None
    """When the running replay was asked for or brought its last batch; None: none runs."""
    held: dict[int, EventBatch] = field(default_factory=dict)
    announced_seq: int = -1
    replayed_seq: int | None = None
    """The last batch of the running replay. Those of a snapshot all carry one number, and all count."""


class PrefixIndex:
    """Key → places, at most `max_entries` keys; past that the keys stored longest ago are dropped."""

    def __init__(self, max_entries: int = 4_000_000) -> None:
        self._max_entries = max_entries
        self._holders: OrderedDict[Key, _Holders] = OrderedDict()
        self._shared: dict[tuple[Place, ...], _Holders] = {}
        self._keys_of: dict[Place, set[Key]] = {}
        self._feeds: dict[str, _Feed] = {}

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def num_place_sets(self) -> int:
        """Different sets of places that hold keys."""
        return len(self._shared)

    def processes(self) -> set[str]:
        """Names that the index holds anything of."""
        return {place.process for place, keys in self._keys_of.items() if keys} | set(self._feeds)

    def num_blocks_of(self, process: str) -> int:
        return sum(len(keys) for place, keys in self._keys_of.items() if place.process == process)

    def join(self, process: str, epoch: bytes, tier: Tier, now_s: float) -> int:
        """A process joined: forgets what an older epoch of it held. Returns the sequence number to replay from."""
        self.forget(process)
        self._feeds[process] = _Feed(epoch, tier, replay_since_s=now_s)
        return 0

    def forget(self, process: str) -> None:
        """A process is gone: so are its places, at once."""
        self._feeds.pop(process, None)
        self._clear(process)

    def on_batch(self, process: str, epoch: bytes, seq: int, batch: EventBatch, now_s: float) -> int | None:
        """Takes a live batch. Returns the sequence number to replay from when batches before this one are missing."""
        feed = self._feeds.get(process)
        if feed is None or feed.epoch != epoch or (batch.epoch is not None and batch.epoch != epoch):
            return None
        if seq < feed.next_seq:
            return None
        if seq == feed.next_seq:
            self._apply(process, feed, batch)
            feed.next_seq += 1
            return None
        if len(feed.held) < MAX_HELD_BATCHES:
            feed.held[seq] = batch
        return self._ask(feed, now_s)

    def on_replay(self, process: str, epoch: bytes, seq: int, batch: EventBatch, now_s: float) -> None:
        """Takes a replayed batch. One past the next means that the process has forgotten those between: what we knew of it
        is stale then, and starts again from here (a snapshot, as `protos/kv_events.py` says)."""
        feed = self._feeds.get(process)
        if feed is None or feed.epoch != epoch:
            return
        feed.replay_since_s = now_s
        if seq < feed.next_seq and seq != feed.replayed_seq:
            return
        if seq > feed.next_seq:
            self._clear(process)
        self._apply(process, feed, batch)
        feed.next_seq = seq + 1
        feed.replayed_seq = seq

    def on_replay_end(self, process: str, epoch: bytes, complete: bool = True) -> None:
        """The replay is over. If it broke off (not `complete`), the next heartbeats ask again, from its last batch on: there may
        have been more of that number."""
        feed = self._feeds.get(process)
        if feed is None or feed.epoch != epoch:
            return
        if not complete:
            self._break_off(feed)
        feed.replay_since_s = feed.replayed_seq = None
        self._apply_held(process, feed)

    def on_announced(self, process: str, epoch: bytes, events_seq: int, now_s: float) -> int | None:
        """Takes the last sequence number of a heartbeat. What the heartbeat before it announced must be here by now, else
        returns the sequence number to replay from."""
        feed = self._feeds.get(process)
        if feed is None or feed.epoch != epoch:
            return None
        overdue = feed.announced_seq >= feed.next_seq
        feed.announced_seq = events_seq
        return self._ask(feed, now_s) if overdue else None

    def longest_hits(self, keys: Sequence[Key]) -> dict[Place, int]:
        """For each place that holds `keys[0]`: how many leading keys it holds."""
        hits: dict[Place, int] = {}
        alive = self._places_of_key(keys[0]) if keys else ()
        num = 1
        while alive and num < len(keys):
            here = self._places_of_key(keys[num])
            if here is not alive:
                for place in alive:
                    if place not in here:
                        hits[place] = num
                alive = tuple(place for place in alive if place in here)
            num += 1
        for place in alive:
            hits[place] = num
        return hits

    @staticmethod
    def _ask(feed: _Feed, now_s: float) -> int | None:
        if feed.replay_since_s is not None and now_s - feed.replay_since_s < REPLAY_RETRY_S:
            return None
        PrefixIndex._break_off(feed)
        feed.replay_since_s = now_s
        return feed.next_seq

    @staticmethod
    def _break_off(feed: _Feed) -> None:
        """The running replay will bring no more, and may have had more of its last number."""
        if feed.replayed_seq is not None:
            feed.next_seq = feed.replayed_seq
            feed.replayed_seq = None

    def _apply_held(self, process: str, feed: _Feed) -> None:
        while (batch := feed.held.pop(feed.next_seq, None)) is not None:
            self._apply(process, feed, batch)
            feed.next_seq += 1
        for seq in [seq for seq in feed.held if seq < feed.next_seq]:
            del feed.held[seq]

    def _apply(self, process: str, feed: _Feed, batch: EventBatch) -> None:
        for event in batch.events:
            self._apply_event(process, feed.tier, event)

    def _apply_event(self, process: str, tier: Tier, event: Event) -> None:
        match event:
            case BlockStored(block_hashes=hashes, medium=medium):
                place = Place(process, _TIERS.get(medium or tier, tier))
                for key in _own_keys(hashes):
                    self._add(key, place)
                self._trim()
            case BlockRemoved(block_hashes=hashes, medium=medium):
                for place in self._places_in(process, medium):
                    for key in _own_keys(hashes):
                        self._remove(key, place)
            case AllBlocksCleared():
                self._clear(process)

    def _places_in(self, process: str, medium: str | None) -> list[Place]:
        if medium is not None and medium in _TIERS:
            return [Place(process, _TIERS[medium])]
        return [place for place in self._keys_of if place.process == process]

    def _places_of_key(self, key: Key) -> tuple[Place, ...]:
        holders = self._holders.get(key)
        return holders.places if holders is not None else ()

    def _add(self, key: Key, place: Place) -> None:
        held = self._keys_of.setdefault(place, set())
        if key in held:
            return
        held.add(key)
        self._hold(key, tuple(sorted((*self._places_of_key(key), place))))

    def _remove(self, key: Key, place: Place) -> None:
        held = self._keys_of.get(place)
        if held is None or key not in held:
            return
        held.remove(key)
        self._hold(key, tuple(other for other in self._places_of_key(key) if other != place))

    def _hold(self, key: Key, places: tuple[Place, ...]) -> None:
        """`places`, sorted, hold `key` from now on; none: the key is forgotten."""
        old = self._holders.get(key)
        if old is not None:
            self._release(old)
        if not places:
            del self._holders[key]
            return
        holders = self._shared.get(places)
        if holders is None:
            holders = self._shared[places] = _Holders(places)
        holders.num_keys += 1
        self._holders[key] = holders

    def _release(self, holders: _Holders) -> None:
        holders.num_keys -= 1
        if holders.num_keys == 0:
            del self._shared[holders.places]

    def _clear(self, process: str) -> None:
        for place in [place for place in self._keys_of if place.process == process]:
            for key in list(self._keys_of[place]):
                self._remove(key, place)
            del self._keys_of[place]

    def _trim(self) -> None:
        while len(self._holders) > self._max_entries:
            key, holders = self._holders.popitem(last=False)
            self._release(holders)
            for place in holders.places:
                self._keys_of[place].discard(key)


def _own_keys(hashes: Iterable[bytes | int]) -> list[Key]:
    """Those that are our keys; a foreign worker's hashes name nothing here."""
    return [item for item in hashes if isinstance(item, bytes) and len(item) == KEY_BYTES]
