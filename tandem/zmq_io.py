"""A process's line to its routers: hello, welcome, heartbeat, reconnect (design §11).

Owns one DEALER socket per router and nothing of what is said over it. Not thread-safe: one thread calls it.
Frames are single MessagePack messages, bounded; what can't be decoded is counted, logged and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import zmq

from protos import control
from protos.control import FromRouter, Heartbeat, Hello, Refused, ToRouter, Welcome
from tandem.curve import HANDSHAKE_MS, Keyring
from tandem.errors import ConfigError

log = logging.getLogger(__name__)

HELLO_PERIOD_S = 1.0
MESSAGES_PER_HANDLE = 1000
"""A busy socket yields after so many messages, so that heartbeats go on."""
_HIGH_WATER_MARK = 100_000
_TELL_AT_HELLO = frozenset({3, 30, 300, 3000})
"""After so many hellos without an answer it is said that nobody answers."""


def identity(process: str, epoch: bytes) -> bytes:
    """The ZeroMQ identity of a process: its name and epoch, so that a restarted one is somebody else."""
    return f"{process}@{epoch.hex()}".encode()


@lru_cache(maxsize=65_536)
def parse_identity(frame: bytes) -> tuple[str, bytes] | None:
    """Name and epoch of a ZeroMQ identity; None if it is not exactly what `identity` makes of them: a second spelling would let
    one process speak as another."""
    try:
        name, _, digits = frame.decode().rpartition("@")
        epoch = bytes.fromhex(digits)
    except ValueError:
        return None
    return (name, epoch) if name and identity(name, epoch) == frame else None


def bounded_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket that never lingers, refuses frames past the limit and has a high-water mark that is never reached in health."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.setsockopt(zmq.MAXMSGSIZE, control.MAX_MESSAGE_BYTES)
    socket.sndhwm = _HIGH_WATER_MARK
    socket.rcvhwm = _HIGH_WATER_MARK
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    return socket


def bind_any_port(socket: zmq.Socket[bytes], host: str) -> str:
    """Binds to a free TCP port of `host` and returns the endpoint that others connect to. Raises ConfigError if it can't."""
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    try:
        socket.bind(f"tcp://{host}:*")
    except zmq.ZMQError as error:
        raise ConfigError(f"transfer.host: can't listen on {host!r}: {error.strerror}") from error
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, str)
    return endpoint


def received(socket: zmq.Socket[bytes], *, signed: bool = False) -> Iterator[list[bytes]]:
    """What waits on a socket, but not for ever: a busy one yields after `MESSAGES_PER_HANDLE` messages, and one that was closed
    by what the last message led to at once. `signed`: as `receive_signed` returns it."""
    for _ in range(MESSAGES_PER_HANDLE):
        if socket.closed:
            return
        try:
            yield receive_signed(socket) if signed else socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


def receive_signed(socket: zmq.Socket[bytes]) -> list[bytes]:
    """The next message of a guarded socket, after the public key of whoever sent it. Raises zmq.Again if none waits."""
    first = socket.recv(zmq.NOBLOCK, copy=False)
    frames, more = [str(first.get("User-Id")).encode(), first.bytes], first.more
    while more:
        frames.append(socket.recv(zmq.NOBLOCK))
        more = bool(socket.getsockopt(zmq.RCVMORE))
    return frames


@dataclass(slots=True)
class _Router:
    socket: zmq.Socket[bytes]
    endpoint: str
    welcome: Welcome | None = None
    heard_s: float = 0.0
    next_hello_s: float = 0.0
    next_heartbeat_s: float = 0.0
    heartbeat_s: float = 0.0
    """When the last heartbeat was sent, or the welcome came."""
    num_hellos: int = 0
    """Since the last welcome."""
    hello_number: int = 0
    """Of the last hello."""
    first_hello: int = 1
    """Of the hellos since we lost this router, or began: an answer to an earlier one is late."""


class RouterLink:
    """Keeps every router informed that this process lives and passes on what they send.

    A hello is repeated each second until a welcome arrives, and begins anew when a router falls silent for its
    `liveness_s` or answers with another epoch. `on_lost` is then called once with the router's number: what it had
    dispatched is nobody's any more, and what it says before it has heard the new hello isn't taken in. Routers are numbered
    in the order of `endpoints`; `make_heartbeat` is given the number. With `keys` only a router is spoken to.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Sequence[str],
        *,
        identity: bytes,
        make_hello: Callable[[], Hello],
        make_heartbeat: Callable[[int], Heartbeat],
        on_message: Callable[[int, FromRouter], None],
        on_refused: Callable[[str], None],
        on_lost: Callable[[int], None],
        keys: Keyring | None = None,
    ) -> None:
        self._make_hello = make_hello
        self._make_heartbeat = make_heartbeat
        self._on_message = on_message
        self._on_refused = on_refused
        self._on_lost = on_lost
        self._routers: list[_Router] = []
        self.num_undecodable = 0
        for endpoint in endpoints:
            socket = bounded_socket(context, zmq.DEALER)
            socket.setsockopt(zmq.IDENTITY, identity)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            if keys is not None:
                keys.dial_router(socket)
            socket.connect(endpoint)
            self._routers.append(_Router(socket, endpoint))

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The sockets to poll for input; `handle` takes one that is readable."""
        return [router.socket for router in self._routers]

    @property
    def welcomed(self) -> bool:
        """Whether some router knows this process."""
        return any(router.welcome for router in self._routers)

    def silent_s(self, now_s: float) -> float:
        """For how long a router has had no heartbeat of this process, if so long that it takes it for dead; else 0. Then this
        process did not run: to be asked before the next `handle` or `tick`."""
        overdue = [
            now_s - router.heartbeat_s
            for router in self._routers
            if router.welcome is not None and now_s - router.heartbeat_s > router.welcome.liveness_s
        ]
        return max(overdue, default=0.0)

    def handle(self, socket: zmq.Socket[bytes], now_s: float) -> None:
        """Takes in what waits on `socket`, up to `MESSAGES_PER_HANDLE`: a flood must not starve heartbeats."""
        number = next(i for i, router in enumerate(self._routers) if router.socket is socket)
        router = self._routers[number]
        for _ in range(MESSAGES_PER_HANDLE):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = control.decode_from_router(frames[-1])
            except msgspec.DecodeError as error:
                self.num_undecodable += 1
                log.warning("dropped a message of %d bytes from %s: %s", len(frames[-1]), router.endpoint, error)
                continue
            router.heard_s = now_s
            match message:
                case Welcome():
                    late = message.answers is not None and message.answers < router.first_hello
                    if router.welcome is None and late:
                        continue  # it believes that we never lost it
                    if router.welcome is not None and router.welcome.epoch != message.epoch:
                        self._lose(number, now_s)  # a new incarnation: `tick` says hello until it answers
                        continue
                    if router.welcome is None:
                        log.info("joined %s at %s", message.router, router.endpoint)
                        router.next_heartbeat_s = router.heartbeat_s = now_s
                    router.welcome = message
                    router.num_hellos = 0
                case Refused(reason=reason):
                    self._on_refused(reason)
                case _ if router.welcome is not None:
                    self._on_message(number, message)
                case _:
                    pass

    def tick(self, now_s: float) -> float:
        """Sends the hellos and heartbeats that are due and notices silent routers. Returns when to call again."""
        due = now_s + HELLO_PERIOD_S
        for number, router in enumerate(self._routers):
            welcome = router.welcome
            if welcome is not None and now_s - router.heard_s > welcome.liveness_s:
                log.warning("router %s has been silent for %.1f s", router.endpoint, now_s - router.heard_s)
                self._lose(number, now_s)
                due = now_s  # then a hello, unless the owner has closed this link for a new one
                continue
            if welcome is None:
                if now_s >= router.next_hello_s:
                    router.num_hellos += 1
                    if router.num_hellos in _TELL_AT_HELLO:
                        log.warning("no router answers at %s; trying again", router.endpoint)
                    self._hello(router)
                    router.next_hello_s = now_s + HELLO_PERIOD_S
                due = min(due, router.next_hello_s)
            else:
                if now_s >= router.next_heartbeat_s:
                    self._send(router, self._make_heartbeat(number))
                    router.heartbeat_s = now_s
                    router.next_heartbeat_s = now_s + welcome.heartbeat_s
                due = min(due, router.next_heartbeat_s)
        return due

    def heartbeat_now(self) -> None:
        """The next `tick` sends a heartbeat to every router that knows this process: there is something to say."""
        for router in self._routers:
            router.next_heartbeat_s = float("-inf")

    def hello_again(self) -> None:
        """Tells every router anew who this process is (its capacity or endpoints changed)."""
        for router in self._routers:
            self._hello(router)

    def send(self, number: int, message: ToRouter) -> None:
        """Sends to one router; a message to a router that can't be reached is dropped (it is asked for again, or is fenced)."""
        self._send(self._routers[number], message)

    def send_all(self, message: ToRouter) -> None:
        """Sends to every router."""
        for router in self._routers:
            self._send(router, message)

    def close(self, linger_ms: int = 0) -> None:
        """Closes the sockets; queued messages get `linger_ms` to leave."""
        for router in self._routers:
            router.socket.close(linger=linger_ms)

    def _lose(self, number: int, now_s: float) -> None:
        router = self._routers[number]
        router.welcome = None
        router.next_hello_s = now_s
        router.first_hello = router.hello_number + 1
        self._on_lost(number)

    def _hello(self, router: _Router) -> None:
        router.hello_number += 1
        self._send(router, msgspec.structs.replace(self._make_hello(), number=router.hello_number))

    def _send(self, router: _Router, message: ToRouter) -> None:
        try:
            router.socket.send(control.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.warning("router %s does not take messages; one was dropped", router.endpoint)
