"""The native sampler: the same tokens as the reference, from the same bits in every variant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.cpu import Native
from kernels.noise import exponential_noise
from kernels.sampling import Draw, Drawn, Row, clean, sample_row_ref, sample_rows
from tests.backends import NATIVE, native, runs

Rows = NDArray[np.float32]


def variants() -> list[Native]:
    """All that were built and run here; skips the test, saying why, if there are none."""
    return [native(variant) for variant in NATIVE if runs(variant)] or [native("portable")]


def draw(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 1, position: int = 0,
    index: int = 0, num_logprobs: int = -1,
) -> Draw:  # fmt: skip
    return Draw(temperature, top_p, min_p, seed, index, position, top_k, num_logprobs)


def agreed(logits: Rows, draws: Sequence[Draw]) -> list[Drawn]:
    """What every variant draws: the same tokens and the same bits of log-probabilities."""
    first, *others = (sample_rows(found, logits, draws, {}) for found in variants())
    for other in others:
        assert other == first
    return first


def score(row: Row, wanted: Draw, token_id: int) -> float:
    values = clean(row).astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        weight = np.exp((values[token_id] - values.max()) / wanted.temperature)
    return float(
        weight
        / exponential_noise(wanted.seed, wanted.sample_index, wanted.position, np.array([token_id], dtype=np.int64))[0]
    )


def check(logits: Rows, draws: Sequence[Draw]) -> None:
    """Every variant draws what the reference draws, but where two scores are the same for all that float64 can tell."""
    for row, wanted, drawn in zip(logits, draws, agreed(logits, draws), strict=True):
        with np.errstate(over="ignore", under="ignore"):
            expected = sample_row_ref(row, row, wanted)
        if drawn.token_id != expected.token_id:
            one, other = (score(row, wanted, token_id) for token_id in (drawn.token_id, expected.token_id))
            assert wanted.temperature > 0, wanted
            assert abs(one - other) <= 1e-9 * other, (wanted, drawn.token_id, expected.token_id)
        elif expected.logprob is not None:
            assert drawn.logprob == pytest.approx(expected.logprob, rel=1e-13, abs=1e-13)
            assert [token_id for token_id, _ in drawn.best] == [token_id for token_id, _ in expected.best]
            assert [value for _, value in drawn.best] == pytest.approx(
                [value for _, value in expected.best], rel=1e-13, abs=1e-13
            )


def random_draws(generator: np.random.Generator, count: int, vocab: int) -> list[Draw]:
    return [
        draw(
            temperature=float(generator.choice([0, 1e-300, 1e-6, 0.1, 0.7, 1, 1, 1.5, 100])),
            top_k=int(generator.choice([0, 0, 0, 1, 2, 50, 1000, max(vocab - 1, 0), vocab, vocab + 5])),
            top_p=float(generator.choice([1, 1, 1 - 1e-12, 0.999, 0.9, 0.5, 0.1, 1e-6])),
            min_p=float(generator.choice([0, 0, 0, 0.02, 0.3])),
            seed=int(generator.integers(2**63)),
            index=int(generator.integers(64)),
            position=int(generator.integers(10**6)),
            num_logprobs=int(generator.choice([-1, -1, -1, 0, 5, 20])),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", ["normal", "rounded", "gumbel", "tiny and huge"])
def test_every_variant_draws_what_the_reference_draws(kind: str) -> None:
    generator = np.random.default_rng(len(kind))
    sizes = [(1, 20), (2, 100), (17, 1000), (257, 2000), (1000, 1500), (5000, 300), (49_152, 30), (100_003, 6)]
    for vocab, count in sizes:
        logits = generator.standard_normal((count, vocab)).astype(np.float32)
        if kind == "rounded":
            logits = np.round(3 * logits)
        elif kind == "gumbel":
            logits = 2 * generator.gumbel(size=(count, vocab)).astype(np.float32)
        elif kind == "tiny and huge":
            logits *= np.float32(10) ** generator.integers(-30, 38, size=(count, 1)).astype(np.float32)
        check(logits, random_draws(generator, count, vocab))


def test_every_size_of_a_vocabulary_up_to_300() -> None:
    generator = np.random.default_rng(0)
    settings = [draw(), draw(0.0), draw(top_k=3), draw(top_p=0.8), draw(min_p=0.1, num_logprobs=3)]
    for vocab in range(1, 301):
        check(generator.standard_normal((len(settings), vocab)).astype(np.float32), settings)


NAN, INF, LARGEST = float("nan"), float("inf"), float(np.finfo(np.float32).max)
odd = st.sampled_from([NAN, INF, -INF, LARGEST, -LARGEST, 0.0, -0.0, 1.0, 1e-45])


@given(
    row=st.lists(odd, min_size=1, max_size=80),
    temperature=st.sampled_from([0.0, 1e-310, 1e-40, 1.0, 1e38, 1e60, 1e300]),
    top_k=st.integers(0, 90),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**63 - 1),
    num_logprobs=st.integers(-1, 90),
)
@example([LARGEST, -LARGEST, INF] * 9, 1e60, 0, 1.0, 0.0, 4, -1)
@example([LARGEST, -LARGEST, INF] * 9, 1e60, 0, 0.5, 0.0, 4, -1)
@example([INF, -LARGEST, -LARGEST], 1e60, 0, 0.5, 0.0, 4788, -1)
@example([1.0, NAN] * 150, 1e60, 0, 0.9, 0.0, 1, -1)
def test_odd_values_and_temperatures(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int, num_logprobs: int
) -> None:
    logits = np.array([row], dtype=np.float32)
    before = logits.copy()
    check(logits, [draw(temperature, top_k, top_p, min_p, seed, num_logprobs=num_logprobs)])
    assert logits.tobytes() == before.tobytes()


def test_nuclei_that_end_among_many_close_or_equal_values() -> None:
    generator = np.random.default_rng(1)
    vocab = 3000
    steps = np.arange(vocab, dtype=np.float32)
    shapes = [
        np.zeros(vocab),
        np.where(steps == 700, 5.0, 1e-6 * generator.standard_normal(vocab)),  # all but one in a single bucket
        -(2.0 ** -(steps / 40)),  # every look into the last bucket finds such a row again
        np.where(steps % 3 == 0, 4.0, np.round(generator.standard_normal(vocab), 1)),
        np.where(steps < 2900, -INF, 0.001 * steps),
        np.where(steps % 2 == 0, NAN, 1e-6 * generator.standard_normal(vocab)),
    ]
    for shape in shapes:
        for top_p in (0.999_999, 0.95, 0.6, 0.3, 0.01):
            draws = [draw(top_p=top_p, top_k=top_k, position=p) for top_k in (0, 2500) for p in range(6)]
            check(np.tile(shape.astype(np.float32), (len(draws), 1)), draws)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1)])
def test_draws_have_the_distribution_that_was_asked_for(variant: str, top_k: int, top_p: float, min_p: float) -> None:
    found = native(next(name for name in NATIVE if name == variant))
    row = np.random.default_rng(2).standard_normal(300).astype(np.float32)
    num = 20_000
    draws = [draw(0.8, top_k, top_p, min_p, seed=9, position=p) for p in range(num)]
    counts = Counter(drawn.token_id for drawn in sample_rows(found, np.tile(row, (num, 1)), draws, {}))
    order = np.argsort(-row, kind="stable")
    weights = np.exp((row[order].astype(np.float64) - row.max()) / 0.8)
    if top_k:
        weights[top_k:] = 0
    weights[np.cumsum(weights) - weights >= top_p * weights.sum() + 1e-12] = 0
    weights[weights < min_p] = 0
    likely = int(np.count_nonzero(weights))
    assert set(counts) <= set(order[:likely].tolist())
    expected = num * weights[:likely] / weights.sum()
    drawn = np.array([counts[token_id] for token_id in order[:likely].tolist()])
    chi_square = float(((drawn - expected) ** 2 / expected).sum())
    freedom = likely - 1
    assert chi_square < freedom + 3.3 * (2 * freedom) ** 0.5 + 5  # beyond the 99.9 % point


def mixed(num: int) -> tuple[Rows, list[Draw]]:
    generator = np.random.default_rng(3)
    return 3 * generator.standard_normal((num, 20_000)).astype(np.float32), random_draws(generator, num, 20_000)


@pytest.mark.parametrize("variant", NATIVE)
def test_a_row_is_the_same_alone_in_any_batch_and_beside_other_threads(variant: str) -> None:
    found = native(next(name for name in NATIVE if name == variant))
    logits, draws = mixed(24)
    together = sample_rows(found, logits, draws, {})
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(lambda _: sample_rows(found, logits, draws, {}), range(8)))
    assert again == [together] * 8
    assert [sample_rows(found, logits[i : i + 1], draws[i : i + 1], {})[0] for i in range(24)] == together
    assert sample_rows(found, np.ascontiguousarray(logits[::-1]), draws[::-1], {}) == together[::-1]


@pytest.mark.parametrize("name", [*NATIVE, "reference"])
def test_an_adjusted_row_is_drawn_from_and_the_raw_one_gives_log_probabilities(name: str) -> None:
    found = None if name == "reference" else native(next(variant for variant in NATIVE if variant == name))
    logits = np.array([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0], [1.0, 5.0, 3.0]], dtype=np.float32)
    adjusted = {1: np.array([1.0, -INF, 3.0], dtype=np.float32), 2: np.full(3, -INF, dtype=np.float32)}
    drawn = sample_rows(found, logits, [draw(0.0, num_logprobs=1)] * 2 + [draw(1.0)], adjusted)
    assert [one.token_id for one in drawn] == [1, 2, 1]
    assert [[token_id for token_id, _ in one.best] for one in drawn] == [[1], [1], []]
    assert drawn[0].logprob is not None
    assert drawn[1].logprob == pytest.approx(drawn[0].logprob - 2.0)
    assert drawn[2].logprob is None


@pytest.mark.parametrize("variant", NATIVE)
def test_no_rows_are_no_tokens(variant: str) -> None:
    found = native(next(name for name in NATIVE if name == variant))
    assert sample_rows(found, np.empty((0, 10), dtype=np.float32), [], {}) == []
