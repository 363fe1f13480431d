"""A router in virtual time: `RouterCore` with the work of its shells, `router/server.py` and `router/control_plane.py`.

Those are asyncio and gRPC; this does what they do with virtual sockets: decodes, checks who is speaking, hands on, carries out
actions in order, follows events, asks for replays. It decides nothing. A stop string is played by a set of tokens: the shell
finds it in what is emitted and says so to the core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import zmq

from protos import control, kv_events
from protos.control import ToRouter
from router.actions import Action, Emit, Replay, RequestEvent, Send, Subscribe, TokensEvent, Unsubscribe
from router.control_plane import REPLAY_TIMEOUT_S
from router.journal import Request
from router.router import RouterCore, Settings
from router.server import TICK_S
from tandem.errors import TandemError
from tandem.sim.faults.network import Context, Network, Socket
from tandem.sim.faults.truth import Truth
from tandem.sim.faults.watch import RouterWatch
from tandem.sim.faults.world import Process, World
from tandem.zmq_io import identity, parse_identity

Who = tuple[str, bytes]


class _Replaying:
    """One replay that runs. `until_s` is by the router's clock."""

    def __init__(self, socket: Socket, until_s: float) -> None:
        self.socket = socket
        self.until_s = until_s


class RouterNode(Process):
    """One incarnation of a router. `show(router, request_id, resume_no, event)` is told what a request's client is to see, in
    which of its calls."""

    def __init__(
        self,
        world: World,
        network: Network,
        *,
        name: str,
        endpoint: str,
        liveness_s: float,
        offset_s: float,
        truth: Truth,
        show: Callable[[RouterNode, str, int, RequestEvent], None],
    ) -> None:
        super().__init__(world, name, name, offset_s)
        rng = world.generator(f"{name} {world.now_s}")
        self.epoch = rng.randbytes(8)
        self.core = RouterCore(
            Settings(name, self.epoch, liveness_s=liveness_s, progress_s=5.0, hold_s=5.0, max_active_requests=10_000),
            rng,
        )
        self.watch = RouterWatch(self, truth)
        self._show = show
        self._context = Context(network, self)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(endpoint)
        self._subscriptions: dict[Socket, Who] = {}
        self._replays: dict[Who, _Replaying] = {}
        self._tick_at_s = 0.0
        self.stops: dict[str, frozenset[int]] = {}
        """Request → the tokens that end a sample and are not shown."""
        self._calls: dict[str, int] = {}
        """Request → the `resume_no` of the call that it is answered in."""
        self.wake()

    # --- requests -------------------------------------------------------------------------------------------------------

    def submit(self, request: Request, stop: frozenset[int]) -> TandemError | None:
        """The error with which it is refused."""
        self.stops[request.request_id] = stop
        try:
            actions = self.core.submit(request, self.world.local_now_s())
        except TandemError as error:
            return error
        self._calls[request.request_id] = request.resumed.resume_no if request.resumed is not None else 0
        self._do(actions)
        return None

    def cancel(self, request_id: str, resume_no: int) -> None:
        """Its client left that call."""
        if self._calls.get(request_id) == resume_no:
            self._do(self.core.cancel(request_id, self.world.local_now_s()))

    # --- turns ----------------------------------------------------------------------------------------------------------

    def turn(self) -> float:
        ready, self.ready = self.ready, {}
        for socket in cast("dict[Socket, int]", ready):
            if socket is self._socket:
                self._take_messages()
            elif (who := self._subscriptions.get(socket)) is not None:
                self._take_events(socket, who)
            else:
                self._take_replay(socket)
        now_s = self.world.local_now_s()
        for who in [who for who, replay in self._replays.items() if now_s >= replay.until_s]:
            self._end_replay(who, complete=False)
        if now_s >= self._tick_at_s:
            self._tick_at_s = now_s + TICK_S
            self._do(self.core.tick(now_s))
        return min([self._tick_at_s, *(replay.until_s for replay in self._replays.values())])

    def _take_messages(self) -> None:
        inbox = self._socket.inbox
        while inbox:
            frames = self._socket.recv_multipart()
            who = parse_identity(frames[0])
            assert who is not None, f"an identity {frames[0]!r}"
            message = control.decode_to_router(frames[1])
            self.watch.hears(who, message)
            self._do(self.watch.says(who, message, self._on_message(who, message)))

    def _on_message(self, who: Who, message: ToRouter) -> list[Action]:
        return self.core.on_message(*who, message, self.world.local_now_s())

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            self.watch.does(action)
            match action:
                case Send(process=process, epoch=epoch, message=message):
                    try:
                        self._socket.send_multipart([identity(process, epoch), control.encode(message)])
                    except zmq.ZMQError:
                        self._do(self.core.on_closed(process, epoch, self.world.local_now_s()))
                case Emit(request_id=request_id, event=event):
                    self._emit(request_id, event)
                case Subscribe():
                    self._subscribe(action)
                case Unsubscribe(process=process, epoch=epoch):
                    self._unsubscribe((process, epoch))
                case Replay():
                    self._replay(action)

    def _emit(self, request_id: str, event: RequestEvent) -> None:
        stop = self.stops.get(request_id)
        if not isinstance(event, TokensEvent):
            self.stops.pop(request_id, None)
        elif stop:
            at = next((i for i, token in enumerate(event.token_ids) if token in stop), None)
            if at is not None:
                shown = TokensEvent(event.index, event.position, event.token_ids[:at], (), "stop")
                self._show(self, request_id, self._calls[request_id], shown)
                now_s = self.world.local_now_s()
                self._do(self.core.stop_sample(request_id, event.index, event.position + at, now_s))
                return
        self._show(self, request_id, self._calls[request_id], event)

    # --- events ---------------------------------------------------------------------------------------------------------

    def _subscribe(self, action: Subscribe) -> None:
        who = (action.process, action.epoch)
        self._unsubscribe(who)
        socket = self._context.socket(zmq.SUB)
        socket.connect(action.endpoints.events)
        self._subscriptions[socket] = who

    def _unsubscribe(self, who: Who) -> None:
        for socket in [socket for socket, known in self._subscriptions.items() if known == who]:
            del self._subscriptions[socket]
            socket.close()
        if (replay := self._replays.pop(who, None)) is not None:
            replay.socket.close()

    def _take_events(self, socket: Socket, who: Who) -> None:
        while socket.inbox and not socket.closed:
            _, seq_frame, payload = socket.recv_multipart()
            seq, batch = kv_events.decode_seq(seq_frame), kv_events.decode_batch(payload)
            self.watch.hears_events(batch)
            self._do(self.core.on_events(*who, seq, batch, self.world.local_now_s()))

    def _replay(self, action: Replay) -> None:
        who = (action.process, action.epoch)
        if (running := self._replays.pop(who, None)) is not None:
            running.socket.close()
        socket = self._context.socket(zmq.DEALER)
        socket.connect(action.endpoints.replay)
        socket.send_multipart([b"", kv_events.encode_seq(action.from_seq)])
        self._replays[who] = _Replaying(socket, self.world.local_now_s() + REPLAY_TIMEOUT_S)

    def _take_replay(self, socket: Socket) -> None:
        who = next((who for who, replay in self._replays.items() if replay.socket is socket), None)
        while who is not None and socket.inbox:
            frames = socket.recv_multipart()
            now_s = self.world.local_now_s()
            if frames[1] == kv_events.END_OF_REPLAY:
                self._end_replay(who, complete=True)
                return
            batch = kv_events.decode_batch(frames[2])
            self.watch.hears_events(batch)
            self.core.on_replayed(*who, kv_events.decode_seq(frames[1]), batch, now_s)
            self._replays[who].until_s = now_s + REPLAY_TIMEOUT_S

    def _end_replay(self, who: Who, *, complete: bool) -> None:
        self._replays.pop(who).socket.close()
        self.core.on_replay_end(*who, complete)

    def died(self) -> None:
        self._context.destroy()
