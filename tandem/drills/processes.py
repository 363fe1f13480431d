"""A cluster of real processes without Ray: each role a process of its own, on free ports.

Owns the processes it starts, leaves none behind, and keeps their logs in its folder. Whatever doesn't happen in time is a
`TandemError` with the ends of the logs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from protos import tandem_pb2 as pb
from router.operator import operator_credentials
from router.secret import secret_path, shared_secret
from tandem.client import Client
from tandem.clock import now_s
from tandem.config import Config, dump_config, load_config, merged
from tandem.credentials import Credentials
from tandem.errors import DeadlineExceeded, TandemError
from tandem.ports import with_free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 15.0
_LOOK_S = 0.02
_MODULES = {"router": "router", "prefill": "prefill_worker", "decode": "decode_worker", "pool": "kvpool"}

T = TypeVar("T")


def wait_until(condition: Callable[[], T], deadline_s: float, what: str) -> T:
    """The first true value of `condition`. Raises DeadlineExceeded after `deadline_s`."""
    end_s = now_s() + deadline_s
    pause = threading.Event()
    while not (value := condition()):
        if now_s() >= end_s:
            raise DeadlineExceeded(f"not within {deadline_s:g} s: {what}")
        pause.wait(_LOOK_S)
    return value


def role_of(name: str) -> str:
    """Of a process by its name."""
    return name.partition("-")[0]


class Process(Protocol):
    """What `subprocess.Popen` can do with one."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | Any: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class ProcessCluster:
    """Processes that share a configuration, `own` of one of them merged into it. Nothing runs before `start` or `spawn`."""

    def __init__(
        self,
        folder: Path,
        overrides: Mapping[str, Any],
        own: Mapping[str, Mapping[str, Any]] | None = None,
        credentials: Credentials = Credentials(),
    ) -> None:
        self.folder = folder
        ports = {"grpc_port": 0, "control_port": 0, "http_port": 0, "admin_port": 0}
        values = {"run_dir": str(folder / "run"), "router": ports}
        self._values = merged(values, overrides)
        self._own = dict(own or {})
        self.config: Config = with_free_ports(load_config(overrides=self._values))
        self.config_file = folder / "config.yaml"
        self.config_file.write_text(dump_config(self.config), encoding="utf-8")
        self.processes: dict[str, Process] = {}
        if self.config.router.keys_file:
            shared_secret(secret_path(self.config))
        self.client = Client(self.config.router.grpc_target, credentials=operator_credentials(self.config, credentials))

    def start(self, names: Sequence[str]) -> None:
        """Starts these at once and waits until all are listed."""
        self.launch(names)
        self.wait_ready(names)

    def launch(self, names: Sequence[str]) -> None:
        """Starts these at once."""
        for name in names:
            self.spawn(name)

    def spawn(self, name: str) -> None:
        """Starts one process; whoever had its name must have ended."""
        command = [sys.executable, "-m", self.module_of(name), "--config", str(self._config_of(name)), "--name", name]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.environment_of(name), cwd=REPOSITORY
            )

    def module_of(self, name: str) -> str:
        """What a process runs."""
        return _MODULES[role_of(name)]

    def environment_of(self, name: str) -> dict[str, str]:
        """What a process gets."""
        return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(REPOSITORY)}

    def set_own(self, name: str, values: Mapping[str, Any]) -> None:
        """What that process' configuration has besides, when it is started the next time."""
        self._own[name] = merged(self._own.get(name, {}), values)

    def _config_of(self, name: str) -> Path:
        if name not in self._own:
            return self.config_file
        file = self.folder / f"{name}.yaml"
        values = merged(self.config.model_dump(mode="json"), self._own[name])
        file.write_text(dump_config(load_config(overrides=values)), encoding="utf-8")
        return file

    def wait_ready(self, names: Sequence[str], deadline_s: float = START_DEADLINE_S) -> None:
        """Until routers answer and list the running processes of `names`, with their memory. Raises DeadlineExceeded, or
        TandemError if one of them has ended."""

        def ready() -> bool:
            for name in names:
                if self.processes[name].poll() is not None:
                    raise TandemError(f"{name} ended with {self.processes[name].returncode}")
            return all(self.is_listed(name, listed) for listed in (self.listed(),) for name in names)

        try:
            wait_until(ready, deadline_s, f"{', '.join(names)} ready")
        except TandemError as error:
            raise type(error)(f"{error}\n{self.logs()}") from error

    def listed(self) -> dict[str, pb.ProcessStatus] | None:
        """What the router lists, by name; None while none answers."""
        try:
            return {process.name: process for process in self.client.cluster(timeout_s=2.0).processes}
        except TandemError:
            return None

    def is_listed(self, name: str, listed: dict[str, pb.ProcessStatus] | None) -> bool:
        """Whether that is the process that runs now."""
        if listed is None or role_of(name) == "router":
            return listed is not None
        return name in listed and listed[name].pid == self.processes[name].pid and listed[name].num_blocks > 0

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        self.processes[name].send_signal(number)

    def status(self, name: str) -> pb.ProcessStatus:
        """Of a process that is listed."""
        return next(process for process in self.client.cluster().processes if process.name == name)

    def logs(self, lines: int = 25) -> str:
        """Their ends."""
        parts = []
        for file in sorted(self.folder.glob("*.log")):
            text = file.read_text(encoding="utf-8", errors="replace")
            parts.append(f"--- {file.name}\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(parts)

    def stop(self) -> dict[str, int]:
        """SIGTERM to all, workers first; returns exit codes. Whoever doesn't end in time is killed and has −9."""
        self.client.close()
        for name in sorted(self.processes, key=lambda name: role_of(name) == "router"):
            process = self.processes[name]
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
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
