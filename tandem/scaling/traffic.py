"""What comes to the cluster, as rates: made of the totals of its routers.

Owns the last totals of each router and what they were in each interval of late. Pure: it is told what routers say, and when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields

MEAN_INTERVALS = 12
"""Over so many intervals with requests the mean request is taken: its lengths change slower than how often it comes."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Of one router since it began (`router/traffic.py`)."""

    num_requests: float = 0.0
    num_samples: float = 0.0
    prompt_tokens: float = 0.0
    uncached_tokens: float = 0.0
    uncached_pairs: float = 0.0
    uncached_squares: float = 0.0
    here_tokens: float = 0.0
    here_pairs: float = 0.0

    def plus(self, other: Totals, sign: float = 1.0) -> Totals:
        return Totals(*(getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(Totals)))


@dataclass(frozen=True, slots=True)
class Shape:
    """The mean request. Tokens; pairs of a token and one that it attends to; `spread` is the squared coefficient of variation of
    the uncached tokens. `here` is the part of uncached tokens that decode workers computed themselves."""

    prompt_tokens: float
    uncached_tokens: float
    uncached_pairs: float
    spread: float
    samples: float
    here: float
    here_pairs: float


class TrafficMeter:
    """Give it the totals of all routers at even intervals; `per_s` and `shape` are what they make."""

    def __init__(self) -> None:
        self._last: dict[str, Totals] = {}
        self._at_s: float | None = None
        self._intervals: deque[Totals] = deque(maxlen=MEAN_INTERVALS)
        self.per_s = 0.0
        """Requests a second in the last interval."""

    def look(self, totals: Mapping[str, Totals], now_s: float) -> bool:
        """Takes the totals by router incarnation: one that is new began at 0. Whether there is an interval now: at the first look
        there is none, and a router that was there before anybody looked says nothing yet."""
        if self._at_s is None:
            self._at_s, self._last = now_s, dict(totals)
            return False
        if now_s <= self._at_s:
            return False
        came = Totals()
        for router, total in totals.items():
            came = came.plus(total).plus(self._last.get(router, Totals()), -1.0)
        self.per_s = max(0.0, came.num_requests) / (now_s - self._at_s)
        if came.num_requests > 0:
            self._intervals.append(came)
        # A router that didn't answer is remembered: what it counted meanwhile comes with its next answer.
        self._at_s, self._last = now_s, self._last | dict(totals)
        return True

    def shape(self) -> Shape | None:
        """The mean request of late; None before the first."""
        sums = Totals()
        for interval in self._intervals:
            sums = sums.plus(interval)
        if sums.num_requests <= 0:
            return None
        num = sums.num_requests
        mean = sums.uncached_tokens / num
        return Shape(
            prompt_tokens=sums.prompt_tokens / num,
            uncached_tokens=mean,
            uncached_pairs=sums.uncached_pairs / num,
            spread=max(0.0, sums.uncached_squares / num / mean**2 - 1.0) if mean else 0.0,
            samples=sums.num_samples / num,
            here=min(1.0, sums.here_tokens / max(1.0, sums.uncached_tokens)),
            here_pairs=min(1.0, sums.here_pairs / max(1.0, sums.uncached_pairs)),
        )
