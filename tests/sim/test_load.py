"""What comes to a simulated cluster: how often, in what order, and what of it is new."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.keys import Key
from tandem.sim.load import jobs_of
from tandem.sim.replay import Job
from tandem.sim.trace import BLOCK_TOKENS, TraceRequest


def request(at_s: float, blocks: Sequence[int], answer: int = 10, part: int = 0) -> TraceRequest:
    """Full blocks, and `part` tokens of one more."""
    ids = [*blocks, 9_000_000 + int(at_s * 1000)] if part else [*blocks]
    return TraceRequest(at_s * 1000, len(blocks) * BLOCK_TOKENS + part, answer, ids)


def turns(num: int = 80, pace_s: float = 3.0) -> list[TraceRequest]:
    """Conversations of four turns with a system prompt that all have, one request every `pace_s`."""
    found = []
    for at in range(num):
        which, turn = at % 5 + 5 * (at // 20), at % 20 // 5
        found.append(
            request(at * pace_s, [0, *(1000 * (which + 1) + block for block in range(turn + 1))], answer=at + 1)
        )
    return found


def gaps(jobs: Sequence[Job], first: Key) -> list[float]:
    arrivals = [job.arrival_s for job in jobs if len(job.keys) > 1 and job.keys[1] == first]
    return [later - sooner for sooner, later in pairwise(arrivals)]


@pytest.mark.parametrize("per_s", [0.25, 4.0, 100.0])
@pytest.mark.parametrize("copies", [1, 4])
def test_as_many_come_a_second_as_is_asked_for(per_s: float, copies: int) -> None:
    jobs = jobs_of(turns(), per_s, copies)
    assert len(jobs) == 80 * copies
    arrivals = [job.arrival_s for job in jobs]
    assert arrivals == sorted(arrivals)
    took_s = arrivals[-1] - arrivals[0]
    assert len(jobs) / took_s == pytest.approx(per_s, rel=0.1)


def test_copies_share_what_is_everybodys_and_nothing_else() -> None:
    jobs = jobs_of(turns(), 10.0, copies=3)
    owners: dict[Key, set[Key]] = {}
    assert len({job.keys[0] for job in jobs}) == 1
    for job in jobs:
        for key in job.keys[1:]:
            owners.setdefault(key, set()).add(job.keys[1])
    assert all(len(owner) == 1 for owner in owners.values())
    assert len({job.keys[1] for job in jobs}) == 3 * 20  # twenty conversations of each copy
    assert {key for job in jobs_of(turns(), 10.0, copies=1) for key in job.keys} < set(owners) | {jobs[0].keys[0]}


@pytest.mark.parametrize("most", [1, 57, 240, 1000])
def test_the_first_of_a_load_are_those_of_all_of_it(most: int) -> None:
    assert jobs_of(turns(), 10.0, 3, 1, most) == jobs_of(turns(), 10.0, 3)[:most]


def test_a_block_that_fewer_than_a_tenth_have_is_not_everybodys() -> None:
    requests = [request(at, [1 if at < 2 else 100 + at]) for at in range(21)]
    assert len({job.keys[0] for job in jobs_of(requests, 1.0, copies=2)}) == 2 * 20
    requests = requests[:20]
    assert len({job.keys[0] for job in jobs_of(requests, 1.0, copies=2)}) == 2 * 19 - 1


def test_copies_begin_at_different_points_and_keep_the_pace_of_one_alone_at_its_rate() -> None:
    alone = jobs_of(turns(), 5.0, copies=1)
    beside = jobs_of(turns(), 20.0, copies=4)
    assert beside[-1].arrival_s == pytest.approx(alone[-1].arrival_s, rel=0.05)
    firsts = {job.keys[1] for job in beside}
    begins = sorted(next(job.arrival_s for job in beside if job.keys[1] == first) for first in firsts)
    assert len(set(begins)) == len(begins)
    within = [gap for first in firsts for gap in gaps(beside, first)]
    # A conversation's turns come every 5 requests of its copy, but for one in which the trace begins anew.
    one_s = 5 / 5.0
    kept = [gap for gap in within if 0.7 * one_s < gap < 1.3 * one_s]
    assert len(kept) >= 0.8 * len(within)


def test_the_same_seed_gives_the_same_jobs_and_another_begins_copies_elsewhere() -> None:
    assert jobs_of(turns(), 5.0, 2, seed=4) == jobs_of(turns(), 5.0, 2, seed=4)
    assert jobs_of(turns(), 5.0, 2, seed=4) != jobs_of(turns(), 5.0, 2, seed=5)


def test_those_of_one_rounded_time_are_spread_over_the_time_to_the_next_in_their_order() -> None:
    requests = [request(3.0 * (at // 10), [at], answer=at + 1) for at in range(40)] + [request(12.0, [40], answer=41)]
    jobs = [job for job in jobs_of(requests, 41 / 12.0) if job.answer_tokens < 41]
    assert [job.answer_tokens for job in jobs] == list(range(1, 41))
    assert len({job.arrival_s for job in jobs}) == 40
    for at in range(4):
        spread = [job.arrival_s for job in jobs[10 * at : 10 * at + 10]]
        assert 3.0 * at <= spread[0] < spread[-1] < 3.0 * (at + 1)
        assert spread[-1] - spread[0] > 1.0


def test_what_is_uncached_is_what_no_request_before_had() -> None:
    requests = [
        request(0.0, [1, 2]),
        request(10.0, [1, 2, 3], part=100),
        request(20.0, [1, 9, 3]),  # a block after another one is another block in a trace; what follows a gap is no hit
        request(30.0, [1, 2, 3]),
        request(40.0, [], part=30),
    ]
    jobs = jobs_of([*requests, request(50.0, [7], answer=99)], 0.12)
    uncached = [(len(job.keys), job.uncached_tokens) for job in jobs if job.answer_tokens != 99]
    hits = [(2, 2 * BLOCK_TOKENS), (3, BLOCK_TOKENS + 100), (3, 2 * BLOCK_TOKENS), (3, 1), (0, 30)]
    assert uncached == hits


def test_an_answer_has_at_least_one_token() -> None:
    jobs = jobs_of([request(0.0, [1], answer=0), request(1.0, [2], answer=5)], 1.0)
    assert sorted(job.answer_tokens for job in jobs) == [1, 5]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4), st.integers(1, 4)), min_size=2, max_size=20),
    st.integers(1, 3),
)
def test_uncached_tokens_are_those_of_an_endless_cache(raw: list[tuple[int, int, int]], copies: int) -> None:
    requests = [request(float(at), [100 * which + block for block in range(num)]) for at, which, num in sorted(raw)]
    seen: set[Key] = set()
    for job in jobs_of(requests, 2.0, copies):
        hit = 0
        while hit < len(job.keys) and job.keys[hit] in seen:
            hit += 1
        seen.update(job.keys)
        assert job.uncached_tokens == max(1, job.num_tokens - hit * BLOCK_TOKENS)


def test_those_of_the_last_time_come_last() -> None:
    last = [TraceRequest(6000, 1024, 3, [2, 3]), TraceRequest(6000, 1024, 4, [1, 5])]
    jobs = jobs_of([TraceRequest(0, 512, 1, [1]), TraceRequest(3000, 512, 2, [2]), *last], 1.0)
    assert [job.answer_tokens for job in jobs][:2] == [1, 2]
