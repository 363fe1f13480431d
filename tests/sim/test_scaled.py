"""A load that doubles and halves: as good as many workers all the time, with fewer, and without swinging."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tandem.scaling.scaler import Counts, Limits
from tandem.sim.presets import PRESETS
from tandem.sim.replay import Job
from tandem.sim.scaled import ScaledReplay, scaler_of, shaped, waves_of
from tandem.sim.trace import BLOCK_TOKENS

H100 = PRESETS["h100-llama-70b"]
PER_S = 2.0
POINTS = waves_of(1, hold_s=240.0, ramp_s=40.0)


def even(num: int, seed: int = 5, tokens: int = 10_000, answer: int = 300) -> list[Job]:
    """One request a second, of unequal lengths and nothing in common, in random order of arrival."""
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.uniform(0.0, num, num))
    jobs = []
    for number, at_s in enumerate(arrivals):
        long = int(tokens * rng.uniform(0.4, 1.6))
        keys = tuple(number.to_bytes(12, "big") + at.to_bytes(4, "big") for at in range(long // BLOCK_TOKENS))
        jobs.append(Job(float(at_s), long, max(1, int(answer * rng.uniform(0.3, 1.7))), keys, long))
    return jobs


def turns(counts: list[int]) -> int:
    steps = [later - sooner for sooner, later in pairwise(counts) if later != sooner]
    return sum((later > 0) != (sooner > 0) for sooner, later in pairwise(steps))


def test_a_shaped_load_comes_as_often_as_it_should() -> None:
    jobs = shaped(even(4000), PER_S, POINTS)
    arrivals = np.array([job.arrival_s for job in jobs])
    assert (np.diff(arrivals) >= 0).all()
    for begin, end, per_s in ((0, 240, 2.0), (280, 520, 4.0), (560, 800, 2.0)):
        came = ((arrivals >= begin) & (arrivals < end)).sum() / (end - begin)
        assert came == pytest.approx(per_s, rel=0.12)


def test_scaled_workers_keep_the_promise_of_many_with_fewer_and_do_not_swing() -> None:
    jobs = shaped(even(3000), PER_S, POINTS)
    scaled = ScaledReplay(H100, Counts(3, 2), jobs, scaler_of(Limits(), settle_s=90.0)).run_scaled()
    fixed = ScaledReplay(H100, scaled.most, jobs, None).run_scaled()
    assert np.isfinite(scaled.outcome.ttft_s).all()  # no request is lost when a worker leaves
    assert scaled.outcome.within.mean() >= fixed.outcome.within.mean() - 0.02
    assert scaled.worker_s <= 0.9 * fixed.worker_s
    assert scaled.num_left > 0
    for counts in ([c.wanted.prefill for c in scaled.changes], [c.wanted.decode for c in scaled.changes]):
        assert turns(counts) <= 2
    assert len(scaled.changes) <= 14


def test_a_load_that_changes_its_kind_moves_workers_between_the_roles() -> None:
    """Long prompts and short answers first, then the other way round, while there may be eight workers."""
    first = [job for job in even(700, tokens=16_000, answer=30) if job.arrival_s < 700]
    second = even(700, seed=6, tokens=1_500, answer=2_500)
    jobs = [Job(j.arrival_s / 2, j.num_tokens, j.answer_tokens, j.keys, j.uncached_tokens) for j in first]
    jobs += [
        Job(350 + j.arrival_s / 4, j.num_tokens, j.answer_tokens, tuple(b"2" + key[1:] for key in j.keys), j.num_tokens)
        for j in second
    ]
    limits = Limits(Counts(1, 1), Counts(8, 8), 8)
    found = ScaledReplay(H100, Counts(4, 4), jobs, scaler_of(limits, settle_s=90.0)).run_scaled()
    assert np.isfinite(found.outcome.tpot_s).all()
    assert found.num_moved > 0
    assert max(change.wanted.total for change in found.changes) <= 8
