"""What is drawn, and that nothing but the request decides it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.cpu import SWITCH, native
from kernels.noise import exponential_noise
from protos.control import Sampling
from tandem.engine.sampler import Sampled, SampleRequest, sample

VOCAB = 49_152


@pytest.fixture(scope="module", params=["native", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the native kernels, if this machine has them, and without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv(SWITCH, "torch")
        elif native() is None:
            pytest.skip("no native kernels were built")
        yield


def request(
    position: int = 0, index: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = (), **sampling: Any
) -> SampleRequest:
    return SampleRequest(Sampling(max_tokens=100, **sampling), index, position, prompt, output)


def one(row: Sequence[float] | torch.Tensor, wanted: SampleRequest) -> Sampled:
    logits = torch.as_tensor(row, dtype=torch.float32)
    return sample(logits[None], [wanted])[0]


def reference_probabilities(row: Sequence[float], wanted: SampleRequest) -> list[float]:
    """What each token's probability must be, in plain Python, one rule after the other."""
    sampling = wanted.sampling
    x = [float(value) for value in row]
    if wanted.position < sampling.min_tokens:
        for token in sampling.stop_token_ids:
            x[token] = -math.inf
    for token, bias in sampling.logit_bias:
        x[token] += bias
    for token in set(wanted.prompt_token_ids) | set(wanted.output_token_ids):
        x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
    for token, count in Counter(wanted.output_token_ids).items():
        x[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if sampling.temperature == 0:
        return [float(token == order[0]) for token in range(len(x))]
    weights = [math.exp((value - x[order[0]]) / sampling.temperature) for value in x]
    kept = order[: sampling.top_k] if sampling.top_k else order
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if sampling.top_p < 1 and nucleus and before >= sampling.top_p * total:
            break
        nucleus.append(token)
        before += weights[token]
    nucleus = [token for token in nucleus if weights[token] >= sampling.min_p]
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(x))]


samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.integers(0, 14),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.2]),
        "min_p": st.sampled_from([0.0, 0.05, 0.4]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.25]),
        "logit_bias": st.lists(st.tuples(st.integers(0, 11), st.floats(-4, 4, width=16)), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 11), max_size=3),
        "min_tokens": st.integers(0, 3),
        "seed": st.integers(0, 2**63 - 1),
    }
)
tokens = st.lists(st.integers(0, 11), max_size=8)
# Distinct values on a grid, so that float32 here and float64 in the reference agree about the order.
rows = st.permutations(range(12)).map(lambda order: [(value - 6) * 0.37 + 0.011 for value in order])


@given(row=rows, sampling=samplings, prompt=tokens, output=tokens, index=st.integers(0, 63))
def test_each_draw_is_the_references_with_the_same_noise(
    row: list[float], sampling: dict[str, Any], prompt: list[int], output: list[int], index: int
) -> None:
    wanted = request(len(output), index, prompt, output, **sampling)
    probabilities = reference_probabilities(row, wanted)
    noise = exponential_noise(wanted.sampling.seed, index, len(output), np.arange(12))
    expected = max(range(12), key=lambda token: probabilities[token] / noise[token])
    assert one(row, wanted).token_id == expected


@given(
    row=rows,
    sampling=samplings,
    output=tokens,
    allowed=st.sets(st.integers(0, 11), min_size=1),
    size=st.sampled_from([12, 20]),
)
def test_what_a_grammar_allows_is_all_that_there_is(
    row: list[float], sampling: dict[str, Any], output: list[int], allowed: set[int], size: int
) -> None:
    mask = np.isin(np.arange(size), list(allowed))  # the tokenizer may know more tokens than the model
    wanted = replace(request(len(output), 0, (), output, num_logprobs=12, **sampling), allowed=mask)
    masked = [value if token in allowed else -math.inf for token, value in enumerate(row)]
    found = one(row, wanted)
    assert found.token_id in allowed
    plain = one(masked, replace(wanted, allowed=None))
    assert found.token_id == plain.token_id
    assert found.logprobs is not None
    assert plain.logprobs is not None
    assert found.logprobs.chosen == plain.logprobs.chosen
    assert found.logprobs.top == [pair for pair in plain.logprobs.top if pair[0] in allowed]
    assert {token for token, _ in found.logprobs.top} == allowed
    assert sum(math.exp(logprob) for _, logprob in found.logprobs.top) == pytest.approx(1.0)


def test_where_the_model_gives_nothing_to_what_is_allowed_the_lowest_of_it_is_taken() -> None:
    mask = np.array([False, False, True, True, False])
    wanted = replace(request(temperature=0.0), allowed=mask)
    assert one([1.0, 2.0, -math.inf, math.nan, 3.0], wanted).token_id == 2


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5, "logit_bias": [(2, 1.5)]},
    ],
)
def test_draws_have_the_distribution_that_was_asked_for(sampling: dict[str, Any]) -> None:
    row = [2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.7]
    settings = {"temperature": 1.0, **sampling}
    num = 4000
    requests = [request(position, prompt=[0, 5], **settings) for position in range(num)]
    counts = Counter(drawn.token_id for drawn in sample(torch.tensor([row]).expand(num, -1), requests))
    probabilities = reference_probabilities(row, request(prompt=[0, 5], **settings))
    likely = [token for token, probability in enumerate(probabilities) if probability > 0]
    assert set(counts) <= set(likely)
    chi_square = sum(
        (counts[token] - num * probabilities[token]) ** 2 / (num * probabilities[token]) for token in likely
    )
    freedom = len(likely) - 1
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5 + 5  # beyond the 99.9 % point for 2 … 7 degrees


def test_samples_and_positions_draw_independently() -> None:
    row = torch.zeros(2)
    pairs = Counter(
        (
            one(row, request(p, 0, temperature=1.0, seed=5)).token_id,
            one(row, request(p, 1, temperature=1.0, seed=5)).token_id,
        )
        for p in range(2000)
    )
    assert all(abs(pairs[pair] - 500) < 80 for pair in [(0, 0), (0, 1), (1, 0), (1, 1)])


def varied_requests() -> list[SampleRequest]:
    common: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 50},
        {"temperature": 0.7, "top_k": 2000},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 100.0, "top_p": 0.95},
        {"temperature": 1.3, "min_p": 0.02},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"num_logprobs": 5},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "num_logprobs": 20, "presence_penalty": 1.0},
    ]
    return [request(7, i % 3, range(50), range(40, 47), seed=i, **settings) for i, settings in enumerate(common)]


def big_logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


def test_a_rows_result_does_not_depend_on_the_batch_it_is_in() -> None:
    requests = varied_requests()
    logits = big_logits(len(requests))
    together = sample(logits, requests)
    assert [one(row, wanted) for row, wanted in zip(logits, requests, strict=True)] == together
    assert sample(logits.flip(0), requests[::-1]) == together[::-1]
    twice = sample(torch.cat([logits, logits]), [*requests, *requests])
    assert twice == together + together
    strided = torch.zeros(len(requests), 2 * VOCAB)[:, ::2].copy_(logits)
    assert sample(strided, requests) == together


def test_a_rows_result_does_not_depend_on_the_number_of_threads() -> None:
    requests = varied_requests()
    logits = big_logits(len(requests))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sample(logits, requests)
        torch.set_num_threads(2)
        assert sample(logits, requests) == alone
    finally:
        torch.set_num_threads(threads)


def test_another_process_draws_the_same() -> None:
    code = (
        "import json, torch; from tests.engine.test_sampler import big_logits, varied_requests;"
        "from tandem.engine.sampler import sample; torch.set_num_threads(1); requests = varied_requests();"
        "print(json.dumps([(s.token_id, s.logprobs and [s.logprobs.chosen, s.logprobs.top]) for s in "
        "sample(big_logits(len(requests)), requests)]))"
    )
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    requests = varied_requests()
    here = [
        (drawn.token_id, drawn.logprobs and [drawn.logprobs.chosen, drawn.logprobs.top])
        for drawn in sample(big_logits(len(requests)), requests)
    ]
    assert json.loads(output) == json.loads(json.dumps(here))


def test_the_logits_are_left_as_they_were() -> None:
    requests = varied_requests()
    logits = big_logits(len(requests))
    before = logits.clone()
    sample(logits, requests)
    assert torch.equal(logits, before)


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    row = torch.zeros(VOCAB)
    row[[40_000, 777, 12_345]] = 3.0
    for extra in ({}, {"num_logprobs": 0}, {"logit_bias": [(5, -1.0)]}, {"temperature": 1.0, "top_k": 1}):
        assert one(row, request(**extra)).token_id == 777


def test_top_k_leaves_exactly_k_even_among_equal_values() -> None:
    drawn = {one(torch.zeros(100), request(p, temperature=1.0, top_k=3)).token_id for p in range(200)}
    assert drawn == {0, 1, 2}


def test_a_repeated_token_gets_less_likely_whatever_its_sign() -> None:
    for prompt, output in (([0], []), ([], [0])):
        wanted = request(len(output), 0, prompt, output, repetition_penalty=2.0)
        assert one([3.0, 2.0, 1.0], wanted).token_id == 1
        assert one([-1.0, -1.5, -9.0], wanted).token_id == 1


def test_frequency_counts_and_presence_does_not_and_the_prompt_is_neither() -> None:
    output = [0, 0, 0]
    assert one([4.0, 2.0], request(3, 0, (), output, presence_penalty=1.5)).token_id == 0
    assert one([4.0, 2.0], request(3, 0, (), output, frequency_penalty=0.75)).token_id == 1
    assert one([4.0, 2.0], request(0, 0, output, (), frequency_penalty=0.75, presence_penalty=9.0)).token_id == 0


@pytest.mark.parametrize("min_tokens", [0, 5])
def test_stop_tokens_are_masked_until_min_tokens(min_tokens: int) -> None:
    row = [0.0, 5.0, 9.0, 1.0]
    for position in range(8):
        expected = 1 if position < min_tokens else 2
        wanted = request(position, output=[0] * position, stop_token_ids=[2, 10**6], min_tokens=min_tokens)
        assert one(row, wanted).token_id == expected


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-6},
        {"temperature": 1e-300},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 100.0, "min_p": 1.0},
        {"temperature": 1.0, "logit_bias": [(token, -100.0) for token in range(1000)], "top_p": 1e-9},
        {"logit_bias": [(token, -100.0) for token in range(1000)]},
        {"repetition_penalty": 1e30, "frequency_penalty": 2.0},
    ],
)
def test_extreme_values_still_give_the_best_token(sampling: dict[str, Any]) -> None:
    row = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    best = int(row.argmax())
    for position in range(20):
        assert one(row, request(position, **sampling)).token_id == best


def test_a_very_high_temperature_reaches_everything() -> None:
    row = torch.tensor([10.0, 0.0, -10.0, 5.0])
    drawn = Counter(one(row, request(p, temperature=100.0)).token_id for p in range(400))
    assert min(drawn[token] for token in range(4)) > 50


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"num_logprobs": 2}, {"temperature": 1.0, "top_k": 2, "top_p": 0.5}]
)
@pytest.mark.parametrize(
    ("row", "possible"),
    [
        ([NAN, 1.0, NAN, -INF], {1}),
        ([0.0, INF, NAN, 1.0], {1}),
        ([INF, INF, 0.0, 1.0], {0, 1}),
        ([NAN, NAN, NAN, NAN], {0}),
        ([-INF, -INF, -INF, -INF], {0}),
    ],
)
def test_nan_and_infinity_are_survived(row: list[float], possible: set[int], sampling: dict[str, Any]) -> None:
    drawn = [one(row, request(p, **sampling)) for p in range(20)]
    assert {sampled.token_id for sampled in drawn} <= possible
    for sampled in drawn:
        if sampled.logprobs is not None:
            assert not any(math.isnan(value) for _, value in [(0, sampled.logprobs.chosen), *sampled.logprobs.top])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_when_masks_leave_nothing_the_best_raw_token_is_taken(temperature: float) -> None:
    wanted = request(0, temperature=temperature, stop_token_ids=[0, 1, 2], min_tokens=4)
    assert one([1.0, 3.0, 2.0], wanted).token_id == 1


def test_a_rows_nan_does_not_touch_its_neighbours() -> None:
    logits = torch.tensor([[NAN, 2.0, 1.0], [1.0, 0.0, 5.0]])
    assert [drawn.token_id for drawn in sample(logits, [request(), request()])] == [1, 2]


def test_logprobs_are_of_the_raw_logits_best_first() -> None:
    row = torch.randn(1000, generator=torch.Generator().manual_seed(9)) * 4
    truth = torch.log_softmax(row.double(), dim=-1)
    best = torch.sort(truth, descending=True, stable=True)
    wanted = request(3, temperature=2.0, top_k=900, num_logprobs=5, logit_bias=[(int(best.indices[0]), -50.0)])
    drawn = one(row, wanted)
    assert drawn.logprobs is not None
    assert drawn.token_id != int(best.indices[0])
    assert drawn.logprobs.chosen == pytest.approx(float(truth[drawn.token_id]), abs=1e-6)
    assert [token for token, _ in drawn.logprobs.top] == best.indices[:5].tolist()
    assert [value for _, value in drawn.logprobs.top] == pytest.approx(best.values[:5].tolist(), abs=1e-6)


def test_num_logprobs_zero_is_the_chosen_alone_and_minus_one_is_none() -> None:
    with_chosen = one([0.0, 1.0], request(num_logprobs=0)).logprobs
    assert with_chosen is not None
    assert with_chosen.top == []
    assert with_chosen.chosen == pytest.approx(-math.log(1 + math.exp(-1)))
    assert one([0.0, 1.0], request()).logprobs is None


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    wanted = request(0, 0, [5, 10**9], [7, -1], repetition_penalty=1.1, frequency_penalty=1.0, logit_bias=[(99, 5.0)])
    assert one([0.0, 1.0], wanted).token_id == 1


def test_an_empty_batch_is_an_empty_list() -> None:
    assert sample(torch.zeros(0, 10), []) == []
