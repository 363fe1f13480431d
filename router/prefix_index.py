"""The prefix index: which places hold which blocks, by key.

Owns the order of each process' KV events, by their sequence numbers; what they hold is the `BlockMap`'s, by the number that the
fleet gave each. Pure: it tells its caller when batches are missing, and never asks for them itself. It may be behind the truth: a
hit that is gone is a fetch's miss.

A key says how many tokens its block has, so processes with other block sizes share the map without meeting: a query finds those
whose root and block size its keys were made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvpool.keys import NO_KEYS, Key
from protos.control import Tier
from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch
from router.block_map import NUM_TIERS, Counts, new_block_map
from router.foreign import ForeignBatch, ForeignNames

MAX_KEYS = 4_000_000
"""Some 400 MB of memory at most, where nobody says otherwise."""
MAX_HELD_BATCHES = 1024
REPLAY_RETRY_S = 10.0
"""A replay that has brought nothing for so long is asked for again. Longer than the shell waits for a batch: it is the shell
that says when a replay breaks off, this is for one whose end is never said."""
_MEDIA = {"DEVICE": 0, "HOST": 1, "DISK": 2, "GPU": 0, "CPU": 1, "STORAGE": 2}
"""Tiers by their name in events, ours and vLLM's."""

Batch = EventBatch | ForeignBatch


@dataclass(frozen=True, slots=True)
class Hits:
    """The longest hits of a prompt. `counts` is `[num_processes, NUM_TIERS]`: leading blocks, each in the first of a process'
    tiers that has it. `holders` are the processes that have any."""

    counts: Counts
    holders: Sequence[int]
    longest: int
    """Leading blocks that some process has."""


@dataclass(slots=True)
class _Feed:
    """One process' stream of batches. While a replay runs, live batches are held back and applied after it."""

    epoch: bytes
    number: int
    """Of the process, in the map."""
    tier: int
    """Where its blocks are when an event doesn't say."""
    names: ForeignNames | None = None
    """What a worker of another system calls its blocks; its batches are foreign ones."""
    block_size: int = 0
    """Tokens of its blocks, as its first event said; 0 before."""
    next_seq: int = 0
    replay_since_s: float | None = None
    """When the running replay was asked for or brought its last batch; None: none runs."""
    held: dict[int, Batch] = field(default_factory=dict)
    announced_seq: int = -1
    replayed_seq: int | None = None
    """The last batch of the running replay. Those of a snapshot all carry one number, and all count."""


class PrefixIndex:
    """Key → places, at most `max_keys` keys; past that those that came first are dropped."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._map = new_block_map(max_keys)
        self._feeds: dict[str, _Feed] = {}
        self._numbers: dict[str, int] = {}
        self._counts = np.zeros((0, NUM_TIERS), dtype=np.int32)
        self.num_rejected = 0
        """Frames that are no batch, batches out of order or of another epoch, and events of another block size or with names
        that are or get no keys: what of them means nothing here was left out."""

    def __len__(self) -> int:
        """Keys that somebody holds."""
        return len(self._map)

    @property
    def num_entries(self) -> int:
        """Keys, counted once for each place that holds them."""
        return self._map.num_entries

    @property
    def num_bytes(self) -> int:
        """Of memory, about."""
        return self._map.num_bytes

    def sound(self) -> bool:
        """Whether what is counted is so. Looks at every key."""
        return self._map.sound()

    def processes(self) -> set[str]:
        """Names that the index holds anything of."""
        return set(self._numbers)

    def num_blocks_of(self, process: str) -> int:
        """Blocks of a process, counted once for each tier."""
        return self._map.num_held(self._numbers[process]) if process in self._numbers else 0

    def held(self, process: str, tier: Tier) -> tuple[int, int, bytes]:
        """For an audit: the last batch of the process' events that is taken in (-1: none, or a replay runs), and how many keys it
        holds in `tier` by then, and all of them XORed. Looks at every key."""
        feed = self._feeds.get(process)
        if feed is None:
            return -1, 0, NO_KEYS
        seq = feed.next_seq - 1 if feed.replayed_seq is None else -1
        return seq, *self._map.digest(feed.number, _MEDIA[tier])

    def join(
        self, process: str, number: int, epoch: bytes, tier: Tier, now_s: float, names: ForeignNames | None = None
    ) -> int:
        """A process joined, of a number that nobody else has: forgets what an older epoch of it held. Returns the sequence number
        to replay from. With `names` its batches are another system's."""
        self.forget(process)
        self.expect(number)
        self._numbers[process] = number
        self._feeds[process] = _Feed(epoch, number, _MEDIA[tier], names, replay_since_s=now_s)
        return 0

    def expect(self, number: int) -> None:
        """A process of that number may join: hits have a row for it from now on."""
        if number >= len(self._counts):
            self._counts = np.zeros((max(16, 2 * number), NUM_TIERS), dtype=np.int32)

    def forget(self, process: str) -> None:
        """A process is gone: so are its places, at once."""
        if self._feeds.pop(process, None) is not None:
            number = self._numbers.pop(process)
            self._map.clear(number)

    def on_batch(self, process: str, epoch: bytes, seq: int, batch: Batch, now_s: float) -> int | None:
        """Takes a live batch. Returns the sequence number to replay from when batches before this one are missing."""
        feed = self._speaker(process, epoch, batch)
        if feed is None:
            return None
        if seq < feed.next_seq:
            self.num_rejected += 1
            return None
        if seq == feed.next_seq:
            self._apply(feed, batch)
            feed.next_seq += 1
            return None
        if len(feed.held) < MAX_HELD_BATCHES:
            feed.held[seq] = batch
        return self._ask(feed, now_s)

    def on_replay(self, process: str, epoch: bytes, seq: int, batch: Batch, now_s: float) -> None:
        """Takes a replayed batch. One past the next means that the process has forgotten those between: what we knew of it
        is stale then, and starts again from here (a snapshot, as `protos/kv_events.py` says)."""
        feed = self._speaker(process, epoch, batch)
        if feed is None:
            return
        feed.replay_since_s = now_s
        if seq < feed.next_seq and seq != feed.replayed_seq:
            self.num_rejected += 1
            return
        if seq > feed.next_seq:
            self._clear(feed)
        self._apply(feed, batch)
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
        self._apply_held(feed)

    def ask(self, process: str, epoch: bytes, now_s: float) -> int | None:
        """The sequence number to replay from, for who wants to know whether there is more; None while a replay runs."""
        feed = self._feeds.get(process)
        return None if feed is None or feed.epoch != epoch else self._ask(feed, now_s)

    def lacks(self, process: str, epoch: bytes) -> bool:
        """Whether batches of it are held back because earlier ones are missing."""
        feed = self._feeds.get(process)
        return feed is not None and feed.epoch == epoch and bool(feed.held)

    def skip(self, process: str, epoch: bytes) -> None:
        """The missing batches can't be had any more: what we knew of the process is stale, and it starts again with the first
        batch that is held back."""
        feed = self._feeds.get(process)
        if feed is not None and feed.epoch == epoch and feed.held:
            self._clear(feed)
            feed.next_seq = min(feed.held)
            self._apply_held(feed)

    def reject(self) -> None:
        """Counts a frame of somebody's events that was none."""
        self.num_rejected += 1

    def assume(self, number: int, keys: Sequence[Key]) -> None:
        """The process of that number, which publishes nothing, is taken to hold `keys` (on DEVICE) until `unassume`."""
        self._map.add(number, 0, keys)

    def unassume(self, number: int, keys: Sequence[Key]) -> None:
        """It is not any more."""
        self._map.remove(number, 0, keys)

    def on_announced(self, process: str, epoch: bytes, events_seq: int, now_s: float) -> int | None:
        """Takes the last sequence number of a heartbeat. What the heartbeat before it announced must be here by now, else
        returns the sequence number to replay from."""
        feed = self._feeds.get(process)
        if feed is None or feed.epoch != epoch:
            return None
        overdue = feed.announced_seq >= feed.next_seq
        feed.announced_seq = events_seq
        return self._ask(feed, now_s) if overdue else None

    def longest(self, keys: Sequence[Key]) -> Hits:
        """Who holds `keys[0]`, and how many leading keys, in whatever tiers. Good until the next call."""
        return Hits(self._counts, *self._map.longest(keys, self._counts))

    def _speaker(self, process: str, epoch: bytes, batch: Batch) -> _Feed | None:
        """Whose batch it is; None, and counted, if not this epoch's."""
        feed = self._feeds.get(process)
        said = batch.epoch if isinstance(batch, EventBatch) else None
        if feed is None or feed.epoch != epoch or said not in (None, epoch):
            self.num_rejected += 1
            return None
        return feed

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

    def _apply_held(self, feed: _Feed) -> None:
        while (batch := feed.held.pop(feed.next_seq, None)) is not None:
            self._apply(feed, batch)
            feed.next_seq += 1
        for seq in [seq for seq in feed.held if seq < feed.next_seq]:
            del feed.held[seq]

    def _clear(self, feed: _Feed) -> None:
        """It holds nothing that we know of, and what we don't know of has no name."""
        self._map.clear(feed.number)
        if feed.names is not None:
            feed.names.clear()

    def _apply(self, feed: _Feed, batch: Batch) -> None:
        for event in batch.events if isinstance(batch, EventBatch) else self._translated(feed, batch):
            self._apply_event(feed, event)

    def _translated(self, feed: _Feed, batch: ForeignBatch) -> Sequence[Event]:
        assert feed.names is not None, "a foreign batch of a process that joined without names"
        before = feed.names.num_rejected
        events = feed.names.translate(batch.events)
        self.num_rejected += feed.names.num_rejected - before
        return events

    def _apply_event(self, feed: _Feed, event: Event) -> None:
        before = self._map.num_ignored
        match event:
            case BlockStored(block_size=block_size) if block_size != (feed.block_size or block_size):
                self.num_rejected += 1
            case BlockStored(block_hashes=hashes, medium=medium):
                feed.block_size = event.block_size
                self._map.add(feed.number, _MEDIA.get(medium or "", feed.tier), hashes)
            case BlockRemoved(block_hashes=hashes, medium=medium):
                tiers = [_MEDIA[medium]] if medium in _MEDIA else range(NUM_TIERS)
                for tier in tiers:
                    self._map.remove(feed.number, tier, hashes)
            case AllBlocksCleared():
                self._map.clear(feed.number)
        self.num_rejected += self._map.num_ignored != before
