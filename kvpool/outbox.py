"""What the world is still to be told of a pool's blocks.

Owns the KV events and the published keys since they were last taken; merges neighbours into few events. Knows nothing of
blocks. Not thread-safe: its pool's lock covers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvpool.keys import Key
from protos.control import Tier
from protos.kv_events import BlockHash, BlockRemoved, BlockStored, Event

MAX_HASHES_PER_EVENT = 4096
"""Merging stops here, so that a publisher can cut its batches between events."""


class Outbox:
    """Events of blocks of `block_size` tokens in the tier `medium`."""

    __slots__ = ("_block_size", "_events", "_medium", "_open_chains", "_published")

    def __init__(self, block_size: int, medium: Tier) -> None:
        self._block_size = block_size
        self._medium = medium
        self._events: list[Event] = []
        self._open_chains: dict[Key, BlockStored] = {}
        self._published: list[Key] = []

    def published(self, key: Key, parent: Key, announced: bool) -> None:
        """`key` can be found now, and is announced or not."""
        self._published.append(key)
        if not announced:
            return
        event = self._open_chains.pop(parent, None)
        if event is None or len(event.block_hashes) >= MAX_HASHES_PER_EVENT:
            event = self._stored([key], parent)
            self._events.append(event)
        else:
            event.block_hashes.append(key)
        self._open_chains[key] = event

    def restored(self, pairs: Sequence[tuple[Key, Key]]) -> None:
        """All of `pairs` (key, parent), each key once and in any order, can be found now, and are announced."""
        self._published.extend(key for key, _ in pairs)
        self._events.extend(self.in_chains(pairs))

    def removed(self, key: Key) -> None:
        """`key`, which was announced, is gone."""
        if self._open_chains:
            self._open_chains.clear()  # a later store must not move before this removal
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and len(last.block_hashes) < MAX_HASHES_PER_EVENT:
            last.block_hashes.append(key)
        else:
            self._events.append(BlockRemoved([key], self._medium))

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        self._open_chains.clear()
        return events

    def take_published(self) -> list[Key]:
        published, self._published = self._published, []
        return published

    def in_chains(self, pairs: Iterable[tuple[Key, Key]]) -> Iterator[BlockStored]:
        """The fewest events for `pairs` (key, parent), each key once and in any order: parents before children."""
        keys: set[Key] = set()
        first: dict[Key, Key] = {}
        others: dict[Key, list[Key]] = {}
        for key, parent in pairs:
            keys.add(key)
            if parent in first:
                others.setdefault(parent, []).append(key)
            else:
                first[parent] = key
        heads = [(key, parent) for parent, key in first.items() if parent not in keys]
        heads += [(key, parent) for parent, below in others.items() if parent not in keys for key in below]
        while heads:
            key, parent = heads.pop()
            run: list[BlockHash] = [key]
            while (child := first.get(key)) is not None:
                if key in others:
                    heads.extend((other, key) for other in others[key])
                if len(run) >= MAX_HASHES_PER_EVENT:
                    heads.append((child, key))
                    break
                run.append(child)
                key = child
            yield self._stored(run, parent)

    def _stored(self, keys: list[BlockHash], parent: Key) -> BlockStored:
        return BlockStored(keys, parent, [], self._block_size, None, self._medium)
