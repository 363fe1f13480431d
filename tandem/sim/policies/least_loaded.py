"""Least loaded: the worker with the fewest requests that were sent to it and have not ended, for prefill and for decode; one of
them at random if there are several. The rule of nginx' `least_conn`, and of SGLang's gateway when its workers are out of
balance."""

from __future__ import annotations

from router.fleet import Numbers
from tandem.sim.policies.common import Seen, TwoPools


class LeastLoaded(TwoPools):
    """Stateless."""

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        return seen.least_loaded(numbers)
