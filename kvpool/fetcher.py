"""Gets blocks from other processes into our arena: the shell around `FetchMachine`.

Owns the line to each source (a DEALER socket and the channels of its transports), the reads that are queued or running, and
which transport serves which pair. It never decides what to fetch and believes nothing: the machine does. One thread calls it.

What goes wrong with a source, and what follows:

    its channel closes, a read fails      the next transport that reaches it; without one the source is lost
    a shared memory is gone               its process is: lost
    no bytes for `SILENCE_S`              lost (killed, frozen, cut off, or too slow to be of use)
    lost                                  each fetch asks its next source; the source is left alone for a second, longer each time
    an abort that may still be written    the destinations are retired by the caller; past `MAX_TAINTED_PART` of the arena the
                                          transport is switched off
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import zmq

from kvpool.arena import Arena
from kvpool.links import DIRECT, Links, Name
from kvpool.read_queue import ReadQueue
from kvpool.sink import (
    AbortRead,
    Action,
    Committed,
    FetchedBatch,
    FetchEnded,
    FetchMachine,
    FetchPlan,
    Send,
    StartRead,
)
from kvpool.transport.base import Channel, ReadResult, Transport
from protos import control
from protos.control import Fetch, Link, Source, ToSource
from tandem.clock import now_s as clock
from tandem.curve import Keyring
from tandem.errors import ProtocolError, TransportError
from tandem.zmq_io import bounded_socket, received

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]

READ_BYTES = 8 * 1024 * 1024
"""Of one read: a quarter of what a peer may have in flight, half of what a poll moves."""
MAX_READ_BLOCKS = 512
SILENCE_S = 3.0
MAX_TAINTED_PART = 1 / 16
MAX_GONE = 4096
"""So many incarnations that left are remembered."""


@dataclass(slots=True)
class _Peer:
    source: Source
    socket: Socket
    channels: dict[str, Channel] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    """Transports that don't reach it any more."""
    num_reading: int = 0
    progress_s: float = 0.0
    """When bytes last came, or the first of the running reads began."""

    @property
    def name(self) -> tuple[str, bytes]:
        return (self.source.process, self.source.epoch)


@dataclass(slots=True)
class _Reading:
    machine: FetchMachine
    peer: _Peer
    read: StartRead
    transport: str = ""
    """Empty until it begins."""


@dataclass(slots=True)
class FetchCounters:
    """Totals since the epoch began."""

    blocks: int = 0
    missed_keys: int = 0
    corrupt_blocks: int = 0
    sources_lost: int = 0


class Fetcher:
    """Fetches into `arena` by `transports`, in the order of preference.

    `on_blocks(fetch_id, batch)` gets verified blocks as they come, `on_ended(ended)` the end of each fetch, exactly once, both
    from inside a call to this object. `watch` and `unwatch` add sockets to what the caller polls; `switch_off` closes a
    transport for good. `bytes_per_s` is the budget of each source, 0 for none. With `keys` only sources that they trust are
    asked.
    """

    def __init__(
        self,
        *,
        context: zmq.Context[Socket],
        arena: Arena,
        identity: bytes,
        transports: Sequence[Transport],
        bytes_per_s: float,
        watch: Callable[[Socket, Callable[[float], None]], None],
        unwatch: Callable[[Socket], None],
        on_blocks: Callable[[bytes, FetchedBatch], None],
        on_ended: Callable[[FetchEnded], None],
        on_bad_frame: Callable[[str, Exception], None],
        switch_off: Callable[[Transport], None],
        keys: Keyring | None = None,
    ) -> None:
        self._context = context
        self._keys = keys
        self._arena = arena
        self._identity = identity
        self._transports = {transport.name: transport for transport in transports}
        self._watch = watch
        self._unwatch = unwatch
        self._on_blocks = on_blocks
        self._on_ended = on_ended
        self._on_bad_frame = on_bad_frame
        self._switch_off = switch_off
        self._max_read_blocks = max(1, min(MAX_READ_BLOCKS, READ_BYTES // arena.slab_bytes))
        self._machines: dict[bytes, FetchMachine] = {}
        self._machine_of_ask: dict[bytes, FetchMachine] = {}
        self._asks_of: dict[bytes, list[bytes]] = {}
        self._readings: dict[int, _Reading] = {}
        self._reading_ids: dict[tuple[bytes, int], int] = {}
        self._next_reading_id = 0
        self._queue = ReadQueue(bytes_per_s=bytes_per_s)
        self._links = Links()
        self._busy_since_s: dict[tuple[str, str], float] = {}
        self._peers: dict[tuple[str, bytes], _Peer] = {}
        self._gone: dict[Name, None] = {}
        """Incarnations that are said to have left: they are not asked."""
        self._num_tainted: dict[str, int] = {}
        self.counters = FetchCounters()

    # --- the caller's loop -------------------------------------------------------------------------------------------

    def start_fetch(self, plan: FetchPlan, now_s: float) -> None:
        """Begins a fetch; its destinations are the caller's private blocks of our arena. Without a source that can be reached
        it ends at once with every key missing."""
        assert plan.fetch_id not in self._machines, "a fetch id was used twice"
        machine = FetchMachine(
            plan,
            max_read_blocks=self._max_read_blocks,
            parallel=[i for i, source in enumerate(plan.sources) if not self._reaches_directly(source)],
            silence_s=SILENCE_S,
        )
        self._machines[plan.fetch_id] = machine
        self._do(machine, machine.start(now_s), now_s)

    def cancel_fetch(self, fetch_id: bytes, now_s: float) -> None:
        """Ends a fetch with what it has; `on_ended` follows, from inside this call. An unknown id is ignored."""
        machine = self._machines.get(fetch_id)
        if machine is not None:
            self._do(machine, machine.cancel(now_s), now_s)

    def cancel_all(self, now_s: float) -> None:
        """Ends every fetch with what it has; `on_ended` follows for each, from inside this call."""
        for fetch_id in list(self._machines):
            self.cancel_fetch(fetch_id, now_s)

    def tell(self, source: Source, message: ToSource) -> None:
        """Sends a source something that is no fetch, if it takes messages now."""
        peer = self._line(source)
        if peer is not None:
            self._post(peer, message)

    def drop_peer(self, process: str, epoch: bytes, now_s: float) -> None:
        """That incarnation is said to be gone: it is not asked any more, unless it is back."""
        self._gone[process, epoch] = None
        if len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]
        peer = self._peers.get((process, epoch))
        if peer is not None:
            self._lose(peer, "it left the cluster", now_s)

    def peer_is_back(self, process: str, epoch: bytes) -> None:
        """It was said to be gone, and is there."""
        self._gone.pop((process, epoch), None)

    def poll(self, transport: Transport, now_s: float) -> None:
        """Lets a transport go on; the caller saw its descriptor readable, or it is busy."""
        results = transport.poll()
        for result in results:
            self._on_result(result, now_s)
        self._check_channels(transport.name, now_s)
        self._start_reads(now_s)

    def tick(self, now_s: float) -> None:
        """Starts what may start, and ends what is over."""
        for peer in list(self._peers.values()):
            if peer.num_reading and now_s >= peer.progress_s + SILENCE_S:
                self._lose(peer, f"no bytes came for {SILENCE_S:g} s", now_s)
        for machine in list(self._machines.values()):
            if machine.next_deadline() <= now_s:
                self._do(machine, machine.tick(now_s), now_s)
        self._start_reads(now_s)

    def next_deadline(self) -> float | None:
        """When `tick` has something to do."""
        due = [machine.next_deadline() for machine in self._machines.values()]
        due += [peer.progress_s + SILENCE_S for peer in self._peers.values() if peer.num_reading]
        if (start_s := self._queue.next_start_s()) is not None:
            due.append(start_s)
        return min(due, default=None)

    def close(self) -> None:
        """Ends everything at once, without callbacks. The transports are the caller's to close."""
        for peer in list(self._peers.values()):
            self._close_peer(peer)
        self._machines.clear()

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def num_fetches(self) -> int:
        """Fetches that have not ended."""
        return len(self._machines)

    def links(self) -> list[Link]:
        """What came from whom by which transport, and how fast."""
        return self._links.report()

    # --- inside: fetches ---------------------------------------------------------------------------------------------

    def _do(self, machine: FetchMachine, actions: Iterable[Action], now_s: float) -> None:
        todo = deque(actions)
        while todo:
            match todo.popleft():
                case Send(source=source, message=message):
                    if isinstance(message, Fetch) and message.fetch_id not in self._machine_of_ask:
                        self._machine_of_ask[message.fetch_id] = machine
                        self._asks_of.setdefault(machine.plan.fetch_id, []).append(message.fetch_id)
                    if not self._send(source, message, now_s):
                        todo.extend(machine.on_source_lost(source.process, source.epoch, now_s))
                case StartRead(source=source) as read:
                    if not machine.wants(read.read_id):
                        continue
                    peer = self._peers.get((source.process, source.epoch))
                    if peer is None:
                        todo.extend(machine.on_source_lost(source.process, source.epoch, now_s))
                        continue
                    reading_id = self._next_reading_id
                    self._next_reading_id += 1
                    self._readings[reading_id] = _Reading(machine, peer, read)
                    self._reading_ids[machine.plan.fetch_id, read.read_id] = reading_id
                    num_bytes = len(read.locations) * self._arena.slab_bytes
                    self._queue.add(reading_id, peer.name, machine.plan.order, num_bytes)
                case AbortRead(read_id=read_id):
                    aborted = self._reading_ids.get((machine.plan.fetch_id, read_id))
                    quiet = aborted is None or self._abort(aborted)
                    todo.extend(machine.on_aborted(read_id, quiet, now_s))
                case Committed(batch=batch):
                    self.counters.blocks += len(batch.blocks)
                    self._on_blocks(machine.plan.fetch_id, batch)
                case FetchEnded() as ended:
                    del self._machines[ended.fetch_id]
                    for ask in self._asks_of.pop(ended.fetch_id, []):
                        del self._machine_of_ask[ask]
                    self.counters.missed_keys += machine.num_missed_keys
                    self.counters.corrupt_blocks += machine.num_corrupt_blocks
                    self._on_ended(ended)

    # --- inside: reads -----------------------------------------------------------------------------------------------

    def _start_reads(self, now_s: float) -> None:
        while begun := self._queue.start(now_s):
            for reading_id in begun:
                reading = self._readings.get(reading_id)
                if reading is not None:  # what began before it may have ended it
                    self._start_read(reading_id, reading, now_s)

    def _start_read(self, reading_id: int, reading: _Reading, now_s: float) -> None:
        read, machine = reading.read, reading.machine
        if now_s >= read.usable_until_s:
            self._forget_reading(reading_id)
            self._do(machine, machine.on_read_late(read.read_id, now_s), now_s)
            return
        opened = self._channel(reading.peer)
        if opened is None:
            self._lose(reading.peer, "no transport reaches it any more", now_s)
            return
        reading.transport, channel = opened
        pair = (reading.peer.source.process, reading.transport)
        if not reading.peer.num_reading:
            reading.peer.progress_s = now_s
            self._busy_since_s.pop(pair, None)  # of a stretch that ended without a result
        reading.peer.num_reading += 1
        self._busy_since_s.setdefault(pair, clock())
        channel.start_read(reading_id, read.locations, read.block_ids)

    def _on_result(self, result: ReadResult, now_s: float) -> None:
        reading = self._readings.get(result.read_id)
        if reading is None:
            return
        peer, transport, machine = reading.peer, reading.transport, reading.machine
        self._forget_reading(result.read_id)
        peer.progress_s = now_s
        num_bytes = len(reading.read.locations) * self._arena.slab_bytes
        if result.checksums is not None:
            self._measure(peer, transport, num_bytes)
            self._links.worked(peer.name)
        else:
            log.info("a read from %s by %s failed: %s", peer.source.process, transport, result.error)
            closed = transport in peer.channels and peer.channels[transport].closed_because
            if closed and transport not in DIRECT and self._is_current(peer):
                peer.dead.add(transport)
                self._again(reading, num_bytes)
                return
        self._do(machine, machine.on_read(reading.read.read_id, result.checksums, transport, now_s), now_s)

    def _again(self, reading: _Reading, num_bytes: int) -> None:
        """By another transport, if there is one: `_start_read` sees to that."""
        reading_id = self._next_reading_id
        self._next_reading_id += 1
        reading.transport = ""
        self._readings[reading_id] = reading
        self._reading_ids[reading.machine.plan.fetch_id, reading.read.read_id] = reading_id
        self._queue.add(reading_id, reading.peer.name, reading.machine.plan.order, num_bytes)

    def _measure(self, peer: _Peer, transport: str, num_bytes: int) -> None:
        """Counts the time since the last read of this pair ended, or since the first one of a busy stretch began."""
        now, pair = clock(), (peer.source.process, transport)
        began = self._busy_since_s.get(pair, now)
        self._links.moved(*pair, num_bytes, now - began)
        if peer.num_reading:
            self._busy_since_s[pair] = now
        else:
            self._busy_since_s.pop(pair, None)

    def _abort(self, reading_id: int) -> bool:
        """Whether nothing can write into its destinations any more."""
        reading = self._readings[reading_id]
        channel = reading.peer.channels.get(reading.transport)
        quiet = channel is None or channel.abort(reading_id)
        self._forget_reading(reading_id)
        if not quiet:
            self._taint(reading.transport, len(reading.read.block_ids))
        return quiet

    def _taint(self, transport: str, num_blocks: int) -> None:
        num_tainted = self._num_tainted.get(transport, 0) + num_blocks
        self._num_tainted[transport] = num_tainted
        if num_tainted > self._arena.num_blocks * MAX_TAINTED_PART and transport in self._transports:
            log.error(
                "transport %s is switched off: it may still write into %d of %d blocks, which are lost to this process",
                transport,
                num_tainted,
                self._arena.num_blocks,
            )
            self._switch_off(self._transports.pop(transport))

    def _forget_reading(self, reading_id: int) -> None:
        """It is neither queued nor running any more."""
        reading = self._readings.pop(reading_id)
        del self._reading_ids[reading.machine.plan.fetch_id, reading.read.read_id]
        if not self._queue.remove(reading_id):
            self._queue.end(reading_id)
        if reading.transport:
            reading.peer.num_reading -= 1

    # --- inside: sources ---------------------------------------------------------------------------------------------

    def _reaches_directly(self, source: Source) -> bool:
        return any(name in DIRECT and transport.reaches(source) for name, transport in self._transports.items())

    def _send(self, source: Source, message: ToSource, now_s: float) -> bool:
        """False if the source can't be reached, or is left alone."""
        peer = self._peers.get((source.process, source.epoch))
        if not isinstance(message, Fetch):
            if peer is not None:
                self._post(peer, message)
            return True  # nothing of ours is held by a source that we have no line to
        name = (source.process, source.epoch)
        if name in self._gone or self._links.is_quarantined(name, now_s):
            return False
        peer = peer or self._line(source)
        if peer is None:
            return False
        if self._channel(peer) is None:
            self._lose(peer, "no transport reaches it", now_s)
            return False
        return self._post(peer, message)

    def _post(self, peer: _Peer, message: ToSource) -> bool:
        try:
            peer.socket.send(control.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _line(self, source: Source) -> _Peer | None:
        """The source's control line, opened if need be."""
        known = self._peers.get((source.process, source.epoch))
        if known is not None:
            return known
        socket = bounded_socket(self._context, zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._identity)
        try:
            if self._keys is not None:
                self._keys.dial(socket, source.process, source.endpoints.key)
            socket.connect(source.endpoints.fetch)
        except (zmq.ZMQError, ProtocolError) as error:
            log.warning("%s: fetch endpoint %r: %s", source.process, source.endpoints.fetch, error)
            socket.close()
            return None
        peer = _Peer(source, socket)
        self._peers[peer.name] = peer
        self._watch(socket, lambda now_s: self._hear(peer, now_s))
        return peer

    def _channel(self, peer: _Peer) -> tuple[str, Channel] | None:
        """The transport to read by now, and its channel, opened if need be."""
        while True:
            reaching = [
                name for name, t in self._transports.items() if name not in peer.dead and t.reaches(peer.source)
            ]
            name = self._links.choose(peer.source.process, reaching)
            if name is None:
                return None
            if name not in peer.channels:
                try:
                    peer.channels[name] = self._transports[name].connect(peer.source)
                except TransportError as error:
                    log.info("no channel: %s", error)
                    peer.dead.add(name)
                    continue
            return name, peer.channels[name]

    def _check_channels(self, transport: str, now_s: float) -> None:
        """Takes note of channels that closed."""
        for peer in list(self._peers.values()):
            channel = peer.channels.get(transport)
            if channel is None or not channel.closed_because:
                continue
            del peer.channels[transport]
            peer.dead.add(transport)
            if transport in DIRECT or not self._channel(peer):
                self._lose(peer, channel.closed_because, now_s)

    def _hear(self, peer: _Peer, now_s: float) -> None:
        for frames in received(peer.socket):
            try:
                message = control.decode_to_sink(frames[-1])
            except (msgspec.DecodeError, ValueError) as error:
                self._on_bad_frame(f"the line to {peer.source.process}", error)
                continue
            machine = self._machine_of_ask.get(message.fetch_id)
            if machine is not None:
                self._do(machine, machine.on_message(message, now_s), now_s)
        self._start_reads(now_s)

    def _is_current(self, peer: _Peer) -> bool:
        return self._peers.get(peer.name) is peer

    def _lose(self, peer: _Peer, why: str, now_s: float) -> None:
        if not self._is_current(peer):
            return
        until_s = self._links.failed(peer.name, now_s)
        log.info("source %s is lost, for %.0f s at least: %s", peer.source.process, until_s - now_s, why)
        self.counters.sources_lost += 1
        self._close_peer(peer)
        for machine in list(self._machines.values()):
            lost = machine.on_source_lost(peer.source.process, peer.source.epoch, now_s)
            self._do(machine, lost, now_s)
        self._queue.forget_peer(peer.name)

    def _close_peer(self, peer: _Peer) -> None:
        del self._peers[peer.name]
        self._unwatch(peer.socket)
        peer.socket.close()
        for channel in peer.channels.values():
            channel.close()
