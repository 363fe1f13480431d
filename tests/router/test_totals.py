"""Totals of processes never go back: not by a restart, not by an incarnation that goes on, not by a router that comes later."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.totals import KEEP_S, Totals

KEY = ("tokens", "")


def shown(totals: Totals) -> dict[str, int]:
    return {process: counts.get(("tokens", ""), 0) for process, _, counts in totals}


def test_what_was_counted_before_the_router_came_is_not_its_to_show() -> None:
    totals = Totals()
    totals.take("d0", "decode", b"1", (), {KEY: 1000}, 0.0)
    assert shown(totals) == {"d0": 0}
    totals.take("d0", "decode", b"1", (), {KEY: 1007}, 1.0)
    assert shown(totals) == {"d0": 7}


def test_a_restarted_process_counts_on_from_where_it_died() -> None:
    totals = Totals()
    for epoch, count in ((b"1", 0), (b"1", 40), (b"2", 50), (b"3", 3)):
        totals.take("d0", "decode", epoch, (), {KEY: count}, 0.0)
    assert shown(totals) == {"d0": 40 + 50 + 3}


def test_an_incarnation_that_came_after_another_in_one_process_is_not_counted_twice() -> None:
    totals = Totals()
    totals.take("d0", "decode", b"1", (), {KEY: 0, ("bytes", "shm", "p0"): 0}, 0.0)
    totals.take("d0", "decode", b"1", (), {KEY: 40, ("bytes", "shm", "p0"): 900}, 1.0)
    # Its engine counts on, its links begin anew.
    totals.take("d0", "decode", b"2", (b"1",), {KEY: 45, ("bytes", "shm", "p0"): 100}, 2.0)
    ((_, _, counts),) = totals
    assert counts == {("tokens", ""): 45, ("bytes", "shm"): 1000}


def test_a_total_of_several_counts_does_not_fall_when_one_of_them_is_forgotten() -> None:
    totals = Totals()
    totals.take("d0", "decode", b"1", (), {}, 0.0)
    totals.take("d0", "decode", b"1", (), {("bytes", "shm", "p0"): 10, ("bytes", "shm", "p1"): 5}, 1.0)
    totals.take("d0", "decode", b"1", (), {("bytes", "shm", "p1"): 6}, 2.0)
    ((_, _, counts),) = totals
    assert counts == {("bytes", "shm"): 16}


def test_a_process_that_is_gone_is_shown_for_a_while() -> None:
    totals = Totals()
    totals.take("d0", "decode", b"1", (), {KEY: 1}, 0.0)
    totals.forget_silent(KEEP_S)
    assert shown(totals) == {"d0": 0}
    totals.forget_silent(KEEP_S + 1.0)
    assert shown(totals) == {}


reports = st.lists(st.tuples(st.sampled_from([b"1", b"2", b"3"]), st.integers(0, 50), st.booleans()), max_size=30)


@given(reports)
def test_whatever_is_reported_no_total_goes_back(said: list[tuple[bytes, int, bool]]) -> None:
    totals, before = Totals(), 0
    for epoch, count, same_process in said:
        totals.take("d0", "decode", epoch, (b"1", b"2", b"3") if same_process else (), {KEY: count}, 0.0)
        assert shown(totals)["d0"] >= before
        before = shown(totals)["d0"]
