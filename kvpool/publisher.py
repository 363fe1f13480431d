"""KV events of this process: publication in order, and replays for those who missed some (design §11).

Owns the PUB socket, the replay ROUTER socket, the sequence numbers 0, 1, 2 … of one epoch and a bounded history. Knows of
pools only their outboxes and snapshots. What the pools hold already becomes the first batch. The replay's rule is in
`protos/kv_events.py`. One thread calls it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import zmq

from kvpool.block_pool import BlockPool
from protos import kv_events
from protos.control import TierHoldings
from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch
from tandem.curve import Keyring
from tandem.zmq_io import bind_any_port, bounded_socket, received

Socket = zmq.Socket[bytes]

MAX_HASHES_PER_BATCH = 32_768
HISTORY_BATCHES = 10_000
HISTORY_BYTES = 64 * 1024 * 1024


class EventPublisher:
    """Publishes what happens in `pools`. `on_bad_frame(what, error)` hears of replay requests that are none.

    Binds two free ports of `host`; raises ConfigError if it can't. With `keys` only routers and pool nodes are let in.
    """

    def __init__(
        self,
        *,
        context: zmq.Context[Socket],
        host: str,
        pools: Sequence[BlockPool],
        epoch: bytes,
        on_bad_frame: Callable[[str, Exception], None],
        history_batches: int = HISTORY_BATCHES,
        keys: Keyring | None = None,
    ) -> None:
        self._pools = pools
        self._epoch = epoch
        self._on_bad_frame = on_bad_frame
        self._history: deque[tuple[int, bytes]] = deque()
        self._history_bytes = 0
        self._history_batches = history_batches
        self._next_seq = 0
        self._publisher = bounded_socket(context, zmq.PUB)
        self.replay = bounded_socket(context, zmq.ROUTER)
        """To be polled; `handle_replay` when it is readable."""
        if keys is not None:
            keys.guard(self._publisher, "events")
            keys.guard(self.replay, "replay")
        self.events_endpoint = bind_any_port(self._publisher, host)
        self.replay_endpoint = bind_any_port(self.replay, host)
        with self._locked():
            for pool in pools:
                pool.take_events()
            self._publish(self._snapshot())

    @property
    def seq(self) -> int:
        """Sequence number of the last published batch, -1 before the first."""
        return self._next_seq - 1

    def flush(self) -> list[Event]:
        """Publishes what happened since the last call, and returns it."""
        events = [event for pool in self._pools for event in pool.take_events()]
        self._publish(events)
        return events

    def holdings(self, now_s: float) -> tuple[list[TierHoldings], list[Event]]:
        """What the pools hold at the batch `seq`, which is published now if there is anything to tell, and what that was."""
        with self._locked():
            events = self.flush()
            return [pool.holdings(now_s) for pool in self._pools], events

    def handle_replay(self) -> None:
        """Answers those who ask for batches again."""
        for frames in received(self.replay):
            try:
                asker, _, start = frames
                start_seq = kv_events.decode_seq(start)
            except ValueError as error:
                self._on_bad_frame("the replay socket", error)
                continue
            try:
                for seq, payload in self._batches_from(start_seq):
                    self.replay.send_multipart([asker, b"", kv_events.encode_seq(seq), payload], zmq.NOBLOCK)
                self.replay.send_multipart([asker, b"", kv_events.END_OF_REPLAY, b""], zmq.NOBLOCK)
            except zmq.Again:
                pass  # the asker doesn't read; it asks again

    def tend(self) -> None:
        """Has libzmq take in what subscribers said. It does so when the socket is used; while nothing is published, what
        strangers say to the port would be kept, and their connections with it."""
        self._publisher.getsockopt(zmq.EVENTS)

    def close(self) -> None:
        """Idempotent."""
        self._publisher.close()
        self.replay.close()

    def _locked(self) -> ExitStack:
        stack = ExitStack()
        for pool in self._pools:
            stack.enter_context(pool.lock)
        return stack

    def _snapshot(self) -> list[Event]:
        return [event for pool in self._pools for event in pool.snapshot()]

    def _publish(self, events: Sequence[Event]) -> None:
        for payload in self._payloads(events):
            seq = self._next_seq
            self._next_seq += 1
            self._history.append((seq, payload))
            self._history_bytes += len(payload)
            while len(self._history) > self._history_batches or self._history_bytes > HISTORY_BYTES:
                self._history_bytes -= len(self._history.popleft()[1])
            self._publisher.send_multipart([kv_events.TOPIC, kv_events.encode_seq(seq), payload], zmq.NOBLOCK)

    def _payloads(self, events: Sequence[Event]) -> list[bytes]:
        """Batches of bounded size, in order."""
        batches: list[list[Event]] = []
        room = 0
        for event in events:
            size = len(event.block_hashes) if isinstance(event, (BlockStored, BlockRemoved)) else 1
            if size > room:
                batches.append([])
                room = MAX_HASHES_PER_BATCH
            batches[-1].append(event)
            room -= size
        return [kv_events.encode_batch(EventBatch(time.time(), batch, None, self._epoch)) for batch in batches]

    def _batches_from(self, start_seq: int) -> list[tuple[int, bytes]]:
        oldest = self._history[0][0] if self._history else self._next_seq
        if oldest <= start_seq <= self._next_seq:
            return [(seq, payload) for seq, payload in self._history if seq >= start_seq]
        if self._next_seq == 0:
            return []
        with self._locked():  # the snapshot is the state at the last sequence number
            self.flush()
            events: list[Event] = [AllBlocksCleared(), *self._snapshot()]
        return [(self._next_seq - 1, payload) for payload in self._payloads(events)]
