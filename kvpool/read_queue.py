"""Which reads go on now: those that are needed first, within each peer's share (design §5).

Owns the order of reads that have not begun and the budgets of peers; moves no bytes. Pure: time in, read ids out. One
transport thread reads from many sources for many sequences; what the next sequence needs must not wait behind what the
pool would like to copy some day, and no peer may take all the bandwidth.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field

MAX_IN_FLIGHT_BYTES = 32 * 1024 * 1024
"""Of one peer, unless it is a single read: enough that a transport never runs dry, so little that order means something."""


@dataclass(slots=True)
class _Peer:
    waiting: list[tuple[int, int]] = field(default_factory=list)
    """A heap of `(order, read_id)`."""
    in_flight_bytes: int = 0
    free_at_s: float = 0.0
    """When its budget allows the next read."""


@dataclass(frozen=True, slots=True)
class _Read:
    peer: Hashable
    num_bytes: int
    started: bool


class ReadQueue:
    """`bytes_per_s` is each peer's budget, 0 for none. A read is added once, and leaves by `remove` or `end`."""

    def __init__(self, *, bytes_per_s: float = 0.0, max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES) -> None:
        self._bytes_per_s = bytes_per_s
        self._max_in_flight_bytes = max_in_flight_bytes
        self._peers: dict[Hashable, _Peer] = {}
        self._reads: dict[int, _Read] = {}

    def add(self, read_id: int, peer: Hashable, order: int, num_bytes: int) -> None:
        """Queues a read from `peer`; of several the lowest `order` goes first, then the lowest id."""
        assert read_id not in self._reads, f"read {read_id} is queued already"
        self._reads[read_id] = _Read(peer, num_bytes, False)
        heapq.heappush(self._peers.setdefault(peer, _Peer()).waiting, (order, read_id))

    def remove(self, read_id: int) -> bool:
        """Takes a read out that has not begun; False if it has, or isn't known."""
        read = self._reads.get(read_id)
        if read is None or read.started:
            return False
        del self._reads[read_id]
        self._forget_if_idle(read.peer)
        return True

    def start(self, now_s: float) -> list[int]:
        """The reads that begin now, in order over all peers."""
        begun: list[tuple[int, int]] = []
        for name, peer in self._peers.items():
            while self._skip_removed(peer) and self._may_start(peer, now_s):
                order, read_id = heapq.heappop(peer.waiting)
                num_bytes = self._reads[read_id].num_bytes
                self._reads[read_id] = _Read(name, num_bytes, True)
                peer.in_flight_bytes += num_bytes
                if self._bytes_per_s:
                    peer.free_at_s = max(now_s, peer.free_at_s) + num_bytes / self._bytes_per_s
                begun.append((order, read_id))
        return [read_id for _, read_id in sorted(begun)]

    def end(self, read_id: int) -> None:
        """A read that had begun is over, whatever came of it."""
        read = self._reads.pop(read_id)
        assert read.started, f"read {read_id} ended before it began"
        self._peers[read.peer].in_flight_bytes -= read.num_bytes
        self._forget_if_idle(read.peer)

    def next_start_s(self) -> float | None:
        """When a budget allows the next read; None if only the end of another one does."""
        times = [
            peer.free_at_s
            for peer in self._peers.values()
            if self._skip_removed(peer) and self._has_room(peer, self._reads[peer.waiting[0][1]].num_bytes)
        ]
        return min(times, default=None)

    def _may_start(self, peer: _Peer, now_s: float) -> bool:
        return peer.free_at_s <= now_s and self._has_room(peer, self._reads[peer.waiting[0][1]].num_bytes)

    def _has_room(self, peer: _Peer, num_bytes: int) -> bool:
        return not peer.in_flight_bytes or peer.in_flight_bytes + num_bytes <= self._max_in_flight_bytes

    def _skip_removed(self, peer: _Peer) -> bool:
        """Whether a read waits."""
        while peer.waiting and peer.waiting[0][1] not in self._reads:
            heapq.heappop(peer.waiting)
        return bool(peer.waiting)

    def _forget_if_idle(self, name: Hashable) -> None:
        peer = self._peers[name]
        if not self._skip_removed(peer) and not peer.in_flight_bytes and not self._bytes_per_s:
            del self._peers[name]

    def forget_peer(self, name: Hashable) -> None:
        """That peer is gone, and none of its reads is left here."""
        self._peers.pop(name, None)
