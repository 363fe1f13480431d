"""A real cluster for tests (`tandem.drills.processes`), and what its answers are."""

from __future__ import annotations

import itertools
import random
import socket
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
from tandem.config import PORT_STEP, merged
from tandem.drills.processes import ProcessCluster, role_of
from tests.system import quick_worker
from tests.system.quick_worker import Fault


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


class RunningCluster(ProcessCluster):
    """1 router, 1 prefill worker, 1 decode worker and 1 pool node by default. With `faults`, which may be none, the workers are
    those of `quick_worker`."""

    def __init__(
        self, folder: Path, overrides: dict[str, Any] | None = None, faults: Sequence[Fault] | None = None
    ) -> None:
        self._faults = faults
        values: dict[str, Any] = {
            "router": {"http_port": 0, "admin_port": free_port()},
            "prefill": {"arena_bytes": 512 * 2**20},
            "decode": {"arena_bytes": 512 * 2**20},
            "pool": {"host_bytes": 512 * 2**20},
        }
        super().__init__(folder, merged(values, overrides or {}))

    def start(self, names: Sequence[str] = ("router", "pool-0", "prefill-0", "decode-0")) -> RunningCluster:
        super().start(names)
        return self

    def module_of(self, name: str) -> str:
        if self._faults is not None and role_of(name) in ("prefill", "decode"):
            return quick_worker.__name__
        return super().module_of(name)

    def environment_of(self, name: str) -> dict[str, str]:
        faults = msgspec.json.encode(self._faults or []).decode()
        return super().environment_of(name) | {quick_worker.VARIABLE: faults}

    def generate(self, prompt: Any, **sampling: Any) -> Answer:
        return Answer(self.client, prompt, sampling)

    def watch(self, prompt: Any, **sampling: Any) -> Watched:
        """Starts a request and returns at once."""
        watched = Watched(self.client, prompt, sampling)
        watched.start()
        return watched


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
