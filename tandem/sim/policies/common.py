"""What the policies of other systems have in common: the two pools, what a rule sees of them, and the placement of its choice.

Owns no choice. A published rule says where a prompt is computed and where its answer is generated; from where a worker
fetches is the data plane's to say, and the same for all: from whoever holds most, if that is faster than computing. Where
there is no prefill worker to choose, the rule for prefill chooses among the decode workers, and the one that it takes does
both.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.fleet import BASE_S, OUTSTANDING, PAIR_S, STEP_TOKENS, TOKEN_S, Fleet, Numbers
from router.policy.base import Ask, Placement
from router.policy.seconds import PredictedSeconds
from router.prefix_index import Hits

Floats = NDArray[np.float64]

_DATA_PLANE = PredictedSeconds()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rule decides from: the request, and the cluster at this moment."""

    ask: Ask
    hits: Hits
    fleet: Fleet
    now_s: float
    rng: random.Random

    def column(self, which: int, numbers: Numbers) -> Floats:
        """`[num_workers]`: one column of the fleet's table."""
        return np.asarray(self.fleet.table[which, numbers], dtype=np.float64)

    def held_blocks(self, numbers: Numbers) -> Floats:
        """`[num_workers]`: leading blocks that each has in its own memory."""
        if not self.hits.holders:
            return np.zeros(len(numbers))
        return np.asarray(self.hits.counts[numbers].sum(axis=1), dtype=np.float64)

    def held_with_pool(self, numbers: Numbers) -> tuple[Floats, Floats, Floats]:
        """`[num_workers]` each: leading blocks in its own memory; those after them that its machine's pool node has in its HOST
        tier; and those after them that it has on its DISK. A pool node's tiers are taken to be filled from the front."""
        own = self.held_blocks(numbers)
        homes = self.fleet.homes[numbers]
        if not self.hits.holders:
            return own, np.zeros(len(numbers)), np.zeros(len(numbers))
        pooled = np.where((homes == numbers)[:, None], 0, self.hits.counts[homes])
        in_memory = pooled[:, 0] + pooled[:, 1]
        host = np.maximum(in_memory - own, 0.0)
        disk = np.maximum(in_memory + pooled[:, 2] - own - host, 0.0)
        return own, host, disk

    def prefill_s(self, numbers: Numbers, hit_blocks: Floats) -> Floats:
        """`[num_workers]`: seconds in which each would compute the prompt after so many blocks, at its own prices."""
        rows = self.fleet.table[:, numbers]
        hit = np.minimum(hit_blocks * float(self.ask.block_size), self.ask.num_tokens - 1.0)
        suffix = self.ask.num_tokens - hit
        seconds = suffix * (rows[TOKEN_S] + rows[PAIR_S] * (hit + (suffix + 1.0) / 2))
        return np.asarray(seconds + np.ceil(suffix / rows[STEP_TOKENS]) * rows[BASE_S], dtype=np.float64)

    def fewest(self, numbers: Numbers, loads: Floats) -> int:
        """Who has least, one of them at random if there are several."""
        least = np.flatnonzero(loads <= loads.min())
        return int(numbers[least[0] if len(least) == 1 else least[self.rng.randrange(len(least))]])

    def least_loaded(self, numbers: Numbers) -> int:
        """Who has the fewest requests that were sent to it and have not ended."""
        return self.fewest(numbers, self.column(OUTSTANDING, numbers))

    def better_of_two(self, numbers: Numbers) -> int:
        """Of two at random, who has fewer requests that have not ended; the first if they have as many."""
        first = self.rng.randrange(len(numbers))
        if len(numbers) == 1:
            return int(numbers[0])
        second = (first + 1 + self.rng.randrange(len(numbers) - 1)) % len(numbers)
        loads = self.column(OUTSTANDING, numbers)
        return int(numbers[first if loads[first] <= loads[second] else second])


class TwoPools(ABC):
    """A policy that has one rule for the prefill worker and one for the decode worker. What a rule remembers of earlier requests
    is its own; one object serves one cluster."""

    def place(self, ask: Ask, hits: Hits, fleet: Fleet, now_s: float, rng: random.Random) -> Placement | None:
        decodes = _without(fleet.decodes, ask)
        if not len(decodes):
            return None
        seen = Seen(ask, hits, fleet, now_s, rng)
        prefills = fleet.prefills[:0] if ask.prefill_here_only else _without(fleet.prefills, ask)
        if len(prefills):
            decode = self.decode_at(seen, decodes)
            prefill = decode if self.prefills_itself(seen, decode) else self.prefill_at(seen, prefills)
        else:
            decode = prefill = self.prefill_at(seen, decodes)
        return _DATA_PLANE.between(ask, hits, fleet, prefill, decode, now_s)

    @abstractmethod
    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        """Which of `numbers`, at least one, computes the prompt."""

    def decode_at(self, seen: Seen, numbers: Numbers) -> int:
        """Which of `numbers`, at least one, generates the answer: the least loaded, where nothing else is published."""
        return seen.least_loaded(numbers)

    def prefills_itself(self, seen: Seen, decode: int) -> bool:
        """Whether this decode worker computes the prompt, too."""
        return False


def _without(numbers: Numbers, ask: Ask) -> Numbers:
    """Without those that failed the request, unless nobody else is there."""
    if not ask.avoid:
        return numbers
    others = numbers[~np.isin(numbers, list(ask.avoid))]
    return others if len(others) else numbers
