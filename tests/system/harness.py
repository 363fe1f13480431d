"""A real cluster for tests: each role a process of its own, on free ports, without Ray.

Owns the processes it starts and leaves none behind. Logs go to files in the test's folder; `logs` shows their ends.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import msgspec
import psutil

from protos import tandem_pb2 as pb
from tandem.client import Client
from tandem.config import PORT_STEP, Config, dump_config, load_config
from tandem.errors import TandemError
from tests.system import quick_worker
from tests.system.quick_worker import Fault

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
    """1 router, 1 prefill worker, 1 decode worker and 1 pool node by default. With `faults`, which may be none, the workers are
    those of `quick_worker`."""

    def __init__(
        self, folder: Path, overrides: dict[str, Any] | None = None, faults: Sequence[Fault] | None = None
    ) -> None:
        self.folder = folder
        self._faults = faults
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
        role = name.split("-")[0]
        module = _MODULES[role]
        if self._faults is not None and role in ("prefill", "decode"):
            module = quick_worker.__name__
        command = [sys.executable, "-m", module, "--config", str(self.config_file)]
        command += ["--name", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(REPOSITORY)}
        environment[quick_worker.VARIABLE] = msgspec.json.encode(self._faults or []).decode()
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

    def watch(self, prompt: Any, **sampling: Any) -> Watched:
        """Starts a request and returns at once."""
        watched = Watched(self.client, prompt, sampling)
        watched.start()
        return watched

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


class Watched(threading.Thread):
    """One streamed sample, read by a thread of its own: its tokens, when each came, and how it ended."""

    def __init__(self, client: Client, prompt: Any, sampling: dict[str, Any]) -> None:
        super().__init__(name="watched", daemon=True)
        self._client = client
        self.prompt = prompt
        self.sampling = sampling
        self.tokens: list[int] = []
        self.times_s: list[float] = []
        self.completed: pb.Completed | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            sampling = pb.SamplingParams(**self.sampling)
            for event in self._client.generate(self.prompt, sampling, timeout_s=120.0):
                if event.HasField("chunk"):
                    assert event.chunk.position == len(self.tokens)
                    self.times_s.extend(time.monotonic() for _ in event.chunk.token_ids)
                    self.tokens.extend(event.chunk.token_ids)
                elif event.HasField("completed"):
                    self.completed = event.completed
        except BaseException as error:
            self.error = error

    def result(self, deadline_s: float = 60.0) -> list[int]:
        """All its tokens, once it has completed, without help from the client."""
        self.join(deadline_s)
        assert self.error is None, self.error
        assert self.completed is not None, f"not complete after another {deadline_s} s, {len(self.tokens)} tokens came"
        assert self.completed.resume_no == 0
        return self.tokens

    @property
    def longest_gap_s(self) -> float:
        """The longest time between two of its tokens."""
        return max((after - before for before, after in itertools.pairwise(self.times_s)), default=0.0)

    def processes(self, role: str) -> list[str]:
        """Where the role ran, in order; known when it has completed."""
        assert self.completed is not None
        return [run.process for run in self.completed.runs if run.role == role]


def leftovers(pid: int) -> dict[str, int]:
    """What a live process holds: its mappings and descriptors of arenas, its sockets, its threads."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    process = psutil.Process(pid)
    return {
        "arena_mappings": sum("tandem-arena" in line for line in maps.splitlines()),
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


__all__ = ["Answer", "RunningCluster", "Watched", "free_port", "grpc", "leftovers", "wait_until"]
