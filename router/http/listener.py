"""One HTTP port of a router: uvicorn on the router's own event loop.

Owns the listening socket, the server's life (listen, serve, stop), and how long a client may leave unread what it is sent. What
is answered is the app's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tandem.errors import ConfigError

BACKLOG = 1024
KEEP_ALIVE_S = 75
STOP_S = 1.0
"""Answers that still run when the listener stops are cut off after so long."""


log = logging.getLogger(__name__)


class _Connection(HttpToolsProtocol):
    """A client's connection, which is cut when the client reads nothing of what waits for it for `patience_s`. Closing would not
    do: that waits until all is read."""

    def __init__(self, *args: Any, patience_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience_s = patience_s
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Whatever the kernel does not take at once counts as unread; nothing more is written until it is. Not with TLS: uvloop
        # does not always say there that all is written.
        if transport.get_extra_info("sslcontext") is None:
            transport.set_write_buffer_limits(high=0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unwatch()
        self._look(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        self._unwatch()
        super().resume_writing()

    def _look(self, before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread >= before:
            log.warning("a client read nothing for %g s: its connection is cut", self._patience_s)
            self.transport.abort()
            return
        self._watch = self.loop.call_later(self._patience_s, self._look, unread)

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None


class _Server(uvicorn.Server):
    """Leaves signals to the process, which has its own way to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpListener:
    """`app` on one port, over TLS with `tls`. `listen`, then `start` on a running event loop, at last `stop`. A client that reads
    nothing for `patience_s` is cut off."""

    def __init__(self, app: ASGIApp, patience_s: float, tls: ssl.SSLContext | None = None) -> None:
        config = uvicorn.Config(
            app,
            http=functools.partial(_Connection, patience_s=patience_s),  # type: ignore[arg-type]  # it is called, no more
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(STOP_S),
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )
        self._server = _Server(config)
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def listen(self, key: str, host: str, port: int) -> int:
        """Takes the port and returns it (of use when it is 0). Raises ConfigError if it is taken; `key` names it there."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ConfigError(f"{key}: can't listen on {host}:{port}: {error.strerror}") from error
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        """Serves from now on."""
        assert self._socket is not None, "listen before start"
        self._task = asyncio.create_task(self._server.serve([self._socket]))

    async def stop(self) -> None:
        """Takes no more connections, gives answers `STOP_S` to end, closes everything. Does nothing if it never started."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        if self._socket is not None:
            self._socket.close()
