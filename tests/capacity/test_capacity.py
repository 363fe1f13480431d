"""The arithmetic of serving, against figures that can be worked out by hand or are published."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tandem.capacity.arithmetic import Assumed, Figure, Worker, Workload, plan
from tandem.capacity.devices import DEVICES, device_named
from tandem.capacity.shapes import MAX_CONFIG_BYTES, SHAPES, shape_of
from tandem.cli.main import main
from tandem.errors import ConfigError

LLAMA_70B = SHAPES["llama-3.1-70b"]
H100 = DEVICES["h100"]
FOUR = Worker(LLAMA_70B, H100, 4)
LOAD = Workload(requests_per_s=10, prompt_tokens=4000, answer_tokens=300, ttft_s=2.0, tpot_s=0.05)


def planned(worker: Worker = FOUR, load: Workload = LOAD, price: float | None = 2.0) -> dict[str, Figure]:
    figures = plan(worker, load, host_bytes=1e12, disk_bytes=1e13, price_per_gpu_hour=price)
    assert all(figure.formula for figure in figures)
    return {figure.name: figure for figure in figures}


@pytest.mark.parametrize(
    ("model", "billions"),
    [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("llama-3.1-405b", 405.9), ("smollm2-135m", 0.1345)],
)
def test_known_models_have_the_parameters_that_their_cards_say(model: str, billions: float) -> None:
    assert SHAPES[model].num_params / 1e9 == pytest.approx(billions, rel=0.002)


def test_kv_of_a_token_is_what_everybody_says_it_is() -> None:
    assert LLAMA_70B.kv_bytes_per_token(2) == 327_680
    assert 16 * SHAPES["smollm2-135m"].kv_bytes_per_token(2) == 368_640


def test_a_prefill_is_its_multiplications_and_a_step_its_reads() -> None:
    certain = Worker(LLAMA_70B, H100, 1, assumed=Assumed(compute_part=1.0, memory_part=1.0))
    assert certain.prefill_s(1000) == pytest.approx(2 * 69.5e9 * 1000 / 989e12, rel=0.03)
    assert certain.step_s(1, 0) == pytest.approx(2 * 69.5e9 / 3.35e12, rel=0.01)
    assert certain.prefill_s(500, 500) + certain.prefill_s(500) == pytest.approx(certain.prefill_s(1000), rel=1e-3)
    assert certain.step_s(4096, 10) > certain.step_s(1, 10), "many sequences are bound by multiplication"


def test_the_largest_batch_keeps_both_limits_and_one_more_would_not() -> None:
    for tpot_s in (0.02, 0.05, 10.0):
        batch = FOUR.largest_batch(4000, tpot_s)
        assert FOUR.kv_of(batch * 4000) <= FOUR.kv_room
        assert FOUR.step_s(batch, 4000) <= tpot_s
        more = batch + 1
        assert FOUR.kv_of(more * 4000) > FOUR.kv_room or FOUR.step_s(more, 4000) > tpot_s


def test_more_hits_fewer_prefill_workers_and_more_load_more_of_all() -> None:
    plain, cached = planned(), planned(load=Workload(10, 4000, 300, hit_rate=0.75, ttft_s=2.0))
    assert cached["prefill_workers"].value < plain["prefill_workers"].value
    assert cached["decode_workers"].value == plain["decode_workers"].value
    double = planned(load=Workload(20, 4000, 300, ttft_s=2.0))
    for name in ("prefill_workers", "decode_workers"):
        assert plain[name].value < double[name].value <= 2 * plain[name].value
    assert double["cost"].value == pytest.approx(plain["cost"].value, rel=0.2)
    assert "cost" not in planned(price=None)


def test_the_figures_belong_together() -> None:
    found = planned()
    assert found["gpus"].value == 4 * (found["prefill_workers"].value + found["decode_workers"].value)
    capacity = found["decode_workers"].value * found["decode_tokens"].value * Assumed().busy
    assert capacity >= found["generated"].value == 3000
    busy = 10 * found["prefill"].value / found["prefill_workers"].value
    assert busy <= found["prefill_busy"].value < 1
    wait_s = found["prefill"].value * found["prefill_busy"].value / (2 * (1 - found["prefill_busy"].value))
    assert wait_s + found["prefill"].value == pytest.approx(LOAD.ttft_s)


@pytest.mark.parametrize(
    ("worker", "load", "message"),
    [
        (Worker(LLAMA_70B, H100, 1), LOAD, "--gpus 1: the weights take 141.1 GB, 1 x h100 have 72.0 GB"),
        (FOUR, Workload(1, 100_000, 10, ttft_s=0.5), "--ttft 0.5: a prompt alone takes"),
        (FOUR, Workload(1, 100, 10, tpot_s=0.001), "--tpot 0.001: a step of one sequence takes 0.015 s"),
    ],
)
def test_what_no_number_of_workers_can_do_is_said(worker: Worker, load: Workload, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        planned(worker, load)


def test_a_config_json_is_read_and_what_is_none_refused(tmp_path: Path) -> None:
    values = {
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100,
        "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    for name in (str(file), str(tmp_path)):
        shape = shape_of(name)
        assert (shape.head, shape.kv_heads, shape.tie_word_embeddings) == (16, 2, False)
    for broken, message in (
        ("{", "config.json: "),
        (json.dumps(values | {"hidden_size": 0}), ">= 1"),
        (json.dumps(values | {"num_key_value_heads": 3}), "4 heads can't share 3"),
        ('{"hidden_size": 64}', "missing required field"),
        (" " * (MAX_CONFIG_BYTES + 1), "more than 1048576 bytes"),
    ):
        file.write_text(broken)
        with pytest.raises(ConfigError, match=message):
            shape_of(str(file))
    with pytest.raises(ConfigError, match="no known model"):
        shape_of("gpt-9")
    with pytest.raises(ConfigError, match="'h999' is not known"):
        device_named("h999")


def test_the_command_prints_a_table_for_people_and_lines_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tandem", "capacity", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code in (0, None)
        return capsys.readouterr().out

    lines = [json.loads(line) for line in run("--price", "2.5", "--json").splitlines()]
    assert lines[0]["capacity"]["source"].startswith("NVIDIA H100")
    assert [line["name"] for line in lines[1:]][-1] == "cost"
    text = run("--model", "smollm2-135m", "--gpus", "1", "--gpu", "l40s")
    assert "23,040" in text, "KV of a token"
    assert "NVIDIA L40S data sheet" in text
