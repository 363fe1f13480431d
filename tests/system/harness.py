"""A real cluster for tests: each role a process of its own, on free ports, without Ray.

Owns the processes it starts and leaves none behind. Logs go to files in the test's folder; `logs` shows their ends.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil

from protos import tandem_pb2 as pb
from tandem.client import Client
from tandem.config import PORT_STEP, Config, dump_config, load_config
from tandem.errors import TandemError

REPOSITORY = Path(__file__).resolve().parents[2]
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 15.0
_MODULES = {"router": "router", "prefill": "prefill_worker", "decode": "decode_worker", "pool": "kvpool"}


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel hands to connections: none can take it before we bind it."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(10_000, first_ephemeral), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("100 ports tried, none free")


def free_ports(num_replicas: int) -> tuple[int, int]:
    """A gRPC and a control port for the first of so many routers, that those of the others are free beside."""
    for _ in range(100):
        ports = free_port(), free_port()
        needed = {port + number * PORT_STEP for port in ports for number in range(num_replicas)}
        if len(needed) == 2 * num_replicas and all(_is_free(port) for port in needed):
            return ports
    raise AssertionError("no ports in a row are free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def wait_until(condition: Callable[[], Any], deadline_s: float, what: str) -> Any:
    """The first true value of `condition`; AssertionError after `deadline_s`."""
    end_s = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end_s, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)


class RunningCluster:
    """1 router, 1 prefill worker, 1 decode worker and 1 pool node by default."""

    def __init__(self, folder: Path, overrides: dict[str, Any] | None = None) -> None:
        self.folder = folder
        values: dict[str, Any] = {
            "run_dir": str(folder / "run"),
            "router": {"grpc_port": free_port(), "control_port": free_port(), "metrics_port": free_port()},
            "prefill": {"arena_bytes": 512 * 2**20},
            "decode": {"arena_bytes": 512 * 2**20},
            "pool": {"host_bytes": 512 * 2**20},
        }
        for section, entries in (overrides or {}).items():
            if isinstance(entries, dict):
                values.setdefault(section, {}).update(entries)
            else:
                values[section] = entries
        self.config: Config = load_config(overrides=values)
        self.config_file = folder / "config.yaml"
        self.config_file.write_text(dump_config(self.config))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.client = Client(self.config.router.grpc_target)

    def start(self, names: Sequence[str] = ("router", "pool-0", "prefill-0", "decode-0")) -> RunningCluster:
        for name in names:
            self.spawn(name)
        self.wait_ready([name for name in names if not name.startswith("router")])
        return self

    def spawn(self, name: str) -> None:
        module = _MODULES[name.split("-")[0]]
        command = [sys.executable, "-m", module, "--config", str(self.config_file)]
        command += ["--name", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(REPOSITORY)}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY
            )

    def wait_ready(self, names: Sequence[str]) -> None:
        def ready() -> bool:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended with {process.returncode}\n{self.logs()}"
            try:
                seen = self.client.cluster()
            except TandemError:
                return False
            known = {process.name: process for process in seen.processes}
            return all(
                name in known and known[name].pid == self.processes[name].pid and known[name].num_blocks
                for name in names
            )

        try:
            wait_until(ready, START_DEADLINE_S, f"{names} ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        self.processes[name].send_signal(number)

    def status(self, name: str) -> pb.ProcessStatus:
        return next(process for process in self.client.cluster().processes if process.name == name)

    def generate(self, prompt: Any, **sampling: Any) -> Answer:
        return Answer(self.client, prompt, sampling)

    def logs(self, lines: int = 25) -> str:
        parts = []
        for file in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-lines:]))
        return "\n".join(parts)

    def stop(self) -> dict[str, int]:
        """SIGTERM to all, workers first; returns exit codes. Whoever doesn't end in time is killed and has −9."""
        self.client.close()
        for name in sorted(self.processes, key=lambda name: name.startswith("router")):
            process = self.processes[name]
            if process.poll() is None:
                process.terminate()
        codes = {}
        for name, process in self.processes.items():
            try:
                codes[name] = process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes[name] = -9
        return codes


class Answer:
    """One streamed answer, gathered as it comes."""

    def __init__(self, client: Client, prompt: Any, sampling: dict[str, Any], timeout_s: float = 120.0) -> None:
        self.accepted: pb.Accepted | None = None
        self.completed: pb.Completed | None = None
        self.tokens: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.logprobs: list[pb.TokenLogprob] = []
        for event in client.generate(prompt, pb.SamplingParams(**sampling), timeout_s=timeout_s):
            match event.WhichOneof("event"):
                case "accepted":
                    self.accepted = event.accepted
                case "chunk":
                    chunk = event.chunk
                    stream = self.tokens.setdefault(chunk.index, [])
                    assert chunk.position == len(stream)
                    stream.extend(chunk.token_ids)
                    self.text[chunk.index] = self.text.get(chunk.index, "") + chunk.text
                    self.logprobs.extend(chunk.logprobs)
                    if chunk.finish_reason:
                        assert chunk.index not in self.reasons
                        self.reasons[chunk.index] = chunk.finish_reason
                case "completed":
                    assert self.completed is None
                    self.completed = event.completed

    def run(self, role: str) -> pb.RoleRun:
        assert self.completed is not None
        return [run for run in self.completed.runs if run.role == role][-1]


def leftovers(pid: int) -> dict[str, int]:
    """What a live process holds: its mappings and descriptors of arenas, its sockets, its threads."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    process = psutil.Process(pid)
    return {
        "arena_mappings": sum("tandem-arena" in line for line in maps.splitlines()),
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


__all__ = ["Answer", "RunningCluster", "free_port", "grpc", "leftovers", "wait_until"]
