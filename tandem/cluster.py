"""The cluster: Ray places, starts, watches and restarts one process per role.

Ray is started on this machine for it, or is one that runs already; there roles are spread over its nodes. Owns the session of its
own Ray, and the actors. Never on a request's way: no message of a request passes through Ray, and Ray gets
plain strings as arguments, because it pickles them. Each actor's process runs the role's own `run(config, name, stop)`, the
same that `python -m ROLE` runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from router.operator import operator_credentials
from router.secret import secret_path, shared_secret
from tandem.client import Client, targets_of
from tandem.clock import now_s
from tandem.config import Config, WorkerConfig, dump_config, load_config, router_name
from tandem.credentials import Credentials
from tandem.errors import Cancelled, ConfigError, DeadlineExceeded, TandemError, error_from_code
from tandem.logs import configure
from tandem.ports import busy_ports, with_free_ports
from tandem.role_main import ENTRY_POINTS, load_role
from tandem.stop import Stop

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's smallest object store is 75 MiB; nothing of ours goes through it."""

_ACTOR_CPUS = 0.001
"""What needs nothing Ray puts anywhere, whatever it is told."""
_KEPT = frozenset({"TANDEM_CACHE", "TANDEM_KERNELS"})
"""Variables of our own that are no part of the configuration."""
_MAX_PAUSE_S = 30.0
_STEADY_S = 60.0
"""A role that ran for so long did not die at once: its next restart is not delayed."""
_STOP_S = 10.0
_ASK_S = 5.0
_RAY_DIR_PREFIX = "tandem-ray-"


@dataclass(frozen=True, slots=True)
class Placed:
    """A process of the cluster. `pid` is 0 while Ray restarts it."""

    name: str
    role: str
    pid: int
    error: TandemError | None = None


@dataclass(slots=True)
class _Restarts:
    """When a role that ended with an error is started again. Pauses double from one second while it goes on dying at once."""

    count: int = 0
    last_s: float = 0.0
    at_s: float | None = None
    """When the pending restart is due; None if none is."""
    ended_pid: int = 0
    """The process that the last restart ended: what it still says is old."""

    def plan(self, time_s: float) -> float:
        """Takes note that the role ended now; returns the pause before its restart, in seconds."""
        if time_s - self.last_s > _STEADY_S:
            self.count = 0
        pause_s = min(_MAX_PAUSE_S, 2.0 ** (self.count - 1)) if self.count else 0.0
        self.at_s = time_s + pause_s
        return pause_s

    def done(self, time_s: float, pid: int) -> None:
        """Takes note that the role is being started again in place of process `pid`."""
        self.count, self.last_s, self.at_s, self.ended_pid = min(self.count + 1, 16), time_s, None, pid


class RoleProcess:
    """What Ray runs in a process of its own: one role, on a thread, so that `info` and `stop` answer while it works.

    When Ray restarts the process, it constructs this again, with the same arguments: the role comes back under its name.
    """

    def __init__(self, entry_point: str, role: str, name: str, config_yaml: str, log_path: str) -> None:
        _write_output_to(log_path)
        # The string is the whole configuration: the environment was merged into it where the cluster was started.
        for variable in [key for key in os.environ if key.startswith("TANDEM_") and key not in _KEPT]:
            del os.environ[variable]
        self._role = role
        self._name = name
        self._stop = Stop()
        self._error: tuple[str, str] | None = None
        self._thread = threading.Thread(
            target=self._run, args=(entry_point, config_yaml, log_path), name=name, daemon=True
        )
        self._thread.start()

    def _run(self, entry_point: str, config_yaml: str, log_path: str) -> None:
        try:
            config = _parse_config(config_yaml)
            configure(config.log.format, config.log.level, role=self._role, process=self._name)
            load_role(self._role, config, entry_point)(config, self._name, self._stop)
            if not self._stop.is_set():
                self._error = (TandemError.code, f"it ended by itself; its log is {log_path}")
        except TandemError as error:
            traceback.print_exc()
            self._error = (error.code, str(error))
        except BaseException as error:
            traceback.print_exc()
            self._error = (TandemError.code, f"{type(error).__name__}: {error}; its log is {log_path}")

    def info(self) -> str:
        """JSON: pid, and code and message of the error that ended the role, or null."""
        return json.dumps({"pid": os.getpid(), "error": self._error})

    def stop(self, timeout_s: str) -> bool:
        """Asks the role to stop and waits for it. Whether it did."""
        self._stop.set()
        self._thread.join(float(timeout_s))
        return not self._thread.is_alive()


def _num_processes(config: Config, role: str) -> int:
    """Of a role on this machine: it has one pool node, however many copies are kept."""
    if role == "pool":
        return min(1, config.pool.replicas)
    workers: WorkerConfig = getattr(config, role)
    return workers.replicas


class Cluster:
    """One cluster, in Ray, on this machine. Not thread-safe; one per process at a time. Use it as a context manager.

    Raises ConfigError for a configuration that can never be ready.
    """

    def __init__(
        self,
        config: Config,
        *,
        credentials: Credentials = Credentials(),
        entry_points: Mapping[str, str] = ENTRY_POINTS,
    ) -> None:
        check_replicas(config)
        self.config = with_free_ports(config)
        if config.router.keys_file:
            shared_secret(secret_path(config))  # the key to our own routers follows from it
        self._credentials = operator_credentials(config, credentials)
        self._entry_points = entry_points
        self._actors: dict[str, Any] = {}
        self._roles: dict[str, str] = {}
        self._pids: dict[str, int] = {}
        self._restarts: dict[str, _Restarts] = {}
        self._ray_dir: Path | None = None
        self._ray_processes: list[psutil.Process] = []
        self._nodes: list[str] = []
        """Ray's names of the nodes that get roles."""

    @property
    def target(self) -> str:
        """`host:port` of each router's gRPC API, as a client on this machine dials it, with commas between."""
        return self.config.router.grpc_target

    @property
    def log_dir(self) -> Path:
        """The folder of the roles' logs, one file a process."""
        return self.config.run_path / "logs"

    def _client(self, target: str) -> Client:
        return Client(target, credentials=self._credentials)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(
        self,
        *,
        progress: Callable[[str], None] = log.info,
        timeout_s: float = 180.0,
        stop: threading.Event | None = None,
        on_ray_dir: Callable[[Path], None] | None = None,
        address: str = "",
    ) -> None:
        """Starts everything and returns when the router says that the whole cluster is ready. On any error all is stopped.
        `address` is that of a running Ray's head, empty for one of this cluster's own.

        Raises ConfigError before anything runs if a port is taken, the error of the role that failed, with its name,
        DeadlineExceeded naming what is missing, or Cancelled when `stop` was set meanwhile. `on_ray_dir` is told Ray's temporary
        folder before Ray starts in it, so that somebody can remove it should this process be killed.
        """
        deadline_s = now_s() + timeout_s
        pause = stop or threading.Event()
        if busy := busy_ports(self.config):
            raise ConfigError("; ".join(busy))
        try:
            progress(f"joining Ray at {address}" if address else "starting Ray")
            self._start_ray(on_ray_dir, address)
            for number in range(self.config.router.replicas):
                self._start_role(router_name(number), "router")
            progress(f"starting the router at {self.target}")
            with contextlib.ExitStack() as open_clients:
                clients = [open_clients.enter_context(self._client(target)) for target in targets_of(self.target)]
                self._wait(clients, deadline_s, progress, pause, set())
                names = {}
                for role in ("pool", "prefill", "decode"):
                    for number in range(_num_processes(self.config, role)):
                        names[f"{role}-{number}"] = role
                for name, role in names.items():
                    self._start_role(name, role)
                progress(f"starting {', '.join(names)}: loading {self.config.model.path}")
                self._wait(clients, deadline_s, progress, pause, set(names))
        except BaseException:
            self.stop()
            raise

    def processes(self) -> list[Placed]:
        """Every process and whether it failed, as Ray and the process itself say now."""
        ray = ray_module()
        pending = {name: actor.info.remote() for name, actor in self._actors.items()}
        ray.wait(list(pending.values()), num_returns=len(pending), timeout=_ASK_S)
        found = []
        for name, answer in pending.items():
            role = self._roles[name]
            try:
                info = json.loads(ray.get(answer, timeout=0.01))
                error = error_from_code(info["error"][0], f"{name}: {info['error'][1]}") if info["error"] else None
                found.append(Placed(name, role, info["pid"], error))
            except (ray.exceptions.RayError, TimeoutError):
                found.append(Placed(name, role, 0))
        return found

    def supervise(self) -> list[str]:
        """Looks once after everything; a role that ended with an error is started again, after a pause of up to 30 s if it dies
        at once each time. Returns what happened, for people; a role is back when the router lists it again."""
        lines, returning = [], []
        for placed in self.processes():
            restarts = self._restarts[placed.name]
            if placed.error is not None:
                if placed.pid != restarts.ended_pid:
                    lines += self._restart(placed, placed.error, restarts)
            elif not placed.pid:
                if self._pids.get(placed.name, 0):
                    lines.append(f"{placed.name} is gone; Ray is starting it again")
                    self._pids[placed.name] = 0
            elif placed.pid not in (self._pids.get(placed.name, 0), restarts.ended_pid):
                returning.append(placed)
        listed = self._listed() if returning else None
        for placed in returning:
            if listed is not None and (placed.role == "router" or listed.get(placed.name) == placed.pid):
                lines.append(f"{placed.name} is back as process {placed.pid}")
                self._pids[placed.name] = placed.pid
        return lines

    def _restart(self, placed: Placed, error: TandemError, restarts: _Restarts) -> list[str]:
        """Starts a role that ended with an error again when its pause is over. Returns what to say of it, once an end."""
        lines = []
        if restarts.at_s is None:
            pause_s = restarts.plan(now_s())
            lines.append(f"{error}; starting it again" + (f" in {pause_s:.0f} s" if pause_s else ""))
            self._pids[placed.name] = 0
        if restarts.at_s is not None and now_s() >= restarts.at_s:
            ray_module().kill(self._actors[placed.name], no_restart=False)
            restarts.done(now_s(), placed.pid)
        return lines

    def _listed(self) -> dict[str, int] | None:
        """The pid of each process that the router lists; None if it does not answer."""
        with self._client(self.target) as client, contextlib.suppress(TandemError):
            return {process.name: process.pid for process in client.cluster(timeout_s=1.0).processes}
        return None

    def stop(self) -> None:
        """Stops every role, then Ray, within a bounded time; leaves no process and no file but the logs. Routers end first, and
        with them all requests: the workers have nothing left to finish or to hand over."""
        ray = ray_module()
        if ray.is_initialized():
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                workers = [name for name, role in self._roles.items() if role != "router"]
                for names in ([name for name, role in self._roles.items() if role == "router"], workers):
                    asked = [self._actors[name].stop.remote(str(_STOP_S)) for name in names]
                    if asked:
                        ray.wait(asked, num_returns=len(asked), timeout=_STOP_S + 1)
            for actor in self._actors.values():
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(actor, no_restart=True)
            descendants = [*self._ray_processes, *_descendants(self._ray_processes)]
            ray.shutdown()
            _, alive = psutil.wait_procs(descendants, timeout=_ASK_S)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=_ASK_S)
        self._actors.clear()
        self._roles.clear()
        self._pids.clear()
        self._restarts.clear()
        self._ray_processes = []
        if self._ray_dir is not None:
            shutil.rmtree(self._ray_dir, ignore_errors=True)
            self._ray_dir = None

    def _start_ray(self, on_ray_dir: Callable[[Path], None] | None, address: str) -> None:
        ray = ray_module()
        if ray.is_initialized():
            raise TandemError("Ray already runs in this process; one cluster per process")
        self.log_dir.mkdir(parents=True, exist_ok=True)
        own: dict[str, Any] = {}
        if not address:
            # In the temporary folder, because the paths of Ray's sockets must stay under 108 bytes.
            self._ray_dir = Path(tempfile.mkdtemp(prefix=_RAY_DIR_PREFIX))
            if on_ray_dir is not None:
                on_ray_dir(self._ray_dir)
            own = {
                "include_dashboard": False,
                "num_cpus": 1,
                "num_gpus": 0,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": str(self._ray_dir),
            }
        before = {process.pid for process in psutil.Process().children()}
        # Ray takes over signals; who calls decides what they do.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(address=address or "local", log_to_driver=False, configure_logging=False, **own)
        except Exception as error:
            doing = f"can't join Ray at {address}" if address else "Ray does not start"
            raise TandemError(f"{doing}: {error}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        self._ray_processes = [process for process in psutil.Process().children() if process.pid not in before]
        self._nodes = _nodes_for_roles(ray.nodes())

    def _start_role(self, name: str, role: str) -> None:
        """On the next node in turn, so that prefill and decode workers are apart where there are several; when that node is lost,
        Ray starts it again on another one."""
        ray = ray_module()
        node = self._nodes[len(self._actors) % len(self._nodes)]
        actor = ray.remote(RoleProcess).options(
            name=name,
            num_cpus=_ACTOR_CPUS,
            max_restarts=-1,
            max_concurrency=4,
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=True),
        )
        self._roles[name] = role
        self._restarts[name] = _Restarts()
        self._actors[name] = actor.remote(
            self._entry_points[role], role, name, dump_config(self.config), str(self.log_dir / f"{name}.log")
        )

    def _wait(
        self,
        clients: Sequence[Client],
        deadline_s: float,
        progress: Callable[[str], None],
        stop: threading.Event,
        names: set[str],
    ) -> None:
        """Until each router answers and, if there are `names`, lists our processes of these names and says that it is ready."""
        announced: set[str] = set()
        while True:
            if stop.is_set():
                raise Cancelled("stopped while the cluster was starting")
            for placed in self.processes():
                if placed.error is not None:
                    raise placed.error
                self._pids[placed.name] = placed.pid
            try:
                answers = [client.cluster(timeout_s=2.0) for client in clients]
            except TandemError as error:
                missing = str(error)
            else:
                # A name alone is no proof: every cluster has a decode-0, and another one may answer at this port.
                present = set.intersection(
                    *({p.name for p in seen.processes if p.pid == self._pids.get(p.name)} for seen in answers)
                )
                for name in sorted((present & names) - announced):
                    progress(f"{name} is up")
                    announced.add(name)
                absent = sorted(names - present)
                missing = f"waiting for {', '.join(absent)}" if absent else "the router is not ready"
                if not names or (not absent and all(seen.ready for seen in answers)):
                    return
            if now_s() > deadline_s:
                raise DeadlineExceeded(f"the cluster did not start in time: {missing}; the logs are in {self.log_dir}")
            stop.wait(0.1)


def check_replicas(config: Config) -> None:
    """Raises ConfigError if the cluster could never answer: a whole cluster needs a decode worker."""
    if config.decode.replicas < 1:
        raise ConfigError("decode.replicas is 0, must be at least 1 to serve")


def _nodes_for_roles(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of those that live, by their names; the head only where it is alone: what it has dies with it."""
    alive = sorted((node for node in nodes if node["Alive"]), key=lambda node: str(node["NodeName"]))
    others = [node for node in alive if "node:__internal_head__" not in node["Resources"]]
    return [str(node["NodeID"]) for node in others or alive]


def remove_stale_ray_dir(path: str) -> None:
    """Removes the temporary folder of a cluster that was killed; only one that this module made."""
    folder = Path(path)
    if folder.name.startswith(_RAY_DIR_PREFIX) and folder.parent == Path(tempfile.gettempdir()):
        shutil.rmtree(folder, ignore_errors=True)


def _parse_config(text: str) -> Config:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load_config(file.name)


def _write_output_to(path: str) -> None:
    """Sends this process's stdout and stderr to the end of `path`, those of native code too."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _descendants(processes: list[psutil.Process]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.extend(process.children(recursive=True))
    return found


def ray_module() -> Any:
    """The `ray` module. Ray reads its environment when it is first imported, so that must not happen elsewhere: no usage
    statistics leave this machine, and a secret of this process keeps others out of its ports."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray
    import ray._private.worker
    import ray.util.scheduling_strategies

    # What Ray tells its driver of killed processes would land in the middle of what a command writes to stdout.
    ray._private.worker.print_to_stdstream = _log_ray_message
    return ray


def _log_ray_message(data: Mapping[str, Any], **_: object) -> None:
    log.info("Ray: %s", " ".join(str(line) for line in data["lines"]))
