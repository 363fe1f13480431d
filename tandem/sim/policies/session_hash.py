"""Session hash: all requests of one conversation to one prefill worker, by consistent hashing; decode is least loaded.

Karger et al., *Consistent Hashing and Random Trees*, STOC 1997; `consistent_hash` of vLLM's router (vllm-project/router,
`src/policies/consistent_hash.rs`) with its 160 points a worker on the ring (SGLang's gateway has the same rule with 150).
Those hash a session's or user's header. A trace has none, so the conversation is named by the prompt's second block: the
first is the system prompt, which everybody has. A prompt of one block hashes that; one without any full block goes anywhere.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from dataclasses import dataclass

from router.fleet import Numbers
from tandem.sim.policies.common import Seen, TwoPools


@dataclass(frozen=True, slots=True)
class SessionHashTerms:
    points: int = 160
    """Of each worker on the ring."""
    block: int = 1
    """Which of a prompt's blocks names its conversation, or its last if it has fewer."""


class SessionHash(TwoPools):
    """Remembers the ring of the workers that were there last."""

    def __init__(self, terms: SessionHashTerms | None = None) -> None:
        self._terms = terms or SessionHashTerms()
        self._of: tuple[tuple[str, ...], bytes] | None = None
        self._points: list[int] = []
        self._owners: list[int] = []

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        keys = seen.ask.keys
        if not keys:
            return int(numbers[seen.rng.randrange(len(numbers))])
        self._arrange(seen, numbers)
        key = keys[min(self._terms.block, len(keys) - 1)]
        at = bisect_left(self._points, _point(key))
        return self._owners[at % len(self._owners)]

    def _arrange(self, seen: Seen, numbers: Numbers) -> None:
        names = seen.fleet.names
        of = (names, numbers.tobytes())
        if self._of == of:
            return
        ring = sorted(
            (_point(f"{names[number]}#{copy}".encode()), number)
            for number in numbers.tolist()
            for copy in range(self._terms.points)
        )
        self._of = of
        self._points = [point for point, _ in ring]
        self._owners = [number for _, number in ring]


def _point(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
