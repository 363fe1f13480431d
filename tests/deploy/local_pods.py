"""The Pods of a rendered overlay as processes of this machine: each container's own command line, environment, files and probes.

What a cluster would give a Pod and this machine gives otherwise is all in `Local`, and in these rules:

- a Pod's address is a loopback address of its own, so that ports are as rendered; `router.host` is that address, and names of
  Services (`router-0.routers`) are replaced by the addresses behind them;
- a volume is a folder, and paths of mounts in commands, environment, configuration and probes become paths below it; /tmp and
  /dev/shm stay this machine's;
- the volume `cache` is one for all Pods, so that the weights are packed once;
- Secrets have values made here; images are this environment, `python` and `tandem` those of its `bin`;
- a container that ends with an error before it is ready is started again, as by a kubelet; preStop only orders who of a Pod is
  told to end first.

Limits, security contexts, NetworkPolicies and the Services' own balancing are not tried.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deploy.kubernetes import check
from tests.system.harness import wait_until

ROOT = Path(__file__).resolve().parents[2]
NODE = "local"
SHARED_PATHS = ("/tmp", "/dev/shm")
MAX_RESTARTS = 30
RESTART_PAUSE_S = 2.0
MARK = "LOCAL_CONTAINER"
"""In the environment of all processes of a container: which one it is."""
Resource = dict[str, Any]


@dataclass(frozen=True)
class Local:
    """What of an overlay is otherwise on this machine. `texts` are replaced wherever they stand, `environment` is every
    container's, `model` is put into the claim `model` under its name before anything starts."""

    address: str = ""
    """Of the only Pod, if it must not be a loopback address."""
    environment: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class Container:
    name: str
    command: list[str]
    environment: dict[str, str]
    spec: Resource
    log: Path
    process: subprocess.Popen[bytes] | None = None
    num_starts: int = 0

    def start(self) -> None:
        self.num_starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
            )

    def clear(self) -> None:
        """As when a container ends: what is left of it ends with it."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.environment[MARK]:
                    process.kill()

    def run(self, timeout_s: float) -> int:
        self.start()
        assert self.process is not None
        return self.process.wait(timeout_s)


@dataclass
class Pod:
    name: str
    address: str
    labels: Mapping[str, str]
    grace_s: float
    initial: list[Container]
    containers: list[Container]


class LocalPods:
    """All Pods of `overlay`. `start` returns when every container is ready; `stop` ends all and returns exit codes."""

    def __init__(self, overlay: str, folder: Path, local: Local) -> None:
        self._folder = folder
        self._local = local
        self._resources = check.render(overlay)
        self._config_map = next(r for r in self._resources if r["kind"] == "ConfigMap")["data"]
        self._secrets: dict[tuple[str, str], str] = {}
        self._network = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(254) + 1}"
        self._ray_dir = tempfile.TemporaryDirectory(prefix="tandem-ray-")  # a short path: Ray's sockets lie in it
        claim = folder / "claims" / "model"
        claim.mkdir(parents=True)
        for name, path in local.model.items():
            (claim / name).symlink_to(path)
        planned = [(title, template) for resource in self._resources for title, template in _pods_of(resource)]
        self._addresses = {name: f"{self._network}.{number}" for number, (name, _) in enumerate(planned, 1)}
        if local.address:
            self._addresses = dict.fromkeys(self._addresses, local.address)
        self.jobs, self.pods = [], []
        for name, template in planned:
            is_job = template["spec"].get("restartPolicy", "Always") != "Always"
            (self.jobs if is_job else self.pods).append(self._pod(name, template))

    # --- from manifests to processes -----------------------------------------------------------------------------------

    def _pod(self, name: str, template: Resource) -> Pod:
        spec = template["spec"]
        volumes = {volume["name"]: self._volume(name, volume) for volume in spec.get("volumes", [])}

        def containers(key: str) -> list[Container]:
            return [self._container(name, container, volumes) for container in spec.get(key, [])]

        return Pod(
            name,
            self._addresses[name],
            template["metadata"]["labels"],
            spec.get("terminationGracePeriodSeconds", 30),
            containers("initContainers"),
            containers("containers"),
        )

    def _volume(self, pod: str, volume: Resource) -> Path:
        if "persistentVolumeClaim" in volume:
            return self._folder / "claims" / volume["persistentVolumeClaim"]["claimName"]
        if volume["name"] == "cache":
            path = self._folder / "cache"
        elif "hostPath" in volume:
            path = self._folder / "machine" / volume["hostPath"]["path"].strip("/")
        else:
            path = self._folder / "pods" / pod / "volumes" / volume["name"]
        path.mkdir(parents=True, exist_ok=True)
        if "secret" in volume and not volume["secret"].get("optional"):
            (path / "secret").write_text(self._secret(volume["secret"]["secretName"], "secret"))
        return path

    def _secret(self, name: str, key: str) -> str:
        return self._secrets.setdefault((name, key), secrets.token_hex(32))

    def _container(self, pod: str, spec: Resource, volumes: Mapping[str, Path]) -> Container:
        root = self._folder / "pods" / pod / spec["name"]
        root.mkdir(parents=True)
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in spec.get("volumeMounts", [])}
        paths = set()
        for path, volume in mounts.items():
            if path in SHARED_PATHS:
                continue
            place = root / path.strip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(volume)
            paths.add(path)
            if path == "/cache/models":
                paths.add("/cache")

        def local(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: local(item) for key, item in value.items()}
            if isinstance(value, list):
                return [local(item) for item in value]
            if not isinstance(value, str):
                return int(self._local.texts.get(str(value), value)) if type(value) is int else value
            for path in sorted(paths, key=len, reverse=True):
                value = re.sub(rf"(?<![\w./-]){path}(?![\w-])", f"{root}{path}", value)
            return self._local_text(value)

        if "/etc/tandem" in mounts:
            (mounts["/etc/tandem"] / "tandem.yaml").write_text(local(self._config_map["tandem.yaml"]))
        own = {each["name"]: self._value(pod, each) for each in spec.get("env", [])}
        base = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(root),
            "TANDEM_ROUTER__HOST": self._addresses[pod],
            MARK: str(root),
        }
        environment = base | local(own) | dict(self._local.environment)
        command = [_expanded(argument, environment) for argument in local(spec["command"])]
        return Container(spec["name"], command, environment, local(spec), root / "log")

    def _local_text(self, text: str) -> str:
        for name, address in self._addresses.items():
            text = re.sub(rf"\b{re.escape(name)}\.routers\b", address, text)
        text = text.replace("/tmp/ray", self._ray_dir.name)
        for old, new in self._local.texts.items():
            text = text.replace(old, new)
        return text

    def _value(self, pod: str, variable: Resource) -> str:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if reference := source.get("configMapKeyRef"):
            return str(self._config_map[reference["key"]])
        if reference := source.get("secretKeyRef"):
            return self._secret(reference["name"], reference["key"])
        return {"metadata.name": pod, "status.podIP": self._addresses[pod], "spec.nodeName": NODE}[
            source["fieldRef"]["fieldPath"]
        ]

    # --- life ----------------------------------------------------------------------------------------------------------

    def start(self, deadline_s: float) -> None:
        for job in self.jobs:
            codes = [container.run(deadline_s) for container in (*job.initial, *job.containers)]
            assert set(codes) == {0}, f"{job.name}: {codes}\n{self.logs()}"
        for pod in self.pods:
            for container in pod.initial:
                assert container.run(deadline_s) == 0, f"{pod.name}: {container.name}\n{self.logs()}"
            for container in pod.containers:
                container.start()
        try:
            wait_until(self._are_ready, deadline_s, "all containers ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def _are_ready(self) -> bool:
        for pod, container in self._running():
            assert container.process is not None
            if container.process.poll() is not None:
                assert container.num_starts <= MAX_RESTARTS, f"{pod.name}: {container.name} ends each time"
                container.clear()
                time.sleep(RESTART_PAUSE_S)
                container.start()
                return False
        return all(self.probe(pod, container, "readinessProbe") for pod, container in self._running())

    def _running(self) -> Iterator[tuple[Pod, Container]]:
        return ((pod, container) for pod in self.pods for container in pod.containers)

    def probe(self, pod: Pod, container: Container, name: str) -> bool:
        """What a kubelet would find; True without such a probe."""
        probe = container.spec.get(name)
        if probe is None:
            return True
        if "exec" in probe:
            command = probe["exec"]["command"]
            try:
                done = subprocess.run(command, env=container.environment, capture_output=True, timeout=60, check=False)
            except subprocess.TimeoutExpired:
                return False
            return done.returncode == 0
        if "tcpSocket" in probe:
            try:
                with socket.create_connection((pod.address, _port(container, probe["tcpSocket"]["port"])), timeout=5):
                    return True
            except OSError:
                return False
        url = f"http://{pod.address}:{_port(container, probe['httpGet']['port'])}{probe['httpGet']['path']}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.HTTPError):
            return False

    def failing_probes(self) -> list[str]:
        """All probes of all containers that don't pass."""
        names = ("startupProbe", "readinessProbe", "livenessProbe")
        return [
            f"{pod.name}/{container.name}: {name}"
            for pod, container in self._running()
            for name in names
            if not self.probe(pod, container, name)
        ]

    def endpoints(self, service: str, port: str) -> list[str]:
        """`host:port` of each Pod behind a port of a Service."""
        spec = next(r for r in self._resources if check.title(r) == f"Service/{service}")["spec"]
        target = next(each for each in spec["ports"] if each["name"] == port)["targetPort"]
        chosen = [pod for pod in self.pods if spec["selector"].items() <= pod.labels.items()]
        return [f"{pod.address}:{_port(pod.containers[0], target)}" for pod in chosen]

    def stop(self) -> dict[str, int]:
        """SIGTERM to all Pods at once. Each container's exit code; −9 if it had to be killed at the end of its grace."""
        codes: dict[str, int] = {}
        began_s = time.monotonic()
        delays = {_delay_s(container) for _, container in self._running()}
        if len(self.pods) > 1:
            delays = {max(delays, default=0)}
        for delay_s in sorted(delays):
            now = [(p, c) for p, c in self._running() if _delay_s(c) <= delay_s and f"{p.name}/{c.name}" not in codes]
            for _, container in now:
                if container.process is not None and container.process.poll() is None:
                    container.process.send_signal(signal.SIGTERM)
            for pod, container in now:
                codes[f"{pod.name}/{container.name}"] = _end(container, began_s + pod.grace_s)
                container.clear()
        self._ray_dir.cleanup()
        return codes

    def logs(self, lines: int = 30) -> str:
        """Their ends."""
        parts = []
        for file in sorted(self._folder.glob("pods/*/*/log")):
            text = file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
            parts.append(f"--- {file.parent.parent.name}/{file.parent.name}\n" + "\n".join(text))
        return "\n".join(parts)


def _end(container: Container, deadline_s: float) -> int:
    process = container.process
    if process is None:
        return 0
    try:
        return process.wait(max(0.1, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -9


def _delay_s(container: Container) -> float:
    return float(container.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0))


def _pods_of(resource: Resource) -> Iterator[tuple[str, Resource]]:
    """Names and templates of the Pods that the resource asks for, with a DaemonSet on one machine."""
    template = check.pod_template(resource)
    if template is None:
        return
    name = resource["metadata"]["name"]
    for number in range(resource["spec"].get("replicas", 1) if resource["kind"] != "Job" else 1):
        yield f"{name}-{number}", template


def _port(container: Container, port: str | int) -> int:
    if isinstance(port, int):
        return port
    return int(next(each["containerPort"] for each in container.spec["ports"] if each["name"] == port))


def _expanded(argument: str, environment: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], argument)


__all__ = ["Local", "LocalPods"]
