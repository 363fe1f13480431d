"""A running cluster that drills play on, with the lines and the disk that they may hurt.

Owns its processes, proxies and file system; `restore` makes it as new for the next drill, `close` leaves nothing.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil

from protos import tandem_pb2 as pb
from tandem.config import merged
from tandem.drills.model import shallow
from tandem.drills.processes import Process, ProcessCluster
from tandem.drills.proxy import EventRelay, Line, Proxy
from tandem.drills.ray_cluster import RayCluster
from tandem.drills.spec import ClusterSpec
from tandem.errors import StorageFault, TandemError

MiB = 2**20
BASE: dict[str, Any] = {
    "prefill": {"arena_bytes": 64 * MiB},
    "decode": {"arena_bytes": 64 * MiB},
    "pool": {"host_bytes": 64 * MiB},
    "router": {"heartbeat_s": 0.1, "liveness_s": 2.0, "progress_s": 20.0},
    "transfer": {"lease_s": 2.0, "grace_s": 1.0, "hold_s": 3.0, "fetch_timeout_s": 8.0},
}
"""What drills don't wait long for."""
RESTART_S = 60.0
_BEHIND, _BEFORE = "127.0.1", "127.0.2"
"""Networks of loopback: a process behind a proxy listens in the first one and is told to others in the second."""


class Stage:
    """A cluster of `spec`, started. Raises TandemError if it can't be."""

    def __init__(self, spec: ClusterSpec, folder: Path, model: str = "smollm2-135m") -> None:
        self.spec = spec
        self.folder = folder
        self.lines = {name: Line() for name in spec.lines}
        self.disk: Path | None = None
        self._leaving: dict[str, Process] = {}
        values = merged(BASE, {"model": {"path": str(shallow(model, spec.layers)), "name": "drill"}})
        if spec.small_disk_bytes:
            self.disk = _mounted(folder / "disk", spec.small_disk_bytes)
            values = merged(values, {"pool": {"disk": {"dirs": [str(self.disk)]}}})
        values = merged(values, spec.config)
        self.cluster = RayCluster(folder, values) if spec.in_ray else ProcessCluster(folder, values, spec.own)
        try:
            for name in spec.lines:
                self._lay(name)
            self.cluster.launch(spec.processes)
            self._wait_ready(spec.processes)
        except BaseException:
            self.close()
            raise

    def start(self, name: str) -> None:
        """Starts a process (again), and waits for its lines, not for it."""
        process = self.cluster.processes.get(name)
        self._see_off(name)
        if process is not None and process.poll() is None:
            raise TandemError(f"{name} runs already, as process {process.pid}")
        self.cluster.spawn(name)
        if any(line.process == name and line.kind == "data" for line in self.spec.lines.values()):
            self._wait_ready([name])

    def ask_to_stop(self, name: str) -> None:
        """By SIGTERM: it finishes or gives back what it has, and is expected to end with 0."""
        process = self._leaving[name] = self.cluster.processes[name]
        process.terminate()

    def _see_off(self, name: str) -> None:
        """Waits for one that was asked to stop. Raises TandemError if it doesn't end well."""
        process = self._leaving.pop(name, None)
        if process is None:
            return
        try:
            code = process.wait(RESTART_S)
        except subprocess.TimeoutExpired:
            raise TandemError(
                f"{name} (process {process.pid}) has not ended within {RESTART_S:g} s of SIGTERM"
            ) from None
        if code:
            raise TandemError(f"{name} (process {process.pid}) ended with {code} after SIGTERM")

    def restore(self) -> None:
        """Every process of the spec runs and is listed, nobody else does, every line is whole."""
        for name, process in self.cluster.processes.items():
            if process.poll() is None and name not in self.spec.processes:
                process.kill()
                process.wait()
        for line in self.lines.values():
            line.set("open")
            for relay in line.relays:
                relay.drop = relay.swap = 0
        if self.disk is not None:
            (self.disk / "others").unlink(missing_ok=True)
        for name in self.spec.processes:
            process = self.cluster.processes[name]
            self._see_off(name)
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
            else:
                self.cluster.spawn(name)
        self._wait_ready(self.spec.processes)

    def pids(self) -> dict[str, int]:
        """Of the processes that live."""
        running = [(name, process) for name, process in self.cluster.processes.items() if process.poll() is None]
        return {name: process.pid for name, process in running if process.pid}

    def close(self) -> dict[str, int]:
        """Stops everything; exit codes."""
        codes = self.cluster.stop()
        for line in self.lines.values():
            line.close()
        if self.disk is not None:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=False, capture_output=True)
        return codes

    # --- lines ---------------------------------------------------------------------------------------------------------

    def _lay(self, name: str) -> None:
        """Has a process dial, or be dialled, through a proxy, before it starts."""
        spec = self.spec.lines[name]
        router = self.cluster.config.router
        if spec.kind == "control":
            addresses = []
            for number in range(router.replicas):
                port = router.replica(number).control_port
                proxy = Proxy(self.lines[name], "127.0.0.1", 0, ("127.0.0.1", port))
                addresses.append(f"127.0.0.1:{proxy.port}")
            self.cluster.set_own(spec.process, {"router": {"addresses": addresses}})
        else:
            number = 1 + sorted(self.lines).index(name)
            behind, before = f"{_BEHIND}.{number}", f"{_BEFORE}.{number}"
            self.cluster.set_own(
                spec.process,
                {"transfer": {"host": behind, "advertised_host": before, "machine_id": f"machine-{number}"}},
            )

    def _wait_ready(self, names: list[str]) -> None:
        self.cluster.wait_ready(names)
        listed = self.cluster.listed() or {}
        for name, spec in self.spec.lines.items():
            if spec.kind == "data" and spec.process in names:
                self._open(self.lines[name], listed[spec.process])

    def _open(self, line: Line, status: pb.ProcessStatus) -> None:
        """Proxies for all that a process listens on; they are new when the process is."""
        host, _, port = status.events_endpoint.removeprefix("tcp://").rpartition(":")
        behind = host.replace(_BEFORE, _BEHIND, 1)
        ports = {
            connection.laddr.port
            for connection in psutil.Process(status.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == behind
        }
        if ports - {int(port)} == {proxy.port for proxy in line.proxies}:
            return
        line.close()
        line.relays.append(EventRelay(f"tcp://{behind}:{port}", f"tcp://{host}:{port}"))
        for other in ports - {int(port)}:
            Proxy(line, host, other, (behind, other))


def _mounted(path: Path, num_bytes: int) -> Path:
    """A file system of its own. Raises StorageFault where that may not be."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise StorageFault(f"a drill needs a small file system, and can't mount one: {done.stderr.decode().strip()}")
    return path
