"""What both ends of a tcp transport's connection have in common, and the one epoll descriptor behind all of them.

Owns when a connection is polled, what it waits for, and its end; knows nothing of what it carries.
"""

from __future__ import annotations

import select
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from kvpool.transport.tcp_stream import Stream
from tandem.errors import TransportError

MAX_READY = 16
"""Connections that one poll goes on with; the kernel then puts them behind the others that are ready."""


class Pollable(Protocol):
    def fileno(self) -> int: ...

    def poll(self, limit_bytes: int) -> None:
        """Goes on, and moves about `limit_bytes` at most."""


class Watch:
    """An epoll descriptor and who is behind each of its descriptors."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._members: dict[int, tuple[Pollable, int]] = {}
        self._unread: dict[int, Pollable] = {}

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def has_unread(self) -> bool:
        """Whether somebody can go on of whom the descriptor doesn't know."""
        return bool(self._unread)

    def set(self, member: Pollable, *, read: bool = True, write: bool = False, unread: bool = False) -> None:
        """What `member` waits for from now on; `unread`: it need not wait."""
        fd = member.fileno()
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        found = self._members.get(fd)
        if found is None:
            self._epoll.register(fd, events)
        elif found[1] != events:
            self._epoll.modify(fd, events)
        self._members[fd] = (member, events)
        if unread:
            self._unread[fd] = member
        else:
            self._unread.pop(fd, None)

    def remove(self, member: Pollable) -> None:
        """Before its descriptor is closed."""
        fd = member.fileno()
        self._unread.pop(fd, None)
        if self._members.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # TLS closes a socket that broke while it was wrapped

    def ready(self) -> list[Pollable]:
        """Those that can go on now, some of them if they are many."""
        fds = dict.fromkeys(fd for fd, _ in self._epoll.poll(0, MAX_READY))
        fds |= dict.fromkeys(self._unread)
        return [self._members[fd][0] for fd in fds]

    def close(self) -> None:
        self._epoll.close()


class Connection(ABC):
    """One end of a connection. It waits for what it can go on with, until it closes; then `left` is called, once."""

    def __init__(self, stream: Stream, watch: Watch, left: Callable[[Connection], None]) -> None:
        self._stream = stream
        self._fd = stream.fileno()
        self._watch = watch
        self._left = left
        self._open = False
        self._closed_because = ""
        self._wait()

    @property
    def closed_because(self) -> str:
        """Why the connection closed; empty while it is open."""
        return self._closed_because

    def fileno(self) -> int:
        """The same to the end, by which the watch knows it."""
        return self._fd

    def poll(self, limit_bytes: int) -> None:
        """Goes on, and moves about `limit_bytes` at most. Whatever the peer does closes this connection at worst."""
        try:
            self._open = self._open or self._stream.opened()
            if self._open:
                self._go_on(limit_bytes)
        except EOFError:
            self.close(self._peer_is_gone())
        except TransportError as error:
            self.close(str(error))
        except OSError as error:
            self.close(f"the connection broke: {error}")
        if not self._closed_because:
            self._wait()

    @abstractmethod
    def _go_on(self, limit_bytes: int) -> None:
        """What can be done now on an open stream. TransportError closes the connection."""

    @abstractmethod
    def _has_output(self) -> bool: ...

    def _peer_is_gone(self) -> str:
        return "the peer closed the connection"

    def _wait(self) -> None:
        write = self._stream.wants_write or (self._open and self._has_output())
        self._watch.set(self, write=write, unread=self._stream.has_unread)

    def close(self, because: str = "closed by us") -> None:
        """Idempotent; the first reason stays."""
        if self._closed_because:
            return
        self._closed_because = because
        self._watch.remove(self)
        self._stream.close()
        self._left(self)
