"""A cluster that Ray runs, on several Ray nodes of this machine, for drills that kill nodes.

Owns the head, the nodes (each what `ray start --block` runs) and the `tandem serve --address …` beside them, and leaves none of
them. A node dies with all that runs on it, as a machine does; the roles on it are Ray's to start again elsewhere.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from protos import tandem_pb2 as pb
from tandem.clock import now_s
from tandem.cluster import OBJECT_STORE_BYTES
from tandem.drills.processes import ProcessCluster, role_of, wait_until
from tandem.errors import DeadlineExceeded, TandemError
from tandem.ports import free_port

HEAD = "head"
READY_S = 120.0
_RAY_S = 40.0
_END_S = 10.0
_ROUTER = "router"


class RayCluster(ProcessCluster):
    """`head` is Ray's head and has no roles, `node-…` are its nodes. The configuration says how many of each role there are."""

    def __init__(self, folder: Path, overrides: Mapping[str, Any]) -> None:
        super().__init__(folder, overrides)
        self._ray_dir = Path(tempfile.mkdtemp(prefix="tandem-ray-"))  # a short path: Ray's sockets lie in it
        self._address = f"127.0.0.1:{free_port('127.0.0.1')}"
        self._token = secrets.token_hex(32)
        self._serve: subprocess.Popen[bytes] | None = None
        self._seen: dict[str, int] = {}
        """The last process of each role that a router listed."""

    def launch(self, names: Sequence[str]) -> None:
        self.spawn(HEAD)
        for name in names:
            if role_of(name) == "node":
                self.spawn(name)
            elif name != HEAD:
                self.processes[name] = RoleInRay(self, name)
        command = [
            sys.executable,
            "-m",
            "tandem.cli",
            "serve",
            "--config",
            str(self.config_file),
            "--address",
            self._address,
        ]
        self._serve = self._run("serve", command)

    def spawn(self, name: str) -> None:
        """Starts a node. Roles are Ray's to start; a second head would be another Ray, of which the nodes know nothing."""
        if role_of(name) not in (HEAD, "node") or (name == HEAD and HEAD in self.processes):
            return
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-gpus", "0",
            "--object-store-memory", str(OBJECT_STORE_BYTES), "--node-name", name,
            "--min-worker-port", "0", "--max-worker-port", "0",
        ]  # fmt: skip
        if name == HEAD:
            port = self._address.rpartition(":")[2]
            command += ["--head", "--port", port, "--num-cpus", "0", "--temp-dir", str(self._ray_dir)]
            command += ["--include-dashboard", "false"]
        else:
            command += ["--address", self._address, "--num-cpus", "1"]
        log = self.folder / f"{name}.log"
        began = log.stat().st_size if log.exists() else 0
        node = self.processes[name] = RayNode(self._run(name, command))

        def up() -> bool:
            if node.poll() is not None:
                raise TandemError(f"Ray's {name} ended with {node.returncode}\n{self.logs()}")
            return b"Ray runtime started" in log.read_bytes()[began:]

        # One after the other: nodes that start at once on one machine take each other's ports.
        wait_until(up, _RAY_S, f"Ray's {name} runs")

    def _run(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment_of(name),
                cwd=self.folder,
                start_new_session=True,
            )

    def environment_of(self, name: str) -> dict[str, str]:
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token, "RAY_USAGE_STATS_ENABLED": "0"}
        return super().environment_of(name) | ray

    def listed(self) -> dict[str, pb.ProcessStatus] | None:
        found = super().listed()
        self._seen |= {name: status.pid for name, status in (found or {}).items()}
        return found

    def pid_of(self, role: str) -> int:
        """The last one that a router listed; 0 before."""
        return self._seen.get(role, 0)

    def is_listed(self, name: str, listed: dict[str, pb.ProcessStatus] | None) -> bool:
        if name == HEAD or role_of(name) in ("node", _ROUTER):
            return listed is not None
        return (
            listed is not None
            and name in listed
            and listed[name].num_blocks > 0
            and psutil.pid_exists(listed[name].pid)
        )

    def wait_ready(self, names: Sequence[str], deadline_s: float = READY_S) -> None:
        """Until routers answer and list the roles of `names`, wherever they run."""

        def ready() -> bool:
            listed = self.listed()
            return all(self.is_listed(name, listed) for name in names)

        try:
            wait_until(ready, deadline_s, f"{', '.join(names)} ready")
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{error}\n{self.logs()}") from error

    def stop(self) -> dict[str, int]:
        """`tandem serve` by SIGTERM, then the nodes; exit codes. The first is −9 where it doesn't end in time."""
        self.client.close()
        codes: dict[str, int] = {}
        if self._serve is not None:
            if HEAD in self.processes and self.processes[HEAD].poll() is None:
                self._serve.terminate()
            else:
                _end_tree(self._serve.pid)  # without its head it has nobody to ask
            try:
                codes["serve"] = self._serve.wait(4 * _END_S)
            except subprocess.TimeoutExpired:
                _end_tree(self._serve.pid)
                codes["serve"] = self._serve.wait()
        for name, process in self.processes.items():
            if isinstance(process, RayNode):
                process.kill()
                codes[name] = process.wait(_END_S)
        shutil.rmtree(self._ray_dir, ignore_errors=True)
        return codes


class RayNode:
    """What `ray start --block` runs. A signal is for all processes of the node, those of roles too."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        return self._process.wait(timeout)

    def send_signal(self, number: int) -> None:
        _end_tree(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class RoleInRay:
    """A role that Ray runs, whichever process that is now. It doesn't end; it is started again."""

    returncode = None

    def __init__(self, cluster: RayCluster, name: str) -> None:
        self._cluster = cluster
        self._name = name

    @property
    def pid(self) -> int:
        return self._cluster.pid_of(self._name)

    def poll(self) -> int | None:
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Until the process of now is gone."""
        pid, end_s, pause = self.pid, now_s() + (timeout or _END_S), threading.Event()
        while pid and psutil.pid_exists(pid):
            if now_s() > end_s:
                raise subprocess.TimeoutExpired(self._name, timeout or _END_S)
            pause.wait(0.02)
        return 0

    def send_signal(self, number: int) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                psutil.Process(self.pid).send_signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _end_tree(pid: int, number: int = signal.SIGKILL) -> None:
    """A signal for a process and all below it, those first that could start others."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in [top, *top.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
