"""Virtual ZeroMQ: sockets with the calls that production code makes, over lines that delay, lose, double and reorder.

Owns the sockets and what is on its way between them. Frames are bytes, encoded by production code. A line between two sockets
keeps its order, as TCP does, unless the weather says otherwise; what is sent to a process that is gone is lost. What ZeroMQ
promises beyond that (a loss only with a connection) is deliberately not kept: production code says that any message may be lost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import zmq

from tandem.sim.faults.world import Act, Process, World

TICK_S = 0.0005
"""Arrivals are this far apart, or at once: a loop takes in what came together, as a real one does."""
LATENCY_S = 0.0005
SUBSCRIBE_S = 0.001
RESET_S = 0.002
"""After so long the other end of a connection knows that a process died."""

Frames = list[bytes]


@dataclass(slots=True)
class Weather:
    """What lines do to messages. Chances for each message; seconds."""

    loss: float = 0.0
    doubling: float = 0.0
    reordering: float = 0.0
    late_s: float = 0.0
    """A reordered message comes up to so much later."""


@dataclass(slots=True)
class Partition:
    """Between two processes, until healed: what is sent is lost, or held back and arrives then."""

    holds: bool
    held: list[Act] = field(default_factory=list)


class Socket:
    """One socket of one process. The attributes and methods of `zmq.Socket` that production code uses."""

    def __init__(self, network: Network, process: Process, kind: int) -> None:
        self.network = network
        self.process = process
        self.number = next(network.numbers)
        self.kind = kind
        self.closed = False
        self.linger = self.sndhwm = self.rcvhwm = 0
        self.identity = b""
        self.endpoint = ""
        """Where it is bound, or what it is connected to."""
        self.mandatory = False
        self.inbox: deque[Frames] = deque()
        self.topic = b""
        self.is_stream = False
        """Of a replay: what it is sent in answer to a request comes in order, up to where the connection breaks."""
        self.broken = False

    def setsockopt(self, option: int, value: bytes | int) -> None:
        if option == zmq.IDENTITY:
            assert isinstance(value, bytes)
            self.identity = value
        elif option == zmq.ROUTER_MANDATORY:
            self.mandatory = bool(value)

    def getsockopt(self, option: int) -> int:
        assert option == zmq.EVENTS
        return zmq.POLLIN if self.inbox else 0

    def getsockopt_string(self, option: int) -> str:
        assert option == zmq.LAST_ENDPOINT
        return self.endpoint

    def subscribe(self, topic: bytes) -> None:
        self.topic = topic

    def bind(self, endpoint: str) -> None:
        self.endpoint = self.network.bind(self, endpoint)

    def connect(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.network.connect(self)

    def send(self, data: bytes, flags: int = 0) -> None:
        self.send_multipart([data], flags)

    def send_multipart(self, frames: Frames, flags: int = 0) -> None:
        self.network.on_sent(self, frames)
        self.network.send(self, frames)

    def recv_multipart(self, flags: int = 0) -> Frames:
        if not self.inbox:
            raise zmq.Again
        frames = self.inbox.popleft()
        self.network.on_taken(self, frames)
        return frames

    def close(self, linger: int = 0) -> None:
        self.closed = True
        self.inbox.clear()
        self.process.ready.pop(self, None)
        self.network.forget(self)


class Context:
    """In the place of a `zmq.Context` of one process."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process
        self._sockets: list[Socket] = []

    def socket(self, kind: int) -> Socket:
        made = Socket(self._network, self._process, kind)
        self._sockets.append(made)
        return made

    def destroy(self, linger: int = 0) -> None:
        for socket in self._sockets:
            if not socket.closed:
                socket.close()


class NoPoller:
    """In the place of a `zmq.Poller`: the network itself knows what is ready."""

    def register(self, socket: object, flags: int = 0) -> None: ...

    def unregister(self, socket: object) -> None: ...


class Network:
    """Every line. `on_sent` and `on_taken` see each message as it is sent, and as its receiver takes it in."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.generator("network")
        self._bound: dict[str, Socket] = {}
        self._dealers: dict[tuple[str, bytes], Socket] = {}
        """`(endpoint, identity)` → who has connected to it."""
        self._subscribers: dict[str, list[Socket]] = {}
        self._clear_at_s: dict[tuple[int, int], float] = {}
        """When the last message of a line arrives."""
        self.numbers = count(1)
        self._partitions: dict[frozenset[str], Partition] = {}
        self.weather = Weather()
        self.slow: dict[str, float] = {}
        """Processes whose lines take so many seconds more, and so many times longer for bytes."""
        self.on_sent: Callable[[Socket, Frames], None] = lambda socket, frames: None
        self.on_taken: Callable[[Socket, Frames], None] = lambda socket, frames: None
        self.num_lost = self.num_doubled = self.num_reordered = 0

    # --- sockets --------------------------------------------------------------------------------------------------------

    def bind(self, socket: Socket, endpoint: str) -> str:
        if endpoint.endswith("*"):
            endpoint = f"sim://{socket.process.name}/{socket.number}"
        self._bound[endpoint] = socket
        return endpoint

    def connect(self, socket: Socket) -> None:
        if socket.kind == zmq.SUB:
            self._world.after(SUBSCRIBE_S, lambda: self._subscribers.setdefault(socket.endpoint, []).append(socket))
            return
        if not socket.identity:
            socket.identity = f"line-{socket.number}".encode()
            socket.is_stream = True
        self._dealers[socket.endpoint, socket.identity] = socket

    def forget(self, socket: Socket) -> None:
        """It is closed; those that it was connected to know a moment later."""
        if self._bound.get(socket.endpoint) is socket:
            del self._bound[socket.endpoint]
        elif socket.kind == zmq.SUB:
            self._subscribers[socket.endpoint] = [
                s for s in self._subscribers.get(socket.endpoint, []) if s is not socket
            ]
        elif not socket.process.unreachable:
            self._world.after(RESET_S, lambda: self._forget_dealer(socket))

    def _forget_dealer(self, socket: Socket) -> None:
        if self._dealers.get((socket.endpoint, socket.identity)) is socket:
            del self._dealers[socket.endpoint, socket.identity]

    # --- messages -------------------------------------------------------------------------------------------------------

    def send(self, socket: Socket, frames: Frames) -> None:
        """Raises ZMQError where a ROUTER knows nobody of that identity."""
        if socket.kind == zmq.PUB:
            for subscriber in self._subscribers.get(socket.endpoint, []):
                if frames[0].startswith(subscriber.topic):
                    self._transmit(socket, subscriber, frames)
        elif socket.kind == zmq.ROUTER:
            dealer = self._dealers.get((socket.endpoint, frames[0]))
            if dealer is not None:
                self._transmit(socket, dealer, frames[1:])
            elif socket.mandatory:
                raise zmq.ZMQError(zmq.EHOSTUNREACH)
        else:
            target = self._bound.get(socket.endpoint)
            socket.broken = False
            if target is not None:
                self._transmit(socket, target, [socket.identity, *frames])

    def _transmit(self, source: Socket, target: Socket, frames: Frames) -> None:
        weather, rng = self.weather, self._rng
        copies = 1
        if source.is_stream or target.is_stream:
            # An answer of many messages over one connection: with one message the rest is lost.
            asker = target if target.is_stream else source
            asker.broken = asker.broken or (weather.loss > 0.0 and rng.random() < weather.loss)
            if not asker.broken:
                self._carry(source, target, frames)
            return
        if weather.loss and rng.random() < weather.loss:
            self.num_lost += 1
            copies = 0
        elif weather.doubling and rng.random() < weather.doubling:
            self.num_doubled += 1
            copies = 2
        for _ in range(copies):
            self._carry(source, target, frames)

    def _carry(self, source: Socket, target: Socket, frames: Frames) -> None:
        weather, world = self.weather, self._world
        delay_s = LATENCY_S + self.delay_s(source.process.name, target.process.name)
        late = (
            weather.reordering
            and not (source.is_stream or target.is_stream)
            and self._rng.random() < weather.reordering
        )
        if late:
            self.num_reordered += 1
            delay_s += self._rng.random() * weather.late_s
        at_s = math.ceil((world.now_s + delay_s) / TICK_S) * TICK_S
        if not late:
            line = (source.number, target.number)
            at_s = max(at_s, self._clear_at_s.get(line, 0.0))
            self._clear_at_s[line] = at_s

        def arrive() -> None:
            partition = self._partitions.get(frozenset((source.process.name, target.process.name)))
            if partition is None:
                self._arrive(target, frames)
            elif partition.holds:
                partition.held.append(arrive)

        world.at(at_s, arrive)

    @staticmethod
    def _arrive(target: Socket, frames: Frames) -> None:
        process = target.process
        if target.closed or not process.alive:
            return
        target.inbox.append(frames)
        process.ready[target] = zmq.POLLIN
        process.wake()

    # --- what goes wrong ------------------------------------------------------------------------------------------------

    def delay_s(self, one: str, other: str) -> float:
        """More than usual, between two processes."""
        if not self.slow:
            return 0.0
        return max(self.slow.get(one, 0.0), self.slow.get(other, 0.0))

    def are_parted(self, one: str, other: str) -> bool:
        return frozenset((one, other)) in self._partitions

    def part(self, one: str, other: str, *, holds: bool) -> None:
        """Nothing passes between these two until `join`."""
        self._partitions.setdefault(frozenset((one, other)), Partition(holds))

    def join(self, one: str, other: str) -> None:
        partition = self._partitions.pop(frozenset((one, other)), None)
        for arrive in partition.held if partition is not None else ():
            arrive()
