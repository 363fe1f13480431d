"""Answers that go on at another router, and requests that are asked twice, over real sockets: two routers, fake workers of one
model at each, the project's own client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import tandem_pb2
from protos.control import Abort, Dispatch
from protos.metadata import TENANT
from tandem.client import AsyncClient, Client
from tandem.errors import Cancelled, Draining, InvalidRequest, RouterLost
from tests.router.fake_cluster import LONG, FakeWorker, Router, reference, wait_for

NUM_TOKENS = 120


class Two:
    """Two routers that share a secret. Each has a prefill and a decode worker, whose tokens are the same."""

    def __init__(self, folder: Path, step_s: float) -> None:
        self.routers = [Router(drain_s=0.1, run_dir=str(folder)) for _ in range(2)]
        self.workers: list[FakeWorker] = []
        for router in self.routers:
            router.add("prefill-0", "prefill")
            self.workers.append(router.add("decode-0", "decode", step_s=step_s))

    @property
    def target(self) -> str:
        return ",".join(f"127.0.0.1:{router.server.grpc_port}" for router in self.routers)

    def close(self) -> None:
        for router in self.routers:
            router.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    running = Two(tmp_path, step_s=0.03)
    yield running
    running.close()


def sampling(**values: Any) -> tandem_pb2.SamplingParams:
    return tandem_pb2.SamplingParams(max_tokens=NUM_TOKENS, **values)


class Shown:
    """What a client was shown of one sample after the other."""

    def __init__(self) -> None:
        self.text: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.num_accepted = 0
        self.completed: tandem_pb2.Completed | None = None

    def take(self, event: tandem_pb2.GenerateResponse) -> None:
        assert self.completed is None, "something came after the end"
        match event.WhichOneof("event"):
            case "accepted":
                self.num_accepted += 1
            case "chunk":
                tokens = self.tokens.setdefault(event.chunk.index, [])
                assert event.chunk.position == len(tokens)
                tokens.extend(event.chunk.token_ids)
                self.text[event.chunk.index] = self.text.get(event.chunk.index, "") + event.chunk.text
            case "completed":
                self.completed = event.completed


def test_an_answer_goes_on_at_the_other_router_with_the_same_text(two: Two) -> None:
    shown = Shown()
    with Client(two.target) as client:
        stream = client.generate(LONG, sampling(n=2))
        for event in stream:
            shown.take(event)
            if len(shown.tokens.get(0, ())) >= 10 and stream.num_resumes == 0:
                two.routers[client._preferred].stop.set()
    assert stream.num_resumes == 1
    assert shown.num_accepted == 1
    assert shown.text == {index: reference(LONG, NUM_TOKENS, index) for index in range(2)}
    assert shown.completed is not None
    assert (shown.completed.num_generated_tokens, shown.completed.resume_no) == (2 * NUM_TOKENS, 1)
    assert shown.completed.exact


def test_what_the_first_router_showed_is_not_computed_again(two: Two) -> None:
    with Client(two.target) as client:
        stream = client.generate(LONG, sampling())
        shown = Shown()
        for event in stream:
            shown.take(event)
            if len(shown.tokens.get(0, ())) >= 20 and stream.num_resumes == 0:
                first = client._preferred
                two.routers[first].stop.set()
        again = two.workers[1 - first].seen(Dispatch)
    assert [dispatch.prefill_here for dispatch in again] == [True]
    assert len(again[0].token_ids) // 4 - again[0].num_prompt_tokens >= 20
    assert again[0].fence.resume_no == 1


def test_a_stop_string_across_the_cut_still_ends_the_answer(two: Two) -> None:
    whole = reference(LONG, NUM_TOKENS)
    stop = whole[30:34]
    assert whole.index(stop) == 30
    shown = Shown()
    with Client(two.target) as client:
        stream = client.generate(LONG, sampling(stop=[stop]))
        for event in stream:
            shown.take(event)
            if len(shown.tokens.get(0, ())) >= 5 and stream.num_resumes == 0:
                two.routers[client._preferred].stop.set()
    assert shown.text == {0: whole[:30]}
    assert stream.num_resumes == 1


def test_asyncio_clients_go_on_too(two: Two) -> None:
    shown = Shown()

    async def ask() -> None:
        async with AsyncClient(two.target) as client:
            stopped = False
            async for event in client.generate(LONG, sampling()):
                shown.take(event)
                if len(shown.tokens.get(0, ())) >= 10 and not stopped:
                    two.routers[client._preferred].stop.set()
                    stopped = True

    asyncio.run(ask())
    assert shown.text == {0: reference(LONG, NUM_TOKENS)}
    assert shown.completed is not None
    assert shown.completed.resume_no == 1


def test_a_client_that_resumes_at_the_same_router_ends_its_first_call(two: Two) -> None:
    """The router may not have noticed yet that the first connection is gone."""
    router = two.routers[0]
    request = tandem_pb2.GenerateRequest(prompt=LONG, sampling=sampling())
    first = router.stub.Generate(request, timeout=20)
    ticket = next(first).accepted.ticket
    chunk = next(first).chunk
    request.resume.ticket = ticket
    request.resume.samples.add(token_ids=chunk.token_ids)
    rest = [event.chunk.text for event in router.stub.Generate(request, timeout=20) if event.HasField("chunk")]
    assert chunk.text + "".join(rest) == reference(LONG, NUM_TOKENS)
    with pytest.raises(grpc.RpcError) as caught:
        list(first)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    wait_for(lambda: len(router.server.answers) == 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda request: request.resume.samples.add(), "2 samples, the request has 1"),
        (lambda request: setattr(request, "prompt", LONG + "!"), "another request"),
        (lambda request: setattr(request.sampling, "temperature", 0.5), "another request"),
        (lambda request: setattr(request.sampling, "seed", 7), "another request"),
        (lambda request: setattr(request.resume, "ticket", request.resume.ticket[:-1] + b"x"), "not of this cluster"),
        (lambda request: setattr(request.resume, "ticket", b"x" * 2000), "2000 bytes, the limit is 1024"),
        (lambda request: setattr(request.resume.samples[0], "finish_reason", "tired"), "'tired'"),
        (lambda request: request.resume.samples[0].token_ids.append(300), "300, the vocabulary has 300"),
        (lambda request: request.resume.samples[0].token_ids.extend([97] * NUM_TOKENS), f"max_tokens is {NUM_TOKENS}"),
    ],
)
def test_a_ticket_opens_its_own_request_alone(
    two: Two, change: Callable[[tandem_pb2.GenerateRequest], Any], words: str
) -> None:
    router = two.routers[0]
    request = tandem_pb2.GenerateRequest(prompt=LONG, sampling=sampling())
    call = router.stub.Generate(request, timeout=20)
    request.resume.ticket = next(call).accepted.ticket
    call.cancel()
    request.resume.samples.add(token_ids=[97])
    change(request)
    with pytest.raises(grpc.RpcError) as caught:
        list(router.stub.Generate(request, timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.details()


def test_a_ticket_is_of_one_tenant(two: Two) -> None:
    router = two.routers[0]
    request = tandem_pb2.GenerateRequest(prompt=LONG, sampling=sampling())
    call = router.stub.Generate(request, timeout=20, metadata=((TENANT, "a"),))
    request.resume.ticket = next(call).accepted.ticket
    call.cancel()
    request.resume.samples.add()
    with pytest.raises(grpc.RpcError) as caught:
        list(router.stub.Generate(request, timeout=20, metadata=((TENANT, "b"),)))
    assert "another tenant" in caught.value.details()


def test_a_router_with_another_secret_does_not_read_the_ticket(two: Two, tmp_path: Path) -> None:
    other = Router(run_dir=str(tmp_path / "elsewhere"))
    other.add("decode-0", "decode")
    try:
        request = tandem_pb2.GenerateRequest(prompt=LONG, sampling=sampling())
        call = two.routers[0].stub.Generate(request, timeout=20)
        request.resume.ticket = next(call).accepted.ticket
        call.cancel()
        request.resume.samples.add()
        with pytest.raises(grpc.RpcError) as caught:
            list(other.stub.Generate(request, timeout=20))
        assert "not of this cluster" in caught.value.details()
    finally:
        other.close()


def test_the_same_request_with_the_same_key_is_computed_once(two: Two) -> None:
    target = two.target.split(",", maxsplit=1)[0]
    num_before = len(two.workers[0].seen(Dispatch))
    with Client(target) as client:
        first = iter(client.generate(LONG, sampling(), idempotency_key="k"))
        one, other, late = Shown(), Shown(), Shown()
        one.take(next(first))
        one.take(next(first))
        for event in client.generate(LONG, sampling(), idempotency_key="k"):
            other.take(event)
        for event in first:
            one.take(event)
        for event in client.generate(LONG, sampling(), idempotency_key="k"):
            late.take(event)
        assert one.text == other.text == late.text == {0: reference(LONG, NUM_TOKENS)}
        assert len({shown.completed.request_id for shown in (one, other, late) if shown.completed}) == 1
        assert len(two.workers[0].seen(Dispatch)) == num_before + 1
        with pytest.raises(InvalidRequest, match="'k' was used for another request"):
            list(client.generate(LONG + "?", sampling(), idempotency_key="k"))


def test_one_reader_of_two_may_leave_and_the_last_one_ends_the_request(two: Two) -> None:
    worker = two.workers[0]
    with Client(two.target.split(",", maxsplit=1)[0]) as client:
        endless = tandem_pb2.SamplingParams(max_tokens=10_000)
        streams = [client.generate(LONG, endless, idempotency_key="k") for _ in range(2)]
        readers = [iter(stream) for stream in streams]
        for reader in readers:
            next(reader)
            next(reader)
        num_aborts = len(worker.seen(Abort))
        streams[0].cancel()
        for _ in range(5):
            next(readers[1])
        assert len(worker.seen(Abort)) == num_aborts
        streams[1].cancel()
        wait_for(lambda: len(worker.seen(Abort)) > num_aborts)
        # What was broken off is not remembered: asked again it begins anew.
        shown = Shown()
        for event in client.generate(LONG, sampling(), idempotency_key="k"):
            shown.take(event)
        assert shown.text == {0: reference(LONG, NUM_TOKENS)}


def test_without_another_router_a_client_waits_and_then_says_so(two: Two) -> None:
    router = two.routers[0]
    with Client(two.target.split(",", maxsplit=1)[0], patience_s=0.5) as client:
        stream = client.generate(LONG, sampling())
        reader = iter(stream)
        next(reader)
        router.stop.set()
        with pytest.raises((RouterLost, Draining)):
            list(reader)


def test_a_cluster_that_never_answered_is_not_waited_for(two: Two) -> None:
    nobody = "127.0.0.1:9"
    with (
        Client(f"{nobody},{nobody}", patience_s=1000.0) as client,
        pytest.raises(RouterLost, match="no router answers"),
    ):
        list(client.generate(LONG, sampling()))
    with Client(f"{nobody},{two.target}") as client:
        for _ in range(4):  # whichever it begins with
            client._preferred = 0
            assert client.cluster().router == "router"


def test_cancel_ends_a_call_that_is_between_two_routers(two: Two) -> None:
    with Client(two.target.split(",", maxsplit=1)[0], patience_s=1000.0) as client:
        stream = client.generate(LONG, sampling())
        reader = iter(stream)
        next(reader)
        two.routers[0].stop.set()
        two.routers[0].thread.join(20)
        threading.Timer(0.3, stream.cancel).start()
        with pytest.raises((Cancelled, RouterLost, Draining)):
            list(reader)
