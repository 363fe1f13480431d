"""The shell around source and sink: one process's ZeroMQ sockets, transports and KV events.

Owns the fetch ROUTER (we are a source), one DEALER and one channel per source that we fetch from (we are a sink), the shm
listener, and the event publisher with its replay. One thread calls it, all of it; another thread may share the pool. It
never decides what to fetch or keep, and reads no clock but the wall clock that stamps event batches for people.

The caller's loop:

    service.register(poller)
    while …:
        ready = dict(poller.poll(until the earliest of what `tick` said and the caller's own deadlines))
        service.handle(ready, now_s)             # ignores what isn't its own
        service.publish_pool_events(now_s)       # whenever somebody may have published or evicted
        service.tick(now_s)

Events have the sequence numbers 0, 1, 2 … of one epoch. The replay's rule is in `protos/kv_events.py`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.keys import Key
from kvpool.sink import AbortRead, Action, Committed, FetchedBlock, FetchEnded, FetchMachine, FetchPlan, Send, StartRead
from kvpool.source import Answers, FetchServer
from kvpool.transport.base import BlockRead, Channel, Transport
from kvpool.transport.shm import ShmListener, ShmTransport
from protos import control, kv_events
from protos.control import Counters, Endpoints, Fetch, Source, Tier
from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch
from tandem.errors import ConfigError, TransportError
from tandem.zmq_io import bounded_socket, identity

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]

MAX_HASHES_PER_BATCH = 32_768
HISTORY_BATCHES = 10_000
HISTORY_BYTES = 64 * 1024 * 1024
MESSAGES_PER_HANDLE = 1000
"""A busy socket yields after so many messages, so that heartbeats go on."""
LOG_PERIOD_S = 1.0


@dataclass(slots=True)
class ServiceCounters:
    """Totals since the epoch began."""

    served_blocks: int = 0
    served_misses: int = 0
    fetched_blocks: int = 0
    fetched_bytes: int = 0
    fetch_misses: int = 0
    fetch_corrupt: int = 0
    undecodable: int = 0
    sources_lost: int = 0


@dataclass(slots=True)
class _Peer:
    """A source that we fetch from: its control socket and, if some transport reaches it, the channel for its bytes."""

    source: Source
    socket: Socket
    channel: Channel
    transport: str


class KVService:
    """Serves one arena's blocks by key and fetches others' into it.

    `on_blocks(fetch_id, blocks)` gets verified blocks as they come, `on_ended(ended)` the end of each fetch, exactly once,
    both from inside a call to this object. `pool` and `arena` stay the caller's; close the service before the arena.
    What the pool holds already becomes the first event.
    """

    def __init__(
        self,
        *,
        context: zmq.Context[Socket],
        pool: BlockPool,
        arena: Arena,
        process: str,
        epoch: bytes,
        tier: Tier,
        bind_host: str,
        transports: Sequence[str],
        machine_id: str,
        lease_s: float,
        grace_s: float,
        on_blocks: Callable[[bytes, list[FetchedBlock]], None],
        on_ended: Callable[[FetchEnded], None],
        history_batches: int = HISTORY_BATCHES,
    ) -> None:
        self._context = context
        self._pool = pool
        self._arena = arena
        self._epoch = epoch
        self._identity = identity(process, epoch)
        self._on_blocks = on_blocks
        self._on_ended = on_ended
        self._server = FetchServer(pool, epoch, lease_s=lease_s, grace_s=grace_s)
        self._counters = ServiceCounters()
        self._poller: zmq.Poller | None = None
        self._handlers: dict[Socket | int, Callable[[float], None]] = {}
        self._machines: dict[bytes, FetchMachine] = {}
        self._machine_of_ask: dict[bytes, FetchMachine] = {}
        self._asks_of: dict[bytes, list[bytes]] = {}
        self._read_owner: dict[int, tuple[FetchMachine, int]] = {}
        self._channel_read_id: dict[tuple[bytes, int], int] = {}
        self._next_channel_read_id = 0
        self._peers: dict[tuple[str, bytes], _Peer] = {}
        self._history: deque[tuple[int, bytes]] = deque()
        self._history_bytes = 0
        self._history_batches = history_batches
        self._next_seq = 0
        self._log_again_s = 0.0
        self._closed = False

        self._listener = ShmListener(arena, epoch) if "shm" in transports else None
        self._transports: list[Transport] = []
        self._router = bounded_socket(context, zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._publisher = bounded_socket(context, zmq.PUB)
        self._replay = bounded_socket(context, zmq.ROUTER)
        self.endpoints = Endpoints(
            fetch=_bind(self._router, bind_host),
            events=_bind(self._publisher, bind_host),
            replay=_bind(self._replay, bind_host),
            shm=self._listener.endpoint if self._listener is not None else "",
            machine_id=machine_id,
        )
        self._watch(self._router, self._handle_router)
        self._watch(self._replay, self._handle_replay)
        if self._listener is not None:
            listener = self._listener
            self._transports.append(ShmTransport(machine_id, arena.slab_bytes))
            self._watch(listener.fileno(), lambda _: listener.handle())
        with pool.lock:
            pool.take_events()
            self._publish(pool.snapshot())

    # --- the caller's loop -------------------------------------------------------------------------------------------

    def register(self, poller: zmq.Poller) -> None:
        """Registers what must be polled for input, now and as it changes. Once is enough; again changes nothing."""
        if self._poller is poller:
            return
        assert self._poller is None, "registered with another poller"
        self._poller = poller
        for socket in self._handlers:
            poller.register(socket, zmq.POLLIN)

    def handle(self, ready: Mapping[Any, int], now_s: float) -> None:
        """Takes in what the poller found; entries that aren't ours are ignored."""
        for socket in ready:
            handler = self._handlers.get(socket)
            if handler is not None:
                handler(now_s)

    def tick(self, now_s: float) -> float:
        """Moves bytes for a bounded time, ends what is over, and returns when to call again (`now_s`: at once)."""
        self._answer(self._server.tick(now_s))
        for peer in list(self._peers.values()):
            if peer.channel.busy:
                self._poll_channel(peer, now_s)
        for machine in list(self._machines.values()):
            if machine.next_deadline() <= now_s:
                self._do(machine, machine.tick(now_s), now_s)
        if any(peer.channel.busy for peer in self._peers.values()):
            return now_s
        due = [machine.next_deadline() for machine in self._machines.values()]
        deadline = self._server.next_deadline()
        return min([now_s + 1.0, *due] if deadline is None else [now_s + 1.0, deadline, *due])

    def publish_pool_events(self, now_s: float) -> None:
        """Tells the world, and parked fetches, what happened in the pool since the last call."""
        with self._pool.lock:
            events, published = self._pool.take_events(), self._pool.take_published()
        self._publish(events)
        if published:
            self._answer(self._server.on_published(published, now_s))

    def close(self) -> None:
        """Ends everything at once, without callbacks. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for peer in list(self._peers.values()):
            self._close_peer(peer)
        if self._listener is not None:
            self._unwatch(self._listener.fileno())
            self._listener.close()
        for socket in (self._router, self._replay):
            self._unwatch(socket)
            socket.close()
        self._publisher.close()
        self._machines.clear()

    # --- as a source -------------------------------------------------------------------------------------------------

    @property
    def events_seq(self) -> int:
        """Sequence number of the last published batch, -1 before the first."""
        return self._next_seq - 1

    @property
    def counters(self) -> ServiceCounters:
        self._counters.served_blocks = self._server.num_served_blocks
        self._counters.served_misses = self._server.num_missed_keys
        return self._counters

    def add_counters(self, counters: Counters) -> Counters:
        """`counters` with what the service and its pool know filled in: fetched, served, evicted, expired."""
        ours, stats = self.counters, self._pool.stats()
        return msgspec.structs.replace(
            counters,
            fetched_blocks=ours.fetched_blocks,
            fetched_bytes=ours.fetched_bytes,
            fetch_misses=ours.fetch_misses,
            fetch_corrupt=ours.fetch_corrupt,
            served_blocks=ours.served_blocks,
            evicted_blocks=stats.evicted_total,
            expired_leases=stats.expired_leases_total,
        )

    @property
    def num_readers(self) -> int:
        """Processes that may have our arena mapped."""
        return self._listener.num_connections if self._listener is not None else 0

    def promise(self, owner: Hashable, keys: Iterable[Key]) -> None:
        """`owner` is work that will publish `keys`: fetches that wait for them outlast the grace time until it withdraws."""
        self._server.promise(owner, keys)

    def withdraw(self, owner: Hashable, now_s: float) -> None:
        """The work is over: fetches that wait for what only it had promised get a miss at once."""
        self._answer(self._server.withdraw(owner, now_s))

    # --- as a sink ---------------------------------------------------------------------------------------------------

    @property
    def num_fetches(self) -> int:
        """Fetches that have not ended."""
        return len(self._machines)

    def start_fetch(self, plan: FetchPlan, now_s: float) -> None:
        """Begins a fetch; its destinations are the caller's private blocks of our arena. Without transports, or without a
        source that one of them reaches, it ends at once with every key missing."""
        assert plan.fetch_id not in self._machines, "a fetch id was used twice"
        machine = FetchMachine(plan, slab_bytes=self._arena.slab_bytes)
        self._machines[plan.fetch_id] = machine
        self._do(machine, machine.start(now_s), now_s)

    def cancel_fetch(self, fetch_id: bytes, now_s: float) -> None:
        """Ends a fetch with what it has; `on_ended` follows, from inside this call. An unknown id is ignored."""
        machine = self._machines.get(fetch_id)
        if machine is not None:
            self._do(machine, machine.cancel(now_s), now_s)

    def drop_peer(self, process: str, epoch: bytes, now_s: float) -> None:
        """That incarnation is certainly gone: whatever it held here, and we of it, ends."""
        self._server.forget_sink(identity(process, epoch))
        peer = self._peers.get((process, epoch))
        if peer is not None:
            self._lose(peer, "it left the cluster", now_s)

    # --- inside: sockets ---------------------------------------------------------------------------------------------

    def _watch(self, socket: Socket | int, handler: Callable[[float], None]) -> None:
        self._handlers[socket] = handler
        if self._poller is not None:
            self._poller.register(socket, zmq.POLLIN)

    def _unwatch(self, socket: Socket | int) -> None:
        if self._handlers.pop(socket, None) is not None and self._poller is not None:
            self._poller.unregister(socket)

    def _drop_frame(self, what: str, error: Exception, now_s: float) -> None:
        self._counters.undecodable += 1
        if now_s >= self._log_again_s:
            self._log_again_s = now_s + LOG_PERIOD_S
            log.warning("dropped a frame on %s (%d so far): %s", what, self._counters.undecodable, error)

    def _handle_router(self, now_s: float) -> None:
        for frames in _received(self._router):
            try:
                sink_id, payload = frames
                message = control.decode_to_source(payload)
            except (msgspec.DecodeError, ValueError) as error:
                self._drop_frame("the fetch socket", error, now_s)
                continue
            self._answer(self._server.on_message(sink_id, message, now_s))

    def _answer(self, answers: Answers) -> None:
        for sink_id, message in answers:
            try:
                self._router.send_multipart([sink_id, control.encode(message)], zmq.NOBLOCK)
            except zmq.Again:
                pass  # the sink doesn't take messages: its fetch times out and its lease expires

    def _handle_peer(self, peer: _Peer, now_s: float) -> None:
        for frames in _received(peer.socket):
            try:
                message = control.decode_to_sink(frames[-1])
            except (msgspec.DecodeError, ValueError) as error:
                self._drop_frame(f"the line to {peer.source.process}", error, now_s)
                continue
            machine = self._machine_of_ask.get(message.fetch_id)
            if machine is not None:
                self._do(machine, machine.on_message(message, now_s), now_s)

    # --- inside: fetches ---------------------------------------------------------------------------------------------

    def _do(self, machine: FetchMachine, actions: Iterable[Action], now_s: float) -> None:
        todo = deque(actions)
        while todo:
            match todo.popleft():
                case Send(source=source, message=message):
                    if isinstance(message, Fetch):
                        self._machine_of_ask[message.fetch_id] = machine
                        self._asks_of.setdefault(machine.plan.fetch_id, []).append(message.fetch_id)
                    if not self._send(source, message):
                        todo.extend(machine.on_source_lost(source.process, source.epoch, now_s))
                case StartRead(source=source, read_id=read_id, blocks=blocks):
                    peer = self._peers.get((source.process, source.epoch))
                    if peer is None:
                        todo.extend(machine.on_source_lost(source.process, source.epoch, now_s))
                        continue
                    channel_id = self._next_channel_read_id
                    self._next_channel_read_id += 1
                    self._read_owner[channel_id] = (machine, read_id)
                    self._channel_read_id[machine.plan.fetch_id, read_id] = channel_id
                    slab = self._arena.slab
                    peer.channel.start_read(channel_id, [BlockRead(at, slab(block_id)) for at, block_id in blocks])
                case AbortRead(source=source, read_id=read_id):
                    channel_id = self._channel_read_id.pop((machine.plan.fetch_id, read_id))
                    del self._read_owner[channel_id]
                    peer = self._peers.get((source.process, source.epoch))
                    quiet = peer is None or peer.channel.abort(channel_id)
                    todo.extend(machine.on_aborted(read_id, quiet, now_s))
                case Committed(blocks=blocks):
                    self._counters.fetched_blocks += len(blocks)
                    self._counters.fetched_bytes += len(blocks) * self._arena.slab_bytes
                    self._on_blocks(machine.plan.fetch_id, list(blocks))
                case FetchEnded() as ended:
                    del self._machines[ended.fetch_id]
                    for ask in self._asks_of.pop(ended.fetch_id, []):
                        del self._machine_of_ask[ask]
                    self._counters.fetch_misses += machine.num_missed_keys
                    self._counters.fetch_corrupt += machine.num_corrupt_blocks
                    self._on_ended(ended)

    def _send(self, source: Source, message: control.ToSource) -> bool:
        """False if the source can't be reached."""
        peer = self._peers.get((source.process, source.epoch))
        if peer is None:
            if not isinstance(message, Fetch):
                return True  # nothing of ours is held by a source that we have no line to
            peer = self._connect(source)
        if peer is None:
            return False
        try:
            peer.socket.send(control.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return not isinstance(message, Fetch)
        return True

    def _connect(self, source: Source) -> _Peer | None:
        transport = next((transport for transport in self._transports if transport.reaches(source)), None)
        if transport is None:
            return None
        try:
            channel = transport.connect(source)
        except TransportError as error:
            log.info("no channel: %s", error)
            return None
        socket = bounded_socket(self._context, zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._identity)
        try:
            socket.connect(source.endpoints.fetch)
        except zmq.ZMQError as error:
            log.warning("%s: fetch endpoint %r: %s", source.process, source.endpoints.fetch, error)
            socket.close()
            channel.close()
            return None
        peer = _Peer(source, socket, channel, transport.name)
        self._peers[source.process, source.epoch] = peer
        self._watch(socket, lambda now_s: self._handle_peer(peer, now_s))
        self._watch(channel.fileno(), lambda now_s: self._poll_channel(peer, now_s))
        return peer

    def _poll_channel(self, peer: _Peer, now_s: float) -> None:
        before = peer.channel.fileno()
        results = peer.channel.poll()
        if peer.channel.closed:
            self._unwatch(before)
        for result in results:
            owner = self._read_owner.pop(result.read_id, None)
            if owner is None:
                continue
            machine, read_id = owner
            del self._channel_read_id[machine.plan.fetch_id, read_id]
            if result.error:
                log.info("a read from %s failed: %s", peer.source.process, result.error)
            self._do(machine, machine.on_read(read_id, result.checksums, peer.transport, now_s), now_s)
        if peer.channel.closed:
            self._lose(peer, "its channel closed", now_s)

    def _lose(self, peer: _Peer, why: str, now_s: float) -> None:
        if self._peers.get((peer.source.process, peer.source.epoch)) is not peer:
            return
        log.info("source %s is lost: %s", peer.source.process, why)
        self._counters.sources_lost += 1
        self._close_peer(peer)
        for machine in list(self._machines.values()):
            lost = machine.on_source_lost(peer.source.process, peer.source.epoch, now_s)
            self._do(machine, lost, now_s)

    def _close_peer(self, peer: _Peer) -> None:
        del self._peers[peer.source.process, peer.source.epoch]
        self._unwatch(peer.socket)
        peer.socket.close()
        self._unwatch(peer.channel.fileno())
        peer.channel.close()

    # --- inside: events ----------------------------------------------------------------------------------------------

    def _publish(self, events: Sequence[Event]) -> None:
        for payload in self._payloads(events):
            seq = self._next_seq
            self._next_seq += 1
            self._history.append((seq, payload))
            self._history_bytes += len(payload)
            while len(self._history) > self._history_batches or self._history_bytes > HISTORY_BYTES:
                self._history_bytes -= len(self._history.popleft()[1])
            self._publisher.send_multipart([kv_events.TOPIC, kv_events.encode_seq(seq), payload], zmq.NOBLOCK)

    def _payloads(self, events: Sequence[Event]) -> list[bytes]:
        """Batches of bounded size, in order."""
        batches: list[list[Event]] = []
        room = 0
        for event in events:
            size = len(event.block_hashes) if isinstance(event, (BlockStored, BlockRemoved)) else 1
            if size > room:
                batches.append([])
                room = MAX_HASHES_PER_BATCH
            batches[-1].append(event)
            room -= size
        return [kv_events.encode_batch(EventBatch(time.time(), batch, None, self._epoch)) for batch in batches]

    def _handle_replay(self, now_s: float) -> None:
        for frames in _received(self._replay):
            try:
                asker, _, start = frames
                start_seq = kv_events.decode_seq(start)
            except ValueError as error:
                self._drop_frame("the replay socket", error, now_s)
                continue
            try:
                for seq, payload in self._batches_from(start_seq, now_s):
                    self._replay.send_multipart([asker, b"", kv_events.encode_seq(seq), payload], zmq.NOBLOCK)
                self._replay.send_multipart([asker, b"", kv_events.END_OF_REPLAY, b""], zmq.NOBLOCK)
            except zmq.Again:
                pass  # the asker doesn't read; it asks again

    def _batches_from(self, start_seq: int, now_s: float) -> list[tuple[int, bytes]]:
        oldest = self._history[0][0] if self._history else self._next_seq
        if oldest <= start_seq <= self._next_seq:
            return [(seq, payload) for seq, payload in self._history if seq >= start_seq]
        if self._next_seq == 0:
            return []
        with self._pool.lock:  # the snapshot is the state at the last sequence number
            self.publish_pool_events(now_s)
            events: list[Event] = [AllBlocksCleared(), *self._pool.snapshot()]
        return [(self._next_seq - 1, payload) for payload in self._payloads(events)]


def _bind(socket: Socket, host: str) -> str:
    """Binds to a free TCP port of `host` and returns the endpoint that others connect to. Raises ConfigError if it can't."""
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    try:
        socket.bind(f"tcp://{host}:*")
    except zmq.ZMQError as error:
        raise ConfigError(f"transfer.host: can't listen on {host!r}: {error.strerror}") from error
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, str)
    return endpoint


def _received(socket: Socket) -> Iterable[list[bytes]]:
    for _ in range(MESSAGES_PER_HANDLE):
        if socket.closed:  # by what the last message led to
            return
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
