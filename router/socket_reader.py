"""Hands on what comes on a ZeroMQ socket, on the event loop, in bursts: a tenth of the cost of a future for each message.

Owns when the socket is read; the socket is its caller's. libzmq signals through a descriptor that is readable once when something
changed, not for as long as something waits: so everything is read until there is no more, and a burst that had to stop goes on by
itself. A socket that is also sent on loses such signals to its sends: `again` after each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

BURST = 256
"""Messages before other work on the event loop gets its turn."""


def receive_frames(socket: zmq.Socket[bytes]) -> list[bytes]:
    """The next message. Raises zmq.Again if none waits."""
    return socket.recv_multipart(zmq.NOBLOCK)


class SocketReader:
    """`on_frames` is called with each message until `close`, and must not raise; `receive` takes the next one from the socket.
    Needs a running event loop."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_frames: Callable[[list[bytes]], None],
        receive: Callable[[zmq.Socket[bytes]], list[bytes]] = receive_frames,
    ) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._fd = socket.fileno()
        self._pending: asyncio.Handle | None = None
        self._loop.add_reader(self._fd, self._read)
        self.again()

    def again(self) -> None:
        """Looks once more, soon."""
        if self._pending is None:
            self._pending = self._loop.call_soon(self._read)

    def close(self) -> None:
        """Reads no more. The socket stays open."""
        self._loop.remove_reader(self._fd)
        if self._pending is not None:
            self._pending.cancel()

    def _read(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        for _ in range(BURST):
            if self._socket.closed:
                return
            try:
                frames = self._receive(self._socket)
            except zmq.Again:
                return
            self._on_frames(frames)
        self.again()
