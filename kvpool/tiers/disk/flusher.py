"""A thread that writes one buffer while its owner fills the next.

Owns that thread and the hand-over. Never looks at buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Flusher:
    """Runs one call at a time. One thread, the owner, uses it."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ended: SimpleQueue[Exception | None] = SimpleQueue()
        self._running = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def begin(self, call: Callable[[], None]) -> None:
        """Starts `call` when the one before it has ended; raises what that one raised, and then `call` is not started."""
        self.wait()
        self._running = True
        self._calls.put(call)

    def wait(self) -> None:
        """Returns when nothing runs; raises what the last call raised."""
        if self._running:
            error = self._ended.get()
            self._running = False
            if error is not None:
                raise error

    def close(self) -> None:
        """Ends the thread; nothing may be running."""
        assert not self._running, "a call is running"
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._ended.put(error)
            else:
                self._ended.put(None)
