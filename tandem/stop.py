"""How a role is asked to end.

Owns the two words: end when what you have is finished or handed over, and end now.
"""

from __future__ import annotations

import threading


class Stop(threading.Event):
    """Set, a role finishes what it has, as far as its bounds let it, and ends. With `at_once` set too it ends now."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = threading.Event()

    def now(self) -> None:
        """Asks to end at once."""
        self.at_once.set()
        self.set()


def ends_at_once(stop: threading.Event) -> bool:
    """Whether `stop` says so; a plain event never does."""
    return isinstance(stop, Stop) and stop.at_once.is_set()
