"""Simulated workers and pool nodes: what they hold, and how long what they are given takes.

Owns their state; time is the caller's. A prefill worker computes one prompt after the other, in the order in which they are
due. A decode worker is a fluid: all its streams go on by one token in the time of a step, which depends on how many there are
and what they attend to; prompts that it computes itself make its steps longer, chunk by chunk.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import deque
from dataclasses import dataclass

from protos.control import StepPrices
from tandem.sim.cache import Cache


@dataclass(slots=True)
class Prompt:
    """One at a worker. What it fetches is there at `ready_s`; `left_s` is what is left to compute, None before it has begun."""

    request: int
    due_s: float
    ready_s: float
    num_tokens: int
    num_pairs: float
    left_s: float | None = None
    done_s: float = 0.0
    """What it has been computed for."""


class PrefillWorker:
    """Computes prompts in the order in which they are due, chunk by chunk: one that is due earlier goes first from the next
    chunk on. `running` is the one being computed."""

    def __init__(self, number: int, prices: StepPrices, step_tokens: int, cache: Cache) -> None:
        self.number = number
        self.prices = prices
        self.step_tokens = step_tokens
        self.cache = cache
        self.line: list[Prompt] = []
        """By when they are due; the running one is not among them."""
        self.running: Prompt | None = None
        self.began_s = 0.0
        self.version = 0
        self.busy_s = 0.0

    def add(self, prompt: Prompt) -> None:
        insort(self.line, prompt, key=_due_s)

    def begin(self, prompt: Prompt, now_s: float) -> float:
        """Computes it from now on; returns when it would be done."""
        assert self.running is None
        assert prompt.left_s is not None
        self.running, self.began_s = prompt, now_s
        self.version += 1
        return now_s + prompt.left_s

    def stop(self, now_s: float) -> Prompt:
        """Computes it no more."""
        prompt = self.running
        assert prompt is not None
        assert prompt.left_s is not None
        prompt.left_s = max(0.0, prompt.left_s - (now_s - self.began_s))
        prompt.done_s += now_s - self.began_s
        self.busy_s += now_s - self.began_s
        self.running = None
        return prompt

    def next_chunk_s(self, now_s: float) -> float:
        """When the running chunk ends."""
        chunk_s = self.step_tokens * self.prices.token_s
        return self.began_s + math.ceil((now_s - self.began_s) / chunk_s - 1e-6) * chunk_s

    def next(self, now_s: float) -> Prompt | None:
        """Takes the first one that can be computed out of the line."""
        for at, prompt in enumerate(self.line):
            if prompt.ready_s <= now_s:
                return self.line.pop(at)
        return None

    def is_overtaken(self, now_s: float) -> bool:
        """Whether one that can be computed is due before the running one."""
        running = self.running
        return running is not None and any(
            prompt.ready_s <= now_s and prompt.due_s < running.due_s for prompt in self.line
        )

    def ready_s(self) -> float | None:
        """When the first one in line can be computed."""
        return min((prompt.ready_s for prompt in self.line), default=None)

    def waiting(self, now_s: float) -> tuple[int, float]:
        """Tokens and pairs of what is here."""
        prompts = [*self.line, self.running] if self.running is not None else self.line
        return sum(prompt.num_tokens for prompt in prompts), sum(prompt.num_pairs for prompt in prompts)


def _due_s(prompt: Prompt) -> float:
    return prompt.due_s


@dataclass(slots=True)
class Stream:
    """One answer at a decode worker."""

    request: int
    context: float
    num_tokens: int
    num_blocks: int


class DecodeWorker:
    """Streams as a fluid. `advance` before every change; `due_s` is when the next one ends."""

    def __init__(
        self, number: int, prices: StepPrices, step_tokens: int, max_running: int, cache: Cache, num_blocks: int
    ):
        self.number = number
        self.prices = prices
        self.step_tokens = step_tokens
        self.max_running = max_running
        self.cache = cache
        self.num_blocks = num_blocks
        self.free_blocks = num_blocks
        self.waiting: deque[Stream] = deque()
        """Those that have their KV, and no room."""
        self.pending: dict[int, tuple[int, int]] = {}
        """Handed over to it and still on the way: tokens and blocks."""
        self.prompts: deque[tuple[int, float, int]] = deque()
        """Prompts that it computes itself: request, seconds of computing, steps."""
        self.line_tokens = 0
        self.line_pairs = 0.0
        self.num_streams = 0
        self.context = 0.0
        self.version = 0
        self._steps = 0.0
        self._at_s = 0.0
        self._ends: list[tuple[float, int, Stream]] = []
        self._prompt_end = 0.0
        self.busy_s = 0.0

    @property
    def step_s(self) -> float:
        prices = self.prices
        seconds = prices.base_s + self.num_streams * prices.sequence_s + self.context * prices.context_s
        if self.prompts:
            _, compute_s, num_steps = self.prompts[0]
            seconds += compute_s / num_steps
        return seconds

    def advance(self, now_s: float) -> None:
        """Time passes."""
        passed_s = now_s - self._at_s
        self._at_s = now_s
        if passed_s > 0.0 and (self.num_streams or self.prompts):
            steps = passed_s / self.step_s
            self._steps += steps
            self.context += steps * self.num_streams
            self.busy_s += passed_s

    def context_tokens(self) -> int:
        """Of all streams, those included that have not begun."""
        waiting = sum(stream.context for stream in self.waiting)
        return int(self.context + waiting + sum(tokens for tokens, _ in self.pending.values()))

    def due_s(self) -> float | None:
        """When the next stream or prompt ends, if nothing changes. None: nothing runs."""
        first = self._ends[0][0] if self._ends else None
        if self.prompts and (first is None or self._prompt_end < first):
            first = self._prompt_end
        return None if first is None else self._at_s + max(0.0, first - self._steps) * self.step_s

    def ended(self) -> tuple[list[Stream], list[int]]:
        """Streams and prompts that have ended by now; they are here no more."""
        streams: list[Stream] = []
        prompts: list[int] = []
        while self._ends and self._ends[0][0] <= self._steps + 1e-6:
            _, _, stream = heapq.heappop(self._ends)
            self.num_streams -= 1
            self.context -= stream.context + stream.num_tokens
            self.free_blocks += stream.num_blocks
            streams.append(stream)
        if not self.num_streams:
            self.context = 0.0
        if self.prompts and self._prompt_end <= self._steps + 1e-6:
            prompts.append(self.prompts.popleft()[0])
            if self.prompts:
                self._prompt_end = self._steps + self.prompts[0][2]
        return streams, prompts

    def join(self, stream: Stream) -> None:
        """Its KV is here."""
        self.waiting.append(stream)

    def start(self) -> list[Stream]:
        """Those that wait and find room begin, in order; returns them."""
        began: list[Stream] = []
        while self.waiting:
            stream = self.waiting[0]
            if self.num_streams and (stream.num_blocks > self.free_blocks or self.num_streams >= self.max_running):
                break
            self.waiting.popleft()
            self.free_blocks -= stream.num_blocks
            self.num_streams += 1
            self.context += stream.context
            heapq.heappush(self._ends, (self._steps + stream.num_tokens, stream.request, stream))
            began.append(stream)
        return began

    def compute(self, request: int, compute_s: float, num_steps: int) -> None:
        """A prompt, after those that it has."""
        if not self.prompts:
            self._prompt_end = self._steps + num_steps
        self.prompts.append((request, compute_s, num_steps))


@dataclass(slots=True)
class PoolNode:
    """A machine's pool: what its workers stored."""

    number: int
    host: Cache
    disk: Cache
