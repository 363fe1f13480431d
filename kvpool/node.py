"""The pool node: the HOST tier of one machine, which outlives the workers whose blocks it keeps.

Owns its arena, pool and `KVService`, a subscription per worker, and the policy of what to keep: every full block that a
worker announces, fetched from that worker, until the least recently used ones have to go. Nobody else writes its memory.
It never computes KV and never decides where a request goes. One thread.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Iterator, Sequence

import msgspec
import zmq

from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.follower import EventFollower
from kvpool.keys import Key
from kvpool.service import KVService
from kvpool.sink import FetchedBlock, FetchEnded, FetchPlan, WantedBlock
from protos import control, kv_events
from protos.control import (
    Capacity,
    Counters,
    Endpoints,
    FromRouter,
    Goodbye,
    Heartbeat,
    Hello,
    Load,
    Peers,
    RoutingGroup,
    Source,
)
from tandem.clock import now_s
from tandem.config import Config
from tandem.errors import ConfigError
from tandem.machine import machine_id
from tandem.zmq_io import RouterLink, bounded_socket, identity

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]

MAX_FETCHES = 4
MAX_BLOCKS_PER_FETCH = 64
MAX_TRIES = 3
"""A block that a worker announces but doesn't deliver is tried so often."""
MAX_REMEMBERED_TRIES = 10_000
_STOP_CHECK_S = 0.1
_RETRY_S = 0.05
_GOODBYE_LINGER_MS = 200


class Keeper:
    """What the node still has to get from one worker, in the order it was announced. Pure."""

    def __init__(self, follower: EventFollower) -> None:
        self.follower = follower
        self._queue: dict[Key, None] = {}
        self._tries: dict[Key, int] = {}

    def take_in(self) -> None:
        """Queues what the worker has stored since."""
        for key in self.follower.take_stored():
            self._tries.pop(key, None)
            self._queue[key] = None

    def next_batch(self, pool: BlockPool, busy: set[Key]) -> list[tuple[Key, Key]]:
        """Pairs `(key, parent)` that the worker holds and nobody here has or fetches: up to `MAX_BLOCKS_PER_FETCH`, and so many
        that a small pool has room for several fetches."""
        batch: list[tuple[Key, Key]] = []
        most = min(MAX_BLOCKS_PER_FETCH, max(1, pool.num_blocks // (2 * MAX_FETCHES)))
        while self._queue and len(batch) < most:
            key = next(iter(self._queue))
            del self._queue[key]
            parent = self.follower.announced.get(key)
            if parent is None or key in busy or pool.contains(key):
                self._tries.pop(key, None)
            elif self._tries.get(key, 0) >= MAX_TRIES:
                continue
            else:
                batch.append((key, parent))
        return batch

    def put_back(self, keys: Sequence[Key]) -> None:
        """There was no room for these; they stay first in line."""
        self._queue = dict.fromkeys(keys) | self._queue

    def offer(self, keys: Sequence[Key]) -> None:
        """Another worker did not deliver these: queues those that this one holds and has not failed to deliver."""
        for key in keys:
            if key in self.follower.announced and self._tries.get(key, 0) < MAX_TRIES:
                self._queue[key] = None

    def on_fetched(self, committed: Sequence[Key], missing: Sequence[Key]) -> None:
        """How a batch ended: what is missing is tried again, but not for ever, unless it is announced anew."""
        for key in committed:
            self._tries.pop(key, None)
        for key in missing:
            self._tries[key] = self._tries.get(key, 0) + 1
        self.offer(missing)
        if len(self._tries) > MAX_REMEMBERED_TRIES:
            self._tries = {key: tries for key, tries in self._tries.items() if key in self.follower.announced}


class _Worker:
    """One incarnation of a worker that the node follows: its event sockets and what is still to get from it."""

    def __init__(self, context: zmq.Context[Socket], source: Source) -> None:
        self.source = source
        self.keeper = Keeper(EventFollower(source.epoch))
        self.events = bounded_socket(context, zmq.SUB)
        self.replay = bounded_socket(context, zmq.DEALER)
        try:
            self.events.subscribe(kv_events.TOPIC)
            self.events.connect(source.endpoints.events)
            self.replay.connect(source.endpoints.replay)
        except zmq.ZMQError:
            self.close()
            raise

    @property
    def follower(self) -> EventFollower:
        return self.keeper.follower

    def close(self) -> None:
        self.events.close()
        self.replay.close()


class PoolNode:
    """One pool node from its first hello to its goodbye. `run` is all there is to call.

    The arena is made when a router first says how large slabs are, and stays so: a group with other slabs needs a pool
    node of its own (a new process).
    """

    def __init__(self, config: Config, name: str) -> None:
        self._config = config
        self._name = name
        self._epoch = secrets.token_bytes(8)
        self._context: zmq.Context[Socket] = zmq.Context()
        self._poller = zmq.Poller()
        self._group: RoutingGroup | None = None
        self._arena: Arena | None = None
        self._pool: BlockPool | None = None
        self._service: KVService | None = None
        self._workers: dict[tuple[str, bytes], _Worker] = {}
        self._fetches: dict[bytes, tuple[tuple[str, bytes], FetchPlan]] = {}
        self._busy: set[Key] = set()
        self._retry_at_s = 0.0
        self.num_undecodable = 0

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop`. Raises ConfigError if a router refuses this node."""
        self._link = RouterLink(
            self._context,
            [self._config.router.control_endpoint],
            identity=identity(self._name, self._epoch),
            make_hello=self._hello,
            make_heartbeat=self._heartbeat,
            on_message=self._on_message,
            on_refused=self._on_refused,
            on_lost=lambda number: None,  # what is kept stays useful; the next hello tells the router all
        )
        try:
            for socket in self._link.sockets():
                self._poller.register(socket, zmq.POLLIN)
            due_s = 0.0
            while not stop.is_set():
                timeout_s = min(max(0.0, due_s - now_s()), _STOP_CHECK_S)
                due_s = self._step(dict(self._poller.poll(int(timeout_s * 1000))))
            self._link.send_all(Goodbye(self._name, self._epoch))
        finally:
            self._close()

    def _step(self, ready: dict[Socket | int, int]) -> float:
        for socket in self._link.sockets():
            if socket in ready:
                self._link.handle(socket, now_s())
        for worker in list(self._workers.values()):
            if worker.replay in ready and not worker.replay.closed:
                self._hear_replay(worker)
            if worker.events in ready and not worker.events.closed:
                self._hear_events(worker)
        now = now_s()
        due_s = self._link.tick(now)
        if self._service is None:
            return due_s
        self._service.handle(ready, now)
        for worker in self._workers.values():
            if (start_seq := worker.follower.ask(now)) is not None:
                self._ask_replay(worker, start_seq)
            due_s = min(due_s, worker.follower.next_ask_s())
        self._fetch_more(now)
        self._service.publish_pool_events(now)
        if self._retry_at_s > now:
            due_s = min(due_s, self._retry_at_s)
        return min(due_s, self._service.tick(now))

    def _close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        if self._service is not None:
            self._service.close()
        if self._arena is not None:
            self._arena.close()
        self._link.close(_GOODBYE_LINGER_MS)
        self._context.term()

    # --- routers -----------------------------------------------------------------------------------------------------

    def _on_message(self, router: int, message: FromRouter) -> None:
        if not isinstance(message, Peers):
            log.warning("a pool node has no use for %s", type(message).__name__)
            return
        if message.group is None or not message.slab_bytes:
            return  # no worker has joined yet
        if self._service is None:
            self._open(message.group, message.slab_bytes)
            self._link.hello_again()
        if message.group != self._group:
            log.warning("told of the workers of another group; this node keeps to the first it was told")
            return
        self._follow(message.workers)

    def _on_refused(self, reason: str) -> None:
        raise ConfigError(f"the router refused {self._name}: {reason}")

    def _open(self, group: RoutingGroup, slab_bytes: int) -> None:
        num_blocks = self._config.pool.host_bytes // slab_bytes
        if num_blocks < 1:
            raise ConfigError(f"pool.host_bytes is {self._config.pool.host_bytes}, less than one slab of {slab_bytes}")
        transfer = self._config.transfer
        self._group = group
        self._arena = Arena(num_blocks, slab_bytes)
        self._pool = BlockPool(num_blocks, group.block_size, "HOST")
        self._service = KVService(
            context=self._context,
            pool=self._pool,
            arena=self._arena,
            process=self._name,
            epoch=self._epoch,
            tier="HOST",
            bind_host=self._config.transfer.host,
            transports=transfer.transports,
            machine_id=machine_id(),
            lease_s=transfer.lease_s,
            grace_s=transfer.grace_s,
            on_blocks=self._on_blocks,
            on_ended=self._on_ended,
        )
        self._service.register(self._poller)
        log.info("keeping up to %d blocks of %d bytes", num_blocks, slab_bytes)

    def _hello(self) -> Hello:
        num_blocks = self._arena.num_blocks if self._arena is not None else 0
        slab_bytes = self._arena.slab_bytes if self._arena is not None else 0
        return Hello(
            version=control.PROTOCOL_VERSION,
            process=self._name,
            role="pool",
            epoch=self._epoch,
            pid=os.getpid(),
            endpoints=self._service.endpoints if self._service is not None else Endpoints("", "", ""),
            capacity=Capacity(num_blocks=num_blocks, slab_bytes=slab_bytes),
            group=self._group,
        )

    def _heartbeat(self, router: int) -> Heartbeat:
        load, counters, events_seq = Load(), Counters(), -1
        if self._pool is not None and self._service is not None:
            stats = self._pool.stats()
            load = Load(free_blocks=stats.allocatable, cached_blocks=stats.cached, leased_blocks=stats.leased)
            counters = self._service.add_counters(counters)
            events_seq = self._service.events_seq
        return Heartbeat(
            process=self._name,
            epoch=self._epoch,
            step_id=0,
            step_age_s=0.0,
            events_seq=events_seq,
            load=load,
            counters=counters,
        )

    # --- workers -----------------------------------------------------------------------------------------------------

    def _follow(self, sources: Sequence[Source]) -> None:
        """These are all the workers there are."""
        assert self._service is not None
        told = {(source.process, source.epoch): source for source in sources}
        for name in [name for name in self._workers if name not in told]:
            worker = self._workers.pop(name)
            self._poller.unregister(worker.events)
            self._poller.unregister(worker.replay)
            worker.close()
            self._service.drop_peer(*name, now_s())
            log.info("no longer following %s", worker.source.process)
        for name, source in told.items():
            if name in self._workers:
                continue
            try:
                worker = _Worker(self._context, source)
            except zmq.ZMQError as error:
                log.warning("can't follow %s at %r: %s", source.process, source.endpoints.events, error)
                continue
            self._workers[name] = worker
            self._poller.register(worker.events, zmq.POLLIN)
            self._poller.register(worker.replay, zmq.POLLIN)
            log.info("following %s", source.process)

    def _ask_replay(self, worker: _Worker, start_seq: int) -> None:
        try:
            worker.replay.send_multipart([b"", kv_events.encode_seq(start_seq)], zmq.NOBLOCK)
        except zmq.Again:
            pass  # the worker doesn't take messages now; the follower asks again

    def _hear_replay(self, worker: _Worker) -> None:
        for seq, payload in self._publications(worker, worker.replay):
            if seq < 0:
                worker.follower.on_replay_end(now_s())
            else:
                worker.follower.on_replay(seq, self._decoded(worker, payload), now_s())
        worker.keeper.take_in()

    def _hear_events(self, worker: _Worker) -> None:
        for seq, payload in self._publications(worker, worker.events):
            worker.follower.on_live(seq, self._decoded(worker, payload), now_s())
        worker.keeper.take_in()

    def _publications(self, worker: _Worker, socket: Socket) -> Iterator[tuple[int, bytes]]:
        """What waits on an event or replay socket; frames that are no publication are dropped."""
        while (frames := _next(socket)) is not None:
            try:
                _, seq_frame, payload = frames
                seq = kv_events.decode_seq(seq_frame)
            except ValueError as error:
                self._drop_frame(worker, error)
                continue
            yield seq, payload

    def _decoded(self, worker: _Worker, payload: bytes) -> kv_events.EventBatch | None:
        try:
            return kv_events.decode_batch(payload)
        except (msgspec.DecodeError, ValueError) as error:
            self._drop_frame(worker, error)
            return None

    def _drop_frame(self, worker: _Worker, error: Exception) -> None:
        self.num_undecodable += 1
        log.warning("dropped an event frame of %s: %s", worker.source.process, error)

    # --- keeping -----------------------------------------------------------------------------------------------------

    def _fetch_more(self, now: float) -> None:
        """Starts fetches, the workers taking turns, up to the bound and to the room that there is."""
        if now < self._retry_at_s:
            return
        progress = True
        while progress and len(self._fetches) < MAX_FETCHES:
            progress = False
            for name, worker in list(self._workers.items()):
                if len(self._fetches) < MAX_FETCHES and name in self._workers:
                    progress = self._fetch_from(name, worker, now) or progress

    def _fetch_from(self, name: tuple[str, bytes], worker: _Worker, now: float) -> bool:
        assert self._pool is not None
        assert self._service is not None
        pairs = worker.keeper.next_batch(self._pool, self._busy)
        if not pairs:
            return False
        blocks = self._pool.allocate(len(pairs))
        if blocks is None:
            # So much is leased or being fetched right now that there is no room: a moment later there is.
            worker.keeper.put_back([key for key, _ in pairs])
            self._retry_at_s = now + _RETRY_S
            return False
        size = self._pool.block_size
        wanted = tuple(WantedBlock(key, parent, size, b) for (key, parent), b in zip(pairs, blocks, strict=True))
        deadline_s = now + self._config.transfer.fetch_timeout_s
        plan = FetchPlan(secrets.token_bytes(16), f"pool:{self._name}", wanted, (worker.source,), "", deadline_s)
        self._fetches[plan.fetch_id] = (name, plan)
        self._busy.update(key for key, _ in pairs)
        self._service.start_fetch(plan, now)
        return True

    def _on_blocks(self, fetch_id: bytes, blocks: list[FetchedBlock]) -> None:
        assert self._pool is not None
        for block in blocks:
            self._pool.publish(block.block_id, block.key, block.parent, block.num_tokens, block.checksum)

    def _on_ended(self, ended: FetchEnded) -> None:
        assert self._pool is not None
        name, plan = self._fetches.pop(ended.fetch_id)
        self._busy.difference_update(wanted.key for wanted in plan.wanted)
        if ended.tainted:
            self._pool.retire(ended.tainted)
        # The tail first, so that it is the older one when room is needed.
        self._pool.release([w.block_id for w in reversed(plan.wanted) if w.block_id not in ended.tainted])
        for other_name, worker in self._workers.items():
            if other_name == name:
                worker.keeper.on_fetched(ended.committed, ended.missing)
            else:
                worker.keeper.offer(ended.missing)


def _next(socket: Socket) -> list[bytes] | None:
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None


def run(config: Config, name: str, stop: threading.Event) -> None:
    """Runs the pool node `name` in the foreground until `stop` is set. Raises TandemError."""
    PoolNode(config, name).run(stop)
