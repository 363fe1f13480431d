"""The quality benchmark predicts what the engine predicts, and says of two models what an independent computation says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.linear import WeightFormat
from tandem.bench.quality import (
    GOALS,
    REFERENCE,
    TEXT,
    Quality,
    Reader,
    compare,
    forms_named,
    metrics,
    weight_error,
    windows,
)
from tandem.bench.report import Metric
from tandem.config import WorkerConfig
from tandem.errors import ConfigError
from tandem.models.loader import load_model, open_weights
from tests import backends
from tests.models import tiny_models


def quiet(line: str) -> None:
    """Nobody listens."""


def some_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, tiny_models.VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


TEXTS = [some_tokens(701, 1), some_tokens(65, 2), some_tokens(2, 3)]
"""Windows that end inside a step, behind a whole one of logits, and after one prediction."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    """Two `transformers` models of the same shape and their files."""
    models = [tiny_models.build("llama", {}, seed=seed) for seed in (0, 1)]
    return [(model, tiny_models.save(model, tmp_path_factory.mktemp("tiny"))) for model in models]


def reader(path: Path, form: WeightFormat, **worker: int) -> Reader:
    model = load_model(path, "fp32" if form == "fp32" else "bf16", form)
    return Reader(model, backends.best(), WorkerConfig().model_copy(update=worker), 700)


# --- what is compared ----------------------------------------------------------------------------------------------


def reference_scores(model: Any) -> Tensor:
    """Log-probabilities after every token of TEXTS that another follows: [positions, vocab]."""
    with torch.inference_mode():
        logits = [model(torch.tensor([text[:-1]])).logits[0] for text in TEXTS]
    return torch.cat(logits).double().log_softmax(-1)


def test_two_models_differ_as_transformers_says(tiny: list[tuple[Any, Path]]) -> None:
    found = compare({REFERENCE: reader(tiny[0][1], "fp32"), "other": reader(tiny[1][1], "fp32")}, TEXTS, quiet)
    first, second = (reference_scores(model) for model, _ in tiny)
    targets = torch.tensor([token for text in TEXTS for token in text[1:]])
    for name, scores in ((REFERENCE, first), ("other", second)):
        loss = torch.nn.functional.nll_loss(scores, targets)
        assert found[name].num_positions == len(targets) == 765
        assert found[name].perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    other = found["other"]
    assert other.agreement == pytest.approx(float((first.argmax(-1) == second.argmax(-1)).double().mean()), abs=2 / 765)
    assert other.agreement < 0.5
    divergence = torch.nn.functional.kl_div(second, first, log_target=True, reduction="batchmean")
    assert other.mean_divergence == pytest.approx(float(divergence), rel=1e-5)


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_a_form_does_not_differ_from_itself_however_its_prompts_are_cut(
    tiny: list[tuple[Any, Path]], form: WeightFormat
) -> None:
    path = tiny[0][1]
    again = reader(path, form, max_step_tokens=48, block_size=4)
    found = compare({REFERENCE: reader(path, form), "again": again}, TEXTS, quiet)
    assert found["again"] == found[REFERENCE]
    assert found["again"].agreement == 1
    assert found["again"].mean_divergence == 0


def test_fewer_bits_cost_more(tiny: list[tuple[Any, Path]]) -> None:
    path = tiny[0][1]
    forms: list[WeightFormat] = ["bf16", "int8", "int4"]
    found = compare({form: reader(path, form) for form in forms}, TEXTS[:1], quiet)
    assert 0 < found["int8"].mean_divergence < found["int4"].mean_divergence
    assert 1 > found["int8"].agreement > found["int4"].agreement
    errors = [weight_error(open_weights(path), form) for form in ("fp32", *forms)]
    assert errors == sorted(set(errors))
    assert errors[0] == 0
    assert errors[-1] == pytest.approx(
        0.08, abs=0.02
    )  # a step of 15 to a range of some four deviations, uniform: 4.1/15/√12


# --- the text ------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_windows_of_their_own() -> None:
    assert windows(range(10), 7, 3, None) == [[0, 1, 2], [3, 4, 5]]
    assert windows(range(10), 8, 3, None) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert windows(range(10), 7, 3, 99) == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6]]


def test_a_text_that_is_too_short_is_refused_with_its_length() -> None:
    with pytest.raises(ConfigError, match="11 tokens are asked for, the text has 10 in this model's vocabulary"):
        windows(range(10), 11, 3, None)


def test_the_shipped_text_is_plain_text_without_anybodys_licence() -> None:
    text = TEXT.read_bytes().decode("ascii")
    assert text.count("CHAPTER") == 3
    assert "\r" not in text
    assert "gutenberg" not in text.lower()
    assert len(text) > 30_000


# --- what is said --------------------------------------------------------------------------------------------------


def test_formats_are_named_once_and_the_reference_is_always_there() -> None:
    assert forms_named(["int4", "int8", "int4"]) == ["bf16", "int8", "int4"]
    assert forms_named(["fp32", "bf16"]) == ["bf16", "fp32"]
    with pytest.raises(ConfigError, match=r"'int3' is no format of weights \(fp32, bf16, int8, int4 are\)"):
        forms_named(["int8", "int3"])


def said(form: WeightFormat, found: Quality) -> dict[str, Metric]:
    reference = Quality(1000, 1000, 1000 * math.log(20))
    return {result.metric: result for result in metrics(form, found, reference, "a text")}


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_form_is_held_against_its_goals(form: WeightFormat) -> None:
    goal = GOALS[form]
    good = Quality(1000, round(1000 * goal.agreement), 1000 * math.log(19.99 * goal.perplexity))
    assert all(result.ok for result in said(form, good).values())
    found = said(form, replace(good, num_agreed=good.num_agreed - 1))
    assert [name for name, result in found.items() if not result.ok] == [f"{form}_agreement"]
    found = said(form, replace(good, loss=1000 * math.log(20.01 * goal.perplexity)))
    assert [name for name, result in found.items() if not result.ok] == [f"{form}_perplexity"]
    assert found[f"{form}_perplexity"].ratio == pytest.approx(1.0005 * goal.perplexity)


def test_a_form_without_a_goal_is_only_reported() -> None:
    assert all(result.ok and result.goal is None for result in said("fp32", Quality(1000, 0, 9000.0)).values())
