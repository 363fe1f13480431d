"""How a worker leaves: in which order, and within which bounds."""

from __future__ import annotations

import pytest

from tandem.drain import GIVEN_BACK_S, TAKEN_AFTER_S, Drain, Step


def steps(drain: Drain, end_s: float, *, works_until_s: float, read_until_s: float) -> list[tuple[float, Step]]:
    """What a worker that gives back at once is told when, but to go on."""
    told: list[tuple[float, Step]] = []
    for tick in range(int(end_s * 10)):
        now_s = tick / 10
        step = drain.step(now_s, has_work=now_s < works_until_s, is_read=now_s < read_until_s)
        if step is not Step.GO_ON:
            told.append((now_s, step))
        if step is Step.GIVE_BACK:
            works_until_s = now_s
        if step is Step.END:
            break
    return told


def test_an_idle_worker_ends_at_once() -> None:
    assert Drain(0.0, 30.0).step(0.0, has_work=False, is_read=False) is Step.END


def test_what_ends_in_time_is_not_given_back() -> None:
    assert steps(Drain(0.0, 30.0), 60.0, works_until_s=12.0, read_until_s=0.0) == [(12.0, Step.END)]


def test_what_does_not_end_is_given_back_once_and_its_blocks_stay_until_they_can_have_been_asked_for() -> None:
    told = steps(Drain(0.0, 3.0), 60.0, works_until_s=50.0, read_until_s=0.0)
    assert told == [(3.0, Step.GIVE_BACK), (pytest.approx(3.1 + TAKEN_AFTER_S, abs=0.11), Step.END)]


@pytest.mark.parametrize("works_until_s", [2.0, 50.0])
def test_readers_are_waited_for_but_not_for_ever(works_until_s: float) -> None:
    told = steps(Drain(0.0, 3.0), 60.0, works_until_s=works_until_s, read_until_s=5.0)
    assert told[-1] == (5.0, Step.END)
    told = steps(Drain(0.0, 3.0), 60.0, works_until_s=works_until_s, read_until_s=1e9)
    assert told[-1] == (pytest.approx(min(works_until_s, 3.1) + GIVEN_BACK_S, abs=0.11), Step.END)
