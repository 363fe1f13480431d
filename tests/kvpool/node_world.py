"""A pool node's surroundings, played by the test: routers, workers that announce and fetch, and nodes as real processes.

What the test plays is stepped by `World.step`; nothing here runs by itself. Blocks are named by numbers, their keys and bytes
follow from these (`disk_blocks`).
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from kernels.cpu import native
from kvpool.arena import Arena, checksum_of
from kvpool.block_pool import BlockPool
from kvpool.follower import EventFollower
from kvpool.service import KVService
from kvpool.sink import FetchedBatch, FetchEnded, FetchPlan, WantedBlock
from kvpool.transport.build import make_transports
from protos import control, kv_events
from protos.control import FromRouter, Heartbeat, Hello, Peers, RoutingGroup, Source, Welcome
from protos.kv_events import BlockRemoved, BlockStored
from tandem.clock import now_s
from tandem.config import TransferConfig
from tandem.machine import machine_id
from tests.kvpool.child import Child
from tests.kvpool.disk_blocks import bytes_of, key_of, parent_of
from tests.kvpool.named_blocks import SIZE
from tests.kvpool.processes import wait_for

SLAB = 32 * 1024
"""The least memory that may be configured for a tier is 32 of these."""
GROUP = RoutingGroup(b"m" * 16, "format", b"n" * 16, SIZE)
PORTION = 12


@dataclass
class Heard:
    """What a router knows of one node."""

    identity: bytes
    hello: Hello
    heartbeat: Heartbeat | None = None
    num_heartbeats: int = 0
    last_heartbeat_s: float = 0.0
    longest_silence_s: float = 0.0


class Zygote(Child):
    """See `node_zygote`."""

    def __init__(self) -> None:
        super().__init__(
            "tests.kvpool.node_zygote", env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        )

    def start(self, name: str, environment: dict[str, str], log: Path) -> int:
        self.tell({"name": name, "environment": environment, "log": str(log)})
        pid: int = self.hear(int)
        return pid


class Node:
    """One pool node process. `log` is a file with all that it wrote."""

    def __init__(self, world: World, name: str, options: dict[str, Any]) -> None:
        self.world = world
        self.name = name
        self.log = world.path / f"{name}.log"
        world.heard.pop(name, None)
        environment = {
            "TANDEM_ROUTER__CONTROL_PORT": str(world.port),
            "TANDEM_TRANSFER__LEASE_S": "1.0",
            **{f"TANDEM_{key.upper()}": str(value) for key, value in options.items()},
        }
        self.pid = world.zygote.start(name, environment, self.log)
        self._pidfd = os.pidfd_open(self.pid)

    @property
    def heard(self) -> Heard:
        return self.world.heard[self.name]

    @property
    def source(self) -> Source:
        hello = self.heard.hello
        return Source(hello.process, hello.epoch, "HOST", hello.endpoints)

    @property
    def is_over(self) -> bool:
        return self._pidfd < 0 or bool(select.select([self._pidfd], [], [], 0)[0])

    def wait_until_open(self, seconds: float = 15.0) -> None:
        """Until it knows its group and serves."""
        self.world.wait(lambda: self.name in self.world.heard and self.heard.hello.group, seconds)

    def heartbeat(self) -> Heartbeat:
        """A new one, sent after this call."""
        before = self.heard.num_heartbeats
        self.world.wait(lambda: self.heard.num_heartbeats >= before + 2)
        heartbeat = self.heard.heartbeat
        assert heartbeat is not None
        return heartbeat

    def wait_for_counters(self, **wanted: int) -> None:
        """Until each of the counters is at least that."""

        def there() -> bool:
            heartbeat = self.heard.heartbeat
            return heartbeat is not None and all(
                getattr(heartbeat.counters, name) >= count for name, count in wanted.items()
            )

        self.world.wait(there)

    def send_signal(self, number: int) -> None:
        if not self.is_over:
            os.kill(self.pid, number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Ends it, and waits for that."""
        self.send_signal(number)
        self.world.wait(lambda: self.is_over)

    def close(self) -> None:
        """Ends it if need be. Idempotent."""
        if self._pidfd >= 0:
            self.send_signal(signal.SIGKILL)
            select.select([self._pidfd], [], [], 10)
            os.close(self._pidfd)
            self._pidfd = -1


class Worker:
    """A worker in this process, as far as a pool node can tell: announces blocks, is told what is kept, fetches."""

    def __init__(
        self, world: World, name: str, *, machine: str = "", num_blocks: int = 256, slab_bytes: int = SLAB
    ) -> None:
        self.world = world
        self.kept: set[bytes] = set()
        self.pool = BlockPool(num_blocks, SIZE, "DEVICE")
        self.arena = Arena(num_blocks, slab_bytes)
        self.epoch = os.urandom(8)
        self._came: dict[bytes, list[FetchedBatch]] = {}
        self._ended: dict[bytes, FetchEnded] = {}
        self._into: dict[bytes, list[int]] = {}
        transfer = TransferConfig(transports=["shm", "tcp"])
        machine = machine or machine_id()
        self.service = KVService(
            context=world.context, pool=self.pool, arena=self.arena, process=name, epoch=self.epoch,
            bind_host="127.0.0.1", machine_id=machine, lease_s=5.0, grace_s=1.0,
            transports=make_transports(transfer, self.arena, self.epoch, machine_id=machine, native=native()),
            on_blocks=lambda fetch_id, batch: self._came[fetch_id].append(batch),
            on_ended=lambda ended: self._ended.__setitem__(ended.fetch_id, ended),
        )  # fmt: skip
        self._listen_for_kept()
        self.poller = zmq.Poller()
        self.service.register(self.poller)
        self.source = Source(name, self.epoch, "DEVICE", self.service.endpoints)
        world.workers.append(self)

    def _listen_for_kept(self) -> None:
        pool = self.pool
        mark, unmark = pool.mark_kept, pool.unmark_kept

        def mark_kept(keys: Sequence[bytes], by: int) -> None:
            self.kept.update(keys)
            mark(keys, by)

        def unmark_kept(keys: Sequence[bytes], by: int) -> None:
            self.kept.difference_update(keys)
            unmark(keys, by)

        pool.mark_kept, pool.unmark_kept = mark_kept, unmark_kept  # type: ignore[method-assign]

    def put(self, numbers: Sequence[int], *, corrupt: Sequence[int] = (), owner: bytes = bytes(8)) -> None:
        """Computes and announces these blocks, evicting older ones if it must."""
        blocks = self.pool.allocate(len(numbers))
        assert blocks is not None
        for block_id, number in zip(blocks, numbers, strict=True):
            key = key_of(number)
            data = bytes_of(key, self.arena.slab_bytes)
            self.arena.slab(block_id)[:] = data
            if number in corrupt:
                self.arena.slab(block_id)[0] ^= 1
            self.pool.publish(block_id, key, parent_of(number), SIZE, checksum_of(data), writer=self.epoch, owner=owner)
        self.pool.release(blocks)
        self.service.publish_pool_events(now_s())

    def forget(self) -> None:
        self.pool.clear_cached()
        self.service.publish_pool_events(now_s())

    def start_fetch(self, source: Source, numbers: Sequence[int], seconds: float = 10.0) -> bytes:
        blocks = self.pool.allocate(len(numbers))
        assert blocks is not None
        wanted = tuple(
            WantedBlock(key_of(number), parent_of(number), SIZE, block_id)
            for number, block_id in zip(numbers, blocks, strict=True)
        )
        fetch_id = os.urandom(16)
        self._came[fetch_id] = []
        self._into[fetch_id] = blocks
        plan = FetchPlan(fetch_id, "request", wanted, (source,), "", now_s() + seconds)
        self.service.start_fetch(plan, now_s())
        return fetch_id

    def is_over(self, fetch_id: bytes) -> bool:
        return fetch_id in self._ended

    def take(self, fetch_id: bytes) -> set[bytes]:
        """The keys that a fetch that is over brought; their bytes are right."""
        ended = self._ended.pop(fetch_id)
        found: set[bytes] = set()
        for batch in self._came.pop(fetch_id):
            for block, block_id in zip(batch.blocks, batch.block_ids, strict=True):
                data = self.arena.slab(block_id).tobytes()
                assert data == bytes_of(block.key, self.arena.slab_bytes), f"wrong bytes for {block.key.hex()}"
                found.add(block.key)
        assert found == set(ended.committed)
        self.pool.retire(ended.tainted)
        self.pool.release([block_id for block_id in self._into.pop(fetch_id) if block_id not in ended.tainted])
        return found

    def fetch(self, source: Source, numbers: Sequence[int], seconds: float = 10.0) -> set[int]:
        """What comes of `numbers` (and is right), asked for in portions for which the smallest HOST has room."""
        by_key = {key_of(number): number for number in numbers}
        found: set[bytes] = set()
        for begin in range(0, len(numbers), PORTION):
            fetch_id = self.start_fetch(source, numbers[begin : begin + PORTION], seconds)
            self.world.wait(lambda fetch_id=fetch_id: self.is_over(fetch_id), seconds + 5)
            found |= self.take(fetch_id)
        return {by_key[key] for key in found}

    def step(self) -> None:
        self.service.handle(dict(self.poller.poll(0)), now_s())
        self.service.publish_pool_events(now_s())
        self.service.tick(now_s())

    def close(self) -> None:
        self.world.workers.remove(self)
        self.service.close()
        self.arena.close()


class Watcher:
    """Follows a node's KV events; `held[medium]` is what it announces there."""

    def __init__(self, world: World, source: Source) -> None:
        self.world = world
        self.held: dict[str, set[bytes]] = {"HOST": set(), "DISK": set()}
        self._source = source
        self._follower = EventFollower(source.epoch)
        self._follower._apply = self._apply  # type: ignore[method-assign]
        self._events = world.context.socket(zmq.SUB)
        self._events.subscribe(b"")
        self._events.connect(source.endpoints.events)
        self._replay = world.context.socket(zmq.DEALER)
        self._replay.connect(source.endpoints.replay)
        self.num_replies = 0
        world.watchers.append(self)

    def _apply(self, batch: kv_events.EventBatch | None) -> None:
        assert batch is not None
        assert batch.epoch == self._source.epoch
        for event in batch.events:
            if isinstance(event, BlockStored):
                self.held[event.medium or ""].update(event.block_hashes)  # type: ignore[arg-type]
            elif isinstance(event, BlockRemoved):
                self.held[event.medium or ""].difference_update(event.block_hashes)  # type: ignore[arg-type]
            else:
                for held in self.held.values():
                    held.clear()

    @property
    def all(self) -> set[bytes]:
        return self.held["HOST"] | self.held["DISK"]

    def step(self) -> None:
        now = now_s()
        while self._events.poll(0):
            _, seq, payload = self._events.recv_multipart()
            self._follower.on_live(kv_events.decode_seq(seq), kv_events.decode_batch(payload), now)
        while self._replay.poll(0):
            _, seq, payload = self._replay.recv_multipart()
            if kv_events.decode_seq(seq) < 0:
                self._follower.on_replay_end(now)
                self.num_replies += 1
            else:
                self._follower.on_replay(kv_events.decode_seq(seq), kv_events.decode_batch(payload), now)
        start = self._follower.ask(now)
        if start is not None:
            self._replay.send_multipart([b"", kv_events.encode_seq(start)])

    def close(self) -> None:
        self.world.watchers.remove(self)
        self._events.close(0)
        self._replay.close(0)


class World:
    """Everything of one test. `path` is its folder. Close it, or use it as a context."""

    def __init__(self, path: Path, zygote: Zygote) -> None:
        self.path = path
        self.zygote = zygote
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.heartbeat_s = 0.05
        self.heard: dict[str, Heard] = {}
        self.nodes: list[Node] = []
        self.workers: list[Worker] = []
        self.watchers: list[Watcher] = []

    def start_node(
        self,
        name: str = "pool-0",
        *,
        host_blocks: int = 32,
        wait: bool = True,
        workers: Sequence[Worker] | None = None,
        **options: Any,
    ) -> Node:
        """A node with `options` as environment variables (`pool__disk__dirs='[…]'`), told of `workers`, or of all of this world;
        unless `wait` is False it is open."""
        options.setdefault("pool__host_bytes", max(2**20, host_blocks * SLAB))
        node = Node(self, name, options)
        self.nodes.append(node)
        if wait:
            self.wait(lambda: name in self.heard)
            self.tell_peers(node, workers)
            node.wait_until_open()
        return node

    def disk_options(self, *directories: Path, slots: int = 64, **options: Any) -> dict[str, Any]:
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
        dirs = json.dumps([str(directory) for directory in directories])
        return {"pool__disk__dirs": dirs, "pool__disk__bytes": max(2**20, slots * SLAB), **options}

    def tell_peers(self, node: Node, workers: Sequence[Worker] | None = None, slab_bytes: int = SLAB) -> None:
        """What the router would say of `workers` (all), and of all nodes that are open."""
        told = self.workers if workers is None else workers
        pools = [other.source for other in self.nodes if not other.is_over and other.name in self.heard]
        pools = [source for source in pools if source.endpoints.fetch]
        self.send(node, Peers([worker.source for worker in told], GROUP, slab_bytes, pools))

    def send(self, node: Node, message: FromRouter) -> None:
        self.router.send_multipart([node.heard.identity, control.encode(message)])

    def step(self) -> None:
        while self.router.poll(0):
            identity, payload = self.router.recv_multipart()
            self._on_message(identity, control.decode_to_router(payload))
        for one in [*self.workers, *self.watchers]:
            one.step()

    def wait(self, condition: Callable[[], Any], seconds: float = 15.0) -> Any:
        return wait_for(condition, seconds, self.step)

    def _on_message(self, identity: bytes, message: control.ToRouter) -> None:
        match message:
            case Hello(process=name):
                if any(node.name == name and node.pid != message.pid for node in self.nodes[-1:]):
                    return  # what one that was killed had still said
                known = self.heard.get(name)
                if known is None or known.hello.epoch != message.epoch:
                    known = self.heard[name] = Heard(identity, message)
                known.identity, known.hello = identity, message
                welcome = Welcome(control.PROTOCOL_VERSION, "router", b"router-1", self.heartbeat_s, 60.0)
                self.router.send_multipart([identity, control.encode(welcome)])
            case Heartbeat(process=name):
                heard, now = self.heard.get(name), now_s()
                if heard is None or heard.hello.epoch != message.epoch:
                    return
                if heard.last_heartbeat_s:
                    heard.longest_silence_s = max(heard.longest_silence_s, now - heard.last_heartbeat_s)
                heard.heartbeat, heard.last_heartbeat_s = message, now
                heard.num_heartbeats += 1
            case _:
                pass

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        for one in [*self.workers, *self.watchers]:
            one.close()
        self.router.close()
        self.context.term()
