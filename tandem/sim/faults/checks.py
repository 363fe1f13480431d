"""What must hold: at any time, and when all is quiet again.

Owns the rules that look at whole processes; what is judged message by message is in `watch`, `read_watch` and `clients`.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvpool.block_pool import BlockPool
from kvpool.keys import Key
from router.reports import audit
from tandem.sim.faults.clients import Clients
from tandem.sim.faults.cluster import Cluster
from tandem.sim.faults.fake_model import BLOCK_SIZE
from tandem.sim.faults.pool_node import PoolNodeProcess
from tandem.sim.faults.router_node import RouterNode
from tandem.sim.faults.worker_node import WorkerNode
from tandem.sim.faults.world import Violation


def check_always(cluster: Cluster) -> None:
    """Raises Violation or AssertionError unless every pool accounts for every block, and every promise to a reader is kept."""
    for node in cluster.nodes.values():
        if node.alive and not isinstance(node, RouterNode) and node.pool is not None:
            node.pool.check()
    cluster.reads.check_all()


def unrest(cluster: Cluster, clients: Clients) -> Iterator[str]:
    """What is not over or not agreed on yet. Nothing of it may stay once everything is well."""
    if clients.waiting:
        yield f"{len(clients.waiting)} requests have not ended: {', '.join(list(clients.waiting)[:5])}"
    for worker in cluster.workers:
        yield from _unrest_of_worker(worker)
    for pool in cluster.pools:
        yield from _unrest_of_pool(pool, cluster)
    for router in cluster.routers:
        yield from _unrest_of_router(router, cluster)


def check_blocks(cluster: Cluster) -> None:
    """Raises Violation unless every block that can be found has the bytes that its key stands for."""
    blocks = cluster.truth.blocks
    for node in cluster.nodes.values():
        if isinstance(node, RouterNode) or node.pool is None or node.arena is None:
            continue
        for key, block_id in announced(node.pool).items():
            if bytes(node.arena.slab(block_id)) != blocks[key]:
                raise Violation(f"{node.name} holds wrong bytes for {key.hex()[:8]} in block {block_id}")


def announced(pool: BlockPool) -> dict[Key, int]:
    """What a pool has said that it holds, and where. Raises Violation for a partial block."""
    found: dict[Key, int] = {}
    for event in pool.snapshot():
        for key in getattr(event, "block_hashes", ()):
            record = pool.lookup(key)
            assert record is not None, "a snapshot names a block that isn't held"
            if record.num_tokens != BLOCK_SIZE:
                raise Violation(f"a block of {record.num_tokens} tokens is announced")
            found[key] = record.block_id
    return found


def _unrest_of_pool_blocks(name: str, pool: BlockPool) -> Iterator[str]:
    stats = pool.stats()
    if stats.referenced or stats.leased or stats.pinned or stats.lent:
        yield (
            f"{name} holds {stats.referenced} blocks referenced, {stats.leased} leased, {stats.pinned} pinned, "
            f"{stats.lent} lent"
        )


def _unrest_of_worker(worker: WorkerNode) -> Iterator[str]:
    if not worker.engine.is_idle:
        yield f"{worker.name} has jobs: {list(worker.engine._jobs._jobs)[:3]}"
    if len(worker.transfer.unacknowledged):
        yield f"{worker.name} has unacknowledged tokens"
    service = worker.transfer.service
    if service.num_fetches:
        yield f"{worker.name} fetches"
    if service._server.num_parked:
        yield f"{worker.name} keeps keys parked"
    yield from _unrest_of_pool_blocks(worker.name, worker.pool)


def _unrest_of_pool(node: PoolNodeProcess, cluster: Cluster) -> Iterator[str]:
    if node.pool is None:
        yield f"{node.name} has no group"
        return
    if node.node.num_fetches:
        yield f"{node.name} fetches"
    yield from _unrest_of_pool_blocks(node.name, node.pool)
    workers = {(worker.name, worker.epoch): worker for worker in cluster.workers}
    for who, followed in node.node.workers.items():
        if who not in workers:
            yield f"{node.name} follows {who[0]} in an epoch that is over"
        elif set(followed.follower.announced) != set(announced(workers[who].pool)):
            yield f"{node.name} doesn't know what {who[0]} holds"


def _unrest_of_router(router: RouterNode, cluster: Cluster) -> Iterator[str]:
    core = router.core
    for node in cluster.nodes.values():
        if not isinstance(node, RouterNode) and not core.membership.is_member(node.name, node.epoch):
            yield f"{router.name} has no {node.name}"
            return
    now_s = router.world.now_s + router.offset_s
    for check in audit(core, set(), now_s).checks:
        if not check.ok:
            yield f"{router.name}: not so: {check.check} ({check.evidence})"
    if len(core.journal):
        yield f"{router.name} has {len(core.journal)} requests"
    for node in cluster.nodes.values():
        if not isinstance(node, RouterNode) and node.pool is not None:
            yield from _index_disagrees(
                router, node.name, announced(node.pool), 0 if isinstance(node, WorkerNode) else 1
            )


def _index_disagrees(router: RouterNode, name: str, held: dict[Key, int], tier: int) -> Iterator[str]:
    index, number = router.core.index, router.core.fleet.number(name)
    num_indexed = index.num_blocks_of(name)
    if num_indexed != len(held) or number is None:
        yield f"{router.name} has {num_indexed} blocks of {name}, which holds {len(held)}"
        return
    for key in held:
        if not index.longest([key]).counts[number, tier]:
            yield f"{router.name} doesn't know that {name} holds {key.hex()[:8]}"
            return
