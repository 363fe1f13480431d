"""The engine alone, on the real model: the reference's tokens, and none that depend on company or history."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos.control import Sampling
from tandem.config import WorkerConfig
from tandem.engine.local import LocalEngine
from tandem.errors import InvalidRequest
from tandem.model_files import resolve_model
from tests import golden


@pytest.fixture(scope="module")
def model_path() -> Path:
    return resolve_model("smollm2-135m")


@pytest.mark.timeout(300)
def test_fp32_greedy_equals_the_reference_on_every_prompt(model_path: Path) -> None:
    engine = LocalEngine(model_path, dtype="fp32", worker=WorkerConfig(arena_bytes=2 * 2**30))
    cases = golden.load()
    assert len(cases) == 32
    sampling = Sampling(max_tokens=golden.NUM_TOKENS)
    outputs = engine.generate([case["ids"] for case in cases], [sampling] * len(cases))
    ties = [c["name"] for c, (o,) in zip(cases, outputs, strict=True) if not golden.compare(c, o.token_ids)]
    assert len(ties) <= 2, ties
    assert all(len(output.token_ids) == golden.NUM_TOKENS for (output,) in outputs)


def test_bf16_streams_do_not_depend_on_company_chunking_history_or_preemption(model_path: Path) -> None:
    cases = [case for case in golden.load() if len(case["ids"]) < 40][:8]
    prompts = [case["ids"] for case in cases]
    sampled = [Sampling(max_tokens=48, temperature=0.8, top_p=0.95, seed=i) for i in range(len(prompts))]
    alone = LocalEngine(model_path, worker=WorkerConfig(arena_bytes=2**29))
    truth = [alone.generate([p], [s])[0][0].token_ids for p, s in zip(prompts, sampled, strict=True)]
    again = [out.token_ids for (out,) in alone.generate(prompts, sampled)]  # prefix hits, all together
    small = LocalEngine(
        model_path, worker=WorkerConfig(arena_bytes=20 * 368_640, max_step_tokens=48, max_running=8)
    )  # small chunks, too few blocks
    crowded = [out.token_ids for (out,) in small.generate(prompts, sampled)]
    assert again == truth
    assert crowded == truth
    assert small.parts.engine.counters().preemptions > 0


def test_a_prompt_beyond_the_arena_is_refused_and_the_engine_goes_on(model_path: Path) -> None:
    engine = LocalEngine(model_path, worker=WorkerConfig(arena_bytes=4 * 368_640))
    good = Sampling(max_tokens=4)
    with pytest.raises(InvalidRequest, match="at most 64"):
        engine.generate([[1, 2, 3], list(range(100))], [good, good])
    ((output,),) = engine.generate([[1, 2, 3]], [good])
    assert len(output.token_ids) == 4
