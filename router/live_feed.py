"""Who watches a router: one task that looks, many who read along.

Owns the watchers and the task, which runs while there are any. What is told is `router/live.py`'s; a message is made and encoded
once for all who may see the same. A watcher that lags `MAX_BEHIND` messages behind is cut off: it may come again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Literal

import msgspec

from router.live import Live
from router.live_views import Message, for_clients
from tandem.errors import Overloaded

log = logging.getLogger(__name__)

EVERY_S = 0.5
MAX_WATCHERS = 64
MAX_BEHIND = 8

Audience = Literal["admin", "client"]
_encoder = msgspec.json.Encoder()


def encoded(message: Message, audience: Audience) -> bytes:
    """The message as a server-sent event, as much of it as the audience may see."""
    shown = message if audience == "admin" else for_clients(message)
    return b"id: %d\ndata: %b\n\n" % (message.number, _encoder.encode(shown))


class Watcher:
    """One who reads along. Iterate it; it ends when the feed is closed, or when it was cut off and has read what there was."""

    def __init__(self, audience: Audience) -> None:
        self.audience = audience
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_BEHIND + 1)

    def put(self, event: bytes) -> bool:
        """Whether there was room for it."""
        if self._queue.qsize() >= MAX_BEHIND:
            return False
        self._queue.put_nowait(event)
        return True

    def end(self) -> None:
        """Nothing more comes."""
        if not self._queue.full():
            self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (event := await self._queue.get()) is not None:
            yield event


class LiveFeed:
    """A `Live` to all who watch it, `now_s` being its clock. For one event loop."""

    def __init__(self, live: Live, now_s: Callable[[], float]) -> None:
        self._live = live
        self._now_s = now_s
        self._watchers: set[Watcher] = set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def watch(self, audience: Audience) -> Watcher:
        """A new watcher, for whom everything is in the first message. Raises Overloaded if there are too many. Whoever has one
        must `leave`."""
        if self._closed or len(self._watchers) >= MAX_WATCHERS:
            raise Overloaded(f"{len(self._watchers)} are watching this router, the limit is {MAX_WATCHERS}")
        watcher = Watcher(audience)
        watcher.put(encoded(self._live.whole(self._now_s()), audience))
        self._watchers.add(watcher)
        if self._task is None:
            self._task = asyncio.create_task(self._look())
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """It reads no more. Without any, nothing is looked at."""
        self._watchers.discard(watcher)
        watcher.end()
        if not self._watchers and self._task is not None:
            self._task.cancel()
            self._task = None
            self._live.forget()

    def close(self) -> None:
        """All have read what there is to read."""
        self._closed = True
        for watcher in list(self._watchers):
            self.leave(watcher)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                message = self._live.changes(self._now_s())
                events: dict[Audience, bytes] = {}
                for watcher in list(self._watchers):
                    if watcher.audience not in events:
                        events[watcher.audience] = encoded(message, watcher.audience)
                    if not watcher.put(events[watcher.audience]):
                        log.info("one who watches reads too slowly, and is cut off")
                        self._watchers.discard(watcher)
                        watcher.end()
            except Exception:  # a state that can't be shown must not end the page for good
                log.exception("the live view failed")
