"""The open loop: which turn is due when, and what of it counts.

Owns the order of events of one trial. A plain class that is told the time and what was answered: no clock, no thread, no
socket. Conversations come at their times whatever the system does; a conversation's next turn is due a think time after its
answer ended. All times are seconds since the trial began.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.bench.chat.workload import Script

TTFT_S = 0.3
TPOT_S = 0.05
HOLDS = 0.9
"""The part of all turns that must be within both limits."""
_SURELY = 1.5
"""No trial has so many times the turns that its rate makes: more misses than that share of them, and it can't hold."""


@dataclass(frozen=True, slots=True)
class Window:
    """Turns that are due in `[warm_up_s, end_s)` count; those before fill the system, later ones are not sent."""

    warm_up_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.warm_up_s


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """The `number`-th turn of a conversation; `prompt` is its whole history."""

    due_s: float
    conversation: int
    number: int
    prompt: tuple[int, ...] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system said, each token with the time it came."""

    token_ids: tuple[int, ...]
    times_s: tuple[float, ...]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A turn that counts. `ttft_s` runs from when it was due; of a turn with an `error` the times mean nothing."""

    ttft_s: float
    tpot_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    error: str = ""

    @property
    def within(self) -> bool:
        return not self.error and self.ttft_s <= TTFT_S and self.tpot_s <= TPOT_S


@dataclass(frozen=True, slots=True)
class Trial:
    """One rate as one system bore it. `given_up`: it was ended early, because it could no longer hold."""

    rate: float
    seconds: float
    seen: tuple[Seen, ...]
    given_up: bool = False

    @property
    def share(self) -> float:
        """Of the turns that count, those within the limits."""
        return sum(seen.within for seen in self.seen) / len(self.seen) if self.seen else 0.0

    @property
    def holds(self) -> bool:
        return not self.given_up and self.share >= HOLDS

    @property
    def errors(self) -> list[str]:
        return [seen.error for seen in self.seen if seen.error]


class OpenLoop:
    """One trial's events at `rate` turns a second. `mean_turns`: of a conversation."""

    def __init__(self, scripts: Sequence[Script], mean_turns: float, rate: float, window: Window) -> None:
        self._scripts = scripts
        self._rate = rate
        self._window = window
        unit_s = mean_turns / rate
        self._pending = [
            Turn(script.arrival * unit_s, number, 0, script.parts[0])
            for number, script in enumerate(scripts)
            if script.arrival * unit_s < window.end_s
        ]
        heapq.heapify(self._pending)
        self._num_in_flight = 0
        self._seen: list[Seen] = []

    @property
    def next_s(self) -> float | None:
        """When the next turn is due that is known of; None: none is, until an answer ends."""
        return self._pending[0].due_s if self._pending else None

    @property
    def finished(self) -> bool:
        return not self._pending and not self._num_in_flight

    @property
    def hopeless(self) -> bool:
        """Whether the turns that missed already are too many for the rate to hold."""
        missed = sum(not seen.within for seen in self._seen)
        return missed > _SURELY * (1 - HOLDS) * max(1.0, self._rate * self._window.seconds)

    def due(self, now_s: float) -> list[Turn]:
        """The turns to send now, each once."""
        found = []
        while self._pending and self._pending[0].due_s <= now_s:
            found.append(heapq.heappop(self._pending))
        self._num_in_flight += len(found)
        return found

    def answered(self, turn: Turn, answer: Answer) -> None:
        """A turn's answer is complete. Its tokens must be at least two."""
        times_s = answer.times_s
        tpot_s = (times_s[-1] - times_s[0]) / (len(times_s) - 1)
        self._ended(turn, Seen(times_s[0] - turn.due_s, tpot_s, len(turn.prompt), answer.num_cached_tokens))
        script = self._scripts[turn.conversation]
        number = turn.number + 1
        if number < len(script.parts):
            due_s = times_s[-1] + script.think_s[number]
            if due_s < self._window.end_s:
                prompt = (*turn.prompt, *answer.token_ids, *script.parts[number])
                heapq.heappush(self._pending, Turn(due_s, turn.conversation, number, prompt))

    def failed(self, turn: Turn, error: str) -> None:
        """A turn has no answer: its conversation ends."""
        self._ended(turn, Seen(0.0, 0.0, len(turn.prompt), 0, error or "no answer"))

    def _ended(self, turn: Turn, seen: Seen) -> None:
        self._num_in_flight -= 1
        if turn.due_s >= self._window.warm_up_s:
            self._seen.append(seen)

    def trial(self, *, given_up: bool = False) -> Trial:
        """What was seen until now."""
        return Trial(self._rate, self._window.seconds, tuple(self._seen), given_up)
