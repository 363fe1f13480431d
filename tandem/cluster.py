"""The cluster: Ray places, starts, watches and restarts one process per role, and as many of each as are wanted.

Ray is started on this machine for it, or is one that runs already; there roles are spread over its nodes. Owns the session of its
own Ray, the actors and their places. Never on a request's way: no message of a request passes through Ray, and Ray gets
plain strings as arguments, because it pickles them. Each actor's process runs the role's own `run(config, name, stop)`, the
same that `python -m ROLE` runs (`tandem/ray_role.py`).

How many workers are wanted is kept by the routers, all of them, and copied among them from here (docs/decisions/0029); who
starts and who leaves for it is `tandem.scaling.reconcile`'s to say. A worker that leaves finishes what it has first. Its place is
a placement group of its own, which outlives it when another role is to start there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from protos import tandem_pb2 as pb
from router.operator import operator_credentials
from router.secret import secret_path, shared_secret
from tandem.client import Client, targets_of
from tandem.clock import now_s
from tandem.config import Config, WorkerConfig, dump_config, router_name
from tandem.credentials import Credentials
from tandem.drain import GIVEN_BACK_S
from tandem.errors import Cancelled, ConfigError, DeadlineExceeded, TandemError, error_from_code
from tandem.places import Node, addresses_of, choose, nodes_for_roles
from tandem.ports import busy_ports, with_free_ports
from tandem.ray_role import RoleProcess, ray_module
from tandem.role_main import ENTRY_POINTS
from tandem.scaling.look import look_of
from tandem.scaling.reconcile import Leave, Start, State, Worker, reconcile
from tandem.scaling.scaler import Counts, Limits, Name, Scaler
from tandem.scaling.sizing import Promise

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's smallest object store is 75 MiB; nothing of ours goes through it."""
PLAN_EVERY_S = 5.0
"""So often the planner looks, where it is on."""

_ACTOR_CPUS = 0.001
"""What needs nothing Ray puts anywhere, whatever it is told."""
_MAX_PAUSE_S = 30.0
_STEADY_S = 60.0
"""A role that ran for so long did not die at once: its next restart is not delayed."""
_STOP_S = 10.0
_ASK_S = 5.0
_PLACE_S = 20.0
"""Ray finds a place within this, or there is none now."""
_LEAVE_S = GIVEN_BACK_S + 10.0
"""What a worker that leaves takes beyond its `drain_s`; then it is ended."""
_RAY_DIR_PREFIX = "tandem-ray-"


@dataclass(frozen=True, slots=True)
class Placed:
    """A process of the cluster. `pid` is 0 while Ray restarts it. `stopping`: it was asked to end; `target` is a router's."""

    name: str
    role: str
    pid: int
    error: TandemError | None = None
    stopping: bool = False
    ended: bool = False
    target: str = ""
    node_id: str = ""


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


@dataclass(slots=True)
class _Kept:
    """A process that is kept running, and where."""

    role: str
    actor: Any
    place: str
    node_id: str
    pid: int = 0
    """The last one that was well, 0 while it is gone."""
    was_up: bool = False
    restarts: _Restarts = field(default_factory=_Restarts)
    leaves: bool = False
    then: Name | None = None
    """What starts in its place when it has left."""
    told_pid: int = 0
    """The process that was asked to leave."""
    ends_at_s: float = math.inf


class Cluster:
    """One cluster, in Ray. Not thread-safe; one per process at a time. Use it as a context manager. A `lasting` one runs on a Ray
    that runs already, and goes on when this object is gone: another one of the same name finds what runs.

    Raises ConfigError for a configuration that can never be ready.
    """

    def __init__(
        self,
        config: Config,
        *,
        credentials: Credentials = Credentials(),
        entry_points: Mapping[str, str] = ENTRY_POINTS,
        lasting: bool = False,
    ) -> None:
        check_replicas(config)
        self.config = with_free_ports(config)
        if config.router.keys_file:
            shared_secret(secret_path(config))  # the key to our own routers follows from it
        self._credentials = operator_credentials(config, credentials)
        self._entry_points = entry_points
        self._lasting = lasting
        self._kept: dict[str, _Kept] = {}
        self._places: dict[str, Any] = {}
        """Placement groups by name."""
        self._ray_dir: Path | None = None
        self._ray_processes: list[psutil.Process] = []
        self._nodes: list[Node] = []
        """Those that get roles."""
        self._binds_nodes = False
        """Roles listen on their nodes' addresses, not on the configured one."""
        self._clients: dict[str, Client] = {}
        self._target = self.config.router.grpc_target
        self._wanted = Counts(config.prefill.replicas, config.decode.replicas)
        self._revision = 1
        self._reason = "as configured"
        self._scaler = scaler_of(config) if config.planner.enabled else None
        self._plan_at_s = 0.0
        self._num_places = 0

    @property
    def target(self) -> str:
        """`host:port` of each router's gRPC API, with commas between."""
        return self._target

    @property
    def wanted(self) -> Counts:
        """Workers that are wanted."""
        return self._wanted

    @property
    def log_dir(self) -> Path:
        """The folder of the roles' logs, one file a process."""
        return self.config.run_path / "logs"

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lasting:
            self.leave()
        else:
            self.stop()

    # --- begin and end -------------------------------------------------------------------------------------------------

    def start(
        self,
        *,
        progress: Callable[[str], None] = log.info,
        timeout_s: float = 180.0,
        stop: threading.Event | None = None,
        on_ray_dir: Callable[[Path], None] | None = None,
        address: str = "",
    ) -> None:
        """Starts everything that does not run yet and returns when the routers say that the whole cluster is ready. On any error
        what this began is stopped. `address` is that of a running Ray's head, empty for one of this cluster's own.

        Raises ConfigError before anything runs if a port is taken, the error of the role that failed, with its name,
        DeadlineExceeded naming what is missing, or Cancelled when `stop` was set meanwhile. `on_ray_dir` is told Ray's temporary
        folder before Ray starts in it, so that somebody can remove it should this process be killed.
        """
        deadline_s = now_s() + timeout_s
        pause = stop or threading.Event()
        found: list[str] = []
        if not address and (busy := busy_ports(self.config)):
            raise ConfigError("; ".join(busy))
        try:
            progress(f"joining Ray at {address}" if address else "starting Ray")
            self._start_ray(on_ray_dir, address)
            found = self._find()
            if found:
                progress(f"found {', '.join(found)}")
            elif not self._binds_nodes and (busy := busy_ports(self.config)):
                raise ConfigError("; ".join(busy))
            for number in range(self.config.router.replicas):
                self._start_missing(router_name(number), "router")
            progress(f"starting the router at {self.target}" if not found else "looking for the routers")
            self._wait(deadline_s, progress, pause, set())
            self._take_over()
            names = {f"pool-{number}": "pool" for number in range(self._num_pools())}
            if found:
                workers = [(name, kept.role) for name, kept in self._kept.items() if kept.role in ("prefill", "decode")]
                names |= dict(workers)
            else:
                names |= {f"prefill-{number}": "prefill" for number in range(self._wanted.prefill)}
                names |= {f"decode-{number}": "decode" for number in range(self._wanted.decode)}
            if missing := [name for name in names if name not in self._kept]:
                progress(f"starting {', '.join(missing)}: loading {self.config.model.path}")
            for name, role in names.items():
                self._start_missing(name, role)
            self._wait(deadline_s, progress, pause, set(names))
        except BaseException:
            if found:
                self.leave()  # what others run is theirs
            else:
                self.stop()
            raise

    def leave(self) -> None:
        """Lets everything run, and looks after it no more."""
        self._forget()
        ray = ray_module()
        if ray.is_initialized():
            ray.shutdown()

    def stop(self) -> None:
        """Stops every role, then Ray if it is this cluster's own, within a bounded time; leaves no process and no file but the
        logs. Routers end first, and with them all requests: the workers have nothing left to finish or to hand over."""
        ray = ray_module()
        if ray.is_initialized():
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                workers = [kept for kept in self._kept.values() if kept.role != "router"]
                for some in ([kept for kept in self._kept.values() if kept.role == "router"], workers):
                    asked = [kept.actor.stop.remote(str(_STOP_S)) for kept in some]
                    if asked:
                        ray.wait(asked, num_returns=len(asked), timeout=_STOP_S + 1)
            for kept in self._kept.values():
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(kept.actor, no_restart=True)
            for place in self._places.values():
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.util.remove_placement_group(place)
            descendants = [*self._ray_processes, *_descendants(self._ray_processes)]
            ray.shutdown()
            _, alive = psutil.wait_procs(descendants, timeout=_ASK_S)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=_ASK_S)
        self._forget()
        self._ray_processes = []
        if self._ray_dir is not None:
            shutil.rmtree(self._ray_dir, ignore_errors=True)
            self._ray_dir = None

    def join(self, address: str) -> list[str]:
        """Joins a Ray and finds what runs there of a lasting cluster of this name; its processes' names. Raises TandemError if
        there is no Ray at `address`."""
        self._start_ray(None, address)
        return self._find()

    def exposure(self) -> list[str]:
        """What is to be said of the addresses that roles listen on."""
        if not self._binds_nodes:
            return []
        addresses = ", ".join(addresses_of(self._nodes))
        return [
            f"roles listen on their nodes' addresses ({addresses}): whoever reaches their ports is trusted, see docs/security.md"
        ]

    def _forget(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._kept.clear()
        self._places.clear()

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
            ray.init(
                address=address or "local",
                namespace=f"tandem-{self.config.cluster}",
                log_to_driver=False,
                configure_logging=False,
                **own,
            )
        except Exception as error:
            doing = f"can't join Ray at {address}" if address else "Ray does not start"
            raise TandemError(f"{doing}: {error}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        self._ray_processes = [process for process in psutil.Process().children() if process.pid not in before]
        self._look_at_nodes()
        addresses = addresses_of(self._nodes)
        self._binds_nodes = len(addresses) > 1 and not self.config.router.addresses
        if self._binds_nodes:
            # Wherever Ray puts a router, now or after a node is lost, it is at one of these.
            ports = [self.config.router.replica(n).control_port for n in range(self.config.router.replicas)]
            told = [f"{address}:{port}" for address in addresses for port in ports][:64]
            router = self.config.router.model_copy(update={"addresses": told})
            self.config = self.config.model_copy(update={"router": router})

    def _look_at_nodes(self) -> None:
        self._nodes = nodes_for_roles(ray_module().nodes())

    def _find(self) -> list[str]:
        """Takes over the processes of a lasting cluster of this name that run already."""
        ray = ray_module()
        for name in ray.util.list_named_actors() if self._lasting else []:
            actor = ray.get_actor(name)
            try:
                info = json.loads(ray.get(actor.info.remote(), timeout=_ASK_S))
            except (ray.exceptions.RayError, TimeoutError):
                raise TandemError(f"{name} runs there and does not answer within {_ASK_S:.0f} s") from None
            kept = _Kept(name.partition("-")[0], actor, info["place"], info["node"], info["pid"])
            kept.leaves, kept.told_pid = info["stopping"], info["pid"] if info["stopping"] else 0
            kept.ends_at_s = now_s() + self._drain_s(kept.role) + _LEAVE_S if kept.leaves else math.inf
            self._kept[name] = kept
            self._places[info["place"]] = ray.util.get_placement_group(info["place"])
            self._num_places = max(self._num_places, int(info["place"].rpartition("-")[2]) + 1)
        if self._kept:
            self._wanted = Counts(*(self._num_of(role) for role in ("prefill", "decode")))
            self._revision, self._reason = 0, "as many as were found"
        return sorted(self._kept)

    def _num_of(self, role: str) -> int:
        return sum(kept.role == role and not kept.leaves for kept in self._kept.values())

    def _take_over(self) -> None:
        """What routers that were found know to be wanted is; what they don't know is told."""
        self._follow(self._ask_routers())

    def _num_pools(self) -> int:
        """One for each machine, however many copies are kept."""
        return len(addresses_of(self._nodes)) if self.config.pool.replicas else 0

    # --- one role ------------------------------------------------------------------------------------------------------

    def _start_missing(self, name: str, role: str) -> None:
        if name not in self._kept:
            self._start_role(name, role)

    def _start_role(self, name: str, role: str, place: str = "") -> None:
        """In a place of its own, or in one that is there. When the node of the place is lost, Ray finds it another one and starts
        the role again there.

        Raises TandemError where no node has room.
        """
        ray = ray_module()
        needs = {"CPU": _ACTOR_CPUS} | self.config.ray.needs(role)
        node_id = ""
        if not place:
            node = self._node_for(name, role, needs)
            place, node_id = self._new_place(needs, node), node.node_id
        group = self._places[place]
        bundle = dict(group.bundle_specs[0])
        actor = ray.remote(RoleProcess).options(
            name=name,
            lifetime="detached" if self._lasting else None,
            num_cpus=bundle.pop("CPU", 0.0),
            num_gpus=bundle.pop("GPU", 0.0),
            resources=bundle,
            max_restarts=-1,
            max_concurrency=4,
            scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, 0),
        )
        handle = actor.remote(
            self._entry_points[role],
            role,
            name,
            dump_config(self.config),
            str(self.log_dir / f"{name}.log"),
            place,
            "1" if self._binds_nodes else "",
        )
        self._kept[name] = _Kept(role, handle, place, node_id)

    def _node_for(self, name: str, role: str, needs: Mapping[str, float]) -> Node:
        taken = [(kept.role, kept.node_id) for kept in self._kept.values()]
        nodes = self._nodes
        if role == "pool":  # each machine's own
            with_pool = {kept.node_id for kept in self._kept.values() if kept.role == "pool"}
            served = {node.address for node in nodes if node.node_id in with_pool}
            nodes = [node for node in nodes if node.address not in served]
        node = choose(nodes, role, needs, taken)
        if node is None:
            asked = ", ".join(f"{amount:g} {what}" for what, amount in needs.items() if what != "CPU" or amount >= 1)
            raise TandemError(f"{name}: none of {len(nodes)} nodes has {asked or 'room for it'}")
        return node

    def _new_place(self, needs: Mapping[str, float], node: Node) -> str:
        ray = ray_module()
        name = f"tandem-{self.config.cluster}-{self._num_places}"
        self._num_places += 1
        group = ray.util.placement_group(
            [dict(needs)],
            strategy="STRICT_PACK",
            name=name,
            lifetime="detached" if self._lasting else None,
            _soft_target_node_id=node.node_id,
        )
        if not group.wait(int(_PLACE_S)):
            ray.util.remove_placement_group(group)
            raise TandemError(f"Ray found no place for {dict(needs)} within {_PLACE_S:.0f} s")
        self._places[name] = group
        return name

    def processes(self) -> list[Placed]:
        """Every process and whether it failed, as Ray and the process itself say now."""
        ray = ray_module()
        pending = {name: kept.actor.info.remote() for name, kept in self._kept.items()}
        if pending:
            ray.wait(list(pending.values()), num_returns=len(pending), timeout=_ASK_S)
        found = []
        for name, answer in pending.items():
            kept = self._kept[name]
            try:
                info = json.loads(ray.get(answer, timeout=0.01))
            except (ray.exceptions.RayError, TimeoutError):
                found.append(Placed(name, kept.role, 0))
                continue
            error = error_from_code(info["error"][0], f"{name}: {info['error'][1]}") if info["error"] else None
            kept.node_id = info["node"]
            found.append(
                Placed(
                    name, kept.role, info["pid"], error, info["stopping"], info["ended"], info["target"], info["node"]
                )
            )
        targets = sorted({placed.target for placed in found if placed.target})
        if targets:
            self._target = ",".join(targets)
        return found

    # --- looking after it ------------------------------------------------------------------------------------------------

    def supervise(self) -> list[str]:
        """Looks once after everything. A role that ended with an error is started again, after a pause of up to 30 s if it dies
        at once each time; where fewer or more workers are wanted than there are, some start or leave. Returns what happened, for
        people; a role is back when the router lists it again."""
        placed = self.processes()
        clusters = self._ask_routers()
        listed = {process.name: process for cluster in clusters for process in cluster.processes}
        lines = self._keep(placed, listed if clusters else None)
        if not clusters:
            return lines
        lines += self._follow(clusters)
        if self._scaler is not None and now_s() >= self._plan_at_s:
            self._plan_at_s = now_s() + PLAN_EVERY_S
            plan = self._scaler.plan(look_of(clusters), self._wanted, now_s())
            if plan.wanted != self._wanted:
                lines += self.want(plan.wanted, "; ".join(plan.reasons))
        return lines + self._scale(placed, listed)

    def _keep(self, found: Sequence[Placed], listed: Mapping[str, pb.ProcessStatus] | None) -> list[str]:
        """Restarts what failed, and says what came back."""
        lines: list[str] = []
        for placed in found:
            kept = self._kept[placed.name]
            if kept.leaves or placed.stopping:
                continue
            if placed.error is not None:
                if placed.pid != kept.restarts.ended_pid:
                    lines += self._restart(placed, placed.error, kept)
            elif not placed.pid:
                if kept.pid:
                    lines.append(f"{placed.name} is gone; Ray is starting it again")
                    kept.pid = 0
            elif placed.pid not in (kept.pid, kept.restarts.ended_pid) and listed is not None:
                shown = listed.get(placed.name)
                if placed.role == "router" or (shown is not None and shown.pid == placed.pid):
                    lines.append(
                        f"{placed.name} is back as process {placed.pid}" if kept.was_up else f"{placed.name} is up"
                    )
                    kept.pid, kept.was_up = placed.pid, True
        return lines

    def _restart(self, placed: Placed, error: TandemError, kept: _Kept) -> list[str]:
        """Starts a role that ended with an error again when its pause is over. Returns what to say of it, once an end."""
        lines, restarts = [], kept.restarts
        if restarts.at_s is None:
            pause_s = restarts.plan(now_s())
            lines.append(f"{error}; starting it again" + (f" in {pause_s:.0f} s" if pause_s else ""))
            kept.pid = 0
        if restarts.at_s is not None and now_s() >= restarts.at_s:
            ray_module().kill(kept.actor, no_restart=False)
            restarts.done(now_s(), placed.pid)
        return lines

    def _ask_routers(self) -> list[pb.GetClusterResponse]:
        """What those say that answer."""
        answers = []
        for target in targets_of(self.target):
            with contextlib.suppress(TandemError):
                answers.append(self._client(target).cluster(timeout_s=1.0))
        return answers

    def _client(self, target: str) -> Client:
        if target not in self._clients:
            self._clients[target] = Client(target, credentials=self._credentials)
        return self._clients[target]

    # --- as many as are wanted -------------------------------------------------------------------------------------------

    def want(self, counts: Counts, reason: str) -> list[str]:
        """So many workers are wanted from now on; routers are told. Returns what to say of it."""
        self._wanted, self._reason = counts, reason
        self._revision += 1
        self._tell(targets_of(self.target))
        return [f"wanted: {counts.prefill} prefill and {counts.decode} decode workers ({reason})"]

    def _tell(self, targets: Sequence[str]) -> None:
        for target in targets:
            with contextlib.suppress(TandemError):  # the next look tells it again
                self._client(target).set_replicas(
                    self._wanted.prefill, self._wanted.decode, self._reason, revision=self._revision, timeout_s=1.0
                )

    def _follow(self, clusters: Sequence[pb.GetClusterResponse]) -> list[str]:
        """Takes what a router knows that is newer, and tells it to those that know less."""
        lines = []
        newest = max((cluster.wanted for cluster in clusters), key=lambda wanted: wanted.revision, default=None)
        if newest is not None and newest.revision > self._revision:
            counts = Counts(newest.prefill, newest.decode)
            if counts != self._wanted:
                lines.append(
                    f"wanted: {counts.prefill} prefill and {counts.decode} decode workers ({newest.reason or 'no reason given'})"
                )
            self._wanted, self._revision, self._reason = counts, newest.revision, newest.reason
        self._revision = max(1, self._revision)
        others = [
            cluster.wanted
            for cluster in clusters
            if Counts(cluster.wanted.prefill, cluster.wanted.decode) != self._wanted
        ]
        if any(wanted.revision == self._revision for wanted in others):
            self._revision += 1  # two were told at once: one of them it is
        if others or any(cluster.wanted.revision < self._revision for cluster in clusters):
            self._tell(targets_of(self.target))
        return lines

    def _scale(self, found: Sequence[Placed], listed: Mapping[str, pb.ProcessStatus]) -> list[str]:
        """Ends what has left, and starts and ends workers until there are as many as wanted."""
        lines: list[str] = []
        for placed in found:
            kept = self._kept[placed.name]
            if placed.stopping and not kept.leaves and placed.role != "router":
                lines.append(f"{placed.name} leaves: a router told it to")
                self._leaves(kept, placed.pid)
            if kept.leaves:
                lines += self._let_go(placed, kept)
        workers = [
            self._worker(name, kept, listed) for name, kept in self._kept.items() if kept.role in ("prefill", "decode")
        ]
        for action in reconcile(self._wanted, workers):
            match action:
                case Leave(name=name, then=then):
                    kept = self._kept[name]
                    kept.then = then
                    if not kept.leaves:
                        after = f", and {then} starts in its place" if then else ""
                        lines.append(
                            f"{name} leaves: {self._num_of(kept.role)} {kept.role} workers are too many{after}"
                        )
                        self._leaves(kept, 0)
                case Start(role=role):
                    lines += self._begin(role)
        return lines

    def _worker(self, name: str, kept: _Kept, listed: Mapping[str, pb.ProcessStatus]) -> Worker:
        shown = listed.get(name)
        is_up = shown is not None and shown.pid == kept.pid
        state = State.LEAVING if kept.leaves else State.RUNNING if is_up else State.STARTING
        load = float(shown.num_running + shown.num_waiting) if shown is not None else 0.0
        return Worker(name, "prefill" if kept.role == "prefill" else "decode", state, load, kept.then)

    def _leaves(self, kept: _Kept, told_pid: int) -> None:
        kept.leaves, kept.told_pid = True, told_pid
        kept.ends_at_s = now_s() + self._drain_s(kept.role) + _LEAVE_S

    def _drain_s(self, role: str) -> float:
        worker = getattr(self.config, role, None)
        return worker.drain_s if isinstance(worker, WorkerConfig) else 0.0

    def _let_go(self, placed: Placed, kept: _Kept) -> list[str]:
        """One that leaves: told once each process, ended when it is through or its time is over. What follows it starts."""
        if not placed.ended and placed.error is None and now_s() < kept.ends_at_s:
            if placed.pid and placed.pid != kept.told_pid:
                kept.actor.stop.remote(str(self._drain_s(kept.role) + _LEAVE_S))
                kept.told_pid = placed.pid
            return []
        ray = ray_module()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(kept.actor, no_restart=True)
        del self._kept[placed.name]
        lines = [f"{placed.name} has left" if placed.ended else f"{placed.name} did not leave in time, and was ended"]
        if kept.then is not None:
            return lines + self._begin(kept.then, kept.place, kept.node_id)
        ray.util.remove_placement_group(self._places.pop(kept.place))
        return lines

    def _begin(self, role: Name, place: str = "", node_id: str = "") -> list[str]:
        """Starts a worker, in that place if one is given; says so, also where there is no room now."""
        name = next(name for number in range(len(self._kept) + 1) if (name := f"{role}-{number}") not in self._kept)
        if not place:
            self._look_at_nodes()
        try:
            self._start_role(name, role, place)
        except (TandemError, ValueError) as error:  # Ray's ValueError: the name is not free again yet
            self._drop_place(place)
            return [f"{name} can't start now: {error}"]
        self._kept[name].node_id = node_id or self._kept[name].node_id
        lines = [f"{name} starts"]
        if self.config.pool.replicas and not place:
            lines += self._begin_pool(name)
        return lines

    def _drop_place(self, place: str) -> None:
        if place:
            ray_module().util.remove_placement_group(self._places.pop(place))

    def _begin_pool(self, worker: str) -> list[str]:
        """The pool node of a machine that had none, where a worker has come to it."""
        address = {node.node_id: node.address for node in self._nodes}
        pools = {address.get(kept.node_id) for kept in self._kept.values() if kept.role == "pool"}
        if address.get(self._kept[worker].node_id) in pools:
            return []
        name = next(name for number in range(len(self._kept) + 1) if (name := f"pool-{number}") not in self._kept)
        try:
            self._start_role(name, "pool")
        except TandemError as error:
            return [f"{name} can't start now: {error}"]
        return [f"{name} starts"]

    def _wait(
        self,
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
                self._kept[placed.name].pid = placed.pid
            try:
                answers = [self._client(target).cluster(timeout_s=2.0) for target in targets_of(self.target)]
            except TandemError as error:
                missing = str(error)
            else:
                # A name alone is no proof: every cluster has a decode-0, and another one may answer at this port.
                present = set.intersection(
                    *({p.name for p in seen.processes if p.pid == self._pid_of(p.name)} for seen in answers)
                )
                for name in sorted((present & names) - announced):
                    progress(f"{name} is up")
                    announced.add(name)
                absent = sorted(names - present)
                missing = f"waiting for {', '.join(absent)}" if absent else "the router is not ready"
                enough = len(answers) == self._num_of("router")
                if enough and (not names or (not absent and all(seen.ready for seen in answers))):
                    for kept in self._kept.values():
                        kept.was_up = kept.was_up or bool(kept.pid)
                    return
            if now_s() > deadline_s:
                raise DeadlineExceeded(f"the cluster did not start in time: {missing}; the logs are in {self.log_dir}")
            stop.wait(0.1)

    def _pid_of(self, name: str) -> int:
        return self._kept[name].pid if name in self._kept else 0


def check_replicas(config: Config) -> None:
    """Raises ConfigError if the cluster could never answer: a whole cluster needs a decode worker."""
    if config.decode.replicas < 1:
        raise ConfigError("decode.replicas is 0, must be at least 1 to serve")


def scaler_of(config: Config) -> Scaler:
    """As the section `planner` says."""
    planner = config.planner
    limits = Limits(
        Counts(planner.min_prefill, planner.min_decode),
        Counts(planner.max_prefill, planner.max_decode),
        planner.max_workers,
    )
    promise = Promise(planner.ttft_s, planner.ttft_per_1k_tokens_s / 1000.0, planner.tpot_s)
    return Scaler(promise, limits, interval_s=PLAN_EVERY_S, settle_s=planner.settle_s, start_s=planner.start_s)


def stop_lasting(config: Config, address: str) -> list[str]:
    """Stops what runs of a lasting cluster on the Ray at `address`; the names of what ran."""
    cluster = Cluster(config, lasting=True)
    try:
        return cluster.join(address)
    finally:
        cluster.stop()


def unprotected_head() -> str:
    """Why the loss of the joined Ray's head ends what runs on it; empty where the head comes back with all it knew."""
    storage = _gcs_storage()
    if storage in ("redis", "rocksdb"):
        return ""
    return (
        f"the head of this Ray keeps its state in {storage or 'memory'}: when it is lost, what runs goes on for a minute, then "
        "all nodes end. GCS fault tolerance protects it (docs/operations.md)"
    )


def _gcs_storage() -> str:
    """What the joined Ray's head keeps its state in, as it has noted itself; empty where it has noted nothing."""
    from ray._common.usage.usage_lib import get_extra_usage_tags_to_report

    tags = get_extra_usage_tags_to_report(ray_module()._private.worker.global_worker.gcs_client)
    return str(tags.get("gcs_storage", ""))


def remove_stale_ray_dir(path: str) -> None:
    """Removes the temporary folder of a cluster that was killed; only one that this module made."""
    folder = Path(path)
    if folder.name.startswith(_RAY_DIR_PREFIX) and folder.parent == Path(tempfile.gettempdir()):
        shutil.rmtree(folder, ignore_errors=True)


def _descendants(processes: list[psutil.Process]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.extend(process.children(recursive=True))
    return found
