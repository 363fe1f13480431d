"""Prices of a step are learned from steps, whatever the first guess and the noise."""

from __future__ import annotations

from random import Random

import pytest

from protos.control import StepPrices
from tandem.engine.step_model import StepModel, Work

TRUE = StepPrices(base_s=1e-3, token_s=4e-4, pair_s=6e-8, sequence_s=3e-3, context_s=8e-7)
FAST = StepPrices(base_s=4e-3, token_s=2e-6, pair_s=1e-11, sequence_s=2e-5, context_s=3e-9)


def seconds(prices: StepPrices, work: Work) -> float:
    return (
        prices.base_s
        + prices.token_s * work.prefill_tokens
        + prices.pair_s * work.prefill_pairs
        + prices.sequence_s * work.decode_sequences
        + prices.context_s * work.decode_tokens
    )


def some_work(random: Random) -> Work:
    tokens = random.choice([0, 0, 16, 128, 512])
    sequences = random.randrange(0 if tokens else 1, 12)
    return Work(
        tokens, tokens * random.randrange(64, 6000), sequences, sum(random.randrange(4000) for _ in range(sequences))
    )


@pytest.mark.parametrize("true", [TRUE, FAST])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_steps_teach_their_prices_from_a_wrong_start(true: StepPrices, noise: float) -> None:
    random, model = Random(1), StepModel()
    for _ in range(600):
        work = some_work(random)
        model.observe(work, seconds(true, work) * random.lognormvariate(0.0, noise))
    errors = []
    for _ in range(200):
        work = some_work(random)
        errors.append(abs(seconds(model.prices, work) / seconds(true, work) - 1.0))
    assert sorted(errors)[180] < 0.02 + noise, f"{model.prices}"


def test_a_machine_that_becomes_slower_is_learned_anew() -> None:
    random, model = Random(2), StepModel()
    slow = StepPrices(
        *(2 * price for price in (TRUE.base_s, TRUE.token_s, TRUE.pair_s, TRUE.sequence_s, TRUE.context_s))
    )
    for true in (TRUE, slow):
        for _ in range(2000):
            work = some_work(random)
            model.observe(work, seconds(true, work))
    work = Work(512, 512 * 2000, 4, 4000)
    assert seconds(model.prices, work) == pytest.approx(seconds(slow, work), rel=0.05)


def test_what_is_not_seen_for_long_is_not_forgotten() -> None:
    random, model = Random(3), StepModel()
    for _ in range(300):
        work = some_work(random)
        model.observe(work, seconds(TRUE, work))
    for _ in range(20_000):
        work = Work(decode_sequences=4, decode_tokens=4000)
        model.observe(work, seconds(TRUE, work) * random.lognormvariate(0.0, 0.05))
    prompt = Work(512, 512 * 1000)
    assert seconds(model.prices, prompt) == pytest.approx(seconds(TRUE, prompt), rel=0.1)


def test_a_moment_of_other_work_changes_little() -> None:
    random, model = Random(4), StepModel()
    for number in range(1000):
        work = some_work(random)
        model.observe(work, seconds(TRUE, work) * (30.0 if number % 50 == 49 else 1.0))
    work = Work(128, 128 * 500, 4, 2000)
    assert seconds(model.prices, work) == pytest.approx(seconds(TRUE, work), rel=0.15)


def test_prices_are_never_below_nothing_and_idle_steps_teach_nothing() -> None:
    model = StepModel()
    assert model.prices == StepPrices()
    model.observe(Work(), 1.0)
    model.observe(Work(prefill_tokens=5), 0.0)
    assert (model.num_steps, model.prices) == (0, StepPrices())
    for seconds_s in (1.0, 1e-9, 1.0, 1e-9):
        model.observe(Work(prefill_tokens=100, prefill_pairs=5000), seconds_s)
        prices = model.prices
        assert min(prices.base_s, prices.token_s, prices.pair_s, prices.sequence_s, prices.context_s) >= 0.0


def test_what_was_never_done_has_no_price() -> None:
    model = StepModel()
    model.observe(Work(decode_sequences=2, decode_tokens=100), 0.01)
    model.observe(Work(prefill_tokens=3, prefill_pairs=6, decode_sequences=2, decode_tokens=100), 0.01)
    assert (model.prices.token_s, model.prices.pair_s) == (0.0, 0.0)
    assert model.prices.sequence_s > 0.0
    model = StepModel()
    model.observe(Work(prefill_tokens=100, prefill_pairs=5050), 0.05)
    assert model.prices.token_s > 0.0
    assert (model.prices.sequence_s, model.prices.context_s) == (0.0, 0.0)


def test_a_prompt_costs_its_tokens_and_what_they_attend_to() -> None:
    prices = StepPrices(base_s=1.0, token_s=0.1, pair_s=0.001)
    assert prices.prefill_s(3, 10) == pytest.approx(1.0 + 0.3 + 0.001 * (11 + 12 + 13))
