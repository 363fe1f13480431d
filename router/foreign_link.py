"""The sockets of one worker of another system: its KV events and their replay, as vLLM has them.

Owns the sockets and their tasks; what comes is a `ForeignFeed`'s to judge. It decides nothing.

    SUB      its events    [topic, seq, batch]
    DEALER   its replay    [b"", from_seq] → [b"", topic, seq, batch] … [b"", b"", -1, b""]

vLLM's publisher binds if its endpoint has a `*` and connects to others: we do the same with ours, so one of the two has a `*`.
One that connects to us has the endpoint for itself.
"""

from __future__ import annotations

import asyncio
import logging

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from protos import kv_events
from router.foreign_feed import ForeignFeed
from router.socket_reader import SocketReader
from tandem.clock import now_s
from tandem.errors import ConfigError

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 5.0
"""Of each of its batches."""
MAX_REPLAY_BATCHES = 1_000_000
CATCH_UP_S = 10.0
HEARTBEAT_MS = 1_000
SILENT_MS = 5_000
"""A worker that answers no heartbeat of ZeroMQ's for so long is disconnected."""
HIGH_WATER_MARK = 100_000


class ForeignLink:
    """Follows a worker from `open` to `close`, both on a running event loop; reconnects by itself. `replay` is None where it has
    none."""

    def __init__(self, context: zmq.asyncio.Context, feed: ForeignFeed, events: str, replay: str | None) -> None:
        self._context = context
        self._plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
        self._feed = feed
        self._events = events
        self._replay_endpoint = replay
        self._replay: asyncio.Task[None] | None = None
        self._catching_up: asyncio.Task[None] | None = None
        self._sockets: list[zmq.Socket[bytes]] = []
        self._readers: list[SocketReader] = []

    def open(self) -> None:
        """Follows it, as soon as it is there. Raises ConfigError for endpoints that can't be."""
        socket = self._plain.socket(zmq.SUB)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._sockets = [socket, monitor]
        try:
            for option, value in _OPTIONS.items():
                socket.setsockopt(option, value)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            if "*" in self._events:
                socket.bind(self._events)
            else:
                socket.connect(self._events)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise ConfigError(
                f"can't follow the events of {self._feed.process} at {self._events!r}: {error.strerror}"
            ) from error
        self._readers = [SocketReader(socket, self._on_frames), SocketReader(monitor, self._on_monitor)]
        self._catching_up = asyncio.create_task(self._catch_up())

    async def close(self) -> None:
        """Ends every task and socket; the index forgets the worker."""
        tasks = [task for task in (self._replay, self._catching_up) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close_sockets()
        self._feed.disconnected()

    def _close_sockets(self) -> None:
        for reader in self._readers:
            reader.close()
        self._readers = []
        for socket in self._sockets:
            socket.close(linger=0)
        self._sockets = []

    def _on_monitor(self, frames: list[bytes]) -> None:
        if parse_monitor_message(frames)["event"] == zmq.EVENT_DISCONNECTED:
            log.info("%s is gone", self._feed.process)
            self._stop_replay()
            self._feed.disconnected()
        else:
            self._ask(self._feed.connected(now_s()))

    def _on_frames(self, frames: list[bytes]) -> None:
        self._ask(self._feed.on_live(frames, now_s()))

    def _stop_replay(self) -> None:
        if self._replay is not None:
            self._replay.cancel()

    def _ask(self, from_seq: int | None) -> None:
        if from_seq is not None and self._replay_endpoint is not None:
            self._stop_replay()
            self._replay = asyncio.create_task(self._run_replay(self._replay_endpoint, from_seq))

    async def _catch_up(self) -> None:
        while True:
            await asyncio.sleep(CATCH_UP_S)
            self._ask(self._feed.catch_up(now_s()))

    async def _run_replay(self, endpoint: str, from_seq: int) -> None:
        socket = self._context.socket(zmq.DEALER)
        complete = False
        try:
            for option, value in _OPTIONS.items():
                socket.setsockopt(option, value)
            socket.connect(endpoint)
            await socket.send_multipart([b"", kv_events.encode_seq(from_seq)])
            for _ in range(MAX_REPLAY_BATCHES):
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    frames = await socket.recv_multipart()
                if frames[-2] == kv_events.END_OF_REPLAY:
                    complete = True
                    break
                self._feed.on_replayed(frames, now_s())
        except (zmq.ZMQError, TimeoutError, IndexError) as error:
            log.warning("the replay of %s from %d failed: %r", self._feed.process, from_seq, error)
        finally:
            socket.close(linger=0)
        self._feed.on_replay_end(complete)


_OPTIONS = {
    zmq.LINGER: 0,
    zmq.MAXMSGSIZE: kv_events.MAX_BATCH_BYTES,
    zmq.RCVHWM: HIGH_WATER_MARK,
    zmq.HEARTBEAT_IVL: HEARTBEAT_MS,
    zmq.HEARTBEAT_TIMEOUT: SILENT_MS,
}
