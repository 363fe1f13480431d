"""RouterCore under a seeded world in which frames are lost, doubled and reordered and workers crash and come back."""

from __future__ import annotations

import hashlib
import heapq
import random
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.keys import root_key, tokens_from_bytes
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
    Heartbeat,
    Hello,
    Load,
    Resend,
    RoleReport,
    RoutingGroup,
    Sampling,
    Tokens,
)
from router.actions import CompletedEvent, Emit, FailedEvent, Send, TokensEvent
from router.journal import Request
from router.router import RouterCore, Settings

BLOCK = 4
GROUP = RoutingGroup(model_fingerprint=b"f" * 16, kv_format="v1", numerics_class=b"n" * 16, block_size=BLOCK)
ROOT = root_key(model_fingerprint=b"f" * 16, kv_format="v1", numerics_class=b"n" * 16)
ENDPOINTS = Endpoints(fetch="f", events="e", replay="r")
EOS = 0


def next_token(tokens: list[int], index: int) -> int:
    """The fake model: a function of all tokens before and the sample's index."""
    digest = hashlib.sha256(repr((tokens, index)).encode()).digest()
    return digest[0] % 40


def reference(prompt: tuple[int, ...], index: int, max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        token = next_token(tokens, index)
        if token == EOS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@dataclass
class Stream:
    """A worker's side of one sample."""

    tokens: list[int]
    num_prompt: int
    unacked: list[Tokens] = field(default_factory=list)
    done: bool = False
    released: bool = False
    sent_at_s: float = 0.0


class FakeWorker:
    """Takes dispatches as a worker would, with a fake model. `crash` loses everything."""

    def __init__(self, world: World, name: str, role: str) -> None:
        self.world, self.name, self.role = world, name, role
        self.up = False
        self.epoch = b""
        self.start()

    def start(self) -> None:
        self.up = True
        self.epoch = self.world.rng.randbytes(8)
        self.dispatches: dict[Fence, Dispatch] = {}
        self.streams: dict[tuple[Fence, int], Stream] = {}
        self.ready_at_s: dict[Fence, float] = {}
        self.hold_until_s: dict[Fence, float] = {}
        self.parked: set[Fence] = set()
        self.first_tokens: dict[Fence, list[int]] = {}
        self.stopped: dict[Fence, set[int]] = {}
        self.num_dispatches = 0
        self.events_seq = -1
        self.hello()

    def hello(self) -> None:
        self.post(
            Hello(
                version=PROTOCOL_VERSION,
                process=self.name,
                role=self.role,
                epoch=self.epoch,
                pid=1,
                endpoints=ENDPOINTS,
                capacity=Capacity(num_blocks=100, slab_bytes=1000, max_model_len=200),
                group=GROUP,
            )
        )

    def post(self, message: Any) -> None:
        self.world.to_router(self, message)

    def step(self) -> None:
        now_s = self.world.now_s
        for fence, dispatch in list(self.dispatches.items()):
            ready_s = self.ready_at_s.get(fence)
            if ready_s is not None and now_s >= ready_s and self.source_is_ready(dispatch, ready_s):
                del self.ready_at_s[fence]
                self.begin(dispatch)
            if now_s >= self.hold_until_s.get(fence, now_s + 1.0):
                self.drop(fence)
                self.post(Aborted(fence=fence))
        for (fence, index), stream in list(self.streams.items()):
            if fence.role == "decode" and not stream.done:
                self.generate(self.dispatches[fence], index, stream)
            if stream.unacked and now_s - stream.sent_at_s > 1.0:
                stream.sent_at_s = now_s
                for message in stream.unacked:
                    self.post(message)

    def source_is_ready(self, dispatch: Dispatch, ready_s: float) -> bool:
        """Whether the prefill worker that this dispatch waits for has computed the KV, or will not: then it has failed."""
        if not dispatch.wait_source:
            return True
        source = next(w for w in self.world.workers if w.name == dispatch.wait_source)
        held = [f for f in source.dispatches if source.up and f.request_id == dispatch.fence.request_id]
        if any(fence in source.hold_until_s for fence in held):
            return True
        if not held and self.world.now_s > ready_s + 1.0:  # the grace time: the prefill dispatch may come later
            self.fail(dispatch.fence)
        return False

    def fail(self, fence: Fence) -> None:
        self.drop(fence)
        self.post(Failed(fence=fence, code="fetch_failed", message="no source had it"))

    def begin(self, dispatch: Dispatch) -> None:
        if self.world.rng.random() < self.world.fail_rate:
            self.fail(dispatch.fence)
            return
        self.post(
            RoleReport(
                fence=dispatch.fence,
                local_hit_tokens=0,
                fetched_tokens=0,
                computed_tokens=len(dispatch.token_ids) // 4,
                fetched=[],
                queue_s=0.0,
                fetch_s=0.0,
                compute_s=0.1,
            )
        )
        tokens = tokens_from_bytes(dispatch.token_ids)
        if dispatch.fence.role == "prefill" or dispatch.prefill_here:
            for index in range(dispatch.index, dispatch.index + dispatch.n):
                stream = Stream(list(tokens), dispatch.num_prompt_tokens)
                self.streams[(dispatch.fence, index)] = stream
                if dispatch.fence.role == "prefill":
                    self.generate(dispatch, index, stream)
                    self.hold_until_s[dispatch.fence] = self.world.now_s + dispatch.hold_s
        else:
            self.parked.add(dispatch.fence)
            self.continue_parked(dispatch.fence)

    def continue_parked(self, fence: Fence) -> None:
        """Generation goes on where both the KV and the first tokens are there."""
        if fence not in self.parked or fence not in self.first_tokens:
            return
        self.parked.remove(fence)
        prompt = tokens_from_bytes(self.dispatches[fence].token_ids)
        for index, token in enumerate(self.first_tokens[fence]):
            if token != -1 and index not in self.stopped.get(fence, ()):
                self.streams[(fence, index)] = Stream([*prompt, token], len(prompt))

    def generate(self, dispatch: Dispatch, index: int, stream: Stream) -> None:
        position = len(stream.tokens) - stream.num_prompt
        token = next_token(stream.tokens, index)
        reason = "stop" if token == EOS else "length" if position + 1 >= dispatch.sampling.max_tokens else None
        new = [] if token == EOS else [token]
        stream.tokens += new
        stream.done = reason is not None
        message = Tokens(fence=dispatch.fence, index=index, position=position, token_ids=new, finish_reason=reason)
        stream.unacked.append(message)
        stream.sent_at_s = self.world.now_s
        self.post(message)

    def drop(self, fence: Fence) -> None:
        self.dispatches.pop(fence, None)
        self.ready_at_s.pop(fence, None)
        self.hold_until_s.pop(fence, None)
        self.parked.discard(fence)
        self.first_tokens.pop(fence, None)
        self.stopped.pop(fence, None)
        for key in [key for key in self.streams if key[0] == fence]:
            del self.streams[key]

    def receive(self, message: Any) -> None:
        now_s = self.world.now_s
        match message:
            case Dispatch(fence=fence):
                assert fence not in self.dispatches, "a fence was used twice"
                assert fence.role == self.role
                assert message.root == ROOT
                self.num_dispatches += 1
                self.dispatches[fence] = message
                self.ready_at_s[fence] = now_s + self.world.rng.uniform(0.01, 0.3)
            case FirstTokens(fence=fence, token_ids=token_ids):
                dispatch = self.dispatches.get(fence)
                if dispatch is None or fence in self.first_tokens:
                    return
                assert not dispatch.prefill_here
                assert len(token_ids) == dispatch.n
                assert dispatch.wait_source
                self.first_tokens[fence] = token_ids
                self.continue_parked(fence)
            case Ack(fence=fence, index=index, position=position, final=final):
                stream = self.streams.get((fence, index))
                if stream is None:
                    if final and fence in self.dispatches:
                        self.stopped.setdefault(fence, set()).add(index)
                    return
                stream.unacked = [
                    m for m in stream.unacked if m.finish_reason or m.position + len(m.token_ids) > position
                ]
                if final:
                    stream.unacked, stream.done, stream.released = [], True, True
                    if all(s.released for (f, _), s in self.streams.items() if f == fence) and fence.role == "decode":
                        self.drop(fence)
            case Resend(fence=fence) if fence not in self.dispatches:
                self.post(Failed(fence=fence, code="worker_lost", message="unknown"))
            case Resend(fence=fence, index=index, position=position):
                stream = self.streams.get((fence, index))
                for sent in stream.unacked if stream else []:
                    if sent.position + len(sent.token_ids) > position or sent.finish_reason:
                        self.post(sent)
            case Abort(fence=fence):
                self.drop(fence)
                self.post(Aborted(fence=fence))

    def heartbeat(self) -> None:
        self.post(
            Heartbeat(
                process=self.name,
                epoch=self.epoch,
                step_id=0,
                step_age_s=0.0,
                events_seq=self.events_seq,
                load=Load(num_dispatches=self.num_dispatches),
                counters=Counters(),
            )
        )


LOSSY = (Tokens, Ack, Resend, RoleReport, Abort, Aborted, FirstTokens, Failed)


class World:
    """A virtual clock and a network. Hellos and heartbeats arrive, in order; dispatches arrive in order and once, as over TCP, or
    are lost with their connection; the rest may be lost, doubled and late."""

    def __init__(self, seed: int, *, loss: float, crash_rate: float, fail_rate: float, max_attempts: int = 50) -> None:
        self.rng = random.Random(seed)
        self.now_s = 100.0
        self.loss, self.crash_rate, self.fail_rate = loss, crash_rate, fail_rate
        self.queue: list[tuple[float, int, Any]] = []
        self.order = count()
        self.core = RouterCore(
            Settings(
                "router",
                b"r" * 8,
                max_attempts=max_attempts,
                unavailable_after_s=60.0,
                hold_s=self.rng.choice([0.3, 2.0, 10.0]),
            ),
            random.Random(seed),
        )
        self.terminals: dict[str, list[Any]] = {}
        self.streams: dict[tuple[str, int], list[int]] = {}
        self.finished: dict[tuple[str, int], str] = {}
        self.num_crashes = 0
        self.workers = [FakeWorker(self, f"{role}-{i}", role) for role in ("prefill", "decode") for i in range(2)]
        self.down_until_s: dict[str, float] = {}

    def post(self, deliver: Any, message: Any) -> None:
        lossy = isinstance(message, LOSSY)
        copies = 1
        if isinstance(message, Dispatch) and self.loss:
            copies = 0 if self.rng.random() < self.loss else 1
        elif lossy and self.loss:
            copies = 0 if self.rng.random() < self.loss else 2 if self.rng.random() < self.loss else 1
        for _ in range(copies):
            delay_s = self.rng.uniform(0.001, 0.15) if lossy and self.loss else 0.002
            heapq.heappush(self.queue, (self.now_s + delay_s, next(self.order), deliver))

    def to_router(self, worker: FakeWorker, message: Any) -> None:
        epoch = worker.epoch
        self.post(lambda: self.do(self.core.on_message(worker.name, epoch, message, self.now_s)), message)

    def do(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send():
                    self.send(action)
                case Emit(request_id=request_id, event=event):
                    self.emit(request_id, event)

    def send(self, action: Send) -> None:
        worker = next(w for w in self.workers if w.name == action.process)

        def deliver() -> None:
            if worker.up and worker.epoch == action.epoch:
                worker.receive(action.message)

        self.post(deliver, action.message)

    def emit(self, request_id: str, event: Any) -> None:
        assert request_id not in self.terminals, "an event after the terminal one"
        if isinstance(event, TokensEvent):
            stream = self.streams.setdefault((request_id, event.index), [])
            assert event.position == len(stream), "not the next position"
            assert (request_id, event.index) not in self.finished
            stream += event.token_ids
            if event.finish_reason:
                self.finished[(request_id, event.index)] = event.finish_reason
        else:
            self.terminals[request_id] = [event]

    def advance(self, until: Any, limit_s: float) -> None:
        end_s = self.now_s + limit_s
        while not until() and self.now_s < end_s:
            self.now_s += 0.05
            while self.queue and self.queue[0][0] <= self.now_s:
                heapq.heappop(self.queue)[2]()
            for worker in self.workers:
                if not worker.up:
                    if self.now_s >= self.down_until_s[worker.name]:
                        worker.start()
                    continue
                if self.rng.random() < self.crash_rate:
                    worker.up = False
                    self.num_crashes += 1
                    self.down_until_s[worker.name] = self.now_s + self.rng.uniform(0.2, 5.0)
                    if self.rng.random() < 0.5:  # the connection is seen to close; else only silence tells
                        self.do(self.core.on_closed(worker.name, worker.epoch, self.now_s))
                    continue
                member = self.core.membership.is_member(worker.name, worker.epoch)
                if not member and round(self.now_s * 20) % 20 == 0:
                    worker.hello()
                if round(self.now_s * 20) % 5 == 0:
                    worker.heartbeat()
                worker.step()
            self.do(self.core.tick(self.now_s))

    def assert_clean(self) -> None:
        self.crash_rate = 0.0
        self.loss = 0.0
        self.advance(lambda: False, 12.0)
        core = self.core
        assert len(core.journal) == 0
        assert core.num_waiting == 0
        assert core.num_closing == 0
        assert core.fleet.num_dispatched() == 0
        for worker in self.workers:
            assert not worker.dispatches, f"{worker.name} still holds {list(worker.dispatches)}"


def make_request(world: World, number: int, n: int = 1) -> Request:
    rng = random.Random(number)
    prompt = tuple(rng.randrange(1, 40) for _ in range(rng.choice([1, 3, 60, 150])))
    sampling = Sampling(max_tokens=rng.choice([1, 2, 12, 30]))
    return Request(f"q{number}", prompt, sampling, n, world.now_s + 600.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), loss=st.sampled_from([0.0, 0.1, 0.4]), crash=st.sampled_from([0.0, 0.002, 0.01]))
def test_whatever_is_lost_and_whoever_dies_each_token_arrives_once_and_in_order(
    seed: int, loss: float, crash: float
) -> None:
    world = World(seed, loss=loss, crash_rate=crash, fail_rate=0.05 if loss else 0.0)
    world.advance(lambda: world.core.ready, 5.0)
    requests = [make_request(world, number, n=1 + number % 3) for number in range(8)]
    for request in requests:
        world.do(world.core.submit(request, world.now_s))
        world.advance(lambda: False, world.rng.uniform(0.0, 0.4))
    world.advance(lambda: len(world.terminals) == len(requests), 300.0)
    for request in requests:
        (terminal,) = world.terminals[request.request_id]
        assert isinstance(terminal, CompletedEvent), terminal
        for index in range(request.n):
            expected = reference(request.prompt, index, request.sampling.max_tokens)
            assert world.streams.get((request.request_id, index), []) == expected
            assert world.finished[(request.request_id, index)]
    world.assert_clean()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_requests_that_end_in_any_way_leave_nothing_behind(seed: int) -> None:
    world = World(seed, loss=0.2, crash_rate=0.03, fail_rate=0.2, max_attempts=2)
    world.advance(lambda: world.core.ready, 5.0)
    requests = [make_request(world, number, n=1 + number % 2) for number in range(8)]
    for number, request in enumerate(requests):
        if number % 4 == 3:
            request = Request(request.request_id, request.prompt, request.sampling, request.n, world.now_s + 0.3)
        world.do(world.core.submit(request, world.now_s))
        world.advance(lambda: False, world.rng.uniform(0.0, 0.4))
        if number % 4 == 2:
            world.do(world.core.cancel(request.request_id, world.now_s))
        if number % 4 == 1:
            stream = world.streams.get((request.request_id, 0), [])
            world.do(world.core.stop_sample(request.request_id, 0, min(1, len(stream)), world.now_s))
    world.advance(lambda: len(world.terminals) == len(requests), 300.0)
    for request in requests:
        (terminal,) = world.terminals[request.request_id]
        assert isinstance(terminal, CompletedEvent | FailedEvent)
        for index in range(request.n):
            expected = reference(request.prompt, index, request.sampling.max_tokens)
            stream = world.streams.get((request.request_id, index), [])
            assert stream == expected[: len(stream)]
    world.assert_clean()


def test_the_world_does_crash_workers() -> None:
    world = World(7, loss=0.4, crash_rate=0.01, fail_rate=0.0)
    world.advance(lambda: world.num_crashes >= 3, 300.0)
    assert world.num_crashes >= 3
