"""Mooncake's scheduler, of least predicted time to first token: Qin et al., *Mooncake: Trading More Storage for Less
Computation*, FAST 2025 (arXiv 2407.00079), Algorithm 1.

For each prefill worker, with the longest prefix that any of them has (best) and its own (prefix):

    best / prefix < threshold      queue + prefill after its own prefix
    else                           transfer of best - prefix + queue + prefill after the best prefix

and the least of them. A worker's prefix is what its memory or its machine's holds (Mooncake's cache is in the machines'
memory). The queue is the sum of the predicted times of the prompts that wait there; the transfer is at the rate of the
worker's link, after what its sender is already to send. The paper has the threshold adjusted by hand and gives no value: 2
here. Decode is by load. Left out: its early rejection; here every request is served.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from router.fleet import FETCH_RATE, SENDS_UNTIL, Numbers
from tandem.sim.policies.common import Floats, Seen, TwoPools


@dataclass(frozen=True, slots=True)
class MooncakeTerms:
    balancing_threshold: float = 2.0
    """How many times its own prefix the best one must be to be transferred."""


class Mooncake(TwoPools):
    """Stateless but for its terms."""

    def __init__(self, terms: MooncakeTerms | None = None) -> None:
        self._terms = terms or MooncakeTerms()

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        own, host, disk = seen.held_with_pool(numbers)
        prefix = own + host + disk
        queue_s, _ = seen.fleet.waits_s(numbers, math.inf, seen.now_s)
        longest = int(prefix.argmax())
        best = float(prefix[longest])
        transfers = (best > 0) & (best >= self._terms.balancing_threshold * prefix) & (best > prefix)
        ttft_s = queue_s + seen.prefill_s(numbers, np.where(transfers, best, prefix))
        if transfers.any():
            holder = int(numbers[longest])
            source = holder if own[longest] >= best else int(seen.fleet.homes[holder])
            ttft_s += np.where(transfers, self._transfer_s(seen, numbers, source, best - prefix), 0.0)
        return seen.fewest(numbers, ttft_s)

    @staticmethod
    def _transfer_s(seen: Seen, numbers: Numbers, source: int, num_blocks: Floats) -> Floats:
        fleet = seen.fleet
        measured = fleet.rates[numbers, source]
        rate = np.where(measured > 0, measured, fleet.table[FETCH_RATE, numbers])
        busy_s = max(0.0, float(fleet.table[SENDS_UNTIL, source]) - seen.now_s)
        return np.asarray(busy_s + num_blocks * seen.ask.slab_bytes / rate, dtype=np.float64)
