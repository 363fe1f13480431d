"""Power of two choices: of two workers at random the one that has less, for prefill and for decode.

Mitzenmacher, *The Power of Two Choices in Randomized Load Balancing*, IEEE TPDS 2001; `power_of_two` of SGLang's gateway
(`sgl-model-gateway/src/policies/power_of_two.rs`), whose load is the number of requests in flight where workers report no
tokens: so it is here. No parameters.
"""

from __future__ import annotations

from router.fleet import Numbers
from tandem.sim.policies.common import Seen, TwoPools


class PowerOfTwo(TwoPools):
    """Stateless."""

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        return seen.better_of_two(numbers)

    def decode_at(self, seen: Seen, numbers: Numbers) -> int:
        return seen.better_of_two(numbers)
