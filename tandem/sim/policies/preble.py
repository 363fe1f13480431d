"""Preble's E2: Srivatsa et al., *Preble: Efficient Distributed Prompt Scheduling for LLM Serving*, ICLR 2025 (arXiv 2407.00023);
WukLab/preble, `preble/global_scheduler_with_time.py`.

    exploit    if more of the prompt is cached somewhere than is not: who holds the longest prefix; of several the least L. But
               if that one's L is the highest and above `balance` times the lowest, who has the lowest
    explore    else: least L + M + P
    L          seconds that the worker spends on what was sent to it in the last `window_s`, prompts and answers
    M          over the blocks that it would evict for this prompt, least recently used first: seconds to compute the block
               again x the part of the worker's requests in the window that used it
    P          seconds to compute what it doesn't hold of this prompt

Defaults: a window of three minutes and `balance` 1.5, not before 50 requests a worker, as in the repository. It is made for
workers that do both: here the rule chooses the prefill worker, which spends nothing on answers, and decode is least loaded.
Left out: the copying of a prefix to a second worker when its queue doubles, and the worker's own fair queue.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np

from kvpool.keys import Key
from router.fleet import FREE_BLOCKS, TOKEN_S, Numbers
from tandem.sim.policies.common import Floats, Seen, TwoPools

MAX_EVICTED = 256
"""Blocks past which an eviction is not looked at more closely."""


@dataclass(frozen=True, slots=True)
class PrebleTerms:
    window_s: float = 180.0
    balance: float = 1.5
    """How many times the lowest load the highest may be."""
    requests_before_balance: int = 50
    """For each worker."""


class Preble(TwoPools):
    """Remembers what each worker was sent, by its name."""

    def __init__(self, terms: PrebleTerms | None = None) -> None:
        self._terms = terms or PrebleTerms()
        self._sent: dict[str, Sent] = {}
        self._num_placed = 0

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        ask, names = seen.ask, seen.fleet.names
        workers = self._workers([names[number] for number in numbers.tolist()], seen.now_s - self._terms.window_s)
        load_s = np.array([worker.load_s for worker in workers])
        held = seen.held_blocks(numbers)
        prefill_s = seen.prefill_s(numbers, held)
        longest = float(held.max())
        if longest * ask.block_size > ask.num_tokens - longest * ask.block_size:
            holders = held >= longest
            chosen = seen.fewest(numbers[holders], load_s[holders])
            if self._too_heavy(load_s, float(load_s[numbers == chosen][0])):
                chosen = seen.fewest(numbers, load_s)
        else:
            chosen = seen.fewest(numbers, load_s + self._evicted_s(seen, numbers, workers, held) + prefill_s)
        cost_s = float(prefill_s[numbers == chosen][0])
        capacity = float(seen.fleet.table[FREE_BLOCKS, chosen])
        self._sent[names[chosen]].add(seen.now_s, cost_s, ask.keys, capacity)
        self._num_placed += 1
        return chosen

    def _workers(self, names: Sequence[str], since_s: float) -> list[Sent]:
        """Each with what was sent to it since then."""
        workers = []
        for name in names:
            sent = self._sent.get(name)
            if sent is None:
                sent = self._sent[name] = Sent()
            elif sent.first_s < since_s:
                sent.forget(since_s)
            workers.append(sent)
        return workers

    def _too_heavy(self, load_s: Floats, of_s: float) -> bool:
        enough = self._num_placed >= self._terms.requests_before_balance * len(load_s)
        return enough and of_s >= load_s.max() and of_s > self._terms.balance * load_s.min()

    @staticmethod
    def _evicted_s(seen: Seen, numbers: Numbers, workers: Sequence[Sent], held: Floats) -> Floats:
        """M, `[num_workers]`."""
        wanted = -(-seen.ask.num_tokens // seen.ask.block_size)
        uses = [sent.uses_of_evicted(wanted - int(own)) for sent, own in zip(workers, held.tolist(), strict=True)]
        block_s = seen.column(TOKEN_S, numbers) * seen.ask.block_size
        return np.asarray(np.array(uses) * block_s, dtype=np.float64)


class Sent:
    """What one worker was sent in the window, and what it is taken to hold: blocks in the order of their last use."""

    def __init__(self) -> None:
        self.load_s = 0.0
        self.first_s = math.inf
        """When the first of it was sent."""
        self._capacity = math.inf
        self._recent: deque[tuple[float, float, Sequence[Key]]] = deque()
        self._uses: OrderedDict[Key, int] = OrderedDict()
        """By key: how many requests in the window used it."""
        self._oldest: list[int] = []
        """Of the first so many of them the sum of that, for each number; empty when it must be counted anew."""

    def add(self, now_s: float, cost_s: float, keys: Sequence[Key], capacity: float) -> None:
        """It was sent this; what it then has no room for is evicted, leaves before what they follow."""
        self._recent.append((now_s, cost_s, keys))
        self.first_s = self._recent[0][0]
        self._oldest = []
        self.load_s += cost_s
        self._capacity = capacity
        uses = self._uses
        for key in reversed(keys):
            uses[key] = uses.get(key, 0) + 1
            uses.move_to_end(key)
        while len(uses) > capacity:
            uses.popitem(last=False)

    def forget(self, before_s: float) -> None:
        """What was sent earlier counts no more."""
        recent, uses = self._recent, self._uses
        while recent and recent[0][0] < before_s:
            _, cost_s, keys = recent.popleft()
            self.load_s -= cost_s
            for key in keys:
                if uses.get(key):
                    uses[key] -= 1
        self._oldest = []
        self.first_s = recent[0][0] if recent else math.inf
        if not recent:
            self.load_s = 0.0

    def uses_of_evicted(self, num_blocks: int) -> float:
        """Of the blocks that would leave for so many new ones, the sum of the parts of its requests that used them."""
        num_evicted = num_blocks - (self._capacity - len(self._uses))
        if num_evicted <= 0 or not self._recent:
            return 0.0
        if not self._oldest:
            self._oldest = list(accumulate(islice(self._uses.values(), MAX_EVICTED)))
        return self._oldest[min(int(num_evicted), len(self._oldest)) - 1] / len(self._recent)
