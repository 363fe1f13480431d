"""What one worker of another system (vLLM) says of its blocks, brought into the prefix index.

Owns what its frames mean and which incarnation of it speaks; their order is the index's, their translation `ForeignNames`'.
Such a worker says no epoch and sends no heartbeat: an incarnation ends when its connection does, or when its sequence numbers go
back, and each gets an epoch of ours. Pure: it says from which number to replay, and never asks.

    connected         nothing is known; replay from 0, which brings whatever its buffer still has
    live batch        applied in order; missing ones are replayed
    replay's end      what it didn't bring can't be had any more: starts again with the first batch that came after
    seq goes back     it has restarted: as connected
    no batch          something of it is lost that may have been a removal: nothing is known, and it goes on from there
    disconnected      nothing is known
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from kvpool.keys import Key
from protos import kv_events
from protos.foreign_events import Cleared, decode_foreign_batch
from router.foreign import ForeignBatch, ForeignNames
from router.prefix_index import PrefixIndex

log = logging.getLogger(__name__)

_LOST = ForeignBatch((Cleared(),))
"""In place of a batch that can't be read."""


class ForeignFeed:
    """Feeds `index` with `process`, which has that `number`, and whose blocks of `block_size` tokens follow `root`. A prompt is
    found there by `prompt_keys(root, tokens, block_size)`. Frames are those of vLLM's PUB socket, `[topic, seq, batch]`; of a
    replay's answer the last three are the same."""

    def __init__(
        self, index: PrefixIndex, process: str, number: int, root: Key, block_size: int, has_replay: bool = True
    ) -> None:
        self.process = process
        self.root = root
        self.block_size = block_size
        self._index = index
        self._number = number
        self._has_replay = has_replay
        self._incarnation = 0
        self._last_live_seq = -1
        self._last_replayed_seq = -1
        self._progressed = False
        """Whether the replay brought anything that the ones before it had not."""
        self.num_undecodable = 0
        index.expect(number)

    @property
    def _epoch(self) -> bytes:
        return self._incarnation.to_bytes(8, "big")

    def connected(self, now_s: float) -> int | None:
        """It may be another incarnation. Returns the sequence number to replay from; None if it has no replay."""
        self._incarnation += 1
        self._last_live_seq = self._last_replayed_seq = -1
        self._progressed = False
        names = ForeignNames(self.root, self.block_size)
        from_seq = self._index.join(self.process, self._number, self._epoch, "DEVICE", now_s, names)
        if self._has_replay:
            return from_seq
        self._index.on_replay_end(self.process, self._epoch)
        return None

    def disconnected(self) -> None:
        """What it holds can't be known, nor had. Also at last, when it isn't followed any more."""
        self._index.forget(self.process)

    def on_live(self, frames: Sequence[bytes], now_s: float) -> int | None:
        """Takes what it published. Returns the sequence number to replay from, if any; a running replay is void then."""
        found = self._decoded(frames)
        if found is None:
            return None
        seq, batch = found
        restarted_from = None
        if seq <= self._last_live_seq:
            log.warning("%s publishes batch %d after %d: it has restarted", self.process, seq, self._last_live_seq)
            restarted_from = self.connected(now_s)
        self._last_live_seq = seq
        missing_from = self._index.on_batch(self.process, self._epoch, seq, batch, now_s)
        if missing_from is None or self._has_replay:
            return missing_from if restarted_from is None else restarted_from
        self._index.on_replay_end(self.process, self._epoch)
        self._skip()
        return None

    def on_replayed(self, frames: Sequence[bytes], now_s: float) -> None:
        """Takes a replayed batch."""
        found = self._decoded(frames)
        if found is None:
            return
        seq, batch = found
        if seq > self._last_replayed_seq:
            self._last_replayed_seq = seq
            self._progressed = True
        self._index.on_replay(self.process, self._epoch, seq, batch, now_s)

    def on_replay_end(self, complete: bool) -> None:
        """The replay is over, or broke off (not `complete`)."""
        self._index.on_replay_end(self.process, self._epoch, complete)
        if not self._progressed:
            self._skip()
        self._progressed = False

    def catch_up(self, now_s: float) -> int | None:
        """Now and then: a lost last batch is noticed by nothing else. Returns the sequence number to replay from, if any."""
        return self._index.ask(self.process, self._epoch, now_s) if self._has_replay else None

    def _skip(self) -> None:
        if self._index.lacks(self.process, self._epoch):
            log.warning("batches of %s are lost: what it held is not known any more", self.process)
            self._index.skip(self.process, self._epoch)

    def _decoded(self, frames: Sequence[bytes]) -> tuple[int, ForeignBatch] | None:
        """The batch and its number; `_LOST` if only that is known, None if not even that. Counts both."""
        try:
            _, seq_frame, payload = frames[-3:]
            seq = kv_events.decode_seq(seq_frame)
            if seq < 0:
                raise ValueError(f"sequence number {seq} of a batch")
        except ValueError as error:
            self._reject(error)
            return None
        try:
            return seq, ForeignBatch(decode_foreign_batch(payload))
        except (msgspec.DecodeError, ValueError) as error:
            self._reject(error)
            return seq, _LOST

    def _reject(self, error: Exception) -> None:
        self.num_undecodable += 1
        self._index.reject()
        log.warning("dropped a batch of %s: %s", self.process, error)
