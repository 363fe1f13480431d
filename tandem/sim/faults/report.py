"""What is said of runs: a line of JSON for each, a sum over all, and the command that repeats one.

Owns the wording; reads results, changes nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tandem.sim.faults.run import Result

JsonLine = dict[str, str | int | float | bool | dict[str, int]]


def command_of(result: Result, num_requests: int, requests_per_fault: int) -> str:
    """What repeats this run."""
    return (
        f"tandem sim faults --seeds 1 --first-seed {result.seed} --requests {num_requests} "
        f"--requests-per-fault {requests_per_fault} --story"
    )


def line_of(result: Result) -> JsonLine:
    """One run."""
    return {
        "seed": result.seed,
        "ok": not result.violation,
        "violation": result.violation,
        "requests": result.totals.num_asked,
        "tokens": result.totals.num_tokens,
        "outcomes": dict(result.totals.outcomes),
        "faults": dict(result.faults),
        "seen": dict(result.seen),
        "virtual_s": round(result.virtual_s, 3),
        "rest_s": round(result.rest_s, 3),
        "seconds": round(result.seconds, 3),
        "events": result.num_events,
        "digest": result.digest,
    }


@dataclass(slots=True)
class Summary:
    """All runs so far."""

    num_seeds: int = 0
    num_requests: int = 0
    num_tokens: int = 0
    num_faults: int = 0
    seconds: float = 0.0
    virtual_s: float = 0.0
    failed: list[int] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result) -> None:
        self.num_seeds += 1
        self.num_requests += result.totals.num_asked
        self.num_tokens += result.totals.num_tokens
        self.num_faults += sum(result.faults.values())
        self.seconds += result.seconds
        self.virtual_s += result.virtual_s
        self.outcomes += result.totals.outcomes
        if result.violation:
            self.failed.append(result.seed)

    @property
    def requests_per_minute(self) -> float:
        return 60.0 * self.num_requests / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        """For people."""
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        verdict = f"{len(self.failed)} seeds failed: {self.failed[:10]}" if self.failed else "all held"
        speed = f"{self.requests_per_minute:,.0f} requests a minute"
        return (
            f"{self.num_seeds} seeds, {self.num_requests} requests ({outcomes}), {self.num_tokens} tokens, "
            f"{self.num_faults} faults, {self.virtual_s:.0f} virtual seconds; {speed}; {verdict}"
        )

    def as_line(self) -> JsonLine:
        return {
            "seeds": self.num_seeds,
            "ok": not self.failed,
            "failed": ", ".join(map(str, self.failed)),
            "requests": self.num_requests,
            "tokens": self.num_tokens,
            "faults": self.num_faults,
            "outcomes": dict(self.outcomes),
            "virtual_s": round(self.virtual_s, 1),
            "seconds": round(self.seconds, 1),
            "requests_per_minute": round(self.requests_per_minute),
        }
