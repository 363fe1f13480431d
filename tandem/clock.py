"""Time, in one place, so that the pure cores take it as an argument and the simulator can replace it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def _boottime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


_source: Callable[[], float] = _boottime_s


def now_s() -> float:
    """Seconds on CLOCK_BOOTTIME: monotonic, goes on while the machine sleeps; leases and deadlines are measured on it."""
    return _source()


@contextmanager
def replaced(source: Callable[[], float]) -> Iterator[None]:
    """Within it `now_s` is what `source` says, in the whole process: for a simulation, which has no other threads."""
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before
