"""The prefix index: which places hold which blocks, by key.

Owns the order of each process' KV events, by their sequence numbers, and the names of processes; what they hold is the
`BlockMap`'s. Pure: it tells its caller when batches are missing, and never asks for them itself. It may be behind the truth: a
hit that is gone is a fetch's miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvpool.keys import Key
from protos.control import Tier
from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch
from router.block_map import NUM_TIERS, new_block_map

MAX_HELD_BATCHES = 1024
REPLAY_RETRY_S = 10.0
"""A replay that has brought nothing for so long is asked for again. Longer than the shell waits for a batch: it is the shell
that says when a replay breaks off, this is for one whose end is never said."""
_MEDIA = {"DEVICE": 0, "HOST": 1, "DISK": 2, "GPU": 0, "CPU": 1, "STORAGE": 2}
"""Tiers by their name in events, ours and vLLM's."""


class Place(NamedTuple):
    """Where a block can be fetched: one tier of one process."""

    process: str
    tier: Tier


@dataclass(slots=True)
class _Feed:
    """One process' stream of batches. While a replay runs, live batches are held back and applied after it."""

    epoch: bytes
    number: int
    """Of the process, in the map."""
    tier: int
    """Where its blocks are when an event doesn't say."""
    block_size: int = 0
    """Tokens of its blocks, as its first event said; 0 before."""
    next_seq: int = 0
    replay_since_s: float | None = None
    """When the running replay was asked for or brought its last batch; None: none runs."""
    held: dict[int, EventBatch] = field(default_factory=dict)
    announced_seq: int = -1
    replayed_seq: int | None = None
    """The last batch of the running replay. Those of a snapshot all carry one number, and all count."""


class PrefixIndex:
    """Key → places, at most `max_keys` keys; past that those that came first are dropped."""

    def __init__(self, max_keys: int = 4_000_000) -> None:
        self._map = new_block_map(max_keys)
        self._feeds: dict[str, _Feed] = {}
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        """By number; "" is free."""
        self._counts = np.zeros((0, NUM_TIERS), dtype=np.int32)
        self.num_rejected = 0
        """Batches out of order or of another epoch, and events of another block size or with names that are no keys: what of
        them means nothing here was left out."""

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

    def join(self, process: str, epoch: bytes, tier: Tier, now_s: float) -> int:
        """A process joined: forgets what an older epoch of it held. Returns the sequence number to replay from."""
        self.forget(process)
        number = self._names.index("") if "" in self._names else len(self._names)
        if number == len(self._names):
            self._names.append("")
            self._counts = np.zeros((len(self._names), NUM_TIERS), dtype=np.int32)
        self._names[number] = process
        self._numbers[process] = number
        self._feeds[process] = _Feed(epoch, number, _MEDIA[tier], replay_since_s=now_s)
        return 0

    def forget(self, process: str) -> None:
        """A process is gone: so are its places, at once."""
        if self._feeds.pop(process, None) is not None:
            number = self._numbers.pop(process)
            self._map.clear(number)
            self._names[number] = ""

    def on_batch(self, process: str, epoch: bytes, seq: int, batch: EventBatch, now_s: float) -> int | None:
        """Takes a live batch. Returns the sequence number to replay from when batches before this one are missing."""
        feed = self._feeds.get(process)
        if feed is None or feed.epoch != epoch or (batch.epoch is not None and batch.epoch != epoch):
            self.num_rejected += 1
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

    def on_replay(self, process: str, epoch: bytes, seq: int, batch: EventBatch, now_s: float) -> None:
        """Takes a replayed batch. One past the next means that the process has forgotten those between: what we knew of it
        is stale then, and starts again from here (a snapshot, as `protos/kv_events.py` says)."""
        feed = self._feeds.get(process)
        if feed is None or feed.epoch != epoch or (batch.epoch is not None and batch.epoch != epoch):
            self.num_rejected += 1
            return
        feed.replay_since_s = now_s
        if seq < feed.next_seq and seq != feed.replayed_seq:
            self.num_rejected += 1
            return
        if seq > feed.next_seq:
            self._map.clear(feed.number)
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
        """For each process that holds `keys[0]`: how many leading keys it holds, in whatever tiers. The place is the slowest
        of those that are needed for it."""
        hits: dict[Place, int] = {}
        for number in self._map.longest(keys, self._counts):
            device, host, disk = self._counts[number].tolist()
            tier: Tier = "DISK" if disk else "HOST" if host else "DEVICE"
            hits[Place(self._names[number], tier)] = device + host + disk
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

    def _apply_held(self, feed: _Feed) -> None:
        while (batch := feed.held.pop(feed.next_seq, None)) is not None:
            self._apply(feed, batch)
            feed.next_seq += 1
        for seq in [seq for seq in feed.held if seq < feed.next_seq]:
            del feed.held[seq]

    def _apply(self, feed: _Feed, batch: EventBatch) -> None:
        for event in batch.events:
            self._apply_event(feed, event)

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
