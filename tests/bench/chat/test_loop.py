"""The open loop under a clock of the test: arrivals wait for nobody, later turns for their answers, and what counts is exact."""

from __future__ import annotations

import heapq
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.bench.chat.loop import TPOT_S, TTFT_S, Answer, OpenLoop, Seen, Trial, Turn, Window
from tandem.bench.chat.workload import Script

ANSWER = (91, 92, 93)


def script(arrival: float, *, turns: int = 2, think_s: float = 1.0) -> Script:
    return Script(arrival, tuple((int(arrival * 10), number) for number in range(turns)), (think_s,) * turns)


def answer(turn: Turn, *, ttft_s: float = 0.1, tpot_s: float = 0.02) -> Answer:
    first_s = turn.due_s + ttft_s
    return Answer(ANSWER, (first_s, first_s + tpot_s, first_s + 2 * tpot_s), 1)


def test_conversations_come_at_their_times_though_nothing_is_answered() -> None:
    loop = OpenLoop([script(1), script(2), script(4)], 2.0, 4.0, Window(0, 10))
    assert loop.next_s == 0.5
    assert loop.due(0.4) == []
    assert [turn.due_s for turn in loop.due(1.1)] == [0.5, 1.0]
    assert [turn.conversation for turn in loop.due(50)] == [2]
    assert loop.due(99) == []
    assert not loop.finished


def test_a_rate_is_turns_a_second() -> None:
    scripts = [script(float(number), turns=4) for number in range(1, 101)]
    loop = OpenLoop(scripts, 4.0, 8.0, Window(0, 1000))
    arrivals = loop.due(1000)
    assert 4 * len(arrivals) / arrivals[-1].due_s == pytest.approx(8.0)


def test_the_next_turn_is_due_a_think_time_after_the_last_token_and_has_the_whole_history() -> None:
    loop = OpenLoop([script(1, think_s=0.7)], 2.0, 2.0, Window(0, 100))
    (first,) = loop.due(5)
    assert first.prompt == (10, 0)
    loop.answered(first, answer(first))
    assert loop.next_s == pytest.approx(first.due_s + 0.1 + 0.04 + 0.7)
    (second,) = loop.due(9)
    assert second.prompt == (10, 0, *ANSWER, 10, 1)
    assert second.number == 1
    loop.answered(second, answer(second))
    assert loop.finished


def test_latency_counts_from_when_a_turn_was_due() -> None:
    loop = OpenLoop([script(1, turns=1)], 1.0, 1.0, Window(0, 10))
    (turn,) = loop.due(3.0)  # two seconds late, which is nobody's fault but the client's: it counts all the same
    loop.answered(turn, Answer(ANSWER, (3.1, 3.2, 3.4), 2))
    (seen,) = loop.trial().seen
    assert seen.ttft_s == pytest.approx(2.1)
    assert seen.tpot_s == pytest.approx(0.15)
    assert (seen.num_prompt_tokens, seen.num_cached_tokens) == (2, 2)


def test_turns_of_the_warm_up_do_not_count_and_none_is_sent_after_the_end() -> None:
    loop = OpenLoop([script(1), script(4), script(5), script(12)], 2.0, 2.0, Window(4.0, 6.0))
    sent = []
    while not loop.finished:
        due_s = loop.next_s
        assert due_s is not None
        for turn in loop.due(due_s):
            sent.append((turn.conversation, turn.number))
            loop.answered(turn, answer(turn, ttft_s=0.2 if turn.conversation else 2.5))
    # The first conversation's second turn would be due at 4.54, the others' at 5.24 and 6.24; the last comes after the end.
    assert sent == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1)]
    trial = loop.trial()
    assert len(trial.seen) == 4
    assert trial.seconds == 2.0


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "within"),
    [(TTFT_S, TPOT_S, True), (TTFT_S + 0.001, 0.01, False), (0.01, TPOT_S + 0.001, False), (0.01, 0.01, True)],
)
def test_a_turn_is_within_if_both_its_times_are(ttft_s: float, tpot_s: float, within: bool) -> None:
    assert Seen(ttft_s, tpot_s, 10, 0).within is within
    assert not Seen(ttft_s, tpot_s, 10, 0, error="gone").within


def test_a_rate_holds_with_nine_of_ten() -> None:
    good, bad, gone = Seen(0.1, 0.01, 1, 0), Seen(9.0, 0.01, 1, 0), Seen(0, 0, 1, 0, error="gone")
    assert Trial(1, 10, (good,) * 9 + (bad,)).holds
    assert Trial(1, 10, (good,) * 9 + (gone,)).holds
    assert not Trial(1, 10, (good,) * 8 + (bad, gone)).holds
    assert not Trial(1, 10, (good,) * 10, given_up=True).holds
    assert not Trial(1, 10, ()).holds


def test_a_failed_turn_is_a_miss_and_ends_its_conversation() -> None:
    loop = OpenLoop([script(1)], 2.0, 2.0, Window(0, 10))
    (turn,) = loop.due(5)
    loop.failed(turn, "Overloaded: no room")
    assert loop.finished
    assert loop.trial().errors == ["Overloaded: no room"]
    assert loop.trial().share == 0


def test_a_trial_is_hopeless_once_no_rest_of_it_could_make_it_hold() -> None:
    scripts = [script(float(number), turns=1) for number in range(1, 101)]
    loop = OpenLoop(scripts, 1.0, 1.0, Window(0, 100))
    for number, turn in enumerate(loop.due(100)):
        assert loop.hopeless is (number >= 15)
        loop.answered(turn, answer(turn, ttft_s=5.0))


@given(
    gaps=st.lists(st.floats(0.01, 3.0), min_size=1, max_size=20),
    delays_s=st.lists(st.floats(0.02, 5.0), min_size=1, max_size=7),
    rate=st.floats(0.5, 20.0),
)
def test_every_turn_that_is_due_in_time_is_sent_once_and_seen_once(
    gaps: list[float], delays_s: list[float], rate: float
) -> None:
    arrivals = list(itertools.accumulate(gaps))
    loop = OpenLoop([script(arrival, turns=3) for arrival in arrivals], 3.0, rate, Window(2.0, 12.0))
    answers: list[tuple[float, Turn, Answer]] = []
    delays = itertools.cycle(delays_s)
    sent: list[Turn] = []
    while not loop.finished:
        next_s = loop.next_s
        if answers and (next_s is None or answers[0][0] <= next_s):
            _, turn, given_ = heapq.heappop(answers)
            loop.answered(turn, given_)
            continue
        assert next_s is not None
        for turn in loop.due(next_s):
            sent.append(turn)
            given_ = answer(turn, ttft_s=next(delays))
            heapq.heappush(answers, (given_.times_s[-1], turn, given_))
    assert len({(turn.conversation, turn.number) for turn in sent}) == len(sent)
    assert [turn.due_s for turn in sent] == sorted(turn.due_s for turn in sent)
    assert all(turn.due_s < 12.0 for turn in sent)
    assert len(loop.trial().seen) == sum(turn.due_s >= 2.0 for turn in sent)
    assert {turn.conversation for turn in sent} == {
        number for number, arrival in enumerate(arrivals) if arrival * 3.0 / rate < 12.0
    }
