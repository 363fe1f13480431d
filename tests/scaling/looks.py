"""Looks at a cluster whose load is told by its rate, for tests of the scaler."""

from __future__ import annotations

from collections.abc import Sequence

from protos.control import StepPrices
from tandem.scaling.scaler import Counts, Limits, Look, Plan, Scaler
from tandem.scaling.sizing import Promise, WorkerKind
from tandem.scaling.traffic import Shape, Totals

PRICES = StepPrices(base_s=5e-3, token_s=2e-4, pair_s=1e-8, sequence_s=5e-4, context_s=1e-7)
KIND = WorkerKind(PRICES, 512, 64, 200_000)
SHAPE = Shape(1000.0, 800.0, 480_000.0, 0.3, 1.0, 0.0, 0.0)
INTERVAL_S = 5.0


class Days:
    """A scaler and what it is shown, an interval at a time."""

    def __init__(self, limits: Limits | None = None, settle_s: float = 60.0, start: Counts = Counts(1, 1)) -> None:
        self.scaler = Scaler(Promise(), limits or Limits(), interval_s=INTERVAL_S, settle_s=settle_s, start_s=10.0)
        self.wanted = start
        self.now_s = 100.0
        self.totals = Totals()
        self.plans: list[Plan] = []

    def pass_by(
        self,
        rates: Sequence[float],
        *,
        tokens: float = 1000.0,
        answer: float = 200.0,
        prefill: WorkerKind | None = KIND,
        decode: WorkerKind | None = KIND,
        waiting: float = 0.0,
    ) -> list[Counts]:
        """Rates in requests a second, one an interval. What was wanted after each."""
        found = []
        for per_s in rates:
            num, uncached = per_s * INTERVAL_S, 0.8 * tokens
            came = Totals(
                num, num, num * tokens, num * uncached, num * uncached * tokens * 0.6, num * 1.3 * uncached**2, 0.0, 0.0
            )
            self.totals = self.totals.plus(came)
            look = Look({"r": self.totals}, answer, prefill, decode, waiting_requests=waiting)
            self.plans.append(self.scaler.plan(look, self.wanted, self.now_s))
            self.wanted = self.plans[-1].wanted
            self.now_s += INTERVAL_S
            found.append(self.wanted)
        return found
