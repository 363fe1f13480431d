"""The line of requests that wait for room: who is next, and that nobody waits for ever."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from router.admission import Admission, Held, Slo


def order(line: Admission) -> list[str]:
    return [held.request_id for held in line.all()]


def test_who_is_due_first_goes_first() -> None:
    line = Admission()
    line.add("long", "", 10.0, 1.0, 1, 0.0)
    line.add("short", "", 1.0, 0.1, 1, 1.0)
    assert order(line) == ["short", "long"]
    assert order(line) == ["short", "long"], "looking changes nothing"
    line.remove("short")
    line.remove("short")
    assert order(line) == ["long"]
    assert len(line) == 1


def test_a_promise_grows_with_what_has_to_be_computed() -> None:
    assert Slo(0.3, 0.001).first_token_s(700) == 1.0


def test_nothing_starves() -> None:
    line = Admission()
    line.add("batch", "", 60.0, 1.0, 1, 0.0)
    served = []
    for number in range(100):
        line.add(f"i{number}", "", 1.0, 0.5, 4, float(number))
        first = order(line)[0]
        line.remove(first)
        served.append(first)
    assert 0 < served.index("batch") <= 62


def test_a_tenant_that_asks_for_more_than_its_share_queues_behind_itself() -> None:
    line = Admission()
    for number in range(50):
        line.add(f"greedy{number}", "greedy", 1.0, 1.0, 2, 0.0)
    line.add("modest0", "modest", 1.0, 1.0, 2, 3.0)
    line.add("modest1", "modest", 1.0, 1.0, 2, 3.0)
    ranks = order(line)
    assert ranks.index("modest0") == 7
    assert ranks.index("modest1") <= 9


def test_what_is_too_late_gives_way_once_to_those_who_are_not() -> None:
    line = Admission()
    line.add("late", "", 1.0, 1.0, 1, 0.0)
    line.add("fresh", "", 1.0, 0.1, 1, 1.5)
    tried: list[str] = []

    def full(held: Held) -> float:
        tried.append(held.request_id)
        return 0.05

    line.release(2.0, full)
    assert order(line) == ["fresh", "late"]
    line.release(9.0, full)
    line.release(9.0, full)
    assert order(line) == ["late", "fresh"] or order(line)[0] == "late", "put back once"


def test_those_whose_workers_have_room_go_before_those_whose_have_none() -> None:
    line = Admission()
    for name in ("a", "b", "c", "d", "e", "f"):
        line.add(name, "", 1.0, 1.0, 1, 0.0)
    line.release(0.0, lambda held: 0.0 if held.request_id == "c" else 1.0)
    assert order(line) == ["a", "b", "d", "e", "f"]
    line.release(9.0, lambda held: 0.0 if held.request_id == "f" else 1.0)
    assert "f" in order(line), "only the first few are tried"


def test_one_that_found_no_room_is_tried_again_when_there_may_be_some() -> None:
    line = Admission()
    line.add("a", "", 100.0, 1.0, 1, 0.0)
    tried: list[float] = []
    assert line.next_try_s() == 0.0

    def full(now_s: float) -> None:
        line.release(now_s, lambda held: tried.append(now_s) or 0.03)  # type: ignore[func-returns-value]

    for now_s in (0.0, 0.01, 0.02, 0.031, 0.04):
        full(now_s)
    assert tried == [0.0, 0.031]
    assert line.next_try_s() == 0.061


def test_one_that_was_dispatched_before_keeps_its_place() -> None:
    line = Admission()
    line.add("new", "", 1.0, 1.0, 1, 10.0)
    held = line.add("again", "", 1.0, 1.0, 1, 10.0, due_s=3.0)
    assert held.due_s == 3.0
    line.release(10.0, lambda held: 1.0)
    assert order(line) == ["again", "new"], "and is not put back"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 50), st.floats(0.01, 5)), min_size=1, max_size=40))
def test_everybody_is_served_and_the_work_adds_up(asked: list[tuple[str, float, float]]) -> None:
    line = Admission()
    for number, (tenant, slo_s, work_s) in enumerate(asked):
        line.add(str(number), tenant, slo_s, work_s, 2, number * 0.1)
    assert abs(line.ahead_s(math.inf) - sum(work_s for _, _, work_s in asked)) < 1e-6
    served: list[str] = []

    def serve(held: Held) -> float:
        served.append(held.request_id)
        return 0.0

    line.release(100.0, serve)
    assert sorted(served, key=int) == [str(number) for number in range(len(asked))]
    assert (len(line), line.ahead_s(math.inf)) == (0, 0.0)
