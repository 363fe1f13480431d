"""Workers without a model, all in one process, on one thread: what a router sees of real ones, at no cost.

Owns the workers' side of the control protocol: hello and heartbeats, dispatches taken at once, reports, tokens kept until they
are acknowledged and sent again when asked for. A prompt is computed in no time, and a stream gets its tokens at the pace that
the bench sets. A token's id tells when it was sent (`children.sent_at`). They publish no KV events and serve no blocks.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from dataclasses import dataclass

import msgspec
import zmq

from protos.control import (
    PROTOCOL_VERSION,
    Abort,
    Aborted,
    Ack,
    Capacity,
    Counters,
    Dispatch,
    Endpoints,
    Failed,
    Fence,
    FirstTokens,
    FromRouter,
    Heartbeat,
    Hello,
    Load,
    Resend,
    Role,
    RoleReport,
    RoutingGroup,
    StepPrices,
    Tokens,
)
from tandem.bench.peers import Failed as Said
from tandem.bench.peers import Ready, answer
from tandem.bench.router.children import Join, Joined, Pace, Paced, ToWorkers, sent_at
from tandem.clock import now_s
from tandem.errors import TandemError
from tandem.unacknowledged import Unacknowledged
from tandem.zmq_io import RouterLink, identity

_GROUP = RoutingGroup(
    model_fingerprint=b"no model at all!", kv_format="none", numerics_class=b"no numerics here", block_size=16
)
_CAPACITY = Capacity(num_blocks=1_000_000, slab_bytes=1, max_model_len=131_072, max_running=1024, max_step_tokens=8192)
_PRICES = StepPrices(base_s=1e-6, token_s=1e-9, pair_s=1e-15, sequence_s=1e-9, context_s=1e-15)
_ENDPOINTS = Endpoints(fetch="", events="", replay="")
_WELCOME_S = 30.0
_MAX_WAIT_MS = 100
_WINDOW = 2
"""Frames of a stream that may be unacknowledged when its pace is that of the acknowledgements."""
VOCAB_SIZE = 32_000
"""Ids that tell times; nearly every vocabulary has as many."""

_decoder: msgspec.json.Decoder[ToWorkers] = msgspec.json.Decoder(ToWorkers)


@dataclass(slots=True)
class _Stream:
    fence: Fence
    index: int
    num_tokens: int
    max_tokens: int
    in_flight: int = 0


class FakeWorker:
    """One worker. `handle` and `tick` are called by the process' loop."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], name: str, control_port: int) -> None:
        self.name = name
        self._epoch = os.urandom(8)
        self._num_dispatches = 0
        self._dispatches: dict[Fence, Dispatch] = {}
        self._streams: dict[tuple[Fence, int], _Stream] = {}
        self._unacknowledged = Unacknowledged()
        self._pace = Pace(1, 0.0)
        self._next_step_s = 0.0
        self.link = RouterLink(
            context,
            [f"tcp://127.0.0.1:{control_port}"],
            identity=identity(name, self._epoch),
            make_hello=self._hello,
            make_heartbeat=self._heartbeat,
            on_message=self._on_message,
            on_refused=self._on_refused,
            on_lost=self._on_lost,
        )
        (self.socket,) = self.link.sockets()

    def set_pace(self, pace: Pace, first_step_s: float) -> None:
        """From the next step on, which is at `first_step_s`."""
        self._pace = pace
        self._next_step_s = first_step_s
        if not pace.step_s:
            for stream in list(self._streams.values()):
                self._draw(stream)

    def tick(self, time_s: float) -> float:
        """Does what is due; returns when to call again."""
        due_s = self.link.tick(time_s)
        step_s = self._pace.step_s
        if not step_s or not self._streams:
            return due_s
        if time_s >= self._next_step_s:
            for stream in list(self._streams.values()):
                self._draw(stream)
            # What it could not keep up with is not made good: the pace is that of steps.
            self._next_step_s = max(self._next_step_s + step_s, now_s() - step_s)
        return min(due_s, self._next_step_s)

    def _hello(self) -> Hello:
        role: Role = "prefill" if self.name.startswith("prefill") else "decode"
        return Hello(PROTOCOL_VERSION, self.name, role, self._epoch, os.getpid(), _ENDPOINTS, _CAPACITY, _GROUP)

    def _heartbeat(self, router: int) -> Heartbeat:
        load = Load(
            num_dispatches=self._num_dispatches,
            num_running=len(self._streams),
            num_generating=len(self._streams),
            free_blocks=_CAPACITY.num_blocks,
            prices=_PRICES,
        )
        return Heartbeat(self.name, self._epoch, 0, 0.0, -1, load, Counters())

    def _on_refused(self, reason: str) -> None:
        raise TandemError(f"{self.name} was refused: {reason}")

    def _on_lost(self, router: int) -> None:
        self._dispatches.clear()
        self._streams.clear()
        self._unacknowledged.drop_router(router)

    def _on_message(self, router: int, message: FromRouter) -> None:
        match message:
            case Dispatch():
                self._take(message)
            case FirstTokens(fence=fence, token_ids=token_ids):
                dispatch = self._dispatches.get(fence)
                if dispatch is not None and (fence, dispatch.index) not in self._streams:
                    self._report(dispatch)
                    self._begin(dispatch, [index for index, token in enumerate(token_ids) if token >= 0], 1)
            case Ack(fence=fence, index=index, position=position, final=final):
                self._unacknowledged.acknowledge(0, fence, index, position, final, now_s())
                self._on_ack(fence, index, final)
            case Resend(fence=fence, index=index, position=position):
                if fence not in self._dispatches:
                    self.link.send(0, Failed(fence=fence, code="worker_lost", message="it is not known here"))
                for tokens in self._unacknowledged.from_position(0, fence, index, position):
                    self.link.send(0, tokens)
            case Abort(fence=fence):
                self._drop(fence)
                self.link.send(0, Aborted(fence=fence))
            case _:
                pass  # peers are nobody to fetch from

    def _take(self, dispatch: Dispatch) -> None:
        self._num_dispatches += 1
        self._dispatches[dispatch.fence] = dispatch
        samples = range(dispatch.index, dispatch.index + dispatch.n)
        if dispatch.fence.role == "prefill":
            self._report(dispatch)
            for index in samples:
                self._send(dispatch.fence, index, 0, 1, dispatch.sampling.max_tokens == 1)
        elif dispatch.prefill_here:
            self._report(dispatch)
            self._begin(dispatch, list(samples), len(dispatch.token_ids) // 4 - dispatch.num_prompt_tokens)

    def _report(self, dispatch: Dispatch) -> None:
        num_tokens = len(dispatch.token_ids) // 4
        self.link.send(0, RoleReport(dispatch.fence, 0, 0, num_tokens, [], 0.0, 0.0, 1e-6))

    def _begin(self, dispatch: Dispatch, samples: list[int], position: int) -> None:
        for index in samples:
            stream = _Stream(dispatch.fence, index, position, dispatch.sampling.max_tokens)
            self._streams[dispatch.fence, index] = stream
            if not self._pace.step_s:
                self._draw(stream)

    def _on_ack(self, fence: Fence, index: int, final: bool) -> None:
        stream = self._streams.get((fence, index))
        if stream is not None and not final:
            stream.in_flight = max(0, stream.in_flight - 1)
            while not self._pace.step_s and stream.in_flight < _WINDOW and (fence, index) in self._streams:
                self._draw(stream)
        elif final:
            self._streams.pop((fence, index), None)
            if not any(key[0] == fence for key in self._streams):
                self._dispatches.pop(fence, None)

    def _draw(self, stream: _Stream) -> None:
        count = min(self._pace.frame_tokens, stream.max_tokens - stream.num_tokens)
        ends = stream.num_tokens + count >= stream.max_tokens
        self._send(stream.fence, stream.index, stream.num_tokens, count, ends)
        stream.num_tokens += count
        stream.in_flight += 1
        if ends:
            del self._streams[stream.fence, stream.index]

    def _send(self, fence: Fence, index: int, position: int, count: int, ends: bool) -> None:
        time_s = now_s()
        ids = [sent_at(time_s, VOCAB_SIZE)] * count
        tokens = Tokens(fence, index, position, ids, finish_reason="length" if ends else None)
        self._unacknowledged.add(0, tokens, time_s)
        self.link.send(0, tokens)

    def _drop(self, fence: Fence) -> None:
        dispatch = self._dispatches.pop(fence, None)
        if dispatch is not None:
            for index in range(dispatch.index, dispatch.index + dispatch.n):
                self._streams.pop((fence, index), None)
        self._unacknowledged.drop(0, fence)


class _Line:
    """What the parent says, without waiting for it."""

    def __init__(self) -> None:
        self.fd = sys.stdin.fileno()
        self._rest = b""
        self.ended = False

    def read(self) -> list[ToWorkers]:
        part = os.read(self.fd, 65_536)
        self.ended = not part
        *lines, self._rest = (self._rest + part).split(b"\n")
        return [_decoder.decode(line) for line in lines]


def main() -> None:
    """Works until stdin ends."""
    answer(Ready("fake"))
    line, poller = _Line(), zmq.Poller()
    context = zmq.Context[zmq.Socket[bytes]]()
    poller.register(line.fd, zmq.POLLIN)
    workers: dict[zmq.Socket[bytes], FakeWorker] = {}
    requests: deque[ToWorkers] = deque()
    joined_by_s: float | None = None
    try:
        while not line.ended:
            due_s = min((worker.tick(now_s()) for worker in workers.values()), default=now_s() + 1.0)
            for ready, _ in poller.poll(max(0, min(_MAX_WAIT_MS, int((due_s - now_s()) * 1e3)))):
                if ready == line.fd:
                    requests += line.read()
                else:
                    workers[ready].link.handle(ready, now_s())
            while requests:
                match requests.popleft():
                    case Join() as join:
                        os.sched_setaffinity(0, join.cores)
                        names = [f"prefill-{i}" for i in range(join.prefills)]
                        for name in [*names, *(f"decode-{i}" for i in range(join.decodes))]:
                            worker = FakeWorker(context, name, join.control_port)
                            workers[worker.socket] = worker
                            poller.register(worker.socket, zmq.POLLIN)
                        joined_by_s = now_s() + _WELCOME_S
                    case Pace() as pace:
                        for number, worker in enumerate(workers.values()):
                            worker.set_pace(pace, now_s() + pace.step_s * number / len(workers))
                        answer(Paced())
            if joined_by_s is not None and all(worker.link.welcomed for worker in workers.values()):
                joined_by_s = None
                answer(Joined())
            elif joined_by_s is not None and now_s() > joined_by_s:
                raise TandemError(f"the router has not welcomed all workers for {_WELCOME_S:g} s")
    except TandemError as error:
        answer(Said(str(error)))
    finally:
        for worker in workers.values():
            worker.link.close()
        context.term()


if __name__ == "__main__":
    main()
