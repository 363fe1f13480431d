"""Where the time of a decode step goes: linears, attention, the rest of the native program, and everything around it.

Owns the arithmetic and the goals; the runner measures its parts, `tandem.bench.workload` the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from tandem.bench.cases import Case
from tandem.bench.report import Metric, metric
from tandem.bench.workload import Steps

_OUTSIDE_CASE = Case("decode", 1, 512)
_OUTSIDE_SHARE = 0.15
"""What the step of that case may spend outside linears and attention."""
_LONG_CONTEXT = 6000
_ATTENTION_SHARE = 0.6
"""Of the memory's speed, what attention reaches at least at that context."""


def breakdown(
    case: Case, runs: Sequence[Steps], kv_bytes: float, read_bytes_per_s: Sequence[float]
) -> Iterator[Metric]:
    """The metrics of `case` from its runs and the memory's speed before each; `kv_bytes` is what attention reads in a step.
    Nothing where the runner doesn't measure its parts."""
    if not all(run.parts for run in runs):
        return
    for part in ("linear", "attention", "rest"):
        yield metric(f"{case.name}_{part}", [1000 * run.parts[part] for run in runs], "ms a step")
    around = [1000 * (run.seconds - sum(run.parts.values())) for run in runs]
    yield metric(
        f"{case.name}_python", around, "ms a step", reference="schedule, sampling and messages: not in the program"
    )
    outside = [1 - (run.parts["linear"] + run.parts["attention"]) / run.seconds for run in runs]
    bounded = case == _OUTSIDE_CASE
    yield metric(
        f"{case.name}_outside",
        outside,
        "of the step",
        reference="rest and python",
        goal=f"<= {_OUTSIDE_SHARE:g}" if bounded else None,
        ok=not bounded or median(outside) <= _OUTSIDE_SHARE,
    )
    reads = [kv_bytes / run.parts["attention"] for run in runs]
    long = case.context == _LONG_CONTEXT
    share = median(reads) / median(read_bytes_per_s)
    yield metric(
        f"{case.name}_attention_reads",
        [rate / 1e9 for rate in reads],
        "GB/s",
        reference="memory read by the same cores",
        reference_values=[rate / 1e9 for rate in read_bytes_per_s],
        goal=f"ratio >= {_ATTENTION_SHARE:g}" if long else None,
        ok=not long or share >= _ATTENTION_SHARE,
    )
