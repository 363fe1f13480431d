"""NVIDIA Dynamo's KV router: ai-dynamo/dynamo, `lib/kv-router/src/scheduling/selector/default.rs` and `config.rs`, version 1.x.

The worker of least cost, in blocks:

    cost            = overlap_weight * prefill_blocks + decode_blocks
    prefill_blocks  = max(0, (active prefill tokens + prompt tokens) / block_size - credit)
    credit          = device_credit / (1 + decay * excess) * device blocks + 0.75 * host blocks + 0.25 * disk blocks
    excess          = (active prefill tokens - their minimum over the workers) / prompt tokens
    decode_blocks   = (tokens that its streams attend to + prompt tokens) / block_size

With a temperature T > 0 it draws from softmax(-(cost - min) / ((max - min) * T)); at 0, the default, it takes the least, one
of them at random if there are several. Defaults: overlap_weight 1 (today `prefill_load_scale`; once `overlap_score_weight`),
device_credit 1, decay 0. Its host and disk blocks are a worker's own; here they are those of the worker's machine's pool
node.

In disaggregated mode the prefill router doesn't track streams, so only the first term counts; the decode router has no credit
and doesn't track prompts, so only the second does, at the same temperature. Dynamo counts a stream's prompt; our column has
its answer so far, too. Its queue in the router (off unless all workers are far behind) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router.fleet import CONTEXT, UNCOMPUTED, Numbers
from tandem.sim.policies.common import Floats, Seen, TwoPools


@dataclass(frozen=True, slots=True)
class DynamoTerms:
    overlap_weight: float = 1.0
    temperature: float = 0.0
    decay: float = 0.0
    """Of the credit, as a worker's prompts grow beyond those of the least busy one."""
    device_credit: float = 1.0
    host_credit: float = 0.75
    disk_credit: float = 0.25


class Dynamo(TwoPools):
    """Stateless but for its terms."""

    def __init__(self, terms: DynamoTerms | None = None) -> None:
        self._terms = terms or DynamoTerms()

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        terms, ask = self._terms, seen.ask
        device, host, disk = seen.held_with_pool(numbers)
        active = seen.column(UNCOMPUTED, numbers)
        excess = (active - active.min()) / ask.num_tokens
        credit = terms.device_credit / (1.0 + terms.decay * excess) * device
        credit += terms.host_credit * host + terms.disk_credit * disk
        prefill_blocks = np.maximum((active + ask.num_tokens) / ask.block_size - credit, 0.0)
        return self._drawn(seen, numbers, terms.overlap_weight * prefill_blocks + _decode_blocks(seen, numbers))

    def decode_at(self, seen: Seen, numbers: Numbers) -> int:
        return self._drawn(seen, numbers, _decode_blocks(seen, numbers))

    def _drawn(self, seen: Seen, numbers: Numbers, cost: Floats) -> int:
        least, most = float(cost.min()), float(cost.max())
        if not self._terms.temperature or least == most:
            return seen.fewest(numbers, cost)
        chances = np.exp((least - cost) / ((most - least) * self._terms.temperature)).cumsum()
        at = int(np.searchsorted(chances, seen.rng.random() * chances[-1]))
        return int(numbers[min(at, len(numbers) - 1)])


def _decode_blocks(seen: Seen, numbers: Numbers) -> Floats:
    return np.asarray((seen.column(CONTEXT, numbers) + seen.ask.num_tokens) / seen.ask.block_size, dtype=np.float64)
