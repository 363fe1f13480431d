"""The transport of a pair follows from what it reaches and how fast it is; who fails is left alone, longer each time."""

from __future__ import annotations

from kvpool.links import FIRST_QUARANTINE_S, LONGEST_QUARANTINE_S, MAX_REMEMBERED, TRIAL_BYTES, Links

P = ("p", b"epoch-01")


def test_shared_memory_is_taken_wherever_it_reaches() -> None:
    links = Links()
    links.moved("p", "tcp", 10 * TRIAL_BYTES, 0.001)
    assert links.choose("p", ["tcp", "shm", "ucx"]) == "shm"


def test_over_a_network_each_is_tried_and_then_the_fastest_taken() -> None:
    links = Links()
    assert links.choose("p", ["ucx", "tcp"]) == "ucx"
    links.moved("p", "ucx", TRIAL_BYTES, 1.0)
    assert links.choose("p", ["ucx", "tcp"]) == "tcp"
    links.moved("p", "tcp", TRIAL_BYTES, 0.5)
    assert links.choose("p", ["ucx", "tcp"]) == "tcp"
    assert links.choose("q", ["ucx", "tcp"]) == "ucx", "another pair is another measurement"
    for _ in range(20):
        links.moved("p", "tcp", TRIAL_BYTES, 4.0)
    assert links.choose("p", ["ucx", "tcp"]) == "ucx", "it is the speed of now that counts"


def test_one_that_does_not_reach_is_no_choice() -> None:
    links = Links()
    assert links.choose("p", ["tcp"]) == "tcp"
    assert links.choose("p", []) is None


def test_speeds_are_reported_by_pair_and_transport() -> None:
    links = Links()
    links.moved("p", "tcp", 1000, 0.5)
    links.moved("p", "tcp", 1000, 0.5)
    links.moved("q", "shm", 10, 0.0)
    assert [(link.process, link.transport, link.num_bytes) for link in links.report()] == [
        ("p", "tcp", 2000),
        ("q", "shm", 10),
    ]
    assert abs(links.report()[0].bytes_per_s - 2000) < 1


def test_who_fails_is_left_alone_for_longer_each_time_until_it_works() -> None:
    links = Links()
    assert not links.is_quarantined(P, 0.0)
    pauses = [links.failed(P, 0.0) for _ in range(8)]
    assert pauses[:3] == [FIRST_QUARANTINE_S, 2 * FIRST_QUARANTINE_S, 4 * FIRST_QUARANTINE_S]
    assert pauses[-1] == LONGEST_QUARANTINE_S
    assert links.is_quarantined(P, LONGEST_QUARANTINE_S - 0.1)
    assert not links.is_quarantined(("p", b"epoch-02"), 0.0), "a new incarnation begins anew"
    assert not links.is_quarantined(P, LONGEST_QUARANTINE_S)
    links.worked(P)
    assert links.failed(P, 0.0) == FIRST_QUARANTINE_S


def test_what_is_remembered_is_bounded() -> None:
    links = Links()
    for i in range(MAX_REMEMBERED + 10):
        links.moved(f"p{i}", "tcp", 1, 1.0)
        links.failed((f"p{i}", b"epoch-01"), 0.0)
    assert len(links.report()) == MAX_REMEMBERED
    assert len(links._failures) == MAX_REMEMBERED
