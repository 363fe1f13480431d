"""The router's shell over real sockets: a fake worker on a DEALER, a real gRPC client."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
import zmq
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvpool.keys import prompt_keys, tokens_from_bytes
from protos import control, tandem_pb2
from protos.control import (
    Abort,
    Ack,
    Capacity,
    Dispatch,
    Endpoints,
    Hello,
    Refused,
    Resend,
    Tokens,
)
from router.server import RouterServer
from tandem.config import Config, load_config
from tandem.errors import ConfigError
from tandem.zmq_io import identity, parse_identity
from tests.router.fake_cluster import (
    EOS,
    GROUP,
    LONG,
    ROOT,
    VOCAB,
    ByteTokenizer,
    FakeWorker,
    Router,
    collect,
    reference,
    wait_for,
)


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
    status = status_pb2.Status.FromString(dict(refused.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (8, caught.value.details())
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert [item.Unpack(into) for item, into in zip(status.details, (info, retry), strict=True)] == [True, True]
    assert (info.reason, info.domain, retry.retry_delay.seconds) == ("OVERLOADED", "tandem.v1", 1)
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
        for name in ("grpc_port", "control_port", "http_port", "admin_port"):
            ports = {"grpc_port": 0, "control_port": 0, "http_port": 0, "admin_port": 0, name: port}
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
    router = make_router(router={"admin_port": port})
    router.add("decode-0", "decode")
    collect(router.ask(max_tokens=5))

    def page() -> str:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()

    wait_for(lambda: 'tandem_requests_total{class="interactive",outcome="completed"} 1.0' in page())
    wait_for(lambda: 'tandem_process_num_running{process="decode-0",role="decode"}' in page())
    assert 'tandem_ttft_seconds_count{class="interactive"} 1.0' in page()
    assert "tandem_index_entries 0.0" in page()
    assert "tandem_index_rejected_events_total 0.0" in page()


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
