"""Random: any worker, each as likely, for prefill and for decode (`random` of SGLang's gateway,
`sgl-model-gateway/src/policies/random.rs`, and of Dynamo's `--router-mode random`). No parameters."""

from __future__ import annotations

from router.fleet import Numbers
from tandem.sim.policies.common import Seen, TwoPools


class RandomChoice(TwoPools):
    """Stateless: the chance is its caller's."""

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        return int(numbers[seen.rng.randrange(len(numbers))])

    def decode_at(self, seen: Seen, numbers: Numbers) -> int:
        return self.prefill_at(seen, numbers)
