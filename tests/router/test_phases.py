"""A request's way as spans: each time that is known has its place, nothing overlaps, nothing is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.control import DispatchRole, Fence, RoleReport
from router.journal import Run
from router.phases import Phase, Span, spans


def run(
    role: DispatchRole, reported_at_s: float, queue_s: float = 0.0, fetch_s: float = 0.0, compute_s: float = 0.0
) -> Run:
    report = RoleReport(Fence("q", 0, role, 0), 0, 0, 1, [], queue_s, fetch_s, compute_s)
    return Run(f"{role}-0", 0.0, report, reported_at_s)


def told(*parts: tuple[Phase, float, float | None]) -> tuple[Span, ...]:
    return tuple(Span(*part) for part in parts)


def test_a_hand_over_is_queue_fetch_prefill_handover_and_decode() -> None:
    runs = [run("prefill", 101.0, 0.1, 0.2, 0.5), run("decode", 101.25, 1.0, 0.1, 0.0)]
    assert spans(100.0, [0.2], runs, None, 103.0) == told(
        ("queue", 0.0, 0.3), ("fetch", 0.3, 0.5), ("prefill", 0.5, 1.0), ("handover", 1.0, 1.25), ("decode", 1.25, 3.0)
    )


def test_a_decode_worker_that_prefills_hands_nothing_over() -> None:
    runs = [run("decode", 101.0, 0.0, 0.0, 0.75)]
    assert spans(100.0, [0.0], runs, None, 102.0) == told(
        ("queue", 0.0, 0.25), ("prefill", 0.25, 1.0), ("decode", 1.0, 2.0)
    )


@pytest.mark.parametrize(
    ("runs", "started_at_s", "expected"),
    [
        ([], None, [("queue", 0.0, None)]),
        ([], 100.5, [("queue", 0.0, 0.5), ("prefill", 0.5, None)]),
        (
            [run("prefill", 101.0, 0, 0, 0.5)],
            100.4,
            [("queue", 0.0, 0.5), ("prefill", 0.5, 1.0), ("handover", 1.0, None)],
        ),
        (
            [run("prefill", 101.0, 0, 0, 1.0), run("decode", 101.5)],
            None,
            [("prefill", 0.0, 1.0), ("handover", 1.0, 1.5), ("decode", 1.5, None)],
        ),
    ],
)
def test_the_last_span_of_an_active_request_goes_on(
    runs: list[Run], started_at_s: float | None, expected: list[tuple[Phase, float, float | None]]
) -> None:
    assert spans(100.0, [0.0], runs, started_at_s, None) == told(*expected)


def test_after_a_crash_it_waits_and_computes_again() -> None:
    runs = [run("prefill", 101.0, 0, 0, 1.0), run("decode", 101.5), run("decode", 104.0, 0.25, 0.25, 0.5)]
    assert spans(100.0, [0.0, 3.0], runs, None, 106.0) == told(
        ("prefill", 0.0, 1.0),
        ("handover", 1.0, 1.5),
        ("decode", 1.5, 3.0),
        ("queue", 3.0, 3.25),
        ("fetch", 3.25, 3.5),
        ("prefill", 3.5, 4.0),
        ("decode", 4.0, 6.0),
    )


def test_one_that_ended_in_line_was_in_the_queue_to_its_end() -> None:
    assert spans(100.0, [], [], None, 110.0) == told(("queue", 0.0, 10.0))


durations = st.floats(0.0, 20.0)


@given(
    st.lists(st.floats(0.0, 50.0), max_size=6).map(sorted),
    st.lists(
        st.builds(run, st.sampled_from(["prefill", "decode"]), st.floats(0.0, 50.0), durations, durations, durations)
    ),
    st.floats(0.0, 60.0) | st.none(),
    st.floats(50.0, 60.0) | st.none(),
)
def test_spans_follow_each_other_whatever_is_said(
    placed: list[float], runs: list[Run], started_at_s: float | None, ended_at_s: float | None
) -> None:
    found = spans(0.0, placed, runs, started_at_s, ended_at_s)
    before_s = found[0].begin_s if found else 0.0
    for span in found:
        assert span.begin_s == before_s
        before_s = before_s if span.end_s is None else span.end_s
        assert before_s >= span.begin_s
    assert [span.end_s is None for span in found] == [False] * (len(found) - 1) + [ended_at_s is None][: len(found)]
    if ended_at_s is not None and found:
        assert found[-1].end_s == pytest.approx(ended_at_s, abs=1e-4)
