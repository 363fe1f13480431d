"""Contenders in turns: what is compared is measured alternately, so that a noisy moment meets all of them.

Owns the order; what is measured is its caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from tandem.bench.report import Metric, Say, metric

Turn = Callable[[], Mapping[str, float]]
"""Runs a contender once and answers what it reached, by name."""


def in_rounds(turns: Sequence[Turn], rounds: int, say: Say) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Every turn once a round, after a round that doesn't count; every other round in the opposite order. Returns what was
    reached round by round, and what in the round that doesn't count."""
    reached: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "a round to warm up")
        for turn in turns[:: 1 if number % 2 else -1]:
            for name, value in turn().items():
                if number:
                    reached.setdefault(name, []).append(value)
                else:
                    first[name] = value
    return reached, first


def beside(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    reference: str,
    reference_values: Sequence[float],
    at_least: float | None = None,
) -> Metric:
    """A metric whose goal, if it has one, is a part of its reference's median."""
    ratio = median(values) / median(reference_values)
    return metric(
        name,
        values,
        unit,
        reference=reference,
        reference_values=reference_values,
        goal=None if at_least is None else f"ratio >= {at_least:g}",
        ok=at_least is None or ratio >= at_least,
    )


def times_a_peer(
    name: str, values: Sequence[float], peer: str, peer_values: Sequence[float], at_least: float | None = None
) -> Metric:
    """How many times the peer's values are reached, round by round."""
    ratios = [mine / theirs for mine, theirs in zip(values, peer_values, strict=True)]
    return metric(
        name,
        ratios,
        "x",
        reference=f"{peer}, round by round",
        goal=None if at_least is None else f">= {at_least:g}",
        ok=at_least is None or median(ratios) >= at_least,
    )
