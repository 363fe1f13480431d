"""`tandem serve`, from its start to its end, with the real roles and a real model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "tandem.cli"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    file = tmp_path / "config.yaml"
    arena = "arena_bytes: 100000000"
    file.write_text(
        f"cluster: cli-test\nrun_dir: {tmp_path}/run\nmodel: {{path: smollm2-135m}}\n"
        f"router: {{grpc_port: {ports[0]}, control_port: {ports[1]}, http_port: 0, admin_port: 0}}\n"
        f"prefill: {{{arena}}}\ndecode: {{{arena}}}\npool: {{host_bytes: 100000000}}\n"
    )
    return file


def tandem(configuration: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments, "--config", str(configuration)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.timeout(400)
def test_a_cluster_serves_survives_a_killed_worker_and_goes_without_a_trace(configuration: Path) -> None:
    folders = set(Path(tempfile.gettempdir()).glob("tandem-*"))
    shared = set(Path("/dev/shm").iterdir())
    command = [*COMMAND, "serve", "--config", str(configuration)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            said = next((line for line in serving.stdout if line.startswith("ready: ")), "")
            assert "serves smollm2-135m" in said, serving.communicate(timeout=30)

            status = tandem(configuration, "status", "--json")
            assert status.returncode == 0, status.stderr
            processes = {process["role"]: process for process in json.loads(status.stdout)["processes"]}
            assert set(processes) == {"prefill", "decode", "pool"}
            second = tandem(configuration, "serve")
            assert second.returncode == 1
            assert f"is in use by process {serving.pid}" in second.stderr

            ask = ("generate", "Count from one to ten.", "--max-tokens", "24")
            before = tandem(configuration, *ask)
            assert before.returncode == 0, before.stderr
            os.kill(processes["decode"]["pid"], signal.SIGKILL)
            back = next(line for line in serving.stdout if line.startswith("decode-0 is back as process"))
            assert int(back.split()[-1]) != processes["decode"]["pid"]
            after = tandem(configuration, *ask)
            assert (after.returncode, after.stdout) == (0, before.stdout), after.stderr
            assert tandem(configuration, "audit").returncode == 0

            children = psutil.Process(serving.pid).children(recursive=True)
            down = tandem(configuration, "down")
            assert (down.returncode, serving.wait(30)) == (0, 0), down.stderr
        finally:
            serving.terminate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert set(Path(tempfile.gettempdir()).glob("tandem-*")) <= folders
    assert set(Path("/dev/shm").iterdir()) <= shared
    assert sorted(path.name for path in (configuration.parent / "run").iterdir()) == [
        "logs",
        "router.secret",
        "serve.json",
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_port_in_use_is_one_sentence_and_nothing_keeps_running(configuration: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        text = configuration.read_text()
        configuration.write_text(
            "\n".join(
                f"router: {{grpc_port: {port}, control_port: 0, http_port: 0, admin_port: 0}}"
                if line.startswith("router:")
                else line
                for line in text.splitlines()
            )
        )
        result = tandem(configuration, "serve")
    assert result.returncode == 1
    assert str(port) in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert tandem(configuration, "down").returncode == 1
