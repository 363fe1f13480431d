"""How many workers of each role are wanted: when a need becomes a change.

Owns what was needed of late, and when something was changed. What is needed is `sizing`'s; this makes a calm course of it:

    more    at once, when two looks in a row need it: to what the lesser of them needs
    fewer   when nothing in the last `settle_s` would have needed more, with a tenth more load than there is, and only
            `settle_s` after the last change of that role
    moved   where one role needs more, the other gives what it has had no need of in the last part of `settle_s`, also at once: a
            worker changes its role and none is started. Whoever keeps the counts sees it by one falling as the other rises

So a role is made smaller at most once in `settle_s`, and noise makes nothing swing: a count that was needed lately is kept. Each
look is answered with counts, not with changes, so nothing is asked for twice while it starts, and a worker that can't start holds
nothing up. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tandem.scaling.forecast import Forecast
from tandem.scaling.sizing import Need, Promise, WorkerKind, decode_need, prefill_need, prompt_s
from tandem.scaling.traffic import Shape, Totals, TrafficMeter

SPARE = 1.1
"""Fewer workers must be enough for so many times the load."""
GIVES_AFTER = 0.25
"""Part of `settle_s` in which a role needed less before it gives a worker to the other."""
BACKLOG_S = 30.0
"""What is late is to be made good within this."""
LOOKS_FOR_MORE = 2

Name = Literal["prefill", "decode"]
ROLES: tuple[Name, Name] = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Counts:
    """Workers by role."""

    prefill: int
    decode: int

    def of(self, role: Name) -> int:
        return self.prefill if role == "prefill" else self.decode

    @property
    def total(self) -> int:
        return self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Limits:
    """How few and how many there may be of each role, and of both together; 0: no limit of its own."""

    least: Counts = Counts(1, 1)
    most: Counts = Counts(64, 64)
    most_together: int = 0

    def __post_init__(self) -> None:
        assert all(1 <= self.least.of(role) <= self.most.of(role) for role in ROLES)
        assert not self.most_together or self.most_together >= self.least.total


@dataclass(frozen=True, slots=True)
class Look:
    """What the routers say at one time: totals by incarnation, tokens of an answer, prompt tokens (and pairs) that wait, and the
    typical worker of each role, None while none has said what a step costs."""

    totals: Mapping[str, Totals]
    answer_tokens: float
    prefill: WorkerKind | None
    decode: WorkerKind | None
    waiting_requests: float = 0.0
    waiting_tokens: float = 0.0
    waiting_pairs: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted now, and why: a sentence for each number."""

    wanted: Counts
    reasons: tuple[str, ...]


@dataclass(slots=True)
class _Course:
    """Of one role: what it needed at each look of late, with spare, and when it was changed."""

    needs: deque[tuple[float, int]] = field(default_factory=deque)
    ups: deque[int] = field(default_factory=lambda: deque(maxlen=LOOKS_FOR_MORE))
    changed_s: float = 0.0

    def take(self, need: int, with_spare: int, now_s: float, keep_s: float) -> None:
        self.needs.append((now_s, with_spare))
        while self.needs[0][0] < now_s - keep_s:
            self.needs.popleft()
        self.ups.append(need)

    def most(self, since_s: float) -> int:
        """What it needed since then at most."""
        return max(need for at_s, need in self.needs if at_s >= since_s)

    def more(self) -> int:
        """What all of the last looks needed at least."""
        return min(self.ups) if len(self.ups) == LOOKS_FOR_MORE else 0


class Scaler:
    """Ask it every `interval_s`. `start_s` is what a worker takes to start: so far it looks ahead."""

    def __init__(
        self,
        promise: Promise,
        limits: Limits,
        *,
        interval_s: float = 5.0,
        settle_s: float = 120.0,
        start_s: float = 20.0,
    ) -> None:
        self._promise = promise
        self._limits = limits
        self._settle_s = settle_s
        self._ahead = start_s / interval_s + 1.0
        self._meter = TrafficMeter()
        self._forecast = Forecast()
        self._courses: dict[Name, _Course] = {role: _Course() for role in ROLES}
        self._began_s: float | None = None
        self._answered: Counts | None = None

    def plan(self, look: Look, wanted: Counts, now_s: float) -> Plan:
        """What is to be wanted from now on. `wanted` is what was, by this or by people; it may be outside the limits, the answer
        is not."""
        answered = self._answered or wanted
        for role in ROLES:
            if wanted.of(role) != answered.of(role):  # somebody else's will: it stands as long as one of ours
                self._courses[role].changed_s = now_s
        self._answered = wanted
        within = self._within(wanted)
        if within != wanted:
            self._answered = within
            return Plan(within, (f"the limits allow {_said(self._limits.least)} to {_said(self._limits.most)}",))
        if self._began_s is None:
            self._began_s = now_s
            for course in self._courses.values():
                course.changed_s = now_s
        if not self._meter.look(look.totals, now_s):
            return Plan(wanted, ("this is the first look: rates need two",))
        self._forecast.observe(self._meter.per_s)
        shape = self._meter.shape()
        soon, reasons = self._forecast.ahead(self._ahead), []
        reasons.append(
            f"{self._forecast.level:.2f} requests/s come, {soon:.2f} are expected when a worker that starts now is ready"
        )
        for role in ROLES:
            need, spare = (self._need(role, look, shape, per_s, wanted) for per_s in (soon, SPARE * soon))
            self._courses[role].take(need.workers, spare.workers, now_s, self._settle_s)
            reasons.append(f"{role}: {need.why}")
        changed, more = self._changed(wanted, now_s)
        self._answered = changed
        return Plan(changed, (*reasons, *more))

    def _need(self, role: Name, look: Look, shape: Shape | None, per_s: float, wanted: Counts) -> Need:
        least, most = self._limits.least.of(role), self._limits.most.of(role)
        if shape is None:
            return Need(least, "nothing has come yet")
        if role == "prefill":
            if look.prefill is None:
                return Need(wanted.prefill, "no worker has said yet what computing a prompt costs: it stays")
            backlog = self._backlog(look, look.prefill, shape, wanted.prefill)
            need = prefill_need(per_s, shape, look.prefill, self._promise, backlog, most)
        else:
            if look.decode is None or not look.answer_tokens:
                return Need(wanted.decode, "no worker has said yet what a decode step costs: it stays")
            need = decode_need(per_s, shape, look.answer_tokens, look.decode, self._promise, most)
        return need if need.workers >= least else Need(least, f"{need.why}; {least} are the fewest there may be")

    def _backlog(self, look: Look, kind: WorkerKind, shape: Shape, workers: int) -> float:
        """Seconds of work a second that make good what is late: what waits beyond what so many workers do within the promise."""
        each_s = prompt_s(kind, shape.uncached_tokens, shape.uncached_pairs)
        at_workers_s = prompt_s(kind, look.waiting_tokens, look.waiting_pairs)
        in_time_s = workers * (self._promise.ttft_s + self._promise.ttft_per_token_s * shape.uncached_tokens)
        return max(0.0, at_workers_s + look.waiting_requests * each_s - in_time_s) / BACKLOG_S

    def _changed(self, wanted: Counts, now_s: float) -> tuple[Counts, list[str]]:
        counts: dict[Name, int] = {role: wanted.of(role) for role in ROLES}
        reasons: list[str] = []
        for role, other in (ROLES, ROLES[::-1]):
            more = self._courses[role].more() - counts[role]
            if more <= 0:
                continue
            given = min(more, self._spare_of(other, counts[other], GIVES_AFTER, now_s))
            if given:
                counts[role] += given
                counts[other] -= given
                reasons.append(f"{_workers(given)} of {other} is not needed there, and moves to {role}")
            room = more - given
            if self._limits.most_together:
                room = min(room, self._limits.most_together - sum(counts.values()))
            if room > 0:
                counts[role] += room
                reasons.append(f"{_workers(room)} of {role} more: {LOOKS_FOR_MORE} looks in a row needed it")
            if given + max(0, room) < more:
                reasons.append(
                    f"{role} lacks {more - given - max(0, room)}: {self._limits.most_together} together are the most"
                )
        for role in ROLES:
            fewer = self._spare_of(role, counts[role], 1.0, now_s) if counts[role] == wanted.of(role) else 0
            if fewer:
                counts[role] -= fewer
                reasons.append(
                    f"{_workers(fewer)} of {role} fewer: not needed in the last {self._settle_s:.0f} s, with a tenth more load"
                )
        for role in ROLES:
            if counts[role] != wanted.of(role):
                self._courses[role].changed_s = now_s
        return Counts(counts["prefill"], counts["decode"]), reasons or ["nothing is to be changed"]

    def _spare_of(self, role: Name, count: int, part: float, now_s: float) -> int:
        """How many a role has had no need of for that part of the time in which a count settles."""
        course = self._courses[role]
        since_s = now_s - part * self._settle_s
        if course.changed_s > since_s:
            return 0
        return max(0, count - max(course.most(since_s), self._limits.least.of(role)))

    def _within(self, wanted: Counts) -> Counts:
        limits = self._limits
        counts = {role: min(max(wanted.of(role), limits.least.of(role)), limits.most.of(role)) for role in ROLES}
        if limits.most_together:
            over = max(0, sum(counts.values()) - limits.most_together)
            for role in ROLES:
                fewer = min(over, counts[role] - limits.least.of(role))
                counts[role] -= fewer
                over -= fewer
        return Counts(counts["prefill"], counts["decode"])


def _said(counts: Counts) -> str:
    return f"{counts.prefill} prefill and {counts.decode} decode workers"


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"
