"""The tcp transport: blocks over plain sockets or mutual TLS, between machines, with nothing but the kernel's TCP.

Owns the descriptor that is polled, and the channels; each poll's bytes are shared among the connections that are ready. Blocks go
from the source's arena into its socket and from the sink's socket into its arena with no copy between, and are hashed as each
becomes complete. What travels is in `tcp_frames`; the two ends are `tcp_reader` (behind `tcp_listener`) and `tcp_channel`.

Who connects must name our epoch and a secret of 128 bits that is part of the endpoint, which travels on the control plane.
Without TLS that keeps out whoever doesn't know it, but not whoever can listen on the network.
"""

from __future__ import annotations

import errno
import os
import re
import socket

import numpy as np

from kernels.cpu import Native
from kvpool.arena import Arena
from kvpool.transport.base import POLL_BYTES, ReadResult
from kvpool.transport.tcp_channel import TcpChannel
from kvpool.transport.tcp_connection import Connection, Watch
from kvpool.transport.tcp_listener import Listener
from kvpool.transport.tcp_stream import PlainStream, Stream, TlsContexts, TlsFiles, TlsStream, is_connecting, prepare
from protos.control import Source
from tandem.errors import ConfigError, TransportError

MAX_PORT = 65_535
_ENDPOINT = re.compile(r"(tcp|tls)://(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9.]{7,15})):([0-9]{1,5})/([0-9a-f]{32})")


class TcpTransport:
    """Keeps the `Transport` contract on a free port of `host`, one address of this machine. With `tls` both sides of every
    connection must have a certificate of its authority, and endpoints begin with `tls://`.

    Raises ConfigError if the host can't be bound or a TLS file can't be used. The arena must outlive it.
    """

    name = "tcp"

    def __init__(
        self, arena: Arena, epoch: bytes, host: str, native: Native | None, *, tls: TlsFiles | None = None
    ) -> None:
        try:
            self._tls = TlsContexts(tls) if tls is not None else None
        except OSError as error:
            raise ConfigError(f"TLS with {tls}: {error}") from error
        self._arena = arena
        self._native = native
        self._scratch = np.empty((1, arena.slab_bytes), dtype=np.uint8)
        self._ended: list[ReadResult] = []
        self._channels: set[Connection] = set()
        self._scheme = "tcp" if self._tls is None else "tls"
        self._closed = False
        self._watch = Watch()
        try:
            self._listener = Listener(self._watch, host, self._accepted, arena=arena, native=native, epoch=epoch)
        except BaseException:
            self._watch.close()
            raise

    @property
    def endpoint(self) -> str:
        return f"{self._scheme}://{self._listener.address}:{self._listener.port}/{self._listener.secret.hex()}"

    @property
    def busy(self) -> bool:
        return bool(self._ended) or self._watch.has_unread or self._listener.due

    @property
    def num_readers(self) -> int:
        return self._listener.num_readers

    @property
    def num_refused(self) -> int:
        """Connections to our arena that ended before they were welcomed."""
        return self._listener.num_refused

    def fileno(self) -> int:
        return self._watch.fileno()

    def reaches(self, source: Source) -> bool:
        return bool(source.endpoints.tcp)

    def connect(self, source: Source) -> TcpChannel:
        endpoint = source.endpoints.tcp
        found = _ENDPOINT.fullmatch(endpoint)
        if found is None or int(found[4]) > MAX_PORT:
            raise TransportError(f"{source.process}: {endpoint[:60]!r} is not {self._scheme}://address:port/secret")
        scheme, address, port, secret = found[1], found[2] or found[3], int(found[4]), bytes.fromhex(found[5])
        if scheme != self._scheme:
            raise TransportError(f"{source.process} speaks {scheme}, we speak {self._scheme}")
        try:
            connection = _connect(address, port)
        except OSError as error:
            raise TransportError(f"{source.process}: can't connect to {address} port {port}: {error}") from error
        if self._tls is None:
            stream: Stream = PlainStream(connection, connecting=True)
        else:
            stream = TlsStream(connection, self._tls.client, connecting=True)
        channel = TcpChannel(
            stream, self._watch, self._channels.discard, arena=self._arena, scratch=self._scratch, native=self._native,
            epoch=source.epoch, secret=secret, ended=self._ended,
        )  # fmt: skip
        self._channels.add(channel)
        return channel

    def poll(self) -> list[ReadResult]:
        if not self._closed:
            self._listener.tick()
            ready = self._watch.ready()
            for member in ready:
                member.poll(POLL_BYTES // len(ready))
        results = list(self._ended)
        self._ended.clear()
        return results

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for channel in list(self._channels):
            channel.close()
        self._listener.close()
        self._watch.close()

    def _accepted(self, connection: socket.socket) -> Stream:
        if self._tls is None:
            return PlainStream(connection, connecting=False)
        return TlsStream(connection, self._tls.server, connecting=False)


def _connect(address: str, port: int) -> socket.socket:
    """A connection that may still be on its way. Raises OSError if it is known already that it won't come."""
    numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV  # a name would have to be asked for, which takes time
    family, kind, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=numeric)[0]
    connection = socket.socket(family, kind)
    try:
        prepare(connection)
        if (error := connection.connect_ex(where)) not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))
        is_connecting(connection)  # on this machine a refusal is there by now
    except BaseException:
        connection.close()
        raise
    return connection
