"""What a climb found: metrics for programs, a row for people.

Owns which figures a rung is judged by; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tandem.bench.ladder.rungs import Rung
from tandem.bench.ladder.workload import NUM_REQUESTS, Run
from tandem.bench.report import Metric, metric, percentile

MAX_WASTED = 0.04
"""What paging may waste (Kwon et al., SOSP '23: under 4 %; 60 to 80 % without)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One rung's figures. Seconds; `wasted` is a share, None where no KV is reserved; `same_tokens` is the share of answers that
    equal those of the rungs before, None where there is nothing to compare with."""

    rung: Rung
    num_requests: int
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    gap_p99_s: float
    wasted: float | None
    same_tokens: float | None

    @property
    def ok(self) -> bool:
        """Identical tokens, and no more waste than paging may have."""
        return self.same_tokens in (None, 1.0) and self.waste_ok

    @property
    def waste_ok(self) -> bool:
        return not self.rung.bounded_waste or (self.wasted is not None and self.wasted <= MAX_WASTED)

    @property
    def title(self) -> str:
        """For people; says if only some of the requests ran."""
        part = "" if self.num_requests == NUM_REQUESTS else f" ({self.num_requests} of {NUM_REQUESTS} requests)"
        return self.rung.title + part


@dataclass(slots=True)
class Results:
    """Takes the rungs in their order."""

    steps: list[Step] = field(default_factory=list)
    _answers: dict[int, list[int]] = field(default_factory=dict)

    def add(self, rung: Rung, run: Run) -> Step:
        """The rung's figures, its tokens compared with those of all rungs before."""
        known = [
            self._answers[request.number] == answer.token_ids
            for request, answer in zip(run.requests, run.answers, strict=True)
            if request.number in self._answers
        ]
        for request, answer in zip(run.requests, run.answers, strict=True):
            self._answers.setdefault(request.number, answer.token_ids)
        step = Step(
            rung=rung,
            num_requests=len(run.requests),
            tokens_per_s=run.tokens_per_s,
            ttft_p50_s=percentile(run.ttft_s, 50),
            ttft_p95_s=percentile(run.ttft_s, 95),
            tpot_p50_s=percentile(run.tpot_s, 50),
            tpot_p95_s=percentile(run.tpot_s, 95),
            gap_p99_s=percentile(run.gaps_s, 99),
            wasted=run.wasted,
            same_tokens=sum(known) / len(known) if known else None,
        )
        self.steps.append(step)
        return step

    def metrics(self) -> Iterator[Metric]:
        """The last rung's figures, each beside that of the rung before."""
        step = self.steps[-1]
        before = self.steps[-2] if len(self.steps) > 1 else None
        note = "" if step.num_requests == NUM_REQUESTS else f", {step.num_requests} of {NUM_REQUESTS} requests"
        figures = (
            ("throughput", "tokens_per_s", "generated tokens/s"),
            ("ttft_p50", "ttft_p50_s", "s"),
            ("ttft_p95", "ttft_p95_s", "s"),
            ("tpot_p50", "tpot_p50_s", "s"),
            ("tpot_p95", "tpot_p95_s", "s"),
            ("gap_p99", "gap_p99_s", "s"),
        )
        for name, attribute, unit in figures:
            yield metric(
                f"{step.rung.name}_{name}",
                [getattr(step, attribute)],
                unit + note,
                reference=f"the rung before: {before.title}" if before else "",
                reference_values=[getattr(before, attribute)] if before else (),
            )
        if step.wasted is not None:
            reserved = before is not None and before.wasted is not None
            yield metric(
                f"{step.rung.name}_kv_wasted",
                [step.wasted],
                "of reserved KV slots, averaged over time",
                reference=f"the rung before: {before.title}" if before and reserved else "",
                reference_values=[before.wasted] if before and before.wasted is not None else (),
                goal=f"<= {MAX_WASTED}" if step.rung.bounded_waste else None,
                ok=step.waste_ok,
            )
        if step.same_tokens is not None:
            yield metric(
                f"{step.rung.name}_same_tokens",
                [step.same_tokens],
                "of answers, equal to the rungs before",
                goal="1",
                ok=step.same_tokens == 1.0,
            )
