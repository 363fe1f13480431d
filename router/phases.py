"""A request's way as spans of time: queue → fetch → prefill → handover → decode.

Owns what is made of the times that a router knows of a request: when it was accepted and placed, when its workers reported and
what they said it took them, when it ended. Pure. Spans follow each other without a gap and don't overlap.

What a worker says are durations, on its own clock: they are counted back from its report. As long as there is none, a prompt that
its worker has begun is shown as prefill from then on, and everything before that as queue, which may turn out to have been fetch.
Where samples of one request go on separately after a crash, the spans are those of the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from router.journal import Run

Phase = Literal["queue", "fetch", "prefill", "handover", "decode"]
MAX_SPANS = 24
SHORTEST_S = 5e-5
"""What is shorter is left out."""


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Seconds from the request's acceptance on; `end_s` is None while it goes on."""

    phase: Phase
    begin_s: float
    end_s: float | None


def spans(
    accepted_at_s: float,
    placed_after_s: Sequence[float],
    runs: Sequence[Run],
    started_at_s: float | None,
    ended_at_s: float | None,
) -> tuple[Span, ...]:
    """At most `MAX_SPANS`, the last ones. `started_at_s` is when the worker that computes its prompt now has begun with it, None
    if none has; `ended_at_s` is None while the request is active."""
    way = _Way()
    placed = [(after_s, None) for after_s in placed_after_s[1:]]
    reported = [(run.reported_at_s - accepted_at_s, run) for run in runs]
    for at_s, run in sorted([*placed, *reported], key=lambda item: item[0]):
        if run is None:
            way.go_on(at_s, "queue")
        elif run.report.fence.role == "prefill" or way.phase == "queue":
            report = run.report
            way.go_on(at_s - report.compute_s - report.fetch_s, "fetch")
            way.go_on(at_s - report.compute_s, "prefill")
            way.go_on(at_s, "handover" if report.fence.role == "prefill" else "decode")
        elif way.phase == "handover":
            way.go_on(at_s, "decode")
    if way.phase == "queue" and started_at_s is not None:
        way.go_on(started_at_s - accepted_at_s, "prefill")
    return way.end(None if ended_at_s is None else ended_at_s - accepted_at_s)


class _Way:
    """Spans as they are added, from 0 on."""

    def __init__(self) -> None:
        self.phase: Phase = "queue"
        self._since_s = 0.0
        self._spans: list[Span] = []

    def go_on(self, at_s: float, phase: Phase) -> None:
        """The phase until now ends, another one begins; one that would end before it began is left out."""
        if at_s - self._since_s >= SHORTEST_S:
            self._spans.append(Span(self.phase, _rounded(self._since_s), _rounded(at_s)))
            self._since_s = at_s
        self.phase = phase

    def end(self, at_s: float | None) -> tuple[Span, ...]:
        if at_s is None:
            self._spans.append(Span(self.phase, _rounded(self._since_s), None))
        else:
            self.go_on(at_s, self.phase)
        return tuple(self._spans[-MAX_SPANS:])


def _rounded(seconds: float) -> float:
    return round(seconds, 5)
