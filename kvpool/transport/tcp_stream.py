"""One connection as the tcp transport sees it: bytes and blocks that go as far as they go without waiting, plain or over TLS.

Owns the socket, its options and TLS; knows no frames. Every call raises OSError when the connection broke or TLS refused the
peer, and EOFError when the peer ended it.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kernels.socket_io import Receiving, Sending, Transfer

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 10, 5, 4
UNACKNOWLEDGED_S = 30
"""A peer whose machine is gone, or that takes nothing for so long, is given up by the kernel."""
NEAR_BYTES = 512 * 1024
"""Of a send buffer towards a peer on this machine: about what a core's own cache holds."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for mutual TLS: our certificate chain and its key, and the authority that must have signed the peer's. Names
    in certificates mean nothing: whoever the authority signed belongs to the cluster."""

    certificate: str
    key: str
    authority: str


class TlsContexts:
    """TLS 1.3 with certificates on both sides. Raises OSError if a file can't be used."""

    def __init__(self, files: TlsFiles) -> None:
        self.server = _context(ssl.PROTOCOL_TLS_SERVER, files)
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, files)


def _context(protocol: ssl._SSLMethod, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.authority)
    return context


def prepare(connection: socket.socket) -> None:
    """Sets what every connection has: never waits, sends at once, notices a peer whose machine is gone."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_S * 1000)


def keep_near(connection: socket.socket) -> None:
    """Bounds what is under way to a peer on this machine, so that it is still in the caches when the peer takes it; to others
    as much may be under way as the kernel finds that the network holds."""
    if connection.getsockname()[0] == connection.getpeername()[0]:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NEAR_BYTES)


class Stream(Protocol):
    """A connection that may still be opening."""

    @property
    def wants_write(self) -> bool:
        """Whether it can go on only when the socket takes bytes, apart from what its owner has to send."""

    @property
    def has_unread(self) -> bool:
        """Whether bytes wait here of which the socket knows nothing any more."""

    def fileno(self) -> int: ...

    def opened(self) -> bool:
        """Goes on with opening; whether it is done. Nothing may be sent or received before."""

    def send(self, data: memoryview) -> int:
        """How many bytes went; 0 if none can now. What did not go must come first in the next call."""

    def receive(self, into: memoryview) -> int:
        """How many bytes came; 0 if none is there now."""

    def send_blocks(self, sending: Sending, limit_bytes: int) -> int:
        """As `Sending.send`."""

    def receive_blocks(self, receiving: Receiving, limit_bytes: int) -> int:
        """As `Receiving.receive`."""

    def close(self) -> None: ...


class PlainStream:
    has_unread = False

    def __init__(self, connection: socket.socket, *, connecting: bool) -> None:
        self._socket = connection
        self.wants_write = connecting

    def fileno(self) -> int:
        return self._socket.fileno()

    def opened(self) -> bool:
        self.wants_write = self.wants_write and is_connecting(self._socket)
        return not self.wants_write

    def send(self, data: memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def receive(self, into: memoryview) -> int:
        try:
            num_bytes = self._socket.recv_into(into)
        except BlockingIOError:
            return 0
        if not num_bytes:
            raise EOFError
        return num_bytes

    def send_blocks(self, sending: Sending, limit_bytes: int) -> int:
        return sending.send(self._socket.fileno(), limit_bytes)

    def receive_blocks(self, receiving: Receiving, limit_bytes: int) -> int:
        return receiving.receive(self._socket.fileno(), limit_bytes)

    def close(self) -> None:
        self._socket.close()


class TlsStream:
    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, connecting: bool) -> None:
        self._socket = connection
        self._context = context
        self._server = not connecting
        self._tls: ssl.SSLSocket | None = None
        self._open = False
        self.wants_write = connecting

    @property
    def has_unread(self) -> bool:
        return self._open and self._opened_tls.pending() > 0

    @property
    def _opened_tls(self) -> ssl.SSLSocket:
        assert self._tls is not None, "bytes before the connection opened"
        return self._tls

    def fileno(self) -> int:
        return self._socket.fileno()

    def opened(self) -> bool:
        if self._open:
            return True
        if self._tls is None:
            if is_connecting(self._socket):
                if self._server:
                    raise EOFError
                return False
            # The same descriptor goes on as an SSLSocket, which can't be made before it is connected.
            self._socket = self._tls = self._context.wrap_socket(
                self._socket, server_side=self._server, do_handshake_on_connect=False
            )
        try:
            self._tls.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wish:
            self.wants_write = isinstance(wish, ssl.SSLWantWriteError)
            return False
        self._open, self.wants_write = True, False
        return True

    def send(self, data: memoryview) -> int:
        try:
            return self._opened_tls.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def receive(self, into: memoryview) -> int:
        try:
            num_bytes = self._opened_tls.recv_into(into)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wish:
            self.wants_write = isinstance(wish, ssl.SSLWantWriteError)
            return 0
        self.wants_write = False
        if not num_bytes:
            raise EOFError
        return num_bytes

    def send_blocks(self, sending: Sending, limit_bytes: int) -> int:
        return _by_pieces(sending, self.send, limit_bytes)

    def receive_blocks(self, receiving: Receiving, limit_bytes: int) -> int:
        return _by_pieces(receiving, self.receive, limit_bytes)

    def close(self) -> None:
        self._socket.close()


def _by_pieces(transfer: Transfer, move: Callable[[memoryview], int], limit_bytes: int) -> int:
    """Whole pieces whatever the limit: after a refusal TLS wants the same bytes again. A record at most goes at once."""
    begin = transfer.position
    while transfer.left_bytes and transfer.position - begin < limit_bytes and (moved := move(transfer.piece())):
        transfer.advance(moved)
    return transfer.position - begin


def is_connecting(connection: socket.socket) -> bool:
    """Whether the kernel still waits for the other end. Raises OSError if that failed."""
    error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))
    try:
        connection.getpeername()
    except OSError as unconnected:
        if unconnected.errno == errno.ENOTCONN:
            return True
        raise
    return False
