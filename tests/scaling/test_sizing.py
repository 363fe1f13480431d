"""How many workers a load needs: monotone, within bounds, and what queueing theory says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.control import StepPrices
from tandem.scaling.sizing import Promise, WorkerKind, decode_need, prefill_need, prompt_s, waits_s
from tandem.scaling.traffic import Shape
from tests.scaling.looks import KIND, SHAPE

PROMISE = Promise()
RATES = st.floats(0.0, 500.0)
SHAPES = st.builds(
    Shape,
    prompt_tokens=st.floats(1.0, 50_000.0),
    uncached_tokens=st.floats(1.0, 50_000.0),
    uncached_pairs=st.floats(1.0, 1e9),
    spread=st.floats(0.0, 10.0),
    samples=st.floats(1.0, 4.0),
    here=st.floats(0.0, 1.0),
    here_pairs=st.floats(0.0, 1.0),
)
KINDS = st.builds(
    WorkerKind,
    prices=st.builds(
        StepPrices,
        base_s=st.floats(0.0, 0.1),
        token_s=st.floats(1e-7, 1e-2),
        pair_s=st.floats(0.0, 1e-6),
        sequence_s=st.floats(0.0, 1e-2),
        context_s=st.floats(0.0, 1e-5),
    ),
    step_tokens=st.sampled_from([16.0, 512.0, 2048.0]),
    max_running=st.sampled_from([0.0, 1.0, 64.0]),
    kv_tokens=st.sampled_from([0.0, 1e3, 1e6]),
)


@given(st.tuples(RATES, RATES), SHAPES, KINDS, st.floats(0.0, 5.0), st.integers(1, 64))
def test_more_load_never_needs_fewer_prefill_workers(
    rates: tuple[float, float], shape: Shape, kind: WorkerKind, backlog: float, most: int
) -> None:
    few, many = (prefill_need(rate, shape, kind, PROMISE, backlog, most).workers for rate in sorted(rates))
    assert 1 <= few <= many <= most


@given(st.tuples(RATES, RATES), st.tuples(st.floats(1, 8000), st.floats(1, 8000)), SHAPES, KINDS, st.integers(1, 64))
def test_more_or_longer_answers_never_need_fewer_decode_workers(
    rates: tuple[float, float], answers: tuple[float, float], shape: Shape, kind: WorkerKind, most: int
) -> None:
    (few, many), (short, long) = sorted(rates), sorted(answers)
    needs = [
        decode_need(rate, shape, answer, kind, PROMISE, most).workers
        for rate, answer in ((few, short), (many, short), (many, long))
    ]
    assert 1 <= needs[0] <= needs[1] <= needs[2] <= most


@pytest.mark.parametrize(("workers", "load"), [(1, 0.7), (3, 2.4), (8, 7.0)])
def test_nine_in_ten_wait_no_longer_than_predicted(workers: int, load: float) -> None:
    """A queue with exponential service, played through."""
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(1.0 / load, 200_000))
    service = rng.exponential(1.0, len(arrivals))
    free = np.zeros(workers)
    waited = np.empty(len(arrivals))
    for at, (came, takes) in enumerate(zip(arrivals, service, strict=True)):
        first = int(free.argmin())
        begins = max(came, free[first])
        waited[at] = begins - came
        free[first] = begins + takes
    assert waits_s(workers, load, 1.0) == pytest.approx(np.quantile(waited, 0.9), rel=0.1)


def test_a_step_with_as_many_streams_as_are_planned_keeps_the_promise() -> None:
    answer, rate = 400.0, 9.0
    roomy = replace(KIND, max_running=0.0, kv_tokens=0.0)
    workers = decode_need(rate, SHAPE, answer, roomy, PROMISE, 64).workers
    assert workers > 1

    def step_s(count: int) -> float:
        each = roomy.prices.sequence_s + roomy.prices.context_s * (SHAPE.prompt_tokens + answer / 2)
        per_worker = rate * answer / count
        return roomy.prices.base_s / (1.0 - per_worker * each) if per_worker * each < 1.0 else math.inf

    assert step_s(workers) <= PROMISE.tpot_s
    assert step_s(max(1, workers // 2)) > PROMISE.tpot_s


def test_room_decides_where_it_is_short_and_the_reason_says_so() -> None:
    by_streams = decode_need(5.0, SHAPE, 400.0, replace(KIND, max_running=8.0), PROMISE, 64)
    by_room = decode_need(5.0, SHAPE, 400.0, replace(KIND, kv_tokens=20_000.0), PROMISE, 64)
    assert "8 streams a worker wants" in by_streams.why
    assert "room for 20,000 tokens wants" in by_room.why
    assert min(by_streams.workers, by_room.workers) > decode_need(5.0, SHAPE, 400.0, KIND, PROMISE, 64).workers


def test_a_prompt_costs_what_the_steps_cost() -> None:
    assert prompt_s(KIND, 1024, 0) == pytest.approx(2 * 5e-3 + 1024 * 2e-4)
    assert prompt_s(KIND, 0, 0) == 0.0
