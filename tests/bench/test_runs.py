"""The benchmarks run as a user runs them, and say that all is well only if it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def bench(*arguments: str, timeout_s: float) -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "tandem.cli", "bench", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=REPOSITORY)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.timeout(180)
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


@pytest.mark.timeout(180)
def test_bench_engine_measures_beside_the_machines_limits() -> None:
    code, lines, stderr = bench("engine", "--repetitions", "1", timeout_s=170)
    assert code == 0, stderr
    assert all(line["value"] > 0 for line in lines[1:])
    assert any(line["reference_value"] for line in lines[1:])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sixteen_clients_for_a_minute_see_no_error() -> None:
    code, lines, stderr = bench("serve", "--clients", "16", "--seconds", "60", timeout_s=390)
    assert code == 0, stderr
    assert next(line for line in lines if line.get("metric") == "errors")["value"] == 0
