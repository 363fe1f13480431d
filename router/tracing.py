"""Traces of requests, sent to an OpenTelemetry collector: OTLP over HTTP.

Owns the thread that makes and sends them, and what waits for it: a bounded queue of ended requests, so that no request ever waits
for a collector; what does not fit is dropped and counted. Imports OpenTelemetry, and is imported only where traces are wanted.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from router.journal import Summary
from router.spans import Began, Span, span_of
from tandem.clock import now_s

log = logging.getLogger(__name__)

MAX_QUEUED = 2048
MAX_BATCH = 128
"""Requests; each is some ten spans."""
BATCH_S = 1.0
EXPORT_TIMEOUT_S = 10.0
CLOSE_S = 3.0


@dataclass(frozen=True, slots=True)
class _Ended:
    began: Began
    summary: Summary
    num_generated_tokens: int


class Tracing:
    """Sends the trace of every request of which `began` and `ended` are told, or of the part `sample_ratio` of those whose trace
    begins here. All but the thread's own is called from the router's loop, and returns at once."""

    def __init__(
        self,
        endpoint: str,
        *,
        sample_ratio: float,
        router: str,
        model: str,
        max_queued: int = MAX_QUEUED,
        exporter: SpanExporter | None = None,
    ) -> None:
        self._sample_ratio = sample_ratio
        self._model = model
        self._began: dict[str, Began] = {}
        self._queue: queue.Queue[_Ended | None] = queue.Queue(max_queued)
        self._counts = {"exported": 0, "failed": 0, "dropped": 0}
        self._exporter = exporter or OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S)
        self._made = _Made()
        provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create({"service.name": "tandem", "service.instance.id": router}),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._made)
        self._tracer = provider.get_tracer("tandem.router")
        self._thread = threading.Thread(target=self._run, name="tracing", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests whose trace was `exported`, could not be sent (`failed`), or did not fit into the queue (`dropped`)."""
        return self._counts

    def began(self, request_id: str, began: Began) -> None:
        """A request is accepted; `ended` follows, whatever happens to it."""
        sampled = random.random() < self._sample_ratio if began.parent is None else began.parent.sampled
        if sampled:
            self._began[request_id] = began

    def ended(self, request_id: str, summary: Summary | None, num_generated_tokens: int) -> None:
        """It has ended; without a `summary` it was refused before anything was done for it, and leaves no trace."""
        began = self._began.pop(request_id, None)
        if began is None or summary is None:
            return
        try:
            self._queue.put_nowait(_Ended(began, summary, num_generated_tokens))
        except queue.Full:
            self._counts["dropped"] += 1

    def close(self) -> None:
        """Sends what waits, for a moment, and ends the thread; one that hangs at the collector is left behind."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            pass  # the collector doesn't answer; the thread is a daemon
        self._thread.join(CLOSE_S)

    # --- on the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            batch, is_last = self._gather()
            if batch:
                try:
                    self._send(batch)
                except Exception:  # whatever a library does to a trace, the next ones are sent
                    self._counts["failed"] += len(batch)
                    self._made.take()
                    log.exception("traces of %d requests were not sent", len(batch))
            if is_last:
                self._exporter.shutdown()
                return

    def _gather(self) -> tuple[list[_Ended], bool]:
        """Waits for one, and then for more for a moment."""
        batch: list[_Ended] = []
        end_s = 0.0
        while len(batch) < MAX_BATCH:
            try:
                item = self._queue.get(timeout=max(0.0, end_s - now_s()) if batch else None)
            except queue.Empty:
                break
            if item is None:
                return batch, True
            end_s = end_s or now_s() + BATCH_S
            batch.append(item)
        return batch, False

    def _send(self, batch: list[_Ended]) -> None:
        offset_s = time.time() - now_s()
        for ended in batch:
            root = span_of(
                ended.began,
                ended.summary,
                model=self._model,
                num_generated_tokens=ended.num_generated_tokens,
            )
            self._make(root, _parent_of(ended.began), offset_s, SpanKind.SERVER)
        result = self._exporter.export(self._made.take())
        self._counts["exported" if result is SpanExportResult.SUCCESS else "failed"] += len(batch)

    def _make(self, span: Span, parent: Context | None, offset_s: float, kind: SpanKind) -> None:
        made = self._tracer.start_span(
            span.name,
            context=parent,
            kind=kind,
            attributes=span.attributes,
            start_time=_nanoseconds(span.start_s + offset_s),
        )
        if span.error:
            made.set_attribute("error.type", span.error)
            made.set_status(Status(StatusCode.ERROR))
        for child in span.children:
            self._make(child, trace.set_span_in_context(made), offset_s, SpanKind.INTERNAL)
        made.end(_nanoseconds(span.end_s + offset_s))


class _Made(SpanProcessor):
    """Gathers the spans that the SDK has made."""

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self._spans.append(span)

    def take(self) -> list[ReadableSpan]:
        taken, self._spans = self._spans, []
        return taken


def _parent_of(began: Began) -> Context:
    """An empty one for a trace that begins here, whatever else the process traces."""
    parent = began.parent
    if parent is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    state = TraceState.from_header([parent.state])
    context = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags, trace_state=state)
    return trace.set_span_in_context(NonRecordingSpan(context), Context())


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
