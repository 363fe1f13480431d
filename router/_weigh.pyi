from collections.abc import Sequence
from typing import Any

from numpy import bool_, float64, int32, int64
from numpy.typing import NDArray

def weigh(
    fleet: tuple[Any, ...],
    workers: NDArray[int64],
    num_prefills: int,
    counts: NDArray[int32],
    holders: Sequence[int],
    out: NDArray[float64],
    request: tuple[float, ...],
    terms: tuple[float, ...],
    arrivals_per_s: float,
    busy: float,
    drawn: float,
    drawn_too: float,
    max_places: int,
    max_prefills: int,
) -> tuple[int, float, int, int, float]:
    """`router.policy.weigh.weigh_ref`, natively: fills `out`; returns the cheapest decode worker alone and its cost, and the
    cheapest pair and its cost."""

def sources(
    counts: NDArray[int32],
    holders: Sequence[int],
    reachable: NDArray[bool_],
    more_than: int,
    but: Sequence[int],
    most: int,
) -> list[tuple[int, int, int]]:
    """`router.policy.sources.sources_ref`, natively: numbers, tiers and leading blocks."""
