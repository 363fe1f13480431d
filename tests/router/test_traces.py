"""Traces of requests as a collector gets them: what is in them, whose children they are, and that no request waits for them."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from protos import tandem_pb2
from protos.control import FetchedFrom, Sampling
from router import trace_context
from router.journal import Summary
from router.spans import Began
from router.trace_context import TraceContext, TraceHeaders
from router.tracing import Tracing
from tandem.client import Client
from tests.router.collector import Collector, attributes, check_nesting, children, collector
from tests.router.fake_cluster import LONG, Router, collect, wait_for
from tests.system.harness import free_port

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-00"


@pytest.fixture
def otel() -> Iterator[Collector]:
    with collector() as made:
        yield made


def roots(otel: Collector) -> list[Span]:
    return [span for span in otel.spans if span.kind == Span.SPAN_KIND_SERVER]


def test_a_hand_over_is_one_trace_from_router_to_decode(otel: Collector, make_router: Callable[..., Router]) -> None:
    began_ns = time.time_ns()
    router = make_router(tracing={"endpoint": otel.endpoint})
    prefill = router.add("prefill-0", "prefill")
    router.add("decode-0", "decode")
    prefill.fetched = [FetchedFrom("pool-0", "HOST", "shm", 8, 8000), FetchedFrom("pool-0", "DISK", "tcp", 4, 4000)]
    request = tandem_pb2.GenerateRequest(
        prompt="MARKER " + LONG, sampling=tandem_pb2.SamplingParams(max_tokens=5, temperature=0.5, seed=7)
    )
    metadata = (("traceparent", SAMPLED), ("tracestate", "vendor=opaque"))
    result = collect(router.stub.Generate(request, timeout=20.0, metadata=metadata))
    wait_for(lambda: bool(roots(otel)), 60.0)
    spans = otel.spans
    check_nesting(spans)
    (root,) = roots(otel)
    assert (root.name, root.trace_id.hex(), root.parent_span_id.hex()) == ("text_completion fake", TRACE_ID, SPAN_ID)
    assert root.trace_state == "vendor=opaque"
    assert began_ns < root.start_time_unix_nano < root.end_time_unix_nano < time.time_ns()
    found = attributes(root)
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tandem",
        "gen_ai.request.model": "fake",
        "gen_ai.response.id": result.accepted.request_id,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": len("MARKER " + LONG),
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 48,
        "gen_ai.response.finish_reasons": ["length"],
        "tandem.outcome": "completed",
    }
    assert {key: found[key] for key in expected} == expected
    assert 0.0 < float(str(found["gen_ai.response.time_to_first_chunk"])) < 20.0
    parts = children(spans, root)
    assert sorted(span.name for span in parts) == ["decode", "prefill", "queue"]
    by_name = {span.name: span for span in parts}
    assert [span.name for span in children(spans, by_name["prefill"])] == ["queue", "transfer", "compute"]
    transfer = attributes(children(spans, by_name["prefill"])[1])
    assert transfer["tandem.source.tiers"] == ["HOST", "DISK"]
    assert transfer["tandem.source.transports"] == ["shm", "tcp"]
    assert attributes(by_name["prefill"])["tandem.end"] == "handed over"
    assert attributes(by_name["decode"])["tandem.process"] == "decode-0"
    assert children(spans, by_name["decode"])[-1].name == "generate"
    resource = attributes(otel.requests[0].resource_spans[0].resource)  # type: ignore[arg-type]
    assert (resource["service.name"], resource["service.instance.id"]) == ("tandem", "router")
    assert not [body for body in otel.bodies if b"MARKER" in body or b"quick brown" in body]


def test_the_client_hands_its_caller_s_span_on(otel: Collector, make_router: Callable[..., Router]) -> None:
    router = make_router(tracing={"endpoint": otel.endpoint, "sample_ratio": 0.0})
    router.add("decode-0", "decode")
    with Client(f"127.0.0.1:{router.server.grpc_port}") as client:
        list(client.generate([("user", "hello")], tandem_pb2.SamplingParams(max_tokens=2), traceparent=SAMPLED))
        list(client.generate("hello", tandem_pb2.SamplingParams(max_tokens=2)))
    wait_for(lambda: bool(roots(otel)), 60.0)
    (root,) = roots(otel)
    assert (root.name, root.trace_id.hex(), root.parent_span_id.hex()) == ("chat fake", TRACE_ID, SPAN_ID)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_over_http_is_a_child_of_its_caller_s_span(
    otel: Collector, make_router: Callable[..., Router], stream: bool
) -> None:
    port = free_port()
    router = make_router(router={"http_port": port}, tracing={"endpoint": otel.endpoint, "sample_ratio": 0.0})
    router.add("decode-0", "decode")
    wait_for(lambda: router.server.ready, 60.0)
    body = json.dumps({"model": "fake", "prompt": "hello", "max_tokens": 2, "stream": stream}).encode()
    headers = {"Content-Type": "application/json", "traceparent": SAMPLED}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert answer.status == 200
        answer.read()
    wait_for(lambda: bool(roots(otel)), 60.0)
    (root,) = roots(otel)
    assert (root.name, root.trace_id.hex(), root.parent_span_id.hex()) == ("text_completion fake", TRACE_ID, SPAN_ID)


def test_a_failover_shows_both_dispatches_and_why_the_first_ended(
    otel: Collector, make_router: Callable[..., Router]
) -> None:
    router = make_router(tracing={"endpoint": otel.endpoint})
    workers = [router.add(name, "decode", step_s=0.02) for name in ("decode-0", "decode-1")]
    call = router.ask(max_tokens=30)
    for _ in range(5):
        next(call)
    held = next(worker for worker in workers if worker.streams)
    held.kill()
    router.workers.remove(held)
    list(call)
    wait_for(lambda: bool(roots(otel)), 60.0)
    check_nesting(otel.spans)
    (root,) = roots(otel)
    legs = [span for span in children(otel.spans, root) if span.name == "decode"]
    assert [attributes(leg)["tandem.attempt"] for leg in legs] == [0, 1]
    assert [leg.status.code for leg in legs] == [Status.STATUS_CODE_ERROR, Status.STATUS_CODE_UNSET]
    assert attributes(legs[0])["error.type"] == "closed"
    assert attributes(legs[0])["tandem.process"] == held.name
    assert root.status.code == Status.STATUS_CODE_UNSET
    assert legs[0].end_time_unix_nano <= legs[1].start_time_unix_nano


def test_a_caller_that_is_not_sampled_leaves_no_trace_and_one_that_fails_says_why(
    otel: Collector, make_router: Callable[..., Router]
) -> None:
    router = make_router(tracing={"endpoint": otel.endpoint})
    router.add("decode-0", "decode", step_s=0.05)
    request = tandem_pb2.GenerateRequest(prompt="p", sampling=tandem_pb2.SamplingParams(max_tokens=2))
    collect(router.stub.Generate(request, timeout=20.0, metadata=(("traceparent", UNSAMPLED),)))
    call = router.ask(max_tokens=1000)
    next(call)
    call.cancel()
    wait_for(lambda: bool(roots(otel)), 60.0)
    (root,) = roots(otel)
    assert root.parent_span_id == b""
    assert root.status.code == Status.STATUS_CODE_ERROR
    assert attributes(root)["error.type"] == "cancelled"


def test_no_request_waits_for_a_collector_that_hangs_and_what_does_not_fit_is_counted(otel: Collector) -> None:
    otel.hold.clear()
    tracing = Tracing(otel.endpoint, sample_ratio=1.0, router="router", model="m", max_queued=3)
    summary = Summary("q", "completed", "", 1, 1, 1, 0.1, 0.2, (0, 0), (), (), (), accepted_at_s=5.0)

    def end_one() -> None:
        tracing.began("q", Began(5.0, "chat", Sampling(max_tokens=1), 1, None))
        tracing.ended("q", summary, 1)

    end_one()
    assert otel.was_asked.wait(10)
    began_s = time.monotonic()
    for _ in range(10):
        end_one()
    assert time.monotonic() - began_s < 1.0
    assert tracing.counts["dropped"] == 7
    otel.hold.set()
    wait_for(lambda: tracing.counts["exported"] == 4, 60.0)
    tracing.close()
    assert len(roots(otel)) == 4


def test_a_collector_that_is_not_there_costs_the_trace_alone(make_router: Callable[..., Router]) -> None:
    router = make_router(tracing={"endpoint": "http://127.0.0.1:9/v1/traces"})
    router.add("decode-0", "decode")
    assert collect(router.ask(max_tokens=3)).completed.num_generated_tokens == 3


def test_a_ratio_of_nothing_traces_nothing_but_what_comes_sampled(otel: Collector) -> None:
    tracing = Tracing(otel.endpoint, sample_ratio=0.0, router="router", model="m")
    summary = Summary("q", "completed", "", 1, 1, 1, 0.1, 0.2, (0, 0), (), (), (), accepted_at_s=5.0)
    for parent in (None, trace_context.parse(SAMPLED), trace_context.parse(UNSAMPLED)):
        tracing.began("q", Began(5.0, "chat", Sampling(max_tokens=1), 1, parent))
        tracing.ended("q", summary, 1)
    tracing.close()
    assert [span.trace_id.hex() for span in roots(otel)] == [TRACE_ID]


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (SAMPLED, TraceContext(int(TRACE_ID, 16), int(SPAN_ID, 16), True)),
        (UNSAMPLED, TraceContext(int(TRACE_ID, 16), int(SPAN_ID, 16), False)),
        (f"01-{TRACE_ID}-{SPAN_ID}-01-later", TraceContext(int(TRACE_ID, 16), int(SPAN_ID, 16), True)),
        (f"00-{TRACE_ID}-{SPAN_ID}-01-later", None),
        (f"ff-{TRACE_ID}-{SPAN_ID}-01", None),
        (f"00-{'0' * 32}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
        (f"00-{TRACE_ID.upper()}-{SPAN_ID}-01", None),
        ("nonsense", None),
        ("00-" + "a" * 100_000, None),
        ("", None),
    ],
)
def test_a_traceparent_has_one_form(header: str, found: TraceContext | None) -> None:
    assert trace_context.parse(header) == found


def test_http_headers_are_taken_as_metadata_is() -> None:
    seen: list[TraceContext | None] = []

    async def app(scope: object, receive: object, send: object) -> None:
        seen.append(trace_context.current())

    async def ask(*headers: tuple[bytes, bytes]) -> None:
        await TraceHeaders(app)({"type": "http", "headers": list(headers)}, None, None)  # type: ignore[arg-type]

    async def both() -> None:
        await asyncio.gather(ask((b"traceparent", SAMPLED.encode()), (b"tracestate", b"a=b")), ask())

    asyncio.run(both())
    assert seen == [TraceContext(int(TRACE_ID, 16), int(SPAN_ID, 16), True, "a=b"), None]
