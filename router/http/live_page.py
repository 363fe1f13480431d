"""The live page: its files, its feed, and what it asks for.

Owns these paths, on both ports:

    /                       the page
    /page/NAME              its files, which name no other host and run no inline script
    /live                   what goes on, as server-sent events
    /live/requests/ID       why a request went where it went
    /live/audit             POST, for those who run the cluster alone: an audit, and what it found
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message as ProtoMessage
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from router.access import Caller
from router.front import Front
from router.http.gate import caller_by
from router.live_feed import Audience, LiveFeed, Watcher

FILES = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # kept, and asked after: another release brings other files
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PAGE_HEADER = "tandem-page"
"""What asks for an action carries it: a page of another origin can't send it unasked."""


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    etag: str


def page_routes(front: Front, audience: Audience) -> list[Route]:
    """The page as it is for those who may do everything, or for all others. It shows all tenants' requests and what they had
    cached: where there are keys, to those of the role admin alone, on either port."""
    files = {path.name: _read(path) for path in sorted(FILES.iterdir()) if path.suffix in TYPES}

    def caller(request: Request) -> Caller:
        asks = caller_by(request.headers, front.access)
        asks.check_admin("the live page")
        return asks

    async def index(request: Request) -> Response:
        return _answer(request, files["index.html"])

    async def file(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404, "Not Found")
        return _answer(request, found)

    async def live(request: Request) -> Response:
        caller(request)
        return _EventStream(front.live, front.live.watch(audience))

    async def explain(request: Request) -> Response:
        explained = front.explain(request.path_params["request_id"], caller(request))
        if audience != "admin":
            explained.ClearField("error")
        return _json(explained)

    async def audit(request: Request) -> Response:
        caller(request)
        if PAGE_HEADER not in request.headers:
            raise HTTPException(400, f"the header {PAGE_HEADER} is missing")
        return _json(await front.audit())

    routes = [
        Route("/", index),
        Route("/page/{name}", file),
        Route("/live", live),
        Route("/live/requests/{request_id}", explain),
    ]
    return [*routes, Route("/live/audit", audit, methods=["POST"])] if audience == "admin" else routes


def _read(path: Path) -> _File:
    body = path.read_bytes()
    return _File(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _answer(request: Request, file: _File) -> Response:
    headers = HEADERS | {"ETag": file.etag}
    known: Sequence[str] = request.headers.get("if-none-match", "").split(",")
    if any(tag.strip().removeprefix("W/") in (file.etag, "*") for tag in known):
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)


def _json(message: ProtoMessage) -> Response:
    fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return JSONResponse(fields, headers={"Cache-Control": "no-store"})


class _EventStream(Response):
    """What a watcher gets, until the feed ends or the client is gone. One that reads nothing is the listener's to cut off."""

    def __init__(self, feed: LiveFeed, watcher: Watcher) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._feed, self._watcher = feed, watcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(self._leave_when_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._watcher:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            self._feed.leave(self._watcher)

    async def _leave_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._feed.leave(self._watcher)
