"""A trace through the router in virtual time: what ends, when, and that nothing is left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from kvpool.keys import Key
from router.policy.base import Policy
from router.policy.seconds import PredictedSeconds
from tandem.sim.policies.registry import POLICIES
from tandem.sim.presets import PRESETS, Preset
from tandem.sim.replay import SLO, Job, Outcome, Replay
from tandem.sim.trace import BLOCK_TOKENS

H100 = PRESETS["h100-llama-70b"]
CRAMPED = dataclasses.replace(H100, device_blocks=60, host_blocks=90, disk_blocks=120)
"""So few blocks that streams wait for them and caches forget."""
WAYS = {
    "hold": (PredictedSeconds, True, True),
    "ordered": (PredictedSeconds, False, True),
    "fifo": (POLICIES["least-loaded"].make, False, False),
    "fifo with prefixes": (POLICIES["mooncake"].make, False, False),
}


def job(at_s: float, num_tokens: int, name: int = 0, answer: int = 20, shared: int = 0) -> Job:
    """`shared` leading blocks are everybody's, the others `name`'s."""
    keys = [b"everybody" + bytes([at] * 7) for at in range(shared)]
    keys += [name.to_bytes(12, "big") + at.to_bytes(4, "big") for at in range(shared, num_tokens // BLOCK_TOKENS)]
    return Job(at_s, num_tokens, answer, tuple(keys), num_tokens)


def crowd(num: int = 150, per_s: float = 12.0) -> list[Job]:
    """Conversations of which each turn is longer, after one system prompt."""
    rng = np.random.default_rng(5)
    jobs, at_s = [], 0.0
    for number in range(num):
        at_s += float(rng.exponential(1 / per_s))
        turn, name = divmod(number, 30)
        num_tokens = 700 + 1900 * turn + int(rng.integers(0, 3000))
        jobs.append(job(at_s, num_tokens, name, answer=int(rng.integers(1, 120)), shared=1))
    return jobs


def replay(jobs: Sequence[Job], way: str = "hold", preset: Preset = H100, workers: int = 8, **options: float) -> Replay:
    make, hold, ordered = WAYS[way]
    policy: Policy = make()
    return Replay(preset, workers, policy, jobs, hold=hold, ordered=ordered, **options)


def same(one: Outcome, other: Outcome) -> bool:
    pairs = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return all(
        np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs for mine, theirs in pairs
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_gives_the_same_outcome_and_another_does_not(way: str) -> None:
    jobs = crowd(60)
    once = replay(jobs, way, seed=3).run()
    assert same(once, replay(jobs, way, seed=3).run())
    assert not same(once, replay(jobs, way, seed=4).run())


@pytest.mark.parametrize("preset", [H100, CRAMPED], ids=["roomy", "cramped"])
@pytest.mark.parametrize("way", WAYS)
def test_every_request_ends_and_everything_is_given_back(way: str, preset: Preset) -> None:
    jobs = crowd()
    simulation = replay(jobs, way, preset)
    said: list[int] = []
    found = simulation.run(said.append)
    assert sum(said) == len(jobs)
    assert np.isfinite(found.ttft_s).all()
    assert (found.ttft_s > 0).all()
    assert (found.tpot_s >= 0).all()
    assert np.isfinite(found.tpot_s).all()
    assert np.isfinite(found.predicted_s).all() or way.startswith("fifo")
    assert found.seconds >= jobs[-1].arrival_s
    for decode in simulation._decodes.values():
        assert decode.free_blocks == decode.num_blocks
        assert (decode.num_streams, len(decode.waiting), len(decode.pending), len(decode.prompts)) == (0, 0, 0, 0)
    for prefill in simulation._prefills.values():
        assert prefill.running is None
        assert not prefill.line
    assert not len(simulation._admission)
    assert 0.0 < found.prefill_busy.max() <= 1.0
    assert 0.0 < found.decode_busy.max() <= 1.0
    assert 0.0 <= sum(found.hit_tokens.values()) < found.prompt_tokens == sum(job.num_tokens for job in jobs)


@pytest.mark.parametrize("way", WAYS)
def test_a_request_is_served_as_promised_if_its_first_token_and_the_others_are(way: str) -> None:
    jobs = crowd(per_s=25.0)
    found = replay(jobs, way).run()
    for number, one in enumerate(jobs):
        due_s = SLO.ttft_s + SLO.ttft_per_token_s * one.uncached_tokens
        assert found.within[number] == (found.ttft_s[number] <= due_s and found.tpot_s[number] <= SLO.tpot_s)


@pytest.mark.parametrize("way", ["hold", "ordered"])
def test_an_idle_cluster_does_what_was_predicted(way: str) -> None:
    """Prompts of one chunk and of many, with hits in place, to fetch, and none; nothing else goes on."""
    jobs = [job(1.0 + 30.0 * at, 500 + 1700 * at, name=at) for at in range(6)]
    jobs += [dataclasses.replace(one, arrival_s=one.arrival_s + 300.0) for one in jobs]
    found = replay(jobs, way, noise=0.0).run()
    np.testing.assert_allclose(found.predicted_s, found.ttft_s, rtol=0, atol=1e-3)
    assert (found.ttft_s[7:] < 0.5 * found.ttft_s[1:6]).all()  # and what was computed once is found
    assert found.within[:6].all()


def test_noise_errs_by_so_much() -> None:
    jobs = [job(1.0 + 30.0 * at, 8192, name=at) for at in range(60)]
    found = replay(jobs, noise=0.05).run()
    error = np.log((found.ttft_s - H100.overhead_s) / (found.predicted_s - H100.overhead_s))
    assert 0.03 < error.std() < 0.07


def two(way: str) -> tuple[Outcome, float]:
    """A prompt of seconds of computing and a short one just behind it, at the only prefill worker; what the short one takes
    alone."""
    one_prefill = dataclasses.replace(H100, prefill_part=0.5)
    jobs = [job(1.0, 60_000, 1), job(1.2, 2_000, 2)]
    make = POLICIES["least-loaded"].make
    alone = Replay(one_prefill, 2, make(), jobs[1:], hold=False, ordered=False, noise=0.0).run().ttft_s[0]
    ordered, hold = way != "fifo", way == "hold"
    return Replay(one_prefill, 2, make(), jobs, hold=hold, ordered=ordered, noise=0.0).run(), float(alone)


@pytest.mark.parametrize("way", ["hold", "ordered"])
def test_an_urgent_short_prompt_goes_before_a_long_one_from_its_next_chunk_on(way: str) -> None:
    found, alone_s = two(way)
    chunk_s = H100.prefill_step_tokens * H100.prices.token_s
    assert alone_s < found.ttft_s[1] <= alone_s + chunk_s + 1e-9
    alone_long_s = found.ttft_s[0] - (alone_s - H100.overhead_s)
    assert alone_long_s > 30 * alone_s  # and the long one is kept no longer than that takes
    assert found.within.all()


def test_a_short_prompt_waits_for_a_long_one_when_they_are_computed_as_they_come() -> None:
    found, alone_s = two("fifo")
    assert found.ttft_s[1] == pytest.approx(found.ttft_s[0] - 0.2 + alone_s - H100.overhead_s, abs=1e-6)
    assert list(found.within) == [True, False]


@pytest.mark.parametrize("preset", [H100, CRAMPED], ids=["roomy", "cramped"])
@pytest.mark.parametrize("way", WAYS)
def test_the_index_knows_what_the_caches_hold_at_the_end(way: str, preset: Preset) -> None:
    jobs = crowd(80)
    simulation = replay(jobs, way, preset)
    simulation.run()
    index = simulation._index
    names = simulation._fleet.names
    workers = {**simulation._prefills, **simulation._decodes}
    places = {number: [worker.cache] for number, worker in workers.items()}
    places |= {number: [pool.host, pool.disk] for number, pool in simulation._pools.items()}
    assert index.sound()
    assert index.num_rejected == 0
    for number, caches in places.items():
        assert index.num_blocks_of(names[number]) == sum(len(cache) for cache in caches)
    for one in jobs:
        hits = index.longest(one.keys)
        for number, caches in places.items():
            assert int(hits.counts[number].sum()) == leading(one.keys, *caches)
    if preset is CRAMPED:
        asked = {key for one in jobs for key in one.keys}
        assert any(not any(key in cache for caches in places.values() for cache in caches) for key in asked)


def leading(keys: Sequence[Key], *caches: object) -> int:
    return next((at for at, key in enumerate(keys) if not any(key in cache for cache in caches)), len(keys))


def test_a_prompt_that_was_computed_elsewhere_is_fetched_not_computed_again() -> None:
    jobs = [job(1.0, 20_000, 1), job(30.0, 20_000, 1)]
    turns = POLICIES["round-robin"].make()
    alone = Replay(H100, 8, turns, jobs, hold=False, ordered=False, noise=0.0).run()
    assert alone.moved_bytes["fetch"] == 39 * H100.block_bytes
    assert sum(alone.hit_tokens.values()) == 39 * BLOCK_TOKENS
    assert alone.hit_tokens["DEVICE"] == 0
    assert alone.ttft_s[1] < 0.2 * alone.ttft_s[0]
    assert alone.moved_bytes["hand-over"] == 2 * 40 * H100.block_bytes


def test_streams_that_end_with_what_brought_them_are_counted() -> None:
    jobs = [Job(0.0, 1000, 1, (number.to_bytes(16, "big"),), 1000) for number in (1, 3, 5, 7, 10)]
    found = Replay(H100, 8, POLICIES["round-robin"].make(), jobs, hold=False, ordered=False, noise=0.0).run()
    assert np.isfinite(found.tpot_s).all()


def test_hits_are_what_was_not_computed() -> None:
    """However often a prefix was fetched and found."""
    jobs = [Job(0.01 * number, 1024, 2, (bytes(16), b"1" * 16), 1) for number in range(6)]
    found = Replay(H100, 8, POLICIES["round-robin"].make(), jobs, hold=False, ordered=False, noise=0.0).run()
    assert sum(found.hit_tokens.values()) <= 5 * 1024
