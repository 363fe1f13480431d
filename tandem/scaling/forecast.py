"""A short look ahead: how much will come while a worker starts.

Owns level and trend of one series. Holt's linear method (Holt, 1957; Hyndman & Athanasopoulos, *Forecasting*, section 8.2) with
a damped trend: it follows a ramp without lag, which an average does not, and needs no history of days, which nothing here has.
A trend is believed upwards alone. What falls is followed by the level, and how long it has to have fallen before anything is
taken away is the scaler's to say. Pure.
"""

from __future__ import annotations

LEVEL = 0.5
TREND = 0.2
DAMPING = 0.85
"""Weights of the newest value and of the newest change; what is left of the trend an interval later."""
MOST = 2.0
"""A forecast is at most so many times the level: a burst is not the begin of a ramp to anywhere."""


class Forecast:
    """Give it one value an interval; `ahead` is what it makes of them."""

    def __init__(self) -> None:
        self._level: float | None = None
        self._trend = 0.0

    def observe(self, value: float) -> None:
        """Takes the value of the interval that has just passed."""
        if self._level is None:
            self._level = value
            return
        before = self._level
        self._level = LEVEL * value + (1.0 - LEVEL) * (before + DAMPING * self._trend)
        self._level = max(0.0, self._level)
        self._trend = TREND * (self._level - before) + (1.0 - TREND) * DAMPING * self._trend

    @property
    def level(self) -> float:
        """What comes now, smoothed; 0 before the first value."""
        return self._level or 0.0

    def ahead(self, intervals: float) -> float:
        """What is expected to come so many intervals from now, at least what comes now."""
        steps: float = DAMPING * (1.0 - DAMPING**intervals) / (1.0 - DAMPING)
        return min(MOST * self.level, self.level + max(0.0, self._trend) * steps)
