"""What one worker holds, learnt from its KV events: order, gaps, replays.

Owns the sequence logic and the resulting map of announced blocks. Pure: frames and time in, replay requests out; the
sockets are its caller's. The protocol is told in `protos/kv_events.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvpool.keys import KEY_BYTES, Key
from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch

MAX_BUFFERED_BATCHES = 10_000
"""Live batches kept during a replay; past it the oldest go, and the next replay brings them."""
ASK_AGAIN_S = 0.2
"""The least time between two requests, so that a gap that a replay doesn't fill is no storm."""
REPLAY_TIMEOUT_S = 2.0
RESYNC_S = 2.0
"""Without news for so long we ask what comes next: a lost last batch would be noticed by nobody else."""


class EventFollower:
    """Follows one incarnation of one publisher.

    `announced` maps each key that it holds to its parent. `take_stored` gives what was stored since the last call; keys
    that were removed meanwhile are left out. `None` for a batch means: it could not be decoded.
    """

    def __init__(self, epoch: bytes) -> None:
        self._epoch = epoch
        self.announced: dict[Key, Key] = {}
        self._stored: dict[Key, None] = {}
        self._next_seq = 0
        self._replayed_seq = 0
        self._live: deque[tuple[int, EventBatch | None]] = deque(maxlen=MAX_BUFFERED_BATCHES)
        self._replaying = False
        self._asked_s = float("-inf")
        self._heard_s = float("-inf")
        self.num_bad_batches = 0

    @property
    def seq(self) -> int:
        """The last batch that is taken in, -1 before the first, or while a replay runs: `announced` may be half a snapshot."""
        return -1 if self._replaying else self._next_seq - 1

    def on_live(self, seq: int, batch: EventBatch | None, now_s: float) -> None:
        """A publication. Out of order it waits for a replay."""
        self._heard_s = now_s
        if seq < self._next_seq:
            return
        self._live.append((seq, batch))
        if not self._replaying:
            self._drain()

    def on_replay(self, seq: int, batch: EventBatch | None, now_s: float) -> None:
        """One batch of the answer to the last request."""
        if not self._replaying:
            return
        self._heard_s = now_s
        self._apply(batch)
        # Counts only when the answer is complete: half a snapshot is not the state after its number.
        self._replayed_seq = max(self._replayed_seq, seq + 1)

    def on_replay_end(self, now_s: float) -> None:
        """The answer is complete: live batches go on from there."""
        self._heard_s = now_s
        if self._replaying:
            self._replaying = False
            self._next_seq = max(self._next_seq, self._replayed_seq)
        self._drain()

    def ask(self, now_s: float) -> int | None:
        """The number to ask a replay from, if it is time to; the caller sends the request."""
        if now_s < self._asks_at():
            return None
        self._asked_s = now_s
        self._heard_s = now_s
        self._replaying = True
        self._replayed_seq = 0
        return self._next_seq

    def next_ask_s(self) -> float:
        """When `ask` will have something to say, if nothing is heard until then."""
        return self._asks_at()

    def take_stored(self) -> list[Key]:
        stored, self._stored = self._stored, {}
        return list(stored)

    def _asks_at(self) -> float:
        if self._replaying:
            return self._heard_s + REPLAY_TIMEOUT_S
        if self._live:
            return self._asked_s + ASK_AGAIN_S
        return self._heard_s + RESYNC_S

    def _drain(self) -> None:
        while self._live and self._live[0][0] <= self._next_seq:
            seq, batch = self._live.popleft()
            if seq == self._next_seq:
                self._apply(batch)
                self._next_seq = seq + 1

    def _apply(self, batch: EventBatch | None) -> None:
        if batch is None or batch.epoch != self._epoch:
            self.num_bad_batches += 1
            return
        for event in batch.events:
            match event:
                case BlockStored(block_hashes=hashes, parent_block_hash=parent):
                    self._on_stored(hashes, parent)
                case BlockRemoved(block_hashes=hashes):
                    for key in hashes:
                        if isinstance(key, bytes):
                            self.announced.pop(key, None)
                            self._stored.pop(key, None)
                case AllBlocksCleared():
                    self.announced.clear()
                    self._stored.clear()

    def _on_stored(self, hashes: Sequence[bytes | int], parent: bytes | int | None) -> None:
        for key in hashes:
            # Names of another kind are a foreign worker's: nothing of ours can fetch by them.
            if isinstance(key, bytes) and isinstance(parent, bytes) and len(key) == len(parent) == KEY_BYTES:
                self.announced[key] = parent
                self._stored[key] = None
            parent = key
