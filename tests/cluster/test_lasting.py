"""A cluster that outlives who keeps it, on several Ray nodes with addresses of their own; roles without a model."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tandem.client import Client
from tandem.cluster import OBJECT_STORE_BYTES, Cluster, stop_lasting, unprotected_head
from tandem.config import Config, load_config
from tandem.ports import free_port

HERE = Path(__file__).parent
FAKES = dict.fromkeys(("prefill", "decode", "pool"), "fake_roles:run_worker") | {"router": "fake_roles:run_router"}
HEAD, NODES = "127.0.0.2", ("127.0.0.3", "127.0.0.4")


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        pause.wait(0.1)


@pytest.fixture
def ray_of_two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head without roles; two nodes have joined it, each on an address of its own."""
    from tandem.ray_role import ray_module

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray_module()
    folder = tempfile.mkdtemp(prefix="tandem-ray-")
    address = f"{HEAD}:{free_port(HEAD)}"
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> None:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-gpus", "0",
            "--object-store-memory", str(OBJECT_STORE_BYTES), "--min-worker-port", "0", "--max-worker-port", "0", *arguments,
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        started.append(process)
        said = ""
        assert process.stdout is not None
        while "Ray runtime started" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line

    try:
        port = address.rpartition(":")[2]
        start(
            "--head", "--port", port, "--num-cpus", "0", "--node-ip-address", HEAD, "--temp-dir", folder,
            "--include-dashboard", "false", "--node-name", "head",
        )  # fmt: skip
        for number, node in enumerate(NODES):
            start("--address", address, "--num-cpus", "1", "--node-ip-address", node, "--node-name", f"node-{number}")
        yield address
    finally:
        for process in started:
            for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                each.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.mark.slow
def test_who_keeps_a_cluster_may_go_and_another_finds_it_as_it_was(ray_of_two_nodes: str, tmp_path: Path) -> None:
    ports = {"grpc_port": free_port(NODES[0]), "control_port": free_port(NODES[1]), "http_port": 0, "admin_port": 0}
    config = load_config(None, {"run_dir": str(tmp_path), "router": ports})
    with Cluster(config, entry_points=FAKES, lasting=True) as cluster:
        cluster.start(address=ray_of_two_nodes, timeout_s=120)
        where = {placed.name: placed.node_id for placed in cluster.processes()}
        assert set(where) == {"router", "prefill-0", "decode-0", "pool-0", "pool-1"}
        assert where["prefill-0"] != where["decode-0"]
        assert where["pool-0"] != where["pool-1"]
        hosts = {name: (tmp_path / f"{name}.host").read_text() for name in ("prefill-0", "decode-0")}
        assert set(hosts.values()) == set(NODES)
        assert re.fullmatch(rf"127\.0\.0\.[34]:{ports['grpc_port']}", cluster.target)
        assert set(cluster.config.router.addresses) == {f"{node}:{ports['control_port']}" for node in NODES}
        assert "in memory" in unprotected_head()
        assert any("whoever reaches their ports is trusted" in line for line in cluster.exposure())
        with Client(cluster.target) as client:
            client.set_replicas(decode=2)
        said: list[str] = []
        wait_for(lambda: said.extend(cluster.supervise()) or "decode-1 is up" in said, "another decode worker")
        before = {placed.name: placed.pid for placed in cluster.processes()}
        target = cluster.target
    assert all(psutil.pid_exists(pid) for pid in before.values())

    with Cluster(config, entry_points=FAKES, lasting=True) as again:
        again.start(address=ray_of_two_nodes, timeout_s=120)
        assert {placed.name: placed.pid for placed in again.processes()} == before
        assert again.target == target
        assert (again.wanted.prefill, again.wanted.decode) == (1, 2)
        assert again.supervise() == []

    assert set(stop_lasting(config, ray_of_two_nodes)) == set(before)
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in before.values()), "all have ended")
    assert not list(tmp_path.glob("*.worker"))


def test_a_config_says_nothing_of_addresses_until_there_are_several_machines(tmp_path: Path) -> None:
    config: Config = load_config(None, {"run_dir": str(tmp_path)})
    assert Cluster(config).exposure() == []
    assert Cluster(config).target == "127.0.0.1:8050"
