"""The fleet: a worker's report, what it doesn't include yet once, and the time that passes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.control import Capacity, Fence, Link, Load, StepPrices
from router.fleet import (
    BASE_S,
    CONTEXT,
    FREE_BLOCKS,
    OUTSTANDING,
    PAIR_S,
    SENDS_UNTIL,
    SEQUENCES,
    TOKEN_S,
    UNCOMPUTED,
    Fleet,
    Work,
)

PRICES = StepPrices(base_s=1e-12, token_s=0.001)
STREAM = Work(num_sequences=1, context_tokens=100.0, num_blocks=7)


def fence(number: int) -> Fence:
    return Fence("q", 0, "decode", number)


def fleet(*names: str, step_tokens: int = 0) -> Fleet:
    made = Fleet()
    for name in names:
        role = {"p": "prefill", "d": "decode", "h": "pool"}[name[0]]
        capacity = Capacity(num_blocks=100, max_step_tokens=step_tokens)
        made.join(name, role, f"machine-{name[1:]}", capacity, "group", 0.0)  # type: ignore[arg-type]
        if role != "pool":
            made.reported(name, Load(prices=PRICES, free_blocks=100), (), 0.0, 0.0)
    made.serve("group")
    return made


def waits_s(made: Fleet, name: str, now_s: float, due_s: float = math.inf) -> float:
    number = made.number(name)
    assert number is not None
    return float(made.waits_s(np.array([number]), due_s, now_s)[0][0])


def test_what_was_dispatched_counts_until_a_report_includes_it() -> None:
    made = fleet("d0")
    made.dispatched(0, fence(0), STREAM, 0.0)
    made.dispatched(0, fence(1), STREAM, 0.0)
    assert made.table[[SEQUENCES, CONTEXT, FREE_BLOCKS, OUTSTANDING], 0].tolist() == [2, 200, 86, 2]
    made.reported("d0", Load(num_dispatches=1, num_generating=1, context_tokens=90, free_blocks=90), (), 0.0, 1.0)
    assert made.table[[SEQUENCES, CONTEXT, FREE_BLOCKS], 0].tolist() == [2, 190, 83]
    made.reported("d0", Load(num_dispatches=2, num_generating=2, context_tokens=180, free_blocks=80), (), 0.0, 1.0)
    assert made.table[[SEQUENCES, CONTEXT, FREE_BLOCKS, OUTSTANDING], 0].tolist() == [2, 180, 80, 2]


def test_what_ended_counts_no_more_at_once() -> None:
    made = fleet("d0")
    made.dispatched(0, fence(0), STREAM, 0.0)
    made.ended("d0", fence(0), 0.1)
    made.ended("d0", fence(0), 0.1)
    made.ended("nobody", fence(0), 0.1)
    assert made.table[[SEQUENCES, CONTEXT, FREE_BLOCKS, OUTSTANDING], 0].tolist() == [0, 0, 100, 0]
    assert made.num_dispatched() == 0


def test_a_prompt_is_waited_for_until_its_predicted_time_has_passed_or_it_is_there() -> None:
    made = fleet("p0")
    made.dispatched(0, fence(0), Work(num_tokens=1000, due_s=5.0), 0.0)
    assert waits_s(made, "p0", 0.0) == pytest.approx(1.0)
    assert waits_s(made, "p0", 0.4) == pytest.approx(0.6)
    assert waits_s(made, "p0", 2.0) == 0.0
    made.dispatched(0, fence(1), Work(num_tokens=1000, due_s=6.0), 0.5)
    assert waits_s(made, "p0", 0.5) == pytest.approx(1.5)
    made.computed("p0", fence(0), 0.6)
    assert waits_s(made, "p0", 0.6) == pytest.approx(1.0)
    assert made.table[UNCOMPUTED, 0] == 1000
    made.ended("p0", fence(1), 0.7)
    assert waits_s(made, "p0", 0.7) == 0.0
    assert made.table[UNCOMPUTED, 0] == 0


def test_a_prompt_waits_for_those_that_are_due_before_it() -> None:
    made = fleet("p0")
    made.dispatched(0, fence(0), Work(num_tokens=100, due_s=1.0), 0.0)
    made.dispatched(0, fence(1), Work(num_tokens=200, due_s=3.0), 0.0)
    made.dispatched(0, fence(2), Work(num_tokens=1000, due_s=5.0), 0.0)
    assert waits_s(made, "p0", 0.0, due_s=4.0) == pytest.approx(0.3)
    assert waits_s(made, "p0", 0.05, due_s=4.0) == pytest.approx(0.25)
    assert waits_s(made, "p0", 0.05, due_s=9.0) == pytest.approx(1.25)
    _, behind = made.waits_s(np.array([0]), 2.0, 0.05)
    assert behind.tolist() == [2]


def test_a_running_step_is_waited_for_whatever_is_due() -> None:
    made = fleet("p0", step_tokens=400)
    made.dispatched(0, fence(0), Work(num_tokens=1000, due_s=5.0), 0.0)
    assert waits_s(made, "p0", 0.1, due_s=1.0) == pytest.approx(0.3), "three steps: 400, 400 and 200 tokens"
    made.dispatched(0, fence(1), Work(num_tokens=100, due_s=1.0), 0.1)
    assert waits_s(made, "p0", 0.1, due_s=0.5) == pytest.approx(0.3)
    assert waits_s(made, "p0", 0.1, due_s=2.0) == pytest.approx(0.4)
    assert waits_s(made, "p0", 0.1, due_s=9.0) == pytest.approx(1.0)
    made.computed("p0", fence(1), 0.5)
    assert waits_s(made, "p0", 0.6, due_s=2.0) == pytest.approx(0.3), "its second step has begun"
    made.dispatched(0, fence(2), Work(num_tokens=100, due_s=1.0), 0.6)
    made.ended("p0", fence(0), 0.6)
    assert waits_s(made, "p0", 0.6) == pytest.approx(0.1), "its step is gone with it"


def test_a_report_corrects_what_was_predicted() -> None:
    made = fleet("p0")
    made.dispatched(0, fence(0), Work(num_tokens=1000, due_s=5.0), 0.0)
    made.reported("p0", Load(num_dispatches=1, waiting_tokens=300, prices=PRICES), (), 0.1, 0.5)
    assert waits_s(made, "p0", 0.5) == pytest.approx(0.2), "less is left, and its step has run for a while"
    made.reported("p0", Load(num_dispatches=1, waiting_tokens=900, prices=PRICES), (), 0.0, 0.6)
    assert waits_s(made, "p0", 0.6) == pytest.approx(0.9), "others sent something, or it is slower"
    assert waits_s(made, "p0", 0.6, due_s=1.0) == pytest.approx(0.8), "what nobody here knows of goes first"
    made.computed("p0", fence(0), 0.7)
    assert waits_s(made, "p0", 0.7) == 0.0


def test_more_prompts_than_slots_are_all_counted() -> None:
    made = fleet("p0")
    for number in range(20):
        made.dispatched(0, fence(number), Work(num_tokens=100, due_s=float(number)), 0.0)
    assert waits_s(made, "p0", 0.0) == pytest.approx(2.0)
    assert waits_s(made, "p0", 0.0, due_s=3.0) == pytest.approx(0.4)


def next_one(line: dict[int, list[float]], running: int | None) -> int | None:
    going = [one for one in line if line[one][1] > 1e-9]
    return running if running in going else min(going, key=lambda one: (line[one][0], one), default=None)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 500), st.floats(0, 10), st.floats(0, 0.3)), max_size=30))
def test_a_fleet_waits_as_long_as_a_line_computed_in_order(steps: list[tuple[int, int, float, float]]) -> None:
    """An oracle that keeps every prompt: first due, first begun; each is one step."""
    made, line, now_s, number = fleet("p0"), dict[int, list[float]](), 0.0, 0
    running: int | None = None
    for kind, tokens, due_s, passed_s in steps:
        left_s = passed_s
        for one in sorted(line, key=lambda one: (one != running, line[one][0], one)):
            spent_s = min(left_s, line[one][1])
            line[one][1] -= spent_s
            left_s -= spent_s
        now_s += passed_s
        running = next_one(line, running)
        if kind == 3 and line:
            gone = min(line)
            made.ended("p0", fence(gone), now_s)
            del line[gone]
        else:
            made.dispatched(0, fence(number), Work(num_tokens=tokens, due_s=due_s), now_s)
            line[number] = [due_s, tokens * 0.001]
            number += 1
        running = next_one(line, running)
        assert waits_s(made, "p0", now_s) == pytest.approx(sum(left for _, left in line.values()), abs=1e-6)
        first_s = line[running][1] if running in line else 0.0
        assert waits_s(made, "p0", now_s, due_s=-1.0) == pytest.approx(first_s, abs=1e-6)


def test_a_lost_worker_takes_its_row_along_and_counts_anew_when_it_comes_back() -> None:
    made = fleet("p0", "d1")
    made.dispatched(1, fence(0), STREAM, 0.0)
    made.forget("d1")
    assert made.processes() == {"p0"}
    assert made.decodes.tolist() == []
    assert made.join("d2", "decode", "", Capacity(num_blocks=5), "group", 1.0) == 1
    assert made.table[[SEQUENCES, FREE_BLOCKS, OUTSTANDING], 1].tolist() == [0, 5, 0]
    made.dispatched(1, fence(1), STREAM, 1.0)
    made.reported("d2", Load(num_dispatches=1, free_blocks=3), (), 0.0, 1.0)
    assert made.table[[SEQUENCES, FREE_BLOCKS], 1].tolist() == [0, 3]


def test_a_worker_that_has_not_measured_something_is_taken_to_be_like_the_others() -> None:
    made = fleet("p0", "p1")
    made.join("d2", "decode", "", Capacity(), "group", 0.0)
    assert made.table[TOKEN_S, 2] == 0.001
    load = Load(prices=StepPrices(base_s=0.5, token_s=0.003, pair_s=1e-6))
    made.reported("p0", load, (), 0.0, 0.5)
    assert made.table[TOKEN_S, 2] == 0.001, "not at every report: it looks at everybody"
    made.reported("p0", load, (), 0.0, 1.5)
    assert made.table[TOKEN_S, 2] == pytest.approx(0.002)
    assert made.table[PAIR_S, 2] == pytest.approx(5e-7)
    assert made.table[BASE_S, 2] == pytest.approx(0.25)
    made.reported("d2", Load(prices=StepPrices(base_s=0.1, sequence_s=0.2)), (), 0.0, 0.0)
    assert made.table[[BASE_S, TOKEN_S], 2].tolist() == [0.1, pytest.approx(0.002)]


def test_only_the_served_group_is_there_to_choose_from() -> None:
    made = fleet("p0", "d1", "h1")
    assert (made.prefills.tolist(), made.decodes.tolist(), made.workers.tolist()) == ([0], [1], [0, 1])
    assert made.homes[:3].tolist() == [0, 2, 2], "a pool node on its machine"
    made.regroup("d1", "other")
    assert made.decodes.tolist() == []
    assert made.reachable[:3].tolist() == [True, False, True]
    made.serve("other")
    assert (made.prefills.tolist(), made.decodes.tolist()) == ([], [1])
    made.serve(None)
    assert made.workers.tolist() == []


def test_a_source_is_busy_for_as_long_as_what_was_asked_of_it_takes() -> None:
    made = fleet("p0", "h1")
    made.reported("p0", Load(), (Link("h1", "shm", 10, 1000.0), Link("gone", "shm", 1, 5.0)), 0.0, 0.0)
    made.dispatched(0, fence(0), Work(source=1, num_bytes=500.0), 2.0)
    assert made.table[SENDS_UNTIL, 1] == pytest.approx(2.5)
    made.dispatched(0, fence(1), Work(source=1, num_bytes=500.0), 2.1)
    assert made.table[SENDS_UNTIL, 1] == pytest.approx(3.0)


def test_arrivals_are_counted_as_they_come() -> None:
    made = fleet("p0")
    assert made.arrivals(0.0) == (0.0, 0.0)
    for number in range(400):
        made.dispatched(0, fence(number), Work(num_tokens=100), number * 0.1)
    per_s, seconds_per_s = made.arrivals(40.0)
    assert per_s == pytest.approx(10.0, rel=0.05)
    assert seconds_per_s == pytest.approx(1.0, rel=0.05)
    assert made.arrivals(400.0)[0] < 0.01


def test_a_thousand_processes_have_rows() -> None:
    made = Fleet()
    for number in range(1000):
        assert made.join(f"d{number}", "decode", "", Capacity(), "group", 0.0) == number
    made.serve("group")
    assert len(made.decodes) == 1000
    assert (made.table[TOKEN_S, :1000] > 0).all()
