"""The source's side of the tcp transport: the port where readers connect, and those who did.

Owns who is let in, how many, and how long they may take to say who they are; what they then ask for is theirs (`tcp_reader`).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import secrets
import socket
from collections import deque
from collections.abc import Callable

from kernels.cpu import Native
from kvpool.arena import Arena
from kvpool.transport.tcp_connection import Connection, Watch
from kvpool.transport.tcp_frames import SECRET_BYTES
from kvpool.transport.tcp_reader import HEAR_BYTES, Reader
from kvpool.transport.tcp_stream import Stream, keep_near, prepare
from tandem.clock import now_s
from tandem.errors import ConfigError

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
"""Who is not welcomed so long after it connected is closed."""
ACCEPT_AGAIN_S = 1.0
"""After the process ran out of descriptors nobody is let in for so long."""
MAX_READERS = 4096
LOG_PERIOD_S = 1.0

_BACKLOG = 256
_ACCEPTS_PER_POLL = 64


class Listener:
    """Lets readers of `arena` in on a free port of `host`; `stream` makes of a socket what TLS or its absence asks for. Raises
    ConfigError if the host can't be bound, or is one that others can't be told."""

    def __init__(
        self, watch: Watch, host: str, stream: Callable[[socket.socket], Stream], *,
        arena: Arena, native: Native | None, epoch: bytes,
    ) -> None:  # fmt: skip
        self._watch = watch
        self._stream = stream
        self._arena = arena
        self._native = native
        self._epoch = epoch
        self._readers: set[Reader] = set()
        self._strangers: deque[tuple[float, Reader]] = deque()
        """Who connected and by when it must be welcomed, in that order."""
        self._accept_again_s: float | None = None
        self._heard = memoryview(bytearray(HEAR_BYTES))
        self.num_refused = 0
        self._log_again_s = 0.0
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._socket = _listen(host)
        address, self.port = self._socket.getsockname()[:2]
        self.address = f"[{address}]" if ":" in address else address
        watch.set(self)

    @property
    def num_readers(self) -> int:
        return sum(reader.welcomed for reader in self._readers)

    @property
    def due(self) -> bool:
        """Whether `tick` has something to do."""
        now = now_s()
        silent = bool(self._strangers) and self._strangers[0][0] <= now
        return silent or (self._accept_again_s is not None and self._accept_again_s <= now)

    def fileno(self) -> int:
        return self._socket.fileno()

    def tick(self) -> None:
        """Closes those who said nothing for too long, and lets others in again after a pause."""
        now = now_s()
        while self._strangers and (self._strangers[0][0] <= now or self._strangers[0][1].closed_because):
            _, reader = self._strangers.popleft()
            if not reader.welcomed:
                reader.close(f"no hello within {HANDSHAKE_S} s")
        if self._accept_again_s is not None and self._accept_again_s <= now:
            self._accept_again_s = None
            self._watch.set(self)

    def poll(self, limit_bytes: int) -> None:
        """Lets those in who wait."""
        for _ in range(_ACCEPTS_PER_POLL):
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # Whoever waits stays in the queue and would wake us for ever.
                    log.error("another reader of the arena can't be let in: %s; %d are", error, len(self._readers))
                    self._accept_again_s = now_s() + ACCEPT_AGAIN_S
                    self._watch.set(self, read=False)
                    return
                if isinstance(error, BlockingIOError):
                    return
                continue  # gone while it waited
            self._let_in(connection)

    def close(self) -> None:
        for reader in list(self._readers):
            reader.close()
        self._strangers.clear()
        self._watch.remove(self)
        self._socket.close()

    def _let_in(self, connection: socket.socket) -> None:
        if len(self._readers) >= MAX_READERS:
            self.num_refused += 1
            self._tell_refused(f"{len(self._readers)} are connected, the limit is {MAX_READERS}")
            connection.close()
            return
        try:
            prepare(connection)
            keep_near(connection)
        except OSError:
            connection.close()  # gone already
            return
        reader = Reader(
            self._stream(connection), self._watch, self._left,
            arena=self._arena, native=self._native, epoch=self._epoch, secret=self.secret,
            heard=self._heard,
        )  # fmt: skip
        self._readers.add(reader)
        self._strangers.append((now_s() + HANDSHAKE_S, reader))

    def _left(self, connection: Connection) -> None:
        assert isinstance(connection, Reader)
        self._readers.discard(connection)
        if not connection.welcomed:
            self.num_refused += 1
            self._tell_refused(connection.closed_because)

    def _tell_refused(self, why: str) -> None:
        """Once a second at most: who keeps coming must not fill the disk with our log."""
        if now_s() >= self._log_again_s:
            self._log_again_s = now_s() + LOG_PERIOD_S
            log.warning("a reader of the arena is refused (%d so far): %s", self.num_refused, why)


def _listen(host: str) -> socket.socket:
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(where[0]).is_unspecified:
            raise ConfigError(f"the tcp transport can't tell others {host!r}: it needs one address of this machine")
        listener = socket.socket(family, kind)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tcp transport can't bind {host!r}: {error}") from error
    try:
        listener.setblocking(False)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"the tcp transport can't bind {host!r}: {error}") from error
    return listener
