"""The router's shell over real sockets: a fake worker on a DEALER, a real gRPC client."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
import zmq
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvpool.keys import prompt_keys, root_key, tokens_from_bytes
from protos import control, kv_events, tandem_pb2, tandem_pb2_grpc
from protos.control import (
    Abort,
    Aborted,
    Ack,
    Audit,
    Capacity,
    Counters,
    Dispatch,
    Endpoints,
    Fence,
    FirstTokens,
    Heartbeat,
    Hello,
    Load,
    Owned,
    Refused,
    Resend,
    Role,
    RoleReport,
    RoutingGroup,
    Tokens,
    Welcome,
)
from protos.kv_events import BlockStored, EventBatch
from router.control_plane import parse_identity
from router.server import RouterServer
from tandem.config import Config, load_config
from tandem.errors import ConfigError
from tandem.zmq_io import identity

EOS = 256
VOCAB = 300
GROUP = RoutingGroup(model_fingerprint=b"f" * 16, kv_format="v1", numerics_class=b"n" * 16, block_size=4)
ROOT = root_key(model_fingerprint=b"f" * 16, kv_format="v1", numerics_class=b"n" * 16)
LONG = "the quick brown fox jumps over the lazy dog " * 8


class ByteTokenizer:
    """A token is a byte; 256 ends the stream."""

    vocab_size = VOCAB
    max_token_bytes = 1
    space_prefix = False
    eos_token_ids = frozenset({EOS})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    encode_prompt = encode

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def render_chat(self, messages: list[tuple[str, str]]) -> str:
        return "".join(f"{role}: {content}\n" for role, content in messages)


def next_token(tokens: list[int], index: int) -> int:
    return 97 + (sum(tokens[-5:]) + 7 * len(tokens) + index) % 26


def reference(prompt: str, num_tokens: int, index: int = 0) -> str:
    tokens = list(prompt.encode())
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, index))
    return bytes(tokens[len(prompt.encode()) :]).decode()


@dataclass
class Stream:
    tokens: list[int]
    num_prompt: int
    draws: bool = True
    sent: list[Tokens] = field(default_factory=list)


class FakeWorker:
    """A worker's side of the control protocol on a thread of its own, with a fake model. `step_s` is a token's time; `remembers`
    are keys of which a replay tells from the first."""

    def __init__(
        self,
        port: int,
        name: str,
        role: Role,
        *,
        step_s: float = 0.0,
        tamper: Any = None,
        remembers: tuple[bytes, ...] = (),
    ) -> None:
        self.name, self.role, self.step_s = name, role, step_s
        self.epoch = name.encode().ljust(8, b"_")[:8]
        self.tamper: Callable[[Tokens], list[Tokens]] = tamper or (lambda message: [message])
        self.received: list[Any] = []
        self.dispatches: dict[Fence, Dispatch] = {}
        self.streams: dict[tuple[Fence, int], Stream] = {}
        self.num_dispatches = 0
        self._port = port
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._events = self._context.socket(zmq.PUB)
        self._replay = self._context.socket(zmq.ROUTER)
        self._endpoints = Endpoints(
            fetch="",
            events=f"tcp://127.0.0.1:{self._events.bind_to_random_port('tcp://127.0.0.1')}",
            replay=f"tcp://127.0.0.1:{self._replay.bind_to_random_port('tcp://127.0.0.1')}",
        )
        self.batches: list[bytes] = []
        if remembers:
            self.remember(*remembers)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """Gone without a word."""
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def seen(self, kind: type) -> list[Any]:
        return [message for message in list(self.received) if isinstance(message, kind)]

    def remember(self, *keys: bytes) -> None:
        """Makes a batch of events that only a replay shows."""
        self.batches.append(
            kv_events.encode_batch(EventBatch(0.0, [BlockStored(list(keys), None, [], 4)], epoch=self.epoch))
        )

    def publish(self, *keys: bytes) -> None:
        """Makes a batch of events and publishes it (not for use while the thread publishes)."""
        self.remember(*keys)
        seq = len(self.batches) - 1
        self._events.send_multipart([kv_events.TOPIC, kv_events.encode_seq(seq), self.batches[-1]])

    def _run(self) -> None:
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.IDENTITY, identity(self.name, self.epoch))
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"tcp://127.0.0.1:{self._port}")
        self._dealer = dealer
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._replay, zmq.POLLIN)
        self._hello()
        heartbeat_at_s = step_at_s = 0.0
        while not self._stop.is_set():
            for ready, _ in poller.poll(1):
                if ready is dealer:
                    while dealer.poll(0):
                        self._receive(control.decode_from_router(dealer.recv()))
                else:
                    asker, _, seq = self._replay.recv_multipart()
                    for number in range(kv_events.decode_seq(seq), len(self.batches)):
                        frame = kv_events.encode_seq(number)
                        self._replay.send_multipart([asker, b"", frame, self.batches[number]])
                    self._replay.send_multipart([asker, b"", kv_events.END_OF_REPLAY, b""])
            if time.monotonic() >= heartbeat_at_s and self.seen(Welcome):
                heartbeat_at_s = time.monotonic() + 0.05
                load = Load(num_dispatches=self.num_dispatches)
                self.post(Heartbeat(self.name, self.epoch, 0, 0.0, len(self.batches) - 1, load, Counters()))
            if time.monotonic() >= step_at_s:
                step_at_s = time.monotonic() + self.step_s
                for (fence, index), stream in list(self.streams.items()):
                    if stream.draws:
                        self._draw(fence, index, stream)
        dealer.close()

    def _hello(self) -> None:
        self.post(
            Hello(
                version=control.PROTOCOL_VERSION,
                process=self.name,
                role=self.role,
                epoch=self.epoch,
                pid=1,
                endpoints=self._endpoints,
                capacity=Capacity(num_blocks=1000, slab_bytes=1000, max_model_len=20_000),
                group=GROUP,
            )
        )

    def post(self, message: Any) -> None:
        self._dealer.send(control.encode(message))

    def _draw(self, fence: Fence, index: int, stream: Stream) -> None:
        dispatch = self.dispatches[fence]
        position = len(stream.tokens) - stream.num_prompt
        token = next_token(stream.tokens, index)
        stream.tokens.append(token)
        last = position + 1 >= dispatch.sampling.max_tokens
        stream.draws = not last and fence.role == "decode"
        message = Tokens(fence, index, position, [token], finish_reason="length" if last else None)
        stream.sent.append(message)
        for changed in self.tamper(message):
            self.post(changed)

    def _begin(self, dispatch: Dispatch) -> None:
        num_tokens = len(dispatch.token_ids) // 4
        self.post(RoleReport(dispatch.fence, 0, 0, num_tokens, [], 0.0, 0.0, 0.001))

    def _receive(self, message: Any) -> None:
        self.received.append(message)
        match message:
            case Dispatch(fence=fence):
                self.num_dispatches += 1
                self.dispatches[fence] = message
                if fence.role == "prefill" or message.prefill_here:
                    self._begin(message)
                    tokens = tokens_from_bytes(message.token_ids)
                    for index in range(message.index, message.index + message.n):
                        self.streams[(fence, index)] = Stream(list(tokens), message.num_prompt_tokens)
            case FirstTokens(fence=fence, token_ids=token_ids) if fence in self.dispatches:
                self._begin(self.dispatches[fence])
                prompt = tokens_from_bytes(self.dispatches[fence].token_ids)
                for index, token in enumerate(token_ids):
                    if token >= 0:
                        self.streams[(fence, index)] = Stream([*prompt, token], len(prompt))
            case Ack(fence=fence, index=index, final=True):
                self.streams.pop((fence, index), None)
            case Resend(fence=fence, index=index, position=position):
                stream = self.streams.get((fence, index))
                for sent in stream.sent if stream else []:
                    if sent.position >= position:
                        self.post(sent)
            case Audit(number=number):
                fences = list(dict.fromkeys(fence for fence, _ in self.streams))
                self.post(Owned(number, len(self.batches) - 1, num_jobs=len(fences), fences=fences))
            case Abort(fence=fence):
                for key in [key for key in self.streams if key[0] == fence]:
                    del self.streams[key]
                self.post(Aborted(fence))


class Router:
    """A RouterServer on a thread, a client's channel, and its fake workers."""

    def __init__(self, drain_s: float = 5.0, **overrides: Any) -> None:
        router = {"grpc_port": 0, "control_port": 0, "metrics_port": 0, "heartbeat_s": 0.05, "liveness_s": 1.0}
        router |= overrides.pop("router", {})
        self._folder = tempfile.TemporaryDirectory()
        values = {"router": router, "model": {"path": "m", "name": "fake"}, "run_dir": self._folder.name, **overrides}
        config = load_config(None, values)
        self.server = RouterServer(config, ByteTokenizer(), drain_s=drain_s)  # type: ignore[arg-type]
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.server.started.wait(10)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.grpc_port}")
        self.stub = tandem_pb2_grpc.TandemStub(self.channel)
        self.workers: list[FakeWorker] = []

    def _run(self) -> None:
        try:
            asyncio.run(self.server.serve(self.stop))
        except BaseException as error:
            self.error = error

    def add(self, name: str, role: Role, **options: Any) -> FakeWorker:
        worker = FakeWorker(self.server.control_port, name, role, **options)
        self.workers.append(worker)
        wait_for(lambda: bool(worker.seen(Welcome)))
        return worker

    def close(self) -> None:
        self.stop.set()
        self.thread.join(20)
        self.channel.close()
        for worker in self.workers:
            worker.kill()
        self._folder.cleanup()
        assert not self.thread.is_alive()
        assert self.error is None

    def ask(self, prompt: str = LONG, timeout_s: float = 20.0, **sampling: Any) -> Any:
        request = tandem_pb2.GenerateRequest(prompt=prompt, sampling=tandem_pb2.SamplingParams(**sampling))
        return self.stub.Generate(request, timeout=timeout_s)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.005)


@pytest.fixture
def make_router() -> Iterator[Callable[..., Router]]:
    """Starts routers, and stops them whatever the test did."""
    running: list[Router] = []

    def make(**options: Any) -> Router:
        running.append(Router(**options))
        return running[-1]

    yield make
    for router in running:
        router.close()


@pytest.fixture
def router(make_router: Callable[..., Router]) -> Router:
    return make_router()


@dataclass
class Result:
    accepted: tandem_pb2.Accepted
    chunks: list[tandem_pb2.Chunk]
    completed: tandem_pb2.Completed

    def text(self, index: int = 0) -> str:
        return "".join(chunk.text for chunk in self.chunks if chunk.index == index)

    def token_ids(self, index: int = 0) -> list[int]:
        return [token for chunk in self.chunks if chunk.index == index for token in chunk.token_ids]


def collect(call: Any) -> Result:
    """Reads a whole answer and checks its shape: Accepted, chunks in order, one Completed at the end."""
    events = list(call)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "completed"
    assert set(kinds[1:-1]) <= {"chunk"}
    result = Result(events[0].accepted, [event.chunk for event in events[1:-1]], events[-1].completed)
    positions: dict[int, int] = {}
    for chunk in result.chunks:
        assert chunk.position == positions.get(chunk.index, 0)
        positions[chunk.index] = chunk.position + len(chunk.token_ids)
    return result


def test_an_answer_streams_through_hand_over_and_says_who_did_what(router: Router) -> None:
    prefill, decode = router.add("prefill-0", "prefill"), router.add("decode-0", "decode")
    result = collect(router.ask(max_tokens=40))
    assert result.text() == reference(LONG, 40)
    assert result.chunks[-1].finish_reason == "length"
    assert result.accepted.num_prompt_tokens == len(LONG)
    assert result.completed.num_generated_tokens == 40
    assert [(run.role, run.process) for run in result.completed.runs] == [
        ("prefill", "prefill-0"),
        ("decode", "decode-0"),
    ]
    assert result.completed.runs[0].predicted_ttft_s > 0
    assert 0 < result.completed.ttft_s <= result.completed.total_s
    wait_for(lambda: len(prefill.seen(Abort)) == 1)
    assert prefill.seen(Abort)[0].reason == "handed over"
    (dispatch,) = decode.seen(Dispatch)
    assert dispatch.root == ROOT
    assert dispatch.sampling.seed == result.accepted.seed
    assert EOS in dispatch.sampling.stop_token_ids


def test_frames_are_single_messagepack_maps_with_a_tag(router: Router) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, identity("x", b"1" * 8))
    dealer.connect(f"tcp://127.0.0.1:{router.server.control_port}")
    dealer.send(b"\xc1 not MessagePack")
    hello = Hello(99, "x", "decode", b"1" * 8, 1, Endpoints("", "", ""), Capacity(), GROUP)
    dealer.send(control.encode(hello))
    assert dealer.poll(5000)
    frames = dealer.recv_multipart()
    assert len(frames) == 1
    assert msgpack.unpackb(frames[0])["t"] == "refused"
    assert isinstance(control.decode_from_router(frames[0]), Refused)
    context.destroy(linger=0)


def test_a_worker_that_serves_another_model_is_refused(router: Router) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, identity("x", b"1" * 8))
    dealer.connect(f"tcp://127.0.0.1:{router.server.control_port}")
    hello = Hello(
        control.PROTOCOL_VERSION, "x", "decode", b"1" * 8, 1, Endpoints("", "", ""), Capacity(), GROUP, "other"
    )
    dealer.send(control.encode(hello))
    assert dealer.poll(5000)
    answer = control.decode_from_router(dealer.recv())
    assert isinstance(answer, Refused)
    assert "'other'" in answer.reason
    assert "'fake'" in answer.reason
    context.destroy(linger=0)


def test_samples_are_streamed_side_by_side(router: Router) -> None:
    router.add("prefill-0", "prefill")
    router.add("decode-0", "decode")
    result = collect(router.ask(max_tokens=20, n=3))
    assert [result.text(index) for index in range(3)] == [reference(LONG, 20, index) for index in range(3)]


def test_a_stop_string_across_tokens_ends_the_stream_before_it(router: Router) -> None:
    decode = router.add("decode-0", "decode", step_s=0.005)
    whole = reference(LONG, 400)
    stop = whole[30:33]
    result = collect(router.ask(max_tokens=400, stop=[stop]))
    assert result.text() == whole[: whole.index(stop)]
    assert result.chunks[-1].finish_reason == "stop"
    assert len(result.token_ids()) == whole.index(stop) + 3
    assert result.completed.num_generated_tokens == whole.index(stop) + 3
    wait_for(lambda: len(decode.seen(Abort)) == 1)


def test_a_stop_string_ends_one_sample_while_the_other_goes_on(router: Router) -> None:
    decode = router.add("decode-0", "decode", step_s=0.002)
    first, second = reference(LONG, 60, 0), reference(LONG, 60, 1)
    stop = next(first[i : i + 4] for i in range(10, 50) if first[i : i + 4] not in second)
    result = collect(router.ask(max_tokens=60, n=2, stop=[stop]))
    assert result.text(0) == first[: first.index(stop)]
    assert result.text(1) == second
    assert any(ack.final and ack.index == 0 and ack.position < 60 for ack in decode.seen(Ack))


def test_log_probabilities_come_with_their_tokens(router: Router) -> None:
    from protos.control import TokenLogprobs

    def tamper(message: Tokens) -> list[Tokens]:
        logprobs = [TokenLogprobs(-0.5, [(97, -0.5), (98, -1.5)]) for _ in message.token_ids]
        return [
            Tokens(message.fence, message.index, message.position, message.token_ids, logprobs, message.finish_reason)
        ]

    router.add("decode-0", "decode", tamper=tamper)
    result = collect(router.ask(max_tokens=3, num_logprobs=2))
    logprobs = [item for chunk in result.chunks for item in chunk.logprobs]
    assert [item.token for item in logprobs] == list(reference(LONG, 3))
    assert [top.token for top in logprobs[0].top] == ["a", "b"]


def test_lost_and_doubled_frames_change_nothing(router: Router) -> None:
    def tamper(message: Tokens) -> list[Tokens]:
        return [] if message.position % 7 == 3 else [message, message]

    decode = router.add("decode-0", "decode", tamper=tamper)
    result = collect(router.ask(max_tokens=50))
    assert result.text() == reference(LONG, 50)
    assert decode.seen(Resend)


def test_a_lost_last_frame_is_asked_for_again(router: Router) -> None:
    decode = router.add("decode-0", "decode", tamper=lambda m: [] if m.finish_reason else [m])
    assert collect(router.ask(max_tokens=5)).text() == reference(LONG, 5)
    assert [resend.position for resend in decode.seen(Resend)] == [4]


def test_a_killed_decode_worker_is_noticed_at_once_and_changes_no_character(make_router: Callable[..., Router]) -> None:
    router = make_router(router={"liveness_s": 30.0})
    router.add("prefill-0", "prefill")
    workers = {name: router.add(name, "decode", step_s=0.01) for name in ("decode-0", "decode-1")}
    call = router.ask(max_tokens=60)
    events = [next(call) for _ in range(10)]
    victim = next(name for name, worker in workers.items() if worker.dispatches)
    workers[victim].kill()
    router.workers.remove(workers[victim])
    events += list(call)
    assert "".join(event.chunk.text for event in events) == reference(LONG, 60)
    (survivor,) = (worker for name, worker in workers.items() if name != victim)
    (dispatch,) = survivor.seen(Dispatch)
    assert len(dispatch.token_ids) // 4 > dispatch.num_prompt_tokens, "goes on from the accepted tokens"
    assert [event.WhichOneof("event") for event in events].count("completed") == 1


def test_fifty_answers_at_once_are_all_right(router: Router) -> None:
    for i in range(2):
        router.add(f"prefill-{i}", "prefill")
        router.add(f"decode-{i}", "decode")
    prompts = [f"{number}: {LONG}" for number in range(50)]
    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(lambda prompt: collect(router.ask(prompt, max_tokens=30)), prompts))
    assert [result.text() for result in results] == [reference(prompt, 30) for prompt in prompts]
    wait_for(lambda: router.stub.Audit(tandem_pb2.AuditRequest()).ok)
    status = router.stub.GetCluster(tandem_pb2.GetClusterRequest())
    assert status.num_requests_finished == 50
    assert status.num_active_requests == 0
    assert {process.name for process in status.processes} == {"prefill-0", "prefill-1", "decode-0", "decode-1"}


def test_a_client_that_leaves_frees_the_worker(router: Router) -> None:
    decode = router.add("decode-0", "decode", step_s=0.01)
    call = router.ask(max_tokens=1000)
    next(call)
    next(call)
    call.cancel()
    wait_for(lambda: len(decode.seen(Abort)) == 1)
    wait_for(lambda: not router.server.answers)
    wait_for(lambda: router.stub.GetCluster(tandem_pb2.GetClusterRequest()).num_requests_cancelled == 1)


def test_a_clients_deadline_frees_the_worker(router: Router) -> None:
    decode = router.add("decode-0", "decode", step_s=0.01)
    with pytest.raises(grpc.RpcError) as caught:
        list(router.ask(max_tokens=1000, timeout_s=0.3))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: len(decode.seen(Abort)) == 1)
    assert 0 < decode.seen(Dispatch)[0].deadline_s <= 0.31  # gRPC rounds up what it tells the server


def test_the_servers_deadline_is_said_by_the_server(make_router: Callable[..., Router]) -> None:
    router = make_router(limits={"default_deadline_s": 0.3})
    router.add("decode-0", "decode", step_s=0.01)
    with pytest.raises(grpc.RpcError) as caught:
        list(router.ask(max_tokens=1000))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "0.30 s" in caught.value.details()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x" * 2000}, "2000 bytes, the limit is 1000"),
        ({"token_ids": tandem_pb2.TokenIds(ids=[1, VOCAB])}, f"token id {VOCAB}, the vocabulary has {VOCAB}"),
        ({"model": "other"}, "model 'other' is not served here, 'fake' is"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 40_000}, "max_tokens is 40000, must be in [1, 32768]"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0, must be in (0, 1]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"presence_penalty": 3.0}, "presence_penalty is 3"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"n": 0}, "n is 0, must be in [1, 16]"),
        ({"n": 17}, "n is 17, must be in [1, 16]"),
        ({"stop": [""]}, "stop string 0 has 0 bytes, must be in [1, 256]"),
        ({"stop": ["é" * 129]}, "stop string 0 has 258 bytes"),
        ({"stop": ["x"] * 17}, "17 stop strings, the limit is 16"),
        ({"num_logprobs": 21}, "num_logprobs is 21, the limit is 20"),
        ({"seed": 2**63}, "must be below 2**63"),
        ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias has token id {VOCAB}"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1 is nan"),
        ({"stop_token_ids": [VOCAB]}, f"stop_token_ids has token id {VOCAB}"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4, must be at most max_tokens, 3"),
    ],
)
def test_invalid_arguments_are_named_with_their_limit(limited: Router, fields: dict[str, Any], words: str) -> None:
    top = {name: fields.pop(name) for name in ("prompt", "token_ids", "model") if name in fields}
    request = tandem_pb2.GenerateRequest(**({} if "token_ids" in top else {"prompt": "hello"}) | top)
    request.sampling.CopyFrom(tandem_pb2.SamplingParams(**fields))
    with pytest.raises(grpc.RpcError) as caught:
        list(limited.stub.Generate(request, timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.details()


@pytest.fixture(scope="module")
def limited() -> Iterator[Router]:
    running = Router(limits={"max_prompt_bytes": 1000})
    yield running
    running.close()


def test_a_prompt_past_the_context_is_refused_and_an_answer_past_it_is_cut(router: Router) -> None:
    decode = router.add("decode-0", "decode")
    with pytest.raises(grpc.RpcError) as caught:
        list(router.ask("x" * 20_001))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "20001" in caught.value.details()
    assert "20000" in caught.value.details()
    assert len(collect(router.ask("x" * 19_990, max_tokens=100)).token_ids()) == 10
    assert decode.seen(Dispatch)[0].sampling.max_tokens == 10


def test_a_chat_is_rendered_before_it_is_tokenised(router: Router) -> None:
    decode = router.add("decode-0", "decode")
    chat = tandem_pb2.Chat(messages=[tandem_pb2.ChatMessage(role="user", content="hi")])
    request = tandem_pb2.GenerateRequest(chat=chat, sampling=tandem_pb2.SamplingParams(max_tokens=2))
    collect(router.stub.Generate(request, timeout=10))
    assert bytes(tokens_from_bytes(decode.seen(Dispatch)[0].token_ids)) == b"user: hi\n"


def test_too_many_requests_are_told_when_to_come_back(make_router: Callable[..., Router]) -> None:
    router = make_router(limits={"max_active_requests": 1})
    router.add("decode-0", "decode", step_s=0.01)
    call = router.ask(max_tokens=1000)
    next(call)
    refused = router.ask(max_tokens=10)
    with pytest.raises(grpc.RpcError) as caught:
        list(refused)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the limit is 1" in caught.value.details()
    assert ("retry-after-s", "1") in [(key, value) for key, value in refused.trailing_metadata()]
    call.cancel()


def test_a_client_that_reads_late_gets_all_in_few_frames(router: Router) -> None:
    decode = router.add("decode-0", "decode")
    call = router.ask(max_tokens=4_000, timeout_s=60)
    next(call)
    wait_for(lambda: any(ack.final for ack in decode.seen(Ack)), 60.0)
    chunks = [event.chunk for event in call if event.WhichOneof("event") == "chunk"]
    assert "".join(chunk.text for chunk in chunks) == reference(LONG, 4_000)
    assert len(chunks) < 4_000


def test_health_says_serving_once_a_decode_worker_is_there(router: Router) -> None:
    stub = health_pb2_grpc.HealthStub(router.channel)

    def status() -> Any:
        return stub.Check(health_pb2.HealthCheckRequest(service="tandem.v1.Tandem")).status

    router.add("prefill-0", "prefill")
    assert status() == health_pb2.HealthCheckResponse.NOT_SERVING
    decode = router.add("decode-0", "decode")
    wait_for(lambda: status() == health_pb2.HealthCheckResponse.SERVING)
    decode.kill()
    router.workers.remove(decode)
    wait_for(lambda: status() == health_pb2.HealthCheckResponse.NOT_SERVING)


def test_events_of_before_and_after_the_hello_make_sources(router: Router) -> None:
    keys = prompt_keys(ROOT, list(LONG.encode()), 4).full
    holder = FakeWorker(router.server.control_port, "decode-0", "decode")
    router.workers.append(holder)
    holder.remember(*keys[:20])

    def indexed() -> int:
        processes = router.stub.GetCluster(tandem_pb2.GetClusterRequest()).processes
        return sum(process.indexed_blocks for process in processes)

    wait_for(lambda: indexed() == 20)
    holder.publish(*keys[20:40])
    wait_for(lambda: indexed() == 40)
    holder.remember(*keys[40:60])  # never published: the heartbeat's number tells
    wait_for(lambda: indexed() == 60)
    prefill = router.add("prefill-0", "prefill")
    collect(router.ask(max_tokens=2))
    for dispatch in prefill.seen(Dispatch):
        assert [(source.process, source.tier) for source in dispatch.sources] == [("decode-0", "DEVICE")]


def test_a_defect_in_the_core_ends_neither_a_subscription_nor_a_replay(
    router: Router, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = router.server.core
    calls: list[str] = []

    def failing(name: str) -> Callable[..., Any]:
        def fail(*args: Any) -> None:
            calls.append(name)
            raise AssertionError("a defect")

        return fail

    for name in ("on_events", "on_replayed", "on_closed"):
        monkeypatch.setattr(core, name, failing(name))
    ended: list[bool] = []
    monkeypatch.setattr(core.index, "on_replay_end", lambda process, epoch, complete: ended.append(complete))
    holder = FakeWorker(router.server.control_port, "decode-0", "decode", remembers=(b"k" * 16,))
    router.workers.append(holder)
    wait_for(lambda: True in ended)
    wait_for(lambda: bool(holder.publish(b"l" * 16)) or calls.count("on_events") >= 2)
    assert "on_replayed" in calls
    holder.kill()
    router.workers.remove(holder)
    wait_for(lambda: "on_closed" in calls)

    def logged() -> set[str]:
        traces = [record for record in list(caplog.records) if record.exc_info and "was not handled" in record.message]
        return {record.message.split(":")[0] for record in traces}

    wait_for(lambda: logged() == {"_on_events", "_on_replayed", "_on_closed"})
    monkeypatch.undo()


def test_ports_in_use_are_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # even from somebody who would share it
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name in ("grpc_port", "control_port", "metrics_port"):
            ports = {"grpc_port": 0, "control_port": 0, "metrics_port": 0, name: port}
            config: Config = load_config(None, {"router": ports, "model": {"path": "m"}, "run_dir": str(tmp_path)})
            server = RouterServer(config, ByteTokenizer())  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match=f"router.{name}.*{port}"):
                asyncio.run(server.serve(threading.Event()))


def test_a_stopping_router_ends_what_does_not_end_in_time(make_router: Callable[..., Router]) -> None:
    router = make_router(drain_s=0.2)
    decode = router.add("decode-0", "decode", step_s=0.01)
    call = router.ask(max_tokens=10_000)
    next(call)
    router.stop.set()
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "the router is stopping" in caught.value.details()
    wait_for(lambda: bool(decode.seen(Abort)))


def test_metrics_count_requests_and_show_processes(make_router: Callable[..., Router]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    router = make_router(router={"metrics_port": port})
    router.add("decode-0", "decode")
    collect(router.ask(max_tokens=5))

    def page() -> str:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()

    wait_for(lambda: 'tandem_requests_total{outcome="completed"} 1.0' in page())
    wait_for(lambda: 'tandem_process_num_running{process="decode-0",role="decode"}' in page())
    assert "tandem_ttft_seconds_count 1.0" in page()
    assert "tandem_index_entries 0.0" in page()
    assert "tandem_index_rejected 0.0" in page()


def test_a_client_that_never_reads_is_cut_off_and_its_place_is_free(make_router: Callable[..., Router]) -> None:
    router = make_router(limits={"client_patience_s": 0.5, "max_active_requests": 1})
    router.add("decode-0", "decode")
    stuck = router.ask(max_tokens=4_000, n=8, num_logprobs=20, timeout_s=60)
    next(stuck)

    def served() -> bool:
        call = router.ask(max_tokens=3, timeout_s=20)
        try:
            return bool(list(call))
        except grpc.RpcError:
            return call.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED

    assert not served()
    wait_for(served, 30.0)
    stuck.cancel()


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        (b"decode-0@00ab", ("decode-0", b"\x00\xab")),
        (b"decode-0@00AB", None),
        (b"decode-0@00 ab", None),
        (b"@00ab", None),
        (b"decode-0", None),
        (b"decode-0@0", None),
        (b"\xff@00", None),
    ],
)
def test_an_identity_has_one_spelling(frame: bytes, found: tuple[str, bytes] | None) -> None:
    assert parse_identity(frame) == found
