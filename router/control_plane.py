"""The router's ZeroMQ sockets: messages of workers and pool nodes, their KV events and replays.

Owns the sockets and their tasks. It decodes, checks who is speaking, and hands on; it decides nothing. A send never waits: a
process that can't be reached, or doesn't read what it is sent, is reported closed.

    ROUTER  <host>:<control_port>        one frame a message; the identity is `name@epoch` (tandem/zmq_io.py)
    SUB     a process' `events`          [topic, seq, batch]
    DEALER  a process' `replay`          [b"", from_seq] → [b"", seq, batch] … [b"", -1, b""]
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from protos import control, kv_events
from protos.control import Endpoints, FromRouter, Hello, ToRouter
from protos.kv_events import EventBatch
from router.actions import Replay, Subscribe
from router.socket_reader import SocketReader
from tandem.clock import now_s
from tandem.curve import HANDSHAKE_MS, KEY_ROLES, Keyring, PublicKey
from tandem.errors import ConfigError, ProtocolError
from tandem.zap import Zap
from tandem.zmq_io import identity, parse_identity, receive_signed

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 5.0
MAX_REPLAY_BATCHES = 1_000_000
SEND_HIGH_WATER_MARK = 100_000
AnySocket = TypeVar("AnySocket", bound=zmq.Socket[Any])
LOG_PERIOD_S = 1.0
LAST_WORDS_MS = 200
"""What was sent last, aborts mostly, has so long to leave."""


@dataclass(frozen=True, slots=True)
class Handlers:
    """Who is told what. All are called on the event loop and must not raise. `on_replay_end` is not called for a replay that
    was cancelled: the one that replaced it has an end of its own."""

    on_message: Callable[[str, bytes, ToRouter], None]
    on_closed: Callable[[str, bytes], None]
    on_events: Callable[[str, bytes, int, EventBatch], None]
    on_replayed: Callable[[str, bytes, int, EventBatch], None]
    on_replay_end: Callable[[str, bytes, bool], None]


class ControlPlane:
    """Sockets of one router. `bind`, then `listen` on a running event loop, at last `close`. With `keys` only those that they let
    in are heard, and each only as who it is."""

    def __init__(self, host: str, port: int, handlers: Handlers, keys: Keyring | None = None) -> None:
        self._host = host
        self._keys = keys
        self._port = port
        self._handlers = handlers
        self._context = zmq.asyncio.Context()
        self._plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context.underlying)
        self._zap = Zap(self._plain, keys.allowed) if keys is not None else None
        self._socket = self._bounded(self._plain.socket(zmq.ROUTER))
        if keys is not None:
            keys.guard(self._socket, "control")
        self._readers: list[SocketReader] = []
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # An identity names one incarnation of a process: its newer connection is the one that works.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._subscriptions: dict[tuple[str, bytes], tuple[SocketReader, zmq.Socket[bytes]]] = {}
        self._replays: dict[tuple[str, bytes], asyncio.Task[None]] = {}
        self._outbox: list[tuple[str, bytes, bytes]] = []
        self.num_undecodable = 0
        self._log_again_s = 0.0

    @staticmethod
    def _bounded(socket: AnySocket) -> AnySocket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, control.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, SEND_HIGH_WATER_MARK)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        return socket

    def bind(self) -> int:
        """Listens; returns the port (of use when the configured one is 0). Raises ConfigError if it is taken."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        if ":" in self._host:
            self._socket.setsockopt(zmq.IPV6, 1)
        try:
            self._socket.bind(f"tcp://{host}:{self._port}")
        except zmq.ZMQError as error:
            raise ConfigError(
                f"router.control_port: can't listen on {self._host}:{self._port}: {error.strerror}"
            ) from error
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return int(endpoint.rpartition(b":")[2])

    def listen(self) -> None:
        """Takes in messages from now on; other tasks get their turn after each burst."""
        if self._zap is None:
            self._readers = [SocketReader(self._socket, self._take)]
        else:
            self._readers = [
                SocketReader(self._socket, self._take_signed, receive_signed),
                SocketReader(self._zap.socket, self._zap.answer),
            ]

    def _take_signed(self, frames: list[bytes]) -> None:
        self._take(frames[1:], frames[0].decode())

    def _take(self, frames: list[bytes], key: PublicKey = "") -> None:
        who = parse_identity(frames[0])
        if who is None or len(frames) != 2:
            self._drop(f"{len(frames)} frames of an unknown peer {frames[0][:64]!r}")
            return
        try:
            message = control.decode_to_router(frames[1])
        except msgspec.DecodeError as error:
            self._drop(f"a message of {len(frames[1])} bytes from {who[0]}: {error}")
            return
        if self._keys is not None and not _may_say(self._keys, key, who[0], message):
            self._drop(f"a {type(message).__name__} from {who[0]}: its key may not say that")
            return
        self._handlers.on_message(*who, message)

    def _drop(self, what: str) -> None:
        """Counts it; says it once a second at most: a flood must not fill the disk with its log."""
        self.num_undecodable += 1
        if now_s() >= self._log_again_s:
            self._log_again_s = now_s() + LOG_PERIOD_S
            log.warning("dropped %s (%d so far)", what, self.num_undecodable)

    def send(self, process: str, epoch: bytes, message: FromRouter) -> None:
        """Sends without waiting, together with whatever else this turn of the event loop sends; if that is impossible the process
        is reported closed."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append((process, epoch, control.encode(message)))

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if self._socket.closed:
            return
        for process, epoch, data in outbox:
            try:
                self._socket.send_multipart([identity(process, epoch), data], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                log.info("can't send to %s: %s", process, error)
                self._handlers.on_closed(process, epoch)
        for reader in self._readers[:1]:
            reader.again()

    def subscribe(self, action: Subscribe) -> None:
        """Follows a process' KV events until `unsubscribe`."""
        self.unsubscribe(action.process, action.epoch)
        socket = self._bounded(self._plain.socket(zmq.SUB))
        try:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            self._dial(socket, action.process, action.endpoints)
            socket.connect(action.endpoints.events)
        except (zmq.ZMQError, ProtocolError) as error:
            log.warning("can't follow the events of %s at %r: %s", action.process, action.endpoints.events, error)
            socket.close()
            return
        reader = SocketReader(socket, partial(self._on_event_frames, action.process, action.epoch))
        self._subscriptions[(action.process, action.epoch)] = (reader, socket)

    def unsubscribe(self, process: str, epoch: bytes) -> None:
        """Stops following; unknown ones are ignored."""
        if (found := self._subscriptions.pop((process, epoch), None)) is not None:
            found[0].close()
            found[1].close()
        if (replay := self._replays.pop((process, epoch), None)) is not None:
            replay.cancel()

    def _on_event_frames(self, process: str, epoch: bytes, frames: list[bytes]) -> None:
        try:
            _, seq_frame, payload = frames
            seq, batch = kv_events.decode_seq(seq_frame), kv_events.decode_batch(payload)
        except (ValueError, msgspec.DecodeError) as error:
            self._drop(f"an event batch of {process}: {error}")
            return
        self._handlers.on_events(process, epoch, seq, batch)

    def replay(self, action: Replay) -> None:
        """Asks for the events from a sequence number on; a running replay of that process is given up."""
        who = (action.process, action.epoch)
        if (running := self._replays.pop(who, None)) is not None:
            running.cancel()
        task = asyncio.create_task(self._replay(action))
        self._replays[who] = task
        task.add_done_callback(lambda done: self._replays.pop(who) if self._replays.get(who) is done else None)

    async def _replay(self, action: Replay) -> None:
        process, epoch = action.process, action.epoch
        socket = self._bounded(self._context.socket(zmq.DEALER))
        complete = False
        try:
            self._dial(socket, process, action.endpoints)
            socket.connect(action.endpoints.replay)
            await socket.send_multipart([b"", kv_events.encode_seq(action.from_seq)])
            for _ in range(MAX_REPLAY_BATCHES):
                async with asyncio.timeout(REPLAY_TIMEOUT_S):  # unlike wait_for, it never swallows a cancellation
                    frames = await socket.recv_multipart()
                if frames[1] == kv_events.END_OF_REPLAY:
                    complete = True
                    break
                batch = kv_events.decode_batch(frames[2])
                self._handlers.on_replayed(process, epoch, kv_events.decode_seq(frames[1]), batch)
        except (zmq.ZMQError, ProtocolError, TimeoutError, IndexError, ValueError, msgspec.DecodeError) as error:
            log.warning("the event replay of %s from %d failed: %r", process, action.from_seq, error)
        finally:
            socket.close()
        self._handlers.on_replay_end(process, epoch, complete)

    def _dial(self, socket: zmq.Socket[Any], process: str, endpoints: Endpoints) -> None:
        if self._keys is not None:
            self._keys.dial(socket, process, endpoints.key)

    async def close(self) -> None:
        """Ends every task and socket."""
        tasks = list(self._replays.values())
        for process, epoch in list(self._subscriptions):
            self.unsubscribe(process, epoch)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._flush()
        for reader in self._readers:
            reader.close()
        if self._zap is not None:
            self._zap.close()
        self._socket.close(linger=LAST_WORDS_MS)
        self._context.term()


def _may_say(keys: Keyring, key: PublicKey, process: str, message: ToRouter) -> bool:
    """Whether who holds `key` may say this as `process`. Who says hello says its own role, and is dialled by its own key."""
    member = keys.allowed.speaker(key, process)
    if member is None or not isinstance(message, Hello):
        return member is not None
    return KEY_ROLES[message.role] == member.role and message.endpoints.key in ("", key)
