"""The ladder's requests and what a rung answers them: the same prompts, lengths and arrivals for every rung.

Owns the workload and the bookkeeping of one run over it. Knows no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tandem.clock import now_s

NUM_REQUESTS = 40
MAX_PROMPT_TOKENS = 480
MAX_ANSWER_TOKENS = 128
MAX_TOKENS = MAX_PROMPT_TOKENS + MAX_ANSWER_TOKENS
"""The longest request that this workload may send: what a rung without paging has to reserve for each."""
ARRIVALS_PER_S = 8.0
"""Faster than the machines that we know can answer, so that each rung shows its own throughput."""
_SYSTEM_PROMPT_TOKENS = (256, 192)
_SHARING = 0.4
"""The part of the requests that begin with one of the system prompts."""
_SAMPLE_EVERY = 10
_SEED = 31


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `number` names it in every rung; `arrival_s` counts from the beginning of the run."""

    number: int
    arrival_s: float
    prompt: tuple[int, ...]
    num_answer_tokens: int


@dataclass(slots=True)
class Answer:
    """The tokens of one answer, and when each came, in seconds from the beginning of the run."""

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """What one rung did: `answers[i]` answers `requests[i]`. `wasted` is the share of reserved KV slots that nothing used,
    averaged over time (`tandem.bench.ladder.kv_meter`); None if the rung reserves none."""

    requests: tuple[Request, ...]
    answers: tuple[Answer, ...]
    wasted: float | None

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the time from the first arrival to the last token."""
        began_s = min(request.arrival_s for request in self.requests)
        ended_s = max(answer.times_s[-1] for answer in self.answers)
        return sum(len(answer.token_ids) for answer in self.answers) / (ended_s - began_s)

    @property
    def ttft_s(self) -> list[float]:
        """Of each request, from its arrival to its first token, queueing included."""
        return [
            answer.times_s[0] - request.arrival_s for request, answer in zip(self.requests, self.answers, strict=True)
        ]

    @property
    def tpot_s(self) -> list[float]:
        """Of each request, the mean time between its tokens."""
        return [(answer.times_s[-1] - answer.times_s[0]) / (len(answer.times_s) - 1) for answer in self.answers]

    @property
    def gaps_s(self) -> list[float]:
        """Each time between two tokens of one answer: what a reader sees as stalls."""
        return [
            later - earlier
            for answer in self.answers
            for earlier, later in zip(answer.times_s, answer.times_s[1:], strict=False)
        ]


def requests(vocab_size: int, count: int = NUM_REQUESTS, *, seed: int = _SEED) -> tuple[Request, ...]:
    """The workload: a Poisson process of prompts with 32 to 480 tokens and answers with 8 to 128, log-normal as in real traffic.

    Token ids leave out the first eighth of the vocabulary, where special tokens are. A pure function of its arguments.
    """
    random = Random(seed)

    def tokens(number: int) -> list[int]:
        return [random.randrange(vocab_size // 8, vocab_size) for _ in range(number)]

    def length(middle: float, spread: float, low: int, high: int) -> int:
        return min(high, max(low, round(middle * random.lognormvariate(0, spread))))

    systems = [tokens(length_) for length_ in _SYSTEM_PROMPT_TOKENS]
    found, arrival_s = [], 0.0
    for number in range(count):
        if random.random() < _SHARING:
            system = random.choice(systems)
            prompt = [*system, *tokens(length(70, 0.7, 16, MAX_PROMPT_TOKENS - len(system)))]
        else:
            prompt = tokens(length(240, 0.6, 32, MAX_PROMPT_TOKENS))
        found.append(Request(number, arrival_s, tuple(prompt), length(48, 0.7, 8, MAX_ANSWER_TOKENS)))
        arrival_s += random.expovariate(ARRIVALS_PER_S)
    return tuple(found)


def sample(everything: Sequence[Request]) -> tuple[Request, ...]:
    """Every tenth request, for a rung that is too slow for all of them."""
    return tuple(everything[::_SAMPLE_EVERY])


class Playback:
    """One run over `requests`, in their order: who has arrived, what was drawn for whom and when.

    Times are `clock`'s, from the construction on. Not thread-safe.
    """

    def __init__(self, requests: Sequence[Request], clock: Callable[[], float] = now_s) -> None:
        self._requests = tuple(requests)
        self._answers = {request.number: Answer() for request in requests}
        self._clock = clock
        self._began_s = clock()
        self._num_taken = 0
        self._num_open = len(self._requests)

    @property
    def is_done(self) -> bool:
        """Whether every answer is complete."""
        return self._num_open == 0

    def take(self, limit: int) -> list[Request]:
        """The next requests that have arrived, at most `limit`; each is handed out once."""
        elapsed_s = self._clock() - self._began_s
        waiting = self._requests[self._num_taken : self._num_taken + limit]
        taken = [request for request in waiting if request.arrival_s <= elapsed_s]
        self._num_taken += len(taken)
        return taken

    def wait(self) -> None:
        """Sleeps until the next request arrives, if there is one."""
        if self._num_taken < len(self._requests):
            arrival_s = self._requests[self._num_taken].arrival_s
            time.sleep(max(0.0, arrival_s - (self._clock() - self._began_s)))

    def draw(self, request: Request, token_ids: Sequence[int]) -> bool:
        """Takes down the next tokens of an answer, now. Whether that answer is complete."""
        answer = self._answers[request.number]
        answer.token_ids.extend(token_ids)
        answer.times_s.extend([self._clock() - self._began_s] * len(token_ids))
        is_complete = len(answer.token_ids) >= request.num_answer_tokens
        self._num_open -= is_complete
        return is_complete

    def run(self, wasted: float | None) -> Run:
        """What came of it, when every answer is complete."""
        assert self.is_done
        return Run(self._requests, tuple(self._answers[request.number] for request in self._requests), wasted)
