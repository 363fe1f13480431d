"""A trial under the wall clock: every turn is asked once, later ones with what was answered, and the end is the end of all."""

from __future__ import annotations

import threading

import pytest

from tandem.bench.chat.drive import drive
from tandem.bench.chat.loop import Answer, OpenLoop, Window
from tandem.bench.chat.workload import Script
from tandem.clock import now_s
from tandem.errors import Cancelled, Overloaded, TandemError


class FakeSession:
    """Answers at once with 7s and 8s, or refuses, or waits until it is cancelled."""

    def __init__(self, *, behaves: str = "answers") -> None:
        self.behaves = behaves
        self.asked: list[tuple[int, ...]] = []
        self.cancelled = threading.Event()

    def ask(self, prompt: tuple[int, ...], num_tokens: int) -> Answer:
        self.asked.append(prompt)
        if self.behaves == "refuses":
            raise Overloaded("no room")
        if self.behaves == "breaks":
            raise KeyError("surprise")
        if self.behaves == "hangs":
            assert self.cancelled.wait(30)
            raise TandemError("cancelled")
        began_s = now_s()
        late_s = 1.0 if self.behaves == "is slow" else 0.0
        times_s = tuple(began_s + late_s + 0.001 * number for number in range(num_tokens))
        return Answer((7,) * (num_tokens - 1) + (8,), times_s, len(prompt) // 2)

    def cancel(self) -> None:
        self.cancelled.set()


def loop(*, count: int = 5, end_s: float = 0.4) -> OpenLoop:
    """Conversations of two turns, 50 ms apart, who think for 20 ms."""
    scripts = [Script(float(number), ((number,), (number, 2)), (0.0, 0.02)) for number in range(1, count + 1)]
    return OpenLoop(scripts, 2.0, 40.0, Window(0.0, end_s))


def no_turn_runs() -> bool:
    return not any(thread.name == "turn" for thread in threading.enumerate())


def test_a_trial_asks_every_turn_once_and_keeps_their_times() -> None:
    session = FakeSession()
    trial = drive(session, loop(), 4, threading.Event())
    expected = [(number,) for number in range(1, 6)] + [(number, 7, 7, 7, 8, number, 2) for number in range(1, 6)]
    assert sorted(session.asked) == sorted(expected)
    assert len(trial.seen) == 10
    assert not trial.errors
    assert not trial.given_up
    for seen in trial.seen:
        assert 0 <= seen.ttft_s < 5
        assert seen.tpot_s == pytest.approx(0.001)
    assert sum(seen.num_cached_tokens for seen in trial.seen) == 5 * (0 + 3)
    assert no_turn_runs()


@pytest.mark.parametrize(("behaves", "error"), [("refuses", "Overloaded: no room"), ("breaks", "KeyError: 'surprise'")])
def test_a_refused_turn_is_an_error_and_the_others_go_on(behaves: str, error: str) -> None:
    trial = drive(FakeSession(behaves=behaves), loop(), 4, threading.Event(), patient=True)
    assert trial.errors == [error] * 5
    assert trial.share == 0


def test_a_rate_that_can_not_hold_any_more_is_given_up_unless_it_is_to_be_seen() -> None:
    quick = drive(FakeSession(behaves="is slow"), loop(count=200, end_s=6.0), 4, threading.Event())
    assert quick.given_up
    assert not quick.holds
    assert 36 <= len(quick.seen) < 100
    patient = drive(FakeSession(behaves="is slow"), loop(count=12, end_s=0.5), 4, threading.Event(), patient=True)
    assert not patient.given_up
    assert len(patient.seen) == 9


def test_answers_that_do_not_come_are_missed_in_time() -> None:
    session = FakeSession(behaves="hangs")
    began_s = now_s()
    trial = drive(session, loop(), 4, threading.Event(), patient=True, tail_s=0.2)
    assert 0.45 <= now_s() - began_s < 10
    assert trial.errors == ["TandemError: cancelled"] * 5
    assert no_turn_runs()


def test_a_load_ends_at_once_when_it_is_stopped() -> None:
    session, stop = FakeSession(behaves="hangs"), threading.Event()
    timer = threading.Timer(0.15, stop.set)
    timer.start()
    with pytest.raises(Cancelled):
        drive(session, loop(end_s=500.0), 4, stop)
    assert session.cancelled.is_set()
    assert no_turn_runs()
    timer.join()
