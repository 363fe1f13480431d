"""The native weighing of workers is the numpy one, for any fleet and any request."""

from __future__ import annotations

import random

import numpy as np
import pytest

from protos.control import Capacity, Fence, Link, Load, StepPrices
from router.fleet import Fleet, Work
from router.policy import sources as sources_module
from router.policy import weigh as module
from router.policy.base import Ask
from router.policy.sources import sources, sources_ref
from router.policy.weigh import Terms, weigh, weigh_ref
from router.prefix_index import Hits


def world(seed: int) -> tuple[Fleet, Hits, Ask, np.ndarray, int]:
    """Anything that may come: busy and idle workers, hits anywhere, unreachable holders, pool nodes on some machines."""
    rng = random.Random(seed)
    fleet = Fleet()
    num = rng.choice([1, 2, 5, 20, 70])
    roles = ["decode", *(rng.choice(["prefill", "decode", "pool"]) for _ in range(num))]
    names = [f"{role}-{i}" for i, role in enumerate(roles)]
    for i, role in enumerate(roles):
        capacity = Capacity(num_blocks=rng.choice([0, 500]), max_running=rng.choice([0, 4]), max_step_tokens=256)
        group = "other" if rng.random() < 0.1 and i else "g"
        fleet.join(names[i], role, f"m{i % 5}", capacity, group, 0.0)  # type: ignore[arg-type]
        prices = StepPrices(rng.random() * 0.01, rng.random() * 1e-3, rng.random() * 1e-7, rng.random() * 1e-3, 1e-7)
        load = Load(
            waiting_tokens=rng.choice([0, 1000]),
            num_generating=rng.choice([0, 3, 30]),
            context_tokens=rng.randrange(20_000),
            free_blocks=rng.choice([0, 50, 5000]),
            fetch_bytes_per_s=rng.choice([0.0, 1e9]),
            disk_bytes_per_s=rng.choice([0.0, 5e8]),
            prices=prices if rng.random() < 0.8 else StepPrices(),
        )
        links = [Link(rng.choice(names), "tcp", 1, 1e8 * (1 + rng.random())) for _ in range(rng.randrange(4))]
        fleet.reported(names[i], load, links, 0.0, 0.0)
    for number in range(rng.randrange(40)):
        at = rng.randrange(len(roles))
        if roles[at] != "pool":
            work = Work(rng.randrange(1, 2000), due_s=rng.random() * 9, source=rng.randrange(len(roles)), num_bytes=1e7)
            fleet.dispatched(at, Fence(str(number), 0, "decode", 0), work, rng.random())
    fleet.serve("g")
    counts = np.zeros((rng.choice([fleet.table.shape[1], len(roles)]), 3), dtype=np.int32)
    holders = rng.sample(range(len(roles)), rng.randrange(0, len(roles) + 1))
    for holder in holders:
        counts[holder] = [rng.randrange(1, 60), rng.randrange(0, 2) * 10, rng.randrange(0, 2) * 20]
    samples = rng.choice([1, 3])
    ask = Ask(
        rng.randrange(1, 4000), 16, 300_000, answer_tokens=100.0 * samples, num_samples=samples, due_s=rng.random() * 10,
        tpot_s=rng.choice([0.0, 0.02]),
    )  # fmt: skip
    return fleet, Hits(counts, holders, int(counts.sum(axis=1).max())), ask, fleet.workers, len(fleet.prefills)


@pytest.mark.parametrize("seed", range(300))
def test_native_and_numpy_find_the_same(seed: int) -> None:
    assert module._WEIGH is not None, "the native part was not built"
    fleet, hits, ask, workers, num = world(seed)
    rng = random.Random(seed)
    terms = Terms() if seed % 3 else Terms(**{rng.choice(["queue", "fetch", "others", "stream", "tpot", "room"]): 0.0})
    drawn = (rng.random(), rng.random())
    ours = weigh(ask, hits, fleet, workers, num, 1.5, terms, drawn)
    plain = weigh_ref(ask, hits, fleet, workers, num, 1.5, terms, drawn)
    np.testing.assert_allclose(ours.parts, plain.parts, rtol=1e-9, atol=1e-12)
    assert ours.here_s == pytest.approx(plain.here_s, rel=1e-9)
    assert ours.pair_s == pytest.approx(plain.pair_s, rel=1e-9)
    assert (ours.here, ours.prefill, ours.decode) == (plain.here, plain.prefill, plain.decode)


def test_arrays_that_are_too_short_are_refused() -> None:
    fleet, hits, ask, workers, num = world(4)
    fleet.rates = fleet.rates[:1]
    with pytest.raises(ValueError, match="bytes, must have"):
        weigh(ask, hits, fleet, workers, num, 0.0, Terms(), (0.0, 0.0))
    fleet, hits, ask, _, _ = world(4)
    with pytest.raises(ValueError, match="must be below"):
        weigh(ask, hits, fleet, np.array([99_999]), 0, 0.0, Terms(), (0.0, 0.0))
    with pytest.raises(ValueError, match="1 prefill workers of 1"):
        weigh(ask, hits, fleet, np.array([0]), 1, 0.0, Terms(), (0.0, 0.0))


@pytest.mark.parametrize("seed", range(300))
def test_sources_are_the_same_natively_and_in_numpy(seed: int) -> None:
    assert sources_module._SOURCES is not None, "the native part was not built"
    fleet, hits, _, workers, _ = world(seed)
    rng = random.Random(seed)
    hits.counts[:] = np.minimum(hits.counts, rng.choice([1, 3, 60]))  # many that hold as much
    hits = Hits(hits.counts, hits.holders, int(hits.counts.sum(axis=1).max()))
    but = tuple(rng.sample(workers.tolist(), min(2, len(workers))))
    for more_than in {0, 1, 3, hits.longest - 1, hits.longest, rng.randrange(60)}:
        assert sources(hits, fleet, more_than, but) == sources_ref(hits, fleet, more_than, but)


def test_holders_without_a_row_are_refused() -> None:
    fleet, hits, *_ = world(4)
    for number in (-1, 99_999):
        with pytest.raises(ValueError, match="holder .*, must be below"):
            sources(Hits(hits.counts, [number], 5), fleet, 0, ())
