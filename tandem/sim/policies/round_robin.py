"""Round robin: one worker after the other, for prefill and for decode, each pool with its own count (`round_robin` of SGLang's
gateway, `sgl-model-gateway/src/policies/round_robin.rs`; Dynamo's default router mode). No parameters."""

from __future__ import annotations

from router.fleet import Numbers
from tandem.sim.policies.common import Seen, TwoPools


class RoundRobin(TwoPools):
    """Remembers how many it has sent to each pool."""

    def __init__(self) -> None:
        self._num_prefills = self._num_decodes = 0

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        self._num_prefills += 1
        return int(numbers[(self._num_prefills - 1) % len(numbers)])

    def decode_at(self, seen: Seen, numbers: Numbers) -> int:
        self._num_decodes += 1
        return int(numbers[(self._num_decodes - 1) % len(numbers)])
