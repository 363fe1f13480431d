"""Reads begin in the order of need, and no peer takes more than its share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvpool.read_queue import ReadQueue

MB = 1024 * 1024


def test_what_is_needed_first_begins_first_whoever_it_comes_from() -> None:
    queue = ReadQueue(max_in_flight_bytes=10)
    for read_id, (peer, order) in enumerate([("p", 7), ("q", 3), ("p", 1), ("q", 9), ("p", 1)]):
        queue.add(read_id, peer, order, 2)
    assert queue.start(0.0) == [2, 4, 1, 0, 3]


def test_a_peer_has_a_bounded_amount_in_flight_and_the_others_go_on() -> None:
    queue = ReadQueue(max_in_flight_bytes=10)
    for read_id in range(4):
        queue.add(read_id, "p", 0, 4)
    queue.add(4, "q", 5, 4)
    assert queue.start(0.0) == [0, 1, 4]
    assert queue.start(0.0) == []
    assert queue.next_start_s() is None, "only the end of a read helps"
    queue.add(5, "p", -1, 4)
    queue.end(0)
    assert queue.start(0.0) == [5], "who came later and is needed sooner goes first"


def test_a_read_larger_than_the_bound_goes_alone() -> None:
    queue = ReadQueue(max_in_flight_bytes=10)
    queue.add(1, "p", 0, 100)
    queue.add(2, "p", 1, 1)
    assert queue.start(0.0) == [1]
    queue.end(1)
    assert queue.start(0.0) == [2]


def test_a_read_that_was_taken_out_never_begins() -> None:
    queue = ReadQueue()
    queue.add(1, "p", 0, 1)
    queue.add(2, "p", 1, 1)
    assert queue.remove(1)
    assert not queue.remove(1)
    assert queue.start(0.0) == [2]
    assert not queue.remove(2), "it has begun"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.floats(0.01, 3.0))
def test_a_budget_holds_over_any_stretch_of_time(sizes: list[int], step_s: float) -> None:
    queue = ReadQueue(bytes_per_s=10.0, max_in_flight_bytes=1000)
    for read_id, size in enumerate(sizes):
        queue.add(read_id, "p", 0, size)
    now, begun = 0.0, 0
    while begun < len(sizes):
        started = queue.start(now)
        assert sum(sizes[: begun + len(started)]) <= 10.0 * now + max(sizes) + 1e-6
        begun += len(started)
        for read_id in started:
            queue.end(read_id)
        if begun < len(sizes):
            due = queue.next_start_s()
            assert due is not None
            assert due <= now + max(sizes) / 10.0 + 1e-6, "it is not slower than its budget either"
            now = max(now + step_s, due) if step_s < 1 else due
