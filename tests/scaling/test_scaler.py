"""When a need becomes a change: within limits, calm under noise, more at once, fewer late, moved where that will do."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.scaling.scaler import Counts, Limits
from tandem.scaling.traffic import Totals, TrafficMeter
from tests.scaling.looks import INTERVAL_S, KIND, Days


def changes(wanted: list[Counts]) -> int:
    return sum(later != sooner for sooner, later in pairwise(wanted))


def turns(wanted: list[int]) -> int:
    """How often a count goes the other way."""
    steps = [later - sooner for sooner, later in pairwise(wanted) if later != sooner]
    return sum((later > 0) != (sooner > 0) for sooner, later in pairwise(steps))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0.0, 200.0), min_size=1, max_size=60),
    st.tuples(st.integers(1, 4), st.integers(0, 6), st.integers(1, 4), st.integers(0, 6)),
    st.integers(0, 8),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_never_outside_the_limits(
    rates: list[float], bounds: tuple[int, int, int, int], spare: int, start: tuple[int, int]
) -> None:
    least = Counts(bounds[0], bounds[2])
    most = Counts(bounds[0] + bounds[1], bounds[2] + bounds[3])
    together = least.total + spare
    days = Days(Limits(least, most, together), settle_s=20.0, start=Counts(*start))
    for wanted in days.pass_by(rates):
        assert least.prefill <= wanted.prefill <= most.prefill
        assert least.decode <= wanted.decode <= most.decode
        assert wanted.total <= together


@settings(deadline=None, max_examples=15)
@given(st.floats(0.5, 60.0), st.integers(0, 10_000))
def test_a_steady_load_of_random_arrivals_makes_no_count_swing(per_s: float, seed: int) -> None:
    """Half an hour of Poisson arrivals: after the first minutes each count turns round at most once in ten minutes."""
    rng = np.random.default_rng(seed)
    rates = (rng.poisson(per_s * INTERVAL_S, 360) / INTERVAL_S).tolist()
    wanted = Days(settle_s=120.0).pass_by(rates)[36:]
    for counts in ([each.prefill for each in wanted], [each.decode for each in wanted]):
        assert turns(counts) <= 3
        assert max(counts) - min(counts) <= max(1, round(0.35 * max(counts)))


@settings(deadline=None, max_examples=15)
@given(st.floats(0.5, 30.0), st.floats(1.0, 4.0))
def test_more_load_ends_in_no_fewer_workers(per_s: float, times: float) -> None:
    few = Days().pass_by([per_s] * 40)[-1]
    many = Days().pass_by([per_s * times] * 40)[-1]
    assert many.prefill >= few.prefill
    assert many.decode >= few.decode


def test_a_load_that_doubles_gets_more_within_three_looks_and_one_that_halves_fewer_after_it_settled() -> None:
    days = Days(settle_s=60.0)
    before = days.pass_by([20.0] * 30)[-1]
    risen = days.pass_by([40.0] * 3)[-1]
    assert risen.prefill > before.prefill
    high = days.pass_by([40.0] * 30)[-1]
    falling = days.pass_by([20.0] * 30)
    kept = next(at for at, wanted in enumerate(falling) if wanted.total < high.total)
    assert kept * INTERVAL_S >= 55.0
    assert falling[-1].prefill <= before.prefill + 1
    assert turns([each.prefill for each in falling]) == 0


def test_one_burst_of_one_look_changes_nothing() -> None:
    days = Days()
    before = days.pass_by([10.0] * 30)[-1]
    days.pass_by([30.0])
    assert days.pass_by([0.0] * 3)[-1] == before


def test_a_role_that_needs_more_gets_what_the_other_does_not_need() -> None:
    """Long prompts with short answers become short prompts with long answers: workers change their role, none is started."""
    days = Days(Limits(Counts(1, 1), Counts(16, 16), 9), settle_s=60.0)
    before = days.pass_by([8.0] * 30, tokens=4000.0, answer=20.0)[-1]
    assert before == Counts(8, 1)
    course = days.pass_by([8.0] * 30, tokens=200.0, answer=800.0)
    assert course[-1].decode >= 4
    assert max(each.total for each in course) == 9
    assert any("not needed there, and moves to decode" in reason for plan in days.plans for reason in plan.reasons)


def test_where_no_more_are_allowed_the_plan_says_what_is_lacking() -> None:
    days = Days(Limits(Counts(1, 1), Counts(8, 8), 3))
    assert days.pass_by([60.0] * 10)[-1].total == 3
    assert any("3 together are the most" in reason for reason in days.plans[-1].reasons)


def test_nothing_is_guessed_of_workers_that_have_said_no_prices() -> None:
    days = Days(start=Counts(2, 3))
    assert set(days.pass_by([50.0] * 40, prefill=None, decode=None)) == {Counts(2, 3)}
    assert any("has said yet" in reason for reason in days.plans[-1].reasons)


def test_what_people_set_stands_until_it_has_settled() -> None:
    days = Days(settle_s=60.0)
    days.pass_by([2.0] * 30)
    days.wanted = Counts(4, 4)
    course = days.pass_by([2.0] * 30)
    assert course[10] == Counts(4, 4)
    assert course[-1].total < 8


def test_what_waits_is_made_good() -> None:
    few, many = Days(), Days()
    assert many.pass_by([5.0] * 10, waiting=200.0)[-1].prefill > few.pass_by([5.0] * 10)[-1].prefill


@pytest.mark.parametrize("per_s", [0.0, 3.0, 40.0])
def test_every_number_comes_with_its_reason(per_s: float) -> None:
    days = Days()
    days.pass_by([per_s] * 4)
    reasons = days.plans[-1].reasons
    assert f"{per_s:.2f} requests/s come" in reasons[0]
    assert [reason.split(":")[0] for reason in reasons[1:3]] == ["prefill", "decode"]


def test_a_router_that_restarts_or_does_not_answer_makes_no_rate_jump() -> None:
    meter = TrafficMeter()
    assert not meter.look({"a": Totals(num_requests=1000)}, 0.0)
    meter.look({"a": Totals(num_requests=1050)}, 5.0)
    assert meter.per_s == 10.0
    meter.look({}, 10.0)
    assert meter.per_s == 0.0
    meter.look({"a": Totals(num_requests=1150), "b": Totals(num_requests=5)}, 15.0)
    assert meter.per_s == 21.0


def test_looks_that_come_at_once_are_one() -> None:
    days = Days()
    days.pass_by([5.0] * 5)
    before = days.wanted
    days.now_s -= INTERVAL_S
    days.pass_by([5.0])
    assert days.wanted == before
    assert KIND.knows_prefill
    assert KIND.knows_decode
