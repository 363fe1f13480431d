"""The search for the highest rate that a system holds: up or down by a factor, then halving the gap.

Owns the order of the rates; knows nothing of what is tried. The same for every system, so its resolution favours none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

START = 2.0
"""Turns a second."""
FACTOR = 1.5
RESOLUTION = 1.11
"""The search ends when the lowest rate that failed is less than so many times the highest that held."""
LOWEST = 0.25


def highest(holds: Callable[[float], bool], limit: float, start: float = START) -> float:
    """The highest rate found for which `holds` says True; 0 if not even about `LOWEST` does. None above `limit` is tried."""
    low, high, rate = 0.0, math.inf, min(start, limit)
    while True:
        if holds(rate):
            low = rate
        else:
            high = rate
        if low == limit or high <= LOWEST:
            return low
        if not low:
            rate = high / FACTOR
        elif high == math.inf:
            rate = min(limit, low * FACTOR)
        elif high < RESOLUTION * low:
            return low
        else:
            rate = math.sqrt(low * high)
