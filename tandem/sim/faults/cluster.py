"""The processes of a simulated cluster: which there are, on which machines, and their incarnations.

Owns who runs. A process that died comes back under its name with a new epoch and nothing in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from router.actions import RequestEvent
from tandem.sim.faults.network import Network
from tandem.sim.faults.pool_node import PoolNodeProcess
from tandem.sim.faults.read_watch import ReadWatch
from tandem.sim.faults.router_node import RouterNode
from tandem.sim.faults.shape import Shape, config
from tandem.sim.faults.transport import Memories, Watch
from tandem.sim.faults.truth import Truth
from tandem.sim.faults.worker_node import WorkerNode
from tandem.sim.faults.world import Process, World

Node = WorkerNode | PoolNodeProcess | RouterNode


class Cluster:
    """All processes by name. `show` is told what routers have for clients, `died` of each router that is gone."""

    def __init__(
        self,
        world: World,
        shape: Shape,
        show: Callable[[RouterNode, str, int, RequestEvent], None],
        died: Callable[[RouterNode], None],
    ) -> None:
        self.world = world
        self.shape = shape
        self.truth = Truth()
        self.network = Network(world)
        self.memories = Memories(world, self.network)
        self.reads = ReadWatch()
        self.memories.watch = Watch(self.reads.began, self.reads.ended, self.reads.given_up, self.reads.wrote_late)
        self.network.on_sent = self.reads.sent
        self.network.on_taken = self.reads.taken
        self._show = show
        self._died = died
        self._rng = world.generator("cluster")
        # A network of one kind between machines: with RDMA, where a cancelled receive proves nothing, or without.
        self.remote = self._rng.choice(("ucx", "ucx", "tcp"))
        self.config = config(shape.num_routers)
        self.nodes: dict[str, Node] = {}
        self._dead: list[Node] = []
        """Kept for what is still on its way to and from their memory."""
        names = [f"router-{i}" for i in range(shape.num_routers)]
        names += [f"pool-{i}" for i in range(shape.num_pools)]
        names += [f"prefill-{i}" for i in range(shape.num_prefill)] + [f"decode-{i}" for i in range(shape.num_decode)]
        for name in names:
            self.start(name)

    # --- who there is ---------------------------------------------------------------------------------------------------

    @property
    def routers(self) -> list[RouterNode]:
        return [node for node in self.nodes.values() if isinstance(node, RouterNode)]

    @property
    def workers(self) -> list[WorkerNode]:
        return [node for node in self.nodes.values() if isinstance(node, WorkerNode)]

    @property
    def pools(self) -> list[PoolNodeProcess]:
        return [node for node in self.nodes.values() if isinstance(node, PoolNodeProcess)]

    # --- incarnations ---------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Its next incarnation."""
        role, _, number = name.rpartition("-")
        machine = f"machine-{number}"
        offset_s = self._rng.uniform(0.0, 1000.0)
        if role == "router":
            router = RouterNode(
                self.world,
                self.network,
                name=name,
                endpoint=self.config.router.control_endpoints[int(number)],
                liveness_s=self.config.router.liveness_s,
                offset_s=offset_s,
                truth=self.truth,
                show=self._show,
            )
            self.nodes[name] = router
        elif role == "pool":
            self.nodes[name] = PoolNodeProcess(
                self.world,
                self.network,
                self.memories,
                self.config,
                num_blocks=self.shape.pool_blocks,
                name=name,
                machine=machine,
                offset_s=offset_s,
                transports=("shm", self.remote),
                serves=self.reads.serves,
                kept=self.truth.kept,
            )
        else:
            self.nodes[name] = self._worker("prefill" if role == "prefill" else "decode", name, machine, offset_s)

    def _worker(self, role: Literal["prefill", "decode"], name: str, machine: str, offset_s: float) -> WorkerNode:
        return WorkerNode(
            self.world,
            self.network,
            self.memories,
            self.config,
            self.shape,
            role=role,
            name=name,
            machine=machine,
            offset_s=offset_s,
            transports=("shm", self.remote),
            serves=self.reads.serves,
        )

    def kill(self, node: Process, *, unreachable: bool) -> None:
        """It is gone at once. Unreachable: its machine is too, and nobody's connections are closed."""
        node.kill(unreachable=unreachable)
        assert isinstance(node, Node)
        self._dead.append(node)
        if isinstance(node, RouterNode):
            self._died(node)

    def close(self) -> None:
        """Gives up all memory."""
        for node in [*self.nodes.values(), *self._dead]:
            if node.alive:
                node.kill(unreachable=False)
            arena = getattr(node, "arena", None)
            if arena is not None:
                arena.close()
