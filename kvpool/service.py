"""The shell around source and sink: one process's ZeroMQ sockets, transports and KV events.

Owns the fetch ROUTER (we are a source), the transports, the `Fetcher` (we are a sink) and the event publisher. One thread
calls it, all of it; another thread may share the pool. It never decides what to fetch or keep, and reads no clock but to
stamp events and to time reads.

The caller's loop:

    service.register(poller)
    while …:
        ready = dict(poller.poll(until the earliest of what `tick` said and the caller's own deadlines))
        service.handle(ready, now_s)             # ignores what isn't its own
        service.publish_pool_events(now_s)       # whenever somebody may have published or evicted
        service.tick(now_s)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import zmq

from kvpool.arena import Arena, mapped_arenas
from kvpool.block_pool import BlockPool
from kvpool.fetcher import Fetcher
from kvpool.keys import Key
from kvpool.publisher import HISTORY_BATCHES, EventPublisher
from kvpool.sink import FetchedBatch, FetchEnded, FetchPlan
from kvpool.source import Answers, Below, FetchServer
from kvpool.transport.base import Transport
from protos import control
from protos.control import Counters, Endpoints, Kept, Link, Lost, Owned, Source, ToSource
from protos.kv_events import Event
from tandem.curve import Keyring, PublicKey
from tandem.errors import ProtocolError
from tandem.zmq_io import bind_any_port, bounded_socket, identity, parse_identity, received

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]

LOG_PERIOD_S = 1.0


class KVService:
    """Serves one arena's blocks by key and fetches others' into it.

    `on_blocks(fetch_id, batch)` gets verified blocks as they come, `on_ended(ended)` the end of each fetch, exactly once, both
    from inside a call to this object. `pool`, `arena` and `below` stay the caller's; close the service before the arena. The
    service closes the transports. `below` is where blocks come up from that `pool` doesn't hold; `lower_pools` are the pools of
    those tiers, whose events are published with its own. `on_kept` is called when a pool node keeps more blocks of ours. With
    `keys` only those that they let in are heard, and a `Zap` of the same context has to answer for them.
    """

    def __init__(
        self,
        *,
        context: zmq.Context[Socket],
        pool: BlockPool,
        arena: Arena,
        process: str,
        epoch: bytes,
        bind_host: str,
        advertised_host: str = "",
        transports: Sequence[Transport],
        machine_id: str,
        lease_s: float,
        grace_s: float,
        on_blocks: Callable[[bytes, FetchedBatch], None],
        on_ended: Callable[[FetchEnded], None],
        below: Below | None = None,
        on_kept: Callable[[], None] = lambda: None,
        lower_pools: Sequence[BlockPool] = (),
        peer_bytes_per_s: float = 0.0,
        history_batches: int = HISTORY_BATCHES,
        keys: Keyring | None = None,
    ) -> None:
        self._pool = pool
        self._arena = arena
        self._transports = list(transports)
        self._server = FetchServer(pool, epoch, lease_s=lease_s, grace_s=grace_s, below=below, on_kept=on_kept)
        self._poller: zmq.Poller | None = None
        self._handlers: dict[Socket | int, Callable[[float], None]] = {}
        self._num_undecodable = 0
        self._log_again_s = 0.0
        self._now_s = 0.0
        self._closed = False
        self._router = bounded_socket(context, zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._keys = keys
        if keys is not None:
            keys.guard(self._router, "fetch")
        fetch_endpoint = bind_any_port(self._router, bind_host)
        self._publisher = EventPublisher(
            context=context,
            host=bind_host,
            pools=[pool, *lower_pools],
            epoch=epoch,
            on_bad_frame=self._drop_frame,
            history_batches=history_batches,
            keys=keys,
        )
        self.endpoints = Endpoints(
            fetch=fetch_endpoint,
            events=self._publisher.events_endpoint,
            replay=self._publisher.replay_endpoint,
            machine_id=machine_id,
            key=keys.public_key if keys is not None else "",
            **{transport.name: transport.endpoint for transport in transports if transport.endpoint},
        )
        if advertised_host:
            self.endpoints = _at(advertised_host, bind_host, self.endpoints)
        self._fetcher = Fetcher(
            context=context,
            arena=arena,
            identity=identity(process, epoch),
            transports=transports,
            bytes_per_s=peer_bytes_per_s,
            watch=self._watch,
            unwatch=self._unwatch,
            on_blocks=on_blocks,
            on_ended=on_ended,
            on_bad_frame=self._drop_frame,
            switch_off=self._switch_off,
            keys=keys,
        )
        self._watch(self._router, self._handle_router)
        self._watch(self._publisher.replay, lambda now_s: self._publisher.handle_replay())
        for transport in transports:
            self._watch_transport(transport)

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
        self._now_s = now_s
        for socket in ready:
            handler = self._handlers.get(socket)
            if handler is not None:
                handler(now_s)

    def tick(self, now_s: float) -> float:
        """Moves bytes for a bounded time, ends what is over, and returns when to call again (`now_s`: at once)."""
        self._now_s = now_s
        self._answer(self._server.tick(now_s))
        for transport in list(self._transports):
            if transport.busy:
                self._fetcher.poll(transport, now_s)
        self._fetcher.tick(now_s)
        self._publisher.tend()
        if any(transport.busy for transport in self._transports):
            return now_s
        due = [self._server.next_deadline(), self._fetcher.next_deadline()]
        return min([now_s + 1.0, *(at for at in due if at is not None)])

    def publish_pool_events(self, now_s: float) -> list[Event]:
        """Tells the world, and parked fetches, what happened in the pools since the last call; what it was."""
        events = self._publisher.flush()
        if published := self._pool.take_published():
            self._answer(self._server.on_published(published, now_s))
        return events

    def account(self, now_s: float) -> tuple[Owned, list[Event]]:
        """What an audit wants to know of the pools and the arena, and what was published for it, as `publish_pool_events`."""
        tiers, events = self._publisher.holdings(now_s)
        if published := self._pool.take_published():
            self._answer(self._server.on_published(published, now_s))
        owned = Owned(0, self._publisher.seq, tiers, segment=self._arena.inode, mapped=mapped_arenas())
        return owned, events

    def close(self) -> None:
        """Ends everything at once, without callbacks. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._fetcher.close()
        self._server.close()
        for transport in self._transports:
            self._unwatch(transport.fileno())
            transport.close()
        for socket in (self._router, self._publisher.replay):
            self._unwatch(socket)
        self._router.close()
        self._publisher.close()

    # --- as a source -------------------------------------------------------------------------------------------------

    @property
    def events_seq(self) -> int:
        """Sequence number of the last published batch, -1 before the first."""
        return self._publisher.seq

    @property
    def num_undecodable(self) -> int:
        """Frames that were dropped because they are no message."""
        return self._num_undecodable

    @property
    def num_sources_lost(self) -> int:
        """How often a source was given up."""
        return self._fetcher.counters.sources_lost

    def add_counters(self, counters: Counters) -> Counters:
        """`counters` with what the service and its pool know filled in: fetched, served, evicted, expired."""
        fetched, stats = self._fetcher.counters, self._pool.stats()
        return msgspec.structs.replace(
            counters,
            fetched_blocks=fetched.blocks,
            fetched_bytes=fetched.blocks * self._arena.slab_bytes,
            fetch_misses=fetched.missed_keys,
            fetch_corrupt=fetched.corrupt_blocks,
            served_blocks=self._server.num_served_blocks,
            evicted_blocks=stats.evicted_total,
            expired_leases=stats.expired_leases_total,
            granted_leases=stats.granted_leases_total,
            dropped_blocks=stats.dropped_total,
        )

    @property
    def num_readers(self) -> int:
        """Connections that others have to our arena."""
        return sum(transport.num_readers for transport in self._transports)

    def promise(self, owner: Hashable, keys: Iterable[Key]) -> None:
        """`owner` is work that will publish `keys`: fetches that wait for them outlast the grace time until it withdraws."""
        self._server.promise(owner, keys)

    def on_absent(self, keys: Iterable[Key], now_s: float) -> None:
        """These keys will not come up from below: fetches that wait for them get a miss at once."""
        self._answer(self._server.on_absent(keys, now_s))

    def withdraw(self, owner: Hashable, now_s: float) -> None:
        """The work is over: fetches that wait for what only it had promised get a miss at once."""
        self._answer(self._server.withdraw(owner, now_s))

    # --- as a sink ---------------------------------------------------------------------------------------------------

    @property
    def num_fetches(self) -> int:
        """Fetches that have not ended."""
        return self._fetcher.num_fetches

    def links(self) -> list[Link]:
        """What came from whom by which transport, and how fast."""
        return self._fetcher.links()

    def start_fetch(self, plan: FetchPlan, now_s: float) -> None:
        """Begins a fetch; its destinations are the caller's private blocks of our arena. Without a source that a transport
        reaches it ends at once with every key missing."""
        self._fetcher.start_fetch(plan, now_s)

    def cancel_fetch(self, fetch_id: bytes, now_s: float) -> None:
        """Ends a fetch with what it has; `on_ended` follows, from inside this call. An unknown id is ignored."""
        self._fetcher.cancel_fetch(fetch_id, now_s)

    def cancel_all(self, now_s: float) -> None:
        """Ends every fetch with what it has; `on_ended` follows for each, from inside this call."""
        self._fetcher.cancel_all(now_s)

    def tell(self, source: Source, message: ToSource) -> None:
        """Sends a source something that is no fetch, if it takes messages now."""
        self._fetcher.tell(source, message)

    def drop_peer(self, process: str, epoch: bytes, now_s: float) -> None:
        """That incarnation is said to be gone: what it waits for here, and what we fetch from it, ends. What it may still read
        stays leased as long as it was promised."""
        self._server.forget_sink(identity(process, epoch))
        self._fetcher.drop_peer(process, epoch, now_s)

    def peer_is_back(self, process: str, epoch: bytes) -> None:
        """An incarnation that was dropped is there after all, and may be asked again."""
        self._fetcher.peer_is_back(process, epoch)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _watch(self, socket: Socket | int, handler: Callable[[float], None]) -> None:
        self._handlers[socket] = handler
        if self._poller is not None:
            self._poller.register(socket, zmq.POLLIN)

    def _watch_transport(self, transport: Transport) -> None:
        self._watch(transport.fileno(), lambda now_s: self._fetcher.poll(transport, now_s))

    def _switch_off(self, transport: Transport) -> None:
        self._transports.remove(transport)
        self._unwatch(transport.fileno())
        transport.close()

    def _unwatch(self, socket: Socket | int) -> None:
        if self._handlers.pop(socket, None) is not None and self._poller is not None:
            self._poller.unregister(socket)

    def _drop_frame(self, what: str, error: Exception) -> None:
        self._num_undecodable += 1
        if self._now_s >= self._log_again_s:
            self._log_again_s = self._now_s + LOG_PERIOD_S
            log.warning("dropped a frame on %s (%d so far): %s", what, self._num_undecodable, error)

    def _handle_router(self, now_s: float) -> None:
        signed = self._keys is not None
        for frames in received(self._router, signed=signed):
            try:
                key = frames.pop(0).decode() if signed else ""
                sink_id, payload = frames
                message = control.decode_to_source(payload)
                if self._keys is not None:
                    _check_may_say(self._keys, key, sink_id, message)
            except (msgspec.DecodeError, ValueError, ProtocolError) as error:
                self._drop_frame("the fetch socket", error)
                continue
            self._answer(self._server.on_message(sink_id, message, now_s))

    def _answer(self, answers: Answers) -> None:
        for sink_id, message in answers:
            try:
                self._router.send_multipart([sink_id, control.encode(message)], zmq.NOBLOCK)
            except zmq.Again:
                pass  # the sink doesn't take messages: its fetch times out and its lease expires


def _check_may_say(keys: Keyring, key: PublicKey, sink_id: bytes, message: ToSource) -> None:
    """Raises ProtocolError unless who holds `key` may say this as `sink_id`: only a pool node keeps copies."""
    who = parse_identity(sink_id)
    member = keys.allowed.speaker(key, who[0]) if who is not None else None
    if member is None or (isinstance(message, Kept | Lost) and member.role != "pool"):
        raise ProtocolError(f"{sink_id[:64]!r} said {type(message).__name__}, which its key may not")


def _at(advertised: str, bound: str, endpoints: Endpoints) -> Endpoints:
    """`endpoints` on `bound` as others reach them."""
    ours, theirs = (f"//[{host}]:" if ":" in host else f"//{host}:" for host in (bound, advertised))
    told = {
        name: value.replace(ours, theirs, 1)
        for name, value in msgspec.structs.asdict(endpoints).items()
        if name not in ("machine_id", "key")
    }
    return msgspec.structs.replace(endpoints, **told)
