"""A real router with fake workers before it: the control protocol on a DEALER, a fake model, a real gRPC client."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import msgspec
import zmq

from kvpool.keys import root_key, tokens_from_bytes
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
    FetchedFrom,
    FirstTokens,
    Heartbeat,
    Hello,
    Link,
    Load,
    Owned,
    Resend,
    Role,
    RoleReport,
    RoutingGroup,
    Tokens,
    Welcome,
)
from protos.kv_events import BlockStored, EventBatch
from router.server import RouterServer, run_server
from tandem.config import load_config
from tandem.tokenizer.chat_template import Message
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
    bos_token_id = None
    eos_token_ids = frozenset({EOS})
    chat_template = "<tool_call>"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    encode_prompt = encode

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256

    def render_chat(self, messages: list[Message], tools_json: str = "") -> str:
        tools = f"tools: {tools_json}\n" if tools_json else ""
        return tools + "".join(f"{message.role}: {message.content}\n" for message in messages)


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
        self.load, self.counters = Load(), Counters()
        """What its heartbeats say, but for `num_dispatches`."""
        self.links: list[Link] = []
        self.fetched: list[FetchedFrom] = []
        """What its reports say that it fetched, in blocks of the group's size."""
        self.received: list[Any] = []
        self.dispatches: dict[Fence, Dispatch] = {}
        self.streams: dict[tuple[Fence, int], Stream] = {}
        self.num_dispatches = 0
        self.load, self.links = Load(), list[Link]()
        """What its heartbeats say beside the dispatches."""
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
                load = msgspec.structs.replace(self.load, num_dispatches=self.num_dispatches)
                seq = len(self.batches) - 1
                self.post(Heartbeat(self.name, self.epoch, 0, 0.0, seq, load, self.counters, self.links))
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
        num_fetched = min(num_tokens, GROUP.block_size * sum(item.num_blocks for item in self.fetched))
        fetch_s = 0.002 if num_fetched else 0.0
        self.post(
            RoleReport(dispatch.fence, 0, num_fetched, num_tokens - num_fetched, self.fetched, 0.0, fetch_s, 0.001)
        )

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
        ports = {"grpc_port": 0, "control_port": 0, "http_port": 0, "admin_port": 0}
        router = ports | {"heartbeat_s": 0.05, "liveness_s": 1.0}
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
            run_server(self.server, self.stop)
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
