"""A pool node in virtual time: the production `PoolNode` over virtual sockets and transports.

Owns the HOST memory of one incarnation. Opening it takes no time and no thread; there is no DISK tier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from kvpool.arena import Arena
from kvpool.block_pool import BlockId, BlockPool
from kvpool.followed import FollowedWorker
from kvpool.keys import Key
from kvpool.node import Name, PoolNode
from kvpool.node_tiers import Memory as TierMemory
from protos.control import RoutingGroup
from tandem.config import Config
from tandem.sim.faults.network import Context, Network, NoPoller
from tandem.sim.faults.transport import Memories, Memory, VirtualTransport
from tandem.sim.faults.world import Process, World


class _Pool(BlockPool):
    """The pool of HOST; what it ever held is noted in `kept`."""

    def __init__(self, num_blocks: int, block_size: int, kept: set[Key]) -> None:
        super().__init__(num_blocks, block_size, "HOST")
        self._kept = kept

    def publish(self, block_id: BlockId, key: Key, *args: Any, **kwargs: Any) -> bool:
        self._kept.add(key)
        return super().publish(block_id, key, *args, **kwargs)


class _Node(PoolNode):
    """The pool node, which opens its tiers at once."""

    node: PoolNodeProcess

    def _open_tiers(self, group: RoutingGroup, slab_bytes: int) -> None:
        node = self.node
        node.arena = Arena(node.num_blocks, slab_bytes)
        node.pool = _Pool(node.num_blocks, group.block_size, node.kept)
        memory = Memory(node, node.arena, node.pool)
        transports = [VirtualTransport(kind, node.memories, memory) for kind in node.kinds]
        self._serve(TierMemory(group, node.arena, node.pool, None), transports)
        node.serves(self.service.endpoints.fetch, memory)

    @property
    def service(self) -> Any:
        return self._tiers.service if self._tiers is not None else None

    @property
    def epoch(self) -> bytes:
        return self._epoch

    @property
    def workers(self) -> dict[Name, FollowedWorker]:
        return self._workers

    @property
    def num_fetches(self) -> int:
        return len(self._fetches)


class PoolNodeProcess(Process):
    """One incarnation of a pool node."""

    def __init__(
        self,
        world: World,
        network: Network,
        memories: Memories,
        config: Config,
        *,
        num_blocks: int,
        name: str,
        machine: str,
        offset_s: float,
        transports: tuple[str, ...],
        serves: Callable[[str, Memory], None],
        kept: set[Key],
    ) -> None:
        super().__init__(world, name, machine, offset_s)
        self.kept = kept
        self.memories = memories
        self.kinds = transports
        self.num_blocks = num_blocks
        self.arena: Arena | None = None
        self.pool: BlockPool | None = None
        self._context = Context(network, self)
        rng = world.generator(f"{name} {world.now_s}")
        configured = config.model_copy(update={"transfer": config.transfer.model_copy(update={"machine_id": machine})})
        self.node = _Node(
            configured, name, context=cast(Any, self._context), poller=cast(Any, NoPoller()), new_id=rng.randbytes
        )
        self.node.node = self
        self.epoch = self.node.epoch
        self.serves = serves
        self.run(self._open)

    def _open(self) -> None:
        self.node.open()
        self.wake()

    def turn(self) -> float:
        ready, self.ready = self.ready, {}
        return self.node.turn(cast(Any, ready))

    def died(self) -> None:
        self._context.destroy()
