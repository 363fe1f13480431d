"""The pool node: the HOST and DISK tiers of one machine, which outlive the workers whose blocks they keep.

Owns its tiers (`node_tiers`) and a subscription per worker that it keeps for (`keeper` says which). Every full block that
such a worker announces is fetched from it into HOST and goes on to DISK as `tiering` says; the worker is told what is kept,
and what is no more. Nobody else writes its memory. It never computes KV and never decides where a request goes. One thread,
but for the disk's.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence

import msgspec
import zmq

from kvpool.followed import FollowedWorker
from kvpool.keeper import MAX_BLOCKS_PER_FETCH, keepers_of
from kvpool.keys import Key
from kvpool.node_tiers import Memory, NodeTiers, Opening
from kvpool.peer_lists import PeerLists
from kvpool.sink import FetchedBatch, FetchEnded, FetchPlan, WantedBlock
from kvpool.transport.base import Transport
from protos import control
from protos.control import (
    Audit,
    Capacity,
    Counters,
    Endpoints,
    FromRouter,
    Goodbye,
    Heartbeat,
    Hello,
    Kept,
    Load,
    Lost,
    Owned,
    Peers,
    RoutingGroup,
    Source,
)
from tandem.clock import now_s
from tandem.config import Config
from tandem.curve import load_keyring
from tandem.errors import ConfigError, ProtocolError
from tandem.machine import check_memory, machine_id
from tandem.state_file import StateFile
from tandem.stop import ends_at_once
from tandem.zap import Zap
from tandem.zmq_io import RouterLink, identity

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]

MAX_FETCHES = 8
MAX_FETCHES_PER_WORKER = 2
"""One that answers no more must not keep the node from the others."""
NICENESS = 5
"""Where cores are short, those who compute and those who wait for blocks come first."""
BACKGROUND_ORDER = 2**62
"""What the pool copies may wait behind what somebody needs."""
MAX_KEYS_PER_MESSAGE = 4096
_STOP_CHECK_S = 0.1
_RETRY_S = 0.01
_GOODBYE_LINGER_MS = 200

Name = tuple[str, bytes]


class PoolNode:
    """One pool node from its first hello to its goodbye. `run` is all there is to call: `open`, then a `turn` after the other.

    The tiers are opened when a router first says how large slabs are, and stay so: a group with other slabs needs a pool node
    of its own (a new process). Until they are open the node says that it holds nothing.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        *,
        context: zmq.Context[Socket] | None = None,
        poller: zmq.Poller | None = None,
        new_id: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._config = config
        self._name = name
        self._machine_id = config.transfer.machine_id or machine_id()
        self._new_id = new_id
        self._epoch = new_id(8)
        self._keys = load_keyring(config.control.curve, name, "pool")
        self._zap: Zap | None = None
        self._context: zmq.Context[Socket] = context or zmq.Context()
        self._poller = poller or zmq.Poller()
        self._opening: Opening | None = None
        self._tiers: NodeTiers | None = None
        self._peer_lists = PeerLists()
        self._peers: Peers | None = None
        self._members: set[Name] = set()
        self._workers: dict[Name, FollowedWorker] = {}
        self._fetches: dict[bytes, tuple[Name, FetchPlan]] = {}
        self._busy: set[Key] = set()
        self._retry_at_s = 0.0
        self._leaving = False

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop`, and then until what others read has been read and the disk has what it should, for `pool.drain_s`
        at most. Raises ConfigError if a router refuses this node, ConfigError or StorageFault if its memory or
        directories can't be had."""
        check_memory("pool.host_bytes", self._config.pool.host_bytes)
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
        with StateFile(self._config.run_path, self._name) as state_file:
            self._run(stop, state_file)

    def _run(self, stop: threading.Event, state_file: StateFile) -> None:
        try:
            self.open()
            self._turn_while(lambda: not stop.is_set(), state_file)
            self._leave()
            end_s = now_s() + self._config.pool.drain_s
            self._turn_while(lambda: now_s() < end_s and not ends_at_once(stop) and self._is_owing(), state_file)
            self._link.send_all(Goodbye(self._name, self._epoch))
        finally:
            self._close(stop)

    def _turn_while(self, condition: Callable[[], bool], state_file: StateFile) -> None:
        due_s = 0.0
        while condition():
            timeout_s = min(max(0.0, due_s - now_s()), _STOP_CHECK_S)
            due_s = self.turn(dict(self._poller.poll(int(timeout_s * 1000))))
            state_file.show("leaving" if self._leaving else "joined" if self._link.welcomed else "alone", now_s())

    def _leave(self) -> None:
        """Nothing more is fetched for keeping, and routers are told."""
        self._leaving = True
        self._link.heartbeat_now()

    def _is_owing(self) -> bool:
        """Whether something that was promised is not done yet: blocks that others are reading, or that belong on disk."""
        tiers = self._tiers
        return tiers is not None and (bool(self._fetches) or tiers.pool.stats().leased > 0 or tiers.flush(now_s()))

    def open(self) -> None:
        """Begins to dial the routers."""
        if self._keys is not None:
            self._zap = Zap(self._context, self._keys.allowed)
            self._poller.register(self._zap.socket, zmq.POLLIN)
        self._link = RouterLink(
            self._context,
            self._config.router.control_endpoints,
            identity=identity(self._name, self._epoch),
            make_hello=self._hello,
            make_heartbeat=self._heartbeat,
            on_message=self._on_message,
            on_refused=self._on_refused,
            on_lost=self._peer_lists.lost,  # what is kept stays useful; the next hello tells the router all
            keys=self._keys,
        )
        for socket in self._link.sockets():
            self._poller.register(socket, zmq.POLLIN)

    def turn(self, ready: dict[Socket | int, int]) -> float:
        """Takes in what is `ready`, goes on with all that there is to do; when to call again at the latest."""
        for socket in self._link.sockets():
            if socket in ready:
                self._link.handle(socket, now_s())
        if self._zap is not None and self._zap.socket in ready:
            self._zap.handle()
        now = now_s()
        for worker in list(self._workers.values()):
            for socket in worker.sockets():
                if socket in ready:
                    worker.hear(socket, now)
        due_s = self._link.tick(now)
        if (gone_s := self._peer_lists.due_s()) is not None and gone_s <= now:
            self._take_peers(self._peer_lists.merged(now))
        if self._opening is not None and self._opening.fileno() in ready:
            self._take_tiers(self._opening)
        tiers = self._tiers
        if tiers is None:
            return due_s
        tiers.service.handle(ready, now)
        now = now_s()
        for worker in self._workers.values():
            due_s = min(due_s, worker.tick(now))
        due_s = min(due_s, tiers.service.tick(now))
        # After all that brings blocks: nobody waits for the next round to hear of them, or to be asked for more.
        due_s = min(due_s, tiers.tick(ready, now))
        due_s = min(due_s, self._fetch_more(tiers, now))
        self._tell_workers(tiers, now)
        return due_s

    def _close(self, stop: threading.Event) -> None:
        for worker in self._workers.values():
            worker.close()
        if self._opening is not None:
            self._opening.close()
        if self._tiers is not None:
            self._tiers.close(flush=not ends_at_once(stop))
        self._link.close(_GOODBYE_LINGER_MS)
        self._context.destroy(linger=0)  # also the sockets of whatever failed half made: nothing may hang here

    # --- routers -----------------------------------------------------------------------------------------------------

    def _on_message(self, router: int, message: FromRouter) -> None:
        if isinstance(message, Audit):
            self._link.send(router, self._account(message.number))
            return
        if not isinstance(message, Peers):
            log.warning("a pool node has no use for %s", type(message).__name__)
            return
        if self._tiers is not None and message.group == self._tiers.group and not self._is_in(message.pools):
            self._link.hello_again()  # that router has not heard what we hold: our hello was lost, or is on its way
        self._take_peers(self._peer_lists.said(router, message, now_s()))

    def _is_in(self, pools: Sequence[Source]) -> bool:
        return any((source.process, source.epoch) == (self._name, self._epoch) for source in pools)

    def _take_peers(self, peers: Peers | None) -> None:
        if peers is None or peers.group is None:
            return  # no worker has joined yet
        self._peers = peers
        if self._tiers is not None:
            self._keep_for(self._tiers, peers)
        elif self._opening is None:
            self._open_tiers(peers.group, peers.slab_bytes)

    def _open_tiers(self, group: RoutingGroup, slab_bytes: int) -> None:
        self._opening = Opening(self._config, group, slab_bytes)
        self._poller.register(self._opening.fileno(), zmq.POLLIN)

    def _take_tiers(self, opening: Opening) -> None:
        self._poller.unregister(opening.fileno())
        self._opening = None
        try:
            memory = opening.take()
        finally:
            opening.close()
        self._serve(memory)

    def _serve(self, memory: Memory, transports: Sequence[Transport] | None = None) -> None:
        """The tiers are open. `transports` as `NodeTiers` takes them."""
        self._tiers = NodeTiers(
            memory,
            self._config,
            context=self._context,
            name=self._name,
            epoch=self._epoch,
            machine_id=self._machine_id,
            on_blocks=self._on_blocks,
            on_ended=self._on_ended,
            transports=transports,
            keys=self._keys,
        )
        self._tiers.register(self._poller)
        self._link.hello_again()
        assert self._peers is not None, "tiers were opened for nobody"
        self._keep_for(self._tiers, self._peers)

    def _keep_for(self, tiers: NodeTiers, peers: Peers) -> None:
        if peers.group != tiers.group:
            log.warning("told of the workers of another group; this node keeps to the first it was told")
            return
        members = {(source.process, source.epoch) for source in peers.workers}
        for gone in sorted(self._members - members):
            tiers.service.drop_peer(*gone, now_s())
        for name in members - self._members:
            tiers.service.peer_is_back(*name)
        self._members = members
        us = (self._name, self._epoch)
        pools = [source for source in peers.pools if (source.process, source.epoch) != us] + [self._source()]
        copies = self._config.pool.replicas
        self._follow(tiers, [worker for worker in peers.workers if self._name in keepers_of(worker, pools, copies)])

    def _on_refused(self, reason: str) -> None:
        raise ConfigError(f"the router refused {self._name}: {reason}")

    def _source(self) -> Source:
        assert self._tiers is not None
        return Source(self._name, self._epoch, "HOST", self._tiers.service.endpoints)

    def _hello(self) -> Hello:
        tiers = self._tiers
        return Hello(
            version=control.PROTOCOL_VERSION,
            process=self._name,
            role="pool",
            epoch=self._epoch,
            pid=os.getpid(),
            endpoints=tiers.service.endpoints if tiers is not None else Endpoints("", "", ""),
            capacity=tiers.capacity if tiers is not None else Capacity(),
            group=tiers.group if tiers is not None else None,
        )

    def _account(self, number: int) -> Owned:
        tiers = self._tiers
        if tiers is None:
            return Owned(number)
        followed = [worker.holdings() for worker in self._workers.values()]
        fetching = sum(len(plan.wanted) for _, plan in self._fetches.values())
        return msgspec.structs.replace(tiers.account(fetching, now_s()), number=number, followed=followed)

    def _heartbeat(self, router: int) -> Heartbeat:
        tiers = self._tiers
        return Heartbeat(
            process=self._name,
            epoch=self._epoch,
            step_id=0,
            step_age_s=0.0,
            events_seq=tiers.service.events_seq if tiers is not None else -1,
            load=tiers.load() if tiers is not None else Load(),
            counters=tiers.counters() if tiers is not None else Counters(),
            links=tiers.service.links() if tiers is not None else [],
            draining=self._leaving,
            peers=self._peer_lists.number(router),
        )

    # --- workers -----------------------------------------------------------------------------------------------------

    def _follow(self, tiers: NodeTiers, sources: Sequence[Source]) -> None:
        """These are all the workers that this node keeps for."""
        told = {(source.process, source.epoch): source for source in sources}
        for name in [name for name in self._workers if name not in told]:
            worker = self._workers.pop(name)
            for socket in worker.sockets():
                self._poller.unregister(socket)
            worker.close()
            if name in self._members:
                # Another node keeps for it from now on: what we forget later it would not hear from us.
                for keys in _portions(list(worker.follower.announced)):
                    tiers.service.tell(worker.source, Lost(keys))
            log.info("no longer following %s", worker.source.process)
        for name, source in told.items():
            if name in self._workers:
                continue
            try:
                worker = FollowedWorker(self._context, source, tiers.has, self._keys)
            except (zmq.ZMQError, ProtocolError) as error:
                log.warning("can't follow %s at %r: %s", source.process, source.endpoints.events, error)
                continue
            self._workers[name] = worker
            for socket in worker.sockets():
                self._poller.register(socket, zmq.POLLIN)
            log.info("following %s", source.process)

    def _tell_workers(self, tiers: NodeTiers, now: float) -> None:
        """Publishes what changed, and tells each worker what of its own is kept, and what is gone."""
        gone = tiers.publish(now)
        for worker in self._workers.values():
            for keys in _portions(worker.keeper.take_kept()):
                tiers.service.tell(worker.source, Kept(keys))
            if gone:
                for keys in _portions([key for key in gone if key in worker.follower.announced]):
                    tiers.service.tell(worker.source, Lost(keys))

    # --- keeping -----------------------------------------------------------------------------------------------------

    def _fetch_more(self, tiers: NodeTiers, now: float) -> float:
        """Starts fetches, the workers taking turns, up to the bounds and to the room that there is; when to call again."""
        progress = now >= self._retry_at_s and not self._leaving
        while progress and len(self._fetches) < MAX_FETCHES:
            progress = False
            for name, worker in self._workers.items():
                if len(self._fetches) < MAX_FETCHES:
                    progress = self._fetch_from(tiers, name, worker, now) or progress
        due = [worker.keeper.paused_until_s for worker in self._workers.values()]
        return min((at for at in [self._retry_at_s, *due] if at > now), default=now + _STOP_CHECK_S)

    def _fetch_from(self, tiers: NodeTiers, name: Name, worker: FollowedWorker, now: float) -> bool:
        if sum(name == other for other, _ in self._fetches.values()) >= MAX_FETCHES_PER_WORKER:
            return False
        # A small pool has room for several fetches.
        most = min(MAX_BLOCKS_PER_FETCH, max(1, tiers.pool.num_blocks // (2 * MAX_FETCHES)))
        pairs = worker.keeper.next_batch(self._busy, most, now)
        if not pairs:
            return False
        blocks = tiers.allocate(len(pairs), now)
        if blocks is None:
            # So much is leased, or on its way to or from somewhere, that there is no room: a moment later there is.
            worker.keeper.put_back([key for key, _ in pairs])
            self._retry_at_s = now + _RETRY_S
            return False
        size = tiers.pool.block_size
        wanted = tuple([WantedBlock(key, parent, size, b) for (key, parent), b in zip(pairs, blocks, strict=True)])
        deadline_s = now + self._config.transfer.fetch_timeout_s
        plan = FetchPlan(
            self._new_id(16), f"pool:{self._name}", wanted, (worker.source,), "", deadline_s, BACKGROUND_ORDER
        )
        self._fetches[plan.fetch_id] = (name, plan)
        self._busy.update(key for key, _ in pairs)
        tiers.service.start_fetch(plan, now)
        return True

    def _on_blocks(self, fetch_id: bytes, batch: FetchedBatch) -> None:
        assert self._tiers is not None
        self._tiers.take_in(batch)

    def _on_ended(self, ended: FetchEnded) -> None:
        assert self._tiers is not None
        name, plan = self._fetches.pop(ended.fetch_id)
        self._busy.difference_update([wanted.key for wanted in plan.wanted])
        if ended.tainted:
            self._tiers.pool.retire(ended.tainted)
        # The tail first, so that it is the older one when room is needed.
        self._tiers.pool.release([w.block_id for w in reversed(plan.wanted) if w.block_id not in ended.tainted])
        for other_name, worker in self._workers.items():
            if other_name == name:
                worker.keeper.on_fetched(ended.committed, ended.missing, now_s())
            else:
                worker.keeper.on_others(ended.committed, ended.missing)


def _portions(keys: Sequence[Key]) -> list[list[Key]]:
    return [list(keys[i : i + MAX_KEYS_PER_MESSAGE]) for i in range(0, len(keys), MAX_KEYS_PER_MESSAGE)]


def run(config: Config, name: str, stop: threading.Event) -> None:
    """Runs the pool node `name` in the foreground until `stop` is set. Raises TandemError."""
    PoolNode(config, name).run(stop)
