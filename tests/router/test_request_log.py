"""The router's log tells of requests with their id and attempt, and of no text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest

from protos import tandem_pb2
from router.request_log import ended
from tandem.logs import LineFormatter
from tests.router.fake_cluster import Router, collect, wait_for
from tests.router.test_metrics import summary_of

MARKER = "xylophone"


def said(caplog: pytest.LogCaptureFixture, request_id: str) -> list[tuple[str, int | None, str]]:
    return [
        (record.levelname, getattr(record, "attempt", None), record.getMessage())
        for record in list(caplog.records)
        if getattr(record, "request_id", "") == request_id
    ]


def test_a_request_is_told_of_from_dispatch_to_end(
    make_router: Callable[..., Router], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    router = make_router(router={"liveness_s": 30.0})
    workers = [router.add(name, "decode", step_s=0.02) for name in ("decode-0", "decode-1")]
    call = router.ask(f"the {MARKER} " * 30, 60.0, max_tokens=30)
    request_id = next(call).accepted.request_id
    for _ in range(5):
        next(call)
    held = next(worker for worker in workers if worker.streams)
    (other,) = [worker for worker in workers if worker is not held]
    held.kill()
    router.workers.remove(held)
    list(call)
    wait_for(lambda: len(said(caplog, request_id)) == 4, 60.0)
    first, second, lost, end = said(caplog, request_id)
    assert first == ("DEBUG", 0, f"decode dispatched to {held.name}")
    assert second == ("INFO", 1, f"decode dispatched to {other.name}")
    assert lost == ("INFO", 0, f"decode at {held.name} had ended: closed")
    assert end[:2] == ("DEBUG", None)
    assert end[2].startswith("completed after ")


def test_no_text_of_a_client_is_in_the_log(
    make_router: Callable[..., Router], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    router = make_router()
    router.add("decode-0", "decode")
    sampling = tandem_pb2.SamplingParams(max_tokens=3, stop=[MARKER])
    request = tandem_pb2.GenerateRequest(prompt=f"the {MARKER}", sampling=sampling, idempotency_key=MARKER)
    metadata = (("tandem-tenant", MARKER), ("authorization", f"Bearer {MARKER}"))
    collect(router.stub.Generate(request, timeout=60.0, metadata=metadata))
    request = tandem_pb2.GenerateRequest(prompt=MARKER, model=MARKER, sampling=sampling)
    with pytest.raises(grpc.RpcError):
        list(router.stub.Generate(request, timeout=60.0))
    wait_for(lambda: any("completed after" in record.getMessage() for record in list(caplog.records)), 60.0)
    form = LineFormatter("json", role="router", process="router")
    lines = [form.format(record) for record in list(caplog.records)]
    assert not [line for line in lines if MARKER in line]


@pytest.mark.parametrize(("code", "is_told"), [("invalid_request", False), ("worker_lost", True)])
def test_the_words_of_a_failure_are_told_unless_they_may_be_the_client_s(
    caplog: pytest.LogCaptureFixture, code: str, is_told: bool
) -> None:
    summary = summary_of(0, 0)
    changed = {"outcome": "failed", "error": f"about {MARKER}", "error_code": code}
    ended(replace(summary, **changed))  # type: ignore[arg-type]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert code in record.getMessage()
    assert (MARKER in record.getMessage()) == is_told
