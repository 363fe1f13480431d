"""The benchmarks run as a user runs them, and say that all is well only if it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tandem.bench import quality
from tandem.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]


def bench(*arguments: str, timeout_s: float) -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "tandem.cli", "bench", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=REPOSITORY)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.timeout(400)
def test_bench_serve_measures_a_cluster_beside_one_engine() -> None:
    code, lines, stderr = bench("serve", "--clients", "3", "--seconds", "3", timeout_s=170)
    assert code == 0, stderr
    assert set(lines[0]) >= {"machine", "versions", "commit"}
    found = {line["metric"]: line for line in lines[1:]}
    assert found["errors"]["value"] == 0
    assert found["throughput"]["value"] > 0
    assert found["ttft_p50"]["reference_value"] > 0
    assert all(line["ok"] for line in lines[1:])


def test_bench_serve_against_nobody_fails_with_the_reason() -> None:
    code, lines, stderr = bench("serve", "--target", "127.0.0.1:9", "--clients", "2", "--seconds", "1", timeout_s=100)
    assert code == 1
    assert "no router answers at 127.0.0.1:9" in stderr
    assert not any(line["ok"] for line in lines[1:])


@pytest.mark.timeout(400)
def test_bench_engine_measures_beside_the_machines_limits() -> None:
    options = ("--repetitions", "1", "--batches", "1,2", "--contexts", "40,9000", "--threads", "2")
    code, lines, stderr = bench("engine", *options, timeout_s=170)
    assert code == 0, stderr
    assert lines[0]["engine"] == {"weights": "bf16", "threads": 2}
    found = {line["metric"]: line for line in lines[1:]}
    for name in ("prefill_batch_1", "prefill_batch_2", "decode_batch_1", "decode_batch_2"):
        line = found[f"{name}_context_40"]
        assert line["value"] > 0
        assert line["reference_value"] > 0
    assert {"memory_read_2_cores", "matmul_bf16_2_cores"} <= set(found)
    assert {"rss_of_one_worker", "memory_of_two_workers", "weights_shared_by_two_workers"} <= set(found)
    assert all(line["ok"] for line in lines[1:])
    assert "skipped: context 9000" in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batches", "1,x"), "--batches is '1,x', must be whole numbers of at least 1"),
        (("--contexts", "0"), "--contexts is '0', must be whole numbers of at least 1"),
        (("--against", "gemma.cpp"), "'gemma.cpp' is no peer"),
    ],
)
def test_bench_engine_refuses_what_it_can_not_measure(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "engine", *options, "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


@pytest.mark.timeout(400)
def test_bench_quality_compares_forms_on_the_shipped_text() -> None:
    code, lines, stderr = bench("quality", "--weights", "int8", "--tokens", "200", timeout_s=110)
    assert lines[0]["quality"] == {"weights": ["bf16", "int8"], "tokens": 200, "threads": 1}
    found = {line["metric"]: line for line in lines[1:]}
    assert code == (0 if all(line["ok"] for line in lines[1:]) else 1), stderr
    assert 5 < found["bf16_perplexity"]["value"] < 50
    assert found["bf16_agreement"]["value"] == 1
    assert found["bf16_divergence"]["value"] == 0
    assert found["int8_perplexity"]["ratio"] == pytest.approx(1, abs=0.05)
    assert 0.85 < found["int8_agreement"]["value"] < 1
    assert 0 < found["int8_divergence"]["value"] < 0.05
    assert 0 < found["int8_weight_error"]["value"] < 0.01
    assert found["int8_weights"]["ratio"] == pytest.approx(34 / 64)
    assert "window 1 of 1" in stderr


def test_bench_quality_says_that_a_quantized_file_holds_a_form_already() -> None:
    _, lines, stderr = bench("quality", "--weights", "int4", "--tokens", "2", timeout_s=110)
    assert next(line for line in lines if line.get("metric") == "int4_weight_error")["value"] == 0
    assert "int4: the model's file holds these very weights" in stderr
    assert "bf16: the model's file holds" not in stderr


def test_bench_quality_misses_a_goal_and_the_exit_code_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(quality.GOALS, "bf16", quality.Goal(agreement=1.5, perplexity=1.0))
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "quality", "--weights", "bf16", "--tokens", "2"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "NO (goal >= 1.5)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "int8,q4"), "'q4' is no format of weights (fp32, bf16, int8, int4 are)"),
        (("--tokens", "9999"), "9999 tokens are asked for, the text has 8642 in this model's vocabulary"),
    ],
)
def test_bench_quality_refuses_what_it_can_not_measure(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "quality", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert message in capsys.readouterr().err


def test_bench_quality_outside_a_checkout_names_the_missing_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "TEXT", tmp_path / "alice.txt")
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "quality"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert f"{tmp_path / 'alice.txt'} is not there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sixteen_clients_for_a_minute_see_no_error() -> None:
    code, lines, stderr = bench("serve", "--clients", "16", "--seconds", "60", timeout_s=390)
    assert code == 0, stderr
    assert next(line for line in lines if line.get("metric") == "errors")["value"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_ladder_gives_the_same_tokens_and_draws_itself(tmp_path: Path) -> None:
    picture = tmp_path / "ladder.svg"
    command = [sys.executable, "-m", "tandem.cli", "bench", "ladder", "--json", "--picture", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()][1:]
    assert all(line["ok"] for line in lines)
    throughput = {line["metric"]: line["value"] for line in lines if line["metric"].endswith("_throughput")}
    assert len(throughput) == 7
    assert throughput["paged_kv_throughput"] > throughput["kv_cache_throughput"] > throughput["no_kv_cache_throughput"]
    assert sum(line["metric"].endswith("_same_tokens") for line in lines) == 6
    ElementTree.fromstring(picture.read_text(encoding="utf-8"))
