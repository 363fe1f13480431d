"""llm-d's endpoint picker: llm-d/llm-d-inference-scheduler v0.8 (with the scorers of the Gateway API inference extension that it
took over), `pkg/epp/framework/plugins/scheduling/`.

The worker of the highest weighted sum of scores between 0 and 1, for decode and for prefill alike; one of them at random if
there are several:

    prefix   (`precise-prefix-cache-scorer`)   leading blocks that it holds / full blocks of the prompt
    queue    (`queue-scorer`)                  (longest queue - its queue) / (longest - shortest); 1 if all are equal
    kv       (`kv-cache-utilization-scorer`)   1 - used part of its KV memory

Default weights are those of its built-in configuration (`config/loader/defaults.go`): 3, 2 and 2; its sample for
prefill/decode (`deploy/config/pd-epp-config.yaml`) has 2, 1 and 0. As in that sample, decode is chosen first, and computes
the prompt by itself if fewer than `noncached_tokens` of it are not there (`prefix-based-pd-decider`).

Its queue is the number of requests that wait, as last scraped; ours is the number that was sent and has not ended, at once.
What the prompts that are being computed take of a prefill worker's memory is their tokens that are not computed yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router.fleet import CONTEXT, FREE_BLOCKS, OUTSTANDING, UNCOMPUTED, Numbers
from tandem.sim.policies.common import Floats, Seen, TwoPools


@dataclass(frozen=True, slots=True)
class LlmDTerms:
    prefix_weight: float = 3.0
    queue_weight: float = 2.0
    kv_weight: float = 2.0
    noncached_tokens: int = 16
    """A shorter rest of a prompt is computed where it is decoded; 0: never (there it turns disaggregation off)."""


class LlmD(TwoPools):
    """Stateless but for its terms."""

    def __init__(self, terms: LlmDTerms | None = None) -> None:
        self._terms = terms or LlmDTerms()

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        return seen.fewest(numbers, -self._scores(seen, numbers))

    def decode_at(self, seen: Seen, numbers: Numbers) -> int:
        return self.prefill_at(seen, numbers)

    def prefills_itself(self, seen: Seen, decode: int) -> bool:
        held = float(seen.held_blocks(np.array([decode]))[0])
        return seen.ask.num_tokens - held * seen.ask.block_size < self._terms.noncached_tokens

    def _scores(self, seen: Seen, numbers: Numbers) -> Floats:
        """`[num_workers]`."""
        terms = self._terms
        prefix = seen.held_blocks(numbers) / max(1, len(seen.ask.keys))
        queue = seen.column(OUTSTANDING, numbers)
        longest = float(queue.max())
        spread = longest - float(queue.min())
        scores = terms.prefix_weight * prefix
        scores += terms.queue_weight * ((longest - queue) / spread if spread else 1.0)
        streams = seen.column(CONTEXT, numbers) / seen.ask.block_size
        prompts = seen.column(UNCOMPUTED, numbers) / seen.ask.block_size
        used = (streams + prompts) / np.maximum(seen.column(FREE_BLOCKS, numbers) + streams, 1.0)
        return np.asarray(scores + terms.kv_weight * (1.0 - np.minimum(used, 1.0)), dtype=np.float64)
