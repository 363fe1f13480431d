"""The engine's benchmark measures what it says: which cases, against which bounds, with whose KV, in which order."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.bench import against
from tandem.bench.against import CASES, compared, in_turns
from tandem.bench.breakdown import breakdown
from tandem.bench.cases import DECODE_TOKENS, Case, Plan, kv_tokens, plan
from tandem.bench.engine import fitted_engine
from tandem.bench.report import Metric
from tandem.bench.roofline import kv_read_bytes, prefill_flops, weight_read_bytes
from tandem.bench.workload import EngineLoad, Steps
from tandem.config import WorkerConfig
from tandem.errors import ConfigError, TandemError
from tandem.models.config import ModelConfig, RopeConfig

SMOLLM2 = ModelConfig("llama", 30, 576, 1536, 9, 3, 64, 49_152, 8192, 1e-5, RopeConfig(), True)


# --- which cases ---------------------------------------------------------------------------------------------------


def planned_for(batches: list[int], contexts: list[int], limit_tokens: int) -> Plan:
    return plan(batches, contexts, max_position=8192, step_tokens=512, limit_tokens=limit_tokens)


def test_a_batch_that_can_not_start_together_is_skipped_with_the_limit() -> None:
    planned = planned_for([512, 513, 10**12], [128], 10**9)
    assert planned.max_batch == 512
    assert [reason.partition(":")[0] for reason in planned.skipped] == ["batch 513", f"batch {10**12}"]


def test_a_context_that_the_model_does_not_have_is_skipped_with_its_limit() -> None:
    planned = planned_for([1], [128, 8192], 10**9)
    assert planned.cases == (Case("prefill", 1, 128), Case("decode", 1, 128))
    (reason,) = planned.skipped
    assert "context 8192" in reason
    assert "longer than the model's 8192" in reason


def test_cases_that_memory_does_not_hold_are_skipped_with_the_limit() -> None:
    planned = planned_for([1, 16], [128, 6000], 20_000)
    assert Case("decode", 16, 128) in planned.cases
    assert Case("decode", 1, 6000) in planned.cases
    assert Case("decode", 16, 6000) not in planned.cases
    assert any("decode_batch_16_context_6000" in reason and "20000" in reason for reason in planned.skipped)


def test_prompts_that_fill_a_step_are_prefilled_alone_and_that_is_said() -> None:
    planned = planned_for([1, 4], [128, 512], 10**9)
    prefills = [case for case in planned.cases if case.what == "prefill"]
    assert prefills == [Case("prefill", 1, 128), Case("prefill", 4, 128), Case("prefill", 1, 512)]
    assert any("prefill of 4 x 512 tokens" in reason for reason in planned.skipped)
    assert Case("decode", 4, 512) in planned.cases


@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=4),
    st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    st.integers(1, 200_000),
)
def test_every_case_is_measured_or_its_reason_is_said(batches: list[int], contexts: list[int], limit: int) -> None:
    planned = planned_for(batches, contexts, limit)
    assert kv_tokens(planned.cases) <= limit
    assert len(set(planned.cases)) == len(planned.cases)
    for context in contexts:
        for batch in batches:
            case = Case("decode", batch, context)
            said = any(
                reason.startswith(f"{case.name}:") or f"context {context}:" in reason for reason in planned.skipped
            )
            assert (case in planned.cases) != said


def test_kv_is_kept_for_the_longest_prompt_of_each_sequence() -> None:
    cases = [Case("decode", 4, 128), Case("decode", 2, 1000), Case("prefill", 1, 500)]
    assert kv_tokens(cases) == 2 * 1000 + 2 * 128 + (4 + 2) * DECODE_TOKENS + 501


# --- bounds --------------------------------------------------------------------------------------------------------


def test_a_step_of_smollm2_reads_its_known_size() -> None:
    assert weight_read_bytes(SMOLLM2, "bf16") == pytest.approx(269e6, rel=1e-3)  # 134.5 million parameters
    assert weight_read_bytes(SMOLLM2, "int8") == pytest.approx(269e6 / 2 * 34 / 32, rel=1e-3)
    assert weight_read_bytes(SMOLLM2, "int4") < weight_read_bytes(SMOLLM2, "int8") < weight_read_bytes(SMOLLM2, "bf16")
    assert kv_read_bytes(SMOLLM2, 16, 6000, 2) == 16 * 6000 * 30 * 2 * 3 * 64 * 2


def test_a_long_prefills_multiplications_are_two_a_weight_and_attention() -> None:
    layers = weight_read_bytes(SMOLLM2, "bf16") / 2 - 49_152 * 576
    pairs = sum(range(1, 513))
    expected = 2 * layers * 512 + 4 * 30 * 9 * 64 * pairs + 2 * 49_152 * 576
    assert prefill_flops(SMOLLM2, 1, 512) == pytest.approx(expected)
    assert prefill_flops(SMOLLM2, 3, 512) == pytest.approx(3 * expected)


# --- the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(tiny_model: Path) -> EngineLoad:
    cases = [Case("decode", 3, 40), Case("decode", 2, 70), Case("prefill", 2, 50)]
    engine = fitted_engine(tiny_model, "bf16", "bf16", WorkerConfig(), kv_tokens(cases), 3, 70 + DECODE_TOKENS)
    return EngineLoad(engine, 3, 16)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models import tiny_models

    return tiny_models.save(tiny_models.build("llama", {}), tmp_path_factory.mktemp("tiny"))


def test_decode_starts_from_prompts_that_are_there_each_with_its_own_kv(load: EngineLoad) -> None:
    engine = load._engine.parts.engine
    load.prepare(Case("decode", 3, 40))
    load.prepare(Case("decode", 2, 70))
    assert load.missing_tokens(Case("decode", 3, 40)) == 0
    assert load.missing_tokens(Case("decode", 3, 70)) == 30
    for case in (Case("decode", 2, 70), Case("decode", 3, 40)):
        before = engine.counters()
        steps = load.decode(case)
        after = engine.counters()
        blocks = (case.context - 1) // 16
        assert after.prefix_hit_tokens - before.prefix_hit_tokens == case.batch * blocks * 16
        assert after.prefill_tokens - before.prefill_tokens == case.batch
        assert after.decode_tokens - before.decode_tokens == case.batch * (DECODE_TOKENS - 1)
        assert steps.seconds > sum(steps.parts.values())
    prompts = {tuple(prompt[:16]) for prompt in load._prompts}
    assert len(prompts) == 3


def test_prefill_is_never_found_in_the_cache(load: EngineLoad) -> None:
    engine = load._engine.parts.engine
    before = engine.counters().prefix_hit_tokens
    assert load.rate(Case("prefill", 2, 50)) > 0
    assert load.rate(Case("prefill", 2, 50)) > 0
    assert engine.counters().prefix_hit_tokens == before


def test_decode_from_prompts_that_were_evicted_is_an_error_not_a_figure(tiny_model: Path) -> None:
    # A step holds one such prompt alone, so without the cache its sequences can't begin together.
    case, worker = Case("decode", 2, 40), WorkerConfig(max_step_tokens=40)
    evicted = EngineLoad(fitted_engine(tiny_model, "bf16", "bf16", worker, kv_tokens([case]), 2, 80), 2, 16)
    evicted.prepare(case)
    evicted._engine.parts.pool.clear_cached()
    with pytest.raises(TandemError, match="was not in the prefix cache"):
        evicted.decode(case)


# --- the breakdown -------------------------------------------------------------------------------------------------


def spent(seconds: float, linear: float, attention: float, rest: float) -> Steps:
    return Steps(seconds, {"linear": linear, "attention": attention, "rest": rest})


def by_name(results: list[Metric], case: Case) -> dict[str, Metric]:
    return {result.metric.removeprefix(f"{case.name}_"): result for result in results}


def test_the_parts_of_a_step_add_up_to_it() -> None:
    case = Case("decode", 4, 512)
    found = by_name(list(breakdown(case, [spent(0.010, 0.006, 0.002, 0.001)], 4e7, [2e10])), case)
    assert math.fsum(found[part].value for part in ("linear", "attention", "rest", "python")) == pytest.approx(10.0)
    assert found["outside"].value == pytest.approx(0.2)
    assert found["attention_reads"].value == pytest.approx(20.0)
    assert found["attention_reads"].ratio == pytest.approx(1.0)
    assert all(result.ok and result.goal is None for result in found.values())


def test_the_goals_of_a_step_are_held_where_the_project_promises_them() -> None:
    case = Case("decode", 1, 512)
    assert by_name(list(breakdown(case, [spent(0.010, 0.007, 0.0016, 0.001)], 1e7, [2e10])), case)["outside"].ok
    assert not by_name(list(breakdown(case, [spent(0.010, 0.007, 0.0014, 0.001)], 1e7, [2e10])), case)["outside"].ok
    long = Case("decode", 16, 6000)
    assert by_name(list(breakdown(long, [spent(1, 0.1, 0.5, 0)], 6.1e9, [2e10])), long)["attention_reads"].ok
    assert not by_name(list(breakdown(long, [spent(1, 0.1, 0.5, 0)], 5.9e9, [2e10])), long)["attention_reads"].ok


def test_a_step_that_torch_computes_has_no_breakdown() -> None:
    assert list(breakdown(Case("decode", 1, 512), [Steps(0.01, {})], 1e7, [2e10])) == []


# --- against peers -------------------------------------------------------------------------------------------------


def test_contenders_take_turns_in_both_orders_and_the_first_round_does_not_count() -> None:
    turns: list[tuple[str, Case]] = []

    def contender(name: str) -> against.Contender:
        def run(case: Case) -> float:
            turns.append((name, case))
            return float(len(turns))

        return run

    rates, bounds = in_turns(
        {"a": contender("a"), "b": contender("b")}, lambda _: 7.0, rounds=2, settle_s=0.0, say=lambda _: None
    )
    orders = [[name for name, case in turns if case == CASES[0]][i : i + 2] for i in (0, 2, 4)]
    assert orders[1:] == [["a", "b"], ["b", "a"]]
    for case in CASES:
        assert bounds[case] == [7.0, 7.0]
        for name in ("a", "b"):
            assert rates[name, case] == [i + 1.0 for i, turn in enumerate(turns) if turn == (name, case)][1:]


def test_a_ratio_is_taken_round_by_round_and_its_median_held_against_the_goal() -> None:
    own, peer = [10.0, 40.0, 36.0], [10.0, 20.0, 12.0]
    speed, ratio = compared(CASES[0], "llama.cpp", "llama.cpp 1 BF16", own, peer, 2.0)
    assert (speed.value, speed.reference) == (12.0, "llama.cpp 1 BF16")
    assert (ratio.value, ratio.spread, ratio.goal, ratio.ok) == (2.0, 1.0, ">= 2", True)
    assert not list(compared(CASES[0], "llama.cpp", "llama.cpp 1 BF16", own, peer, 2.1))[1].ok
    assert list(compared(CASES[0], "llama.cpp", "llama.cpp 1 BF16", own, peer, None))[1].ok


def test_an_unknown_peer_is_refused_with_those_that_are_known() -> None:
    assert [peer.name for peer in against.programs_named(["vllm", "llama.cpp", "vllm"])] == ["vllm", "llama.cpp"]
    with pytest.raises(ConfigError, match=r"'gemma.cpp' is no peer .*\(llama.cpp, vllm are\)"):
        against.programs_named(["llama.cpp", "gemma.cpp"])


def test_more_threads_than_cores_are_refused_before_anything_starts(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"256 threads are asked for, this process may use \d+ cores"):
        list(against.run(tiny_model, "bf16", WorkerConfig(threads=256), [], rounds=1, say=lambda _: None))
