"""Time, in one place, so that the pure cores take it as an argument and the simulator can replace it."""

from __future__ import annotations

import time


def now_s() -> float:
    """Seconds on CLOCK_BOOTTIME: monotonic, goes on while the machine sleeps; leases and deadlines are measured on it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
