"""`tandem doctor` finds what is wrong and says what to do."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.cli import doctor
from tandem.config import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_a_machine_without_the_model_is_not_healthy_and_every_check_still_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    result = subprocess.run(
        [sys.executable, "-m", "tandem.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = {line["check"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert set(lines) == set(doctor.CHECKS)
    assert all(set(line) == {"check", "ok", "evidence", "seconds"} for line in lines.values())
    assert result.returncode == 1
    assert not lines["model"]["ok"]
    assert "tandem pull smollm2-135m" in lines["model"]["evidence"]
    assert lines["platform"]["ok"]


def test_a_busy_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        ok, evidence = doctor.check_ports(load_config(None, {"router": {"grpc_port": port}}))
    assert not ok
    assert f"router.grpc_port: can't listen on 127.0.0.1:{port}" in evidence


def test_too_few_open_files_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    ok, evidence = doctor.check_open_files(load_config())
    assert not ok
    assert "ulimit -n 1024" in evidence


def test_more_threads_than_cores_and_more_memory_than_there_is_are_noticed() -> None:
    config = load_config(None, {"decode": {"threads": 256, "replicas": 64, "arena_bytes": 2**40}})
    assert not doctor.check_cores(config)[0]
    ok, evidence = doctor.check_memory(config)
    assert not ok
    assert "lower prefill.arena_bytes" in evidence


def test_the_kernels_in_use_are_named_and_none_is_a_fault_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TANDEM_KERNELS", "portable")
    ok, evidence = doctor.check_kernels(load_config())
    assert ok
    assert evidence.startswith("portable, of sources ")
    monkeypatch.setenv("TANDEM_KERNELS", "torch")
    assert doctor.check_kernels(load_config())[0]
    monkeypatch.delenv("TANDEM_KERNELS")
    monkeypatch.setattr(doctor, "native", lambda: None)
    ok, evidence = doctor.check_kernels(load_config())
    assert not ok
    assert "install a C++ compiler" in evidence
