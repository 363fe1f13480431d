"""Which trace a call belongs to: W3C Trace Context, as it came with the call.

Owns the headers' form, and where a call's is kept while it is served. Every edge (gRPC, HTTP) says what came; whoever serves the
call asks. Makes no spans.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from protos.metadata import TRACEPARENT, TRACESTATE

MAX_STATE_CHARS = 512
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The span of somebody else of which a request's is a child; `sampled` if that is recorded. `state` is theirs, unread."""

    trace_id: int
    span_id: int
    sampled: bool
    state: str = ""


_current: ContextVar[TraceContext | None] = ContextVar("trace_context", default=None)


def parse(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """None for what is no `traceparent` (https://www.w3.org/TR/trace-context/): the trace begins here then."""
    found = _FORM.fullmatch(traceparent.strip()) if len(traceparent) <= MAX_STATE_CHARS else None
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    trace_id, span_id = int(found[2], 16), int(found[3], 16)
    if not trace_id or not span_id:
        return None
    state = tracestate if len(tracestate) <= MAX_STATE_CHARS else ""
    return TraceContext(trace_id, span_id, bool(int(found[4], 16) & 1), state)


def enter(traceparent: str, tracestate: str = "") -> None:
    """What came with the call that this task serves; empty: nothing did."""
    _current.set(parse(traceparent, tracestate) if traceparent else None)


def current() -> TraceContext | None:
    """What the call that this task serves came with."""
    return _current.get()


class TraceHeaders:
    """ASGI middleware: enters the context of each HTTP request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            enter(headers.get(TRACEPARENT, ""), headers.get(TRACESTATE, ""))
        await self._app(scope, receive, send)
