"""One HTTP port of a router: uvicorn on the router's own event loop.

Owns the listening socket and the server's life (listen, serve, stop). What is answered is the app's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from tandem.errors import ConfigError

BACKLOG = 1024
KEEP_ALIVE_S = 75
STOP_S = 1.0
"""Answers that still run when the listener stops are cut off after so long."""


class _Server(uvicorn.Server):
    """Leaves signals to the process, which has its own way to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpListener:
    """`app` on one port. `listen`, then `start` on a running event loop, at last `stop`."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(STOP_S),
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
