"""The search finds the highest rate that holds within its resolution, and asks little."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.bench.chat.search import LOWEST, RESOLUTION, highest


def tried(capacity: float, limit: float = 100.0) -> tuple[float, list[float]]:
    rates: list[float] = []

    def holds(rate: float) -> bool:
        rates.append(rate)
        return rate <= capacity

    return highest(holds, limit), rates


@given(capacity=st.floats(LOWEST, 90.0))
def test_the_rate_found_holds_and_is_close_to_the_highest(capacity: float) -> None:
    found, rates = tried(capacity)
    assert capacity / RESOLUTION < found <= capacity or (found == 0 and capacity < LOWEST * 1.5)
    assert len(rates) == len(set(rates)) <= 14


@pytest.mark.parametrize(("capacity", "most"), [(2.2, 4), (5.0, 6), (6.5, 6), (1.5, 4)])
def test_it_asks_little_near_where_it_begins(capacity: float, most: int) -> None:
    _, rates = tried(capacity)
    assert rates[0] == 2.0
    assert len(rates) <= most


def test_a_system_that_holds_nothing_is_0() -> None:
    found, rates = tried(0.0)
    assert found == 0
    assert min(rates) <= LOWEST


@pytest.mark.parametrize("limit", [1.0, 2.0, 2.5, 7.0])
def test_no_rate_is_tried_for_which_there_are_no_arrivals(limit: float) -> None:
    found, rates = tried(50.0, limit)
    assert found == limit == max(rates)
