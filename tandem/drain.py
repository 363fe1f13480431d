"""How a worker leaves: it takes nothing more, finishes what it has, and gives the rest back at a bound.

Owns when each of these is due. Pure: it is told what the worker still has and says what to do next.

    began ──► (nothing left) ─────────────────────────► over
      └─ drain_s ──► the rest is given back ──► taken ──► over
                                                └─ no later than GIVEN_BACK_S

What was given back is computed elsewhere from the blocks that lie here, so the worker stays as a source until those who go on
have asked for them, and as long as anybody reads.
"""

from __future__ import annotations

from enum import Enum, auto

TAKEN_AFTER_S = 1.0
"""Whoever takes over what was given back asks for its blocks within this time, or gets them elsewhere."""
GIVEN_BACK_S = 5.0
"""Reads of our blocks are waited for so long at most, after the last work is over."""


class Step(Enum):
    """What a leaving worker does next."""

    GO_ON = auto()
    GIVE_BACK = auto()
    """What is left is somebody else's: said once."""
    END = auto()


class Drain:
    """One worker's way out, from `now_s` on; what is not finished after `drain_s` is given back."""

    def __init__(self, now_s: float, drain_s: float) -> None:
        self._give_back_at_s = now_s + drain_s
        self._gave_back = False
        self._over_at_s: float | None = None

    def step(self, now_s: float, *, has_work: bool, is_read: bool) -> Step:
        """`has_work`: dispatches that are not over; `is_read`: somebody holds a lease on blocks here."""
        if has_work:
            if now_s >= self._give_back_at_s and not self._gave_back:
                self._gave_back = True
                return Step.GIVE_BACK
            return Step.GO_ON
        if self._over_at_s is None:
            self._over_at_s = now_s
        waited_s = now_s - self._over_at_s
        is_awaited = self._gave_back and waited_s < TAKEN_AFTER_S
        return Step.GO_ON if waited_s < GIVEN_BACK_S and (is_read or is_awaited) else Step.END
