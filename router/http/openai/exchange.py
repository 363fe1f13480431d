"""One request on an OpenAI path: from its bytes to its answer's.

Owns the life of what it asked of the router: when the client leaves, or anything fails, all of it is cancelled, and nothing is
left running. An error is an HTTP status as long as nothing has been sent, which is until the first token; in the middle of a
stream it is an `error` event, and the stream ends. Knows no shapes: bodies, requests and answers are other modules'.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import msgspec
from msgspec import UNSET
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from protos import tandem_pb2 as pb
from router.access import Caller
from router.front import Front
from router.http.errors import internal_error_body, tandem_error_body
from router.http.gate import caller_by
from router.http.openai.answers import Answered, Heading
from router.http.openai.requests import Asked
from tandem.errors import Cancelled, InvalidRequest, TandemError
from tandem.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TIMEOUT = "x-request-timeout-s"
"""A client's header: after so many seconds it wants no answer any more."""
REQUEST_ID = "x-request-id"
"""Ours: what `tandem explain` and the logs call the request."""
DONE = b"data: [DONE]\n\n"

Make = Callable[[Asked, Heading, Tokenizer], Answered]
Events = AsyncGenerator[pb.GenerateResponse, None]
Numbered = AsyncGenerator[tuple[int, pb.GenerateResponse], None]


async def read_data(request: Request, front: Front) -> bytes:
    """The body. Raises HTTPException for one that is too large (before it is read), too slow or not JSON by its type, Cancelled
    if the client leaves."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"the body's content type is {kind[:100]!r}, must be 'application/json'")
    limit = front.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(f"{int(declared)} bytes", limit)
    data = bytearray()
    try:
        async with asyncio.timeout(front.client_patience_s):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise _too_large(f"more than {limit} bytes", limit)
    except TimeoutError as error:
        raise HTTPException(408, f"the body was not whole after {front.client_patience_s:g} s", _CLOSE) from error
    except ClientDisconnect as error:
        raise Cancelled("the client left before its request was whole") from error
    return bytes(data)


_CLOSE = {"connection": "close"}
"""What is left of the body is not read."""


def _too_large(size: str, limit: int) -> HTTPException:
    return HTTPException(413, f"the body has {size}, the limit is {limit}", _CLOSE)


def budget_of(request: Request) -> float | None:
    """The seconds that the client gives. Raises InvalidRequest if its header is not a number of seconds."""
    given = request.headers.get(TIMEOUT)
    if given is None:
        return None
    try:
        budget_s = float(given)
    except ValueError:
        budget_s = math.nan
    if not 0.0 < budget_s < math.inf:
        raise InvalidRequest(f"the header {TIMEOUT} is {given[:100]!r}, must be a number of seconds above 0", TIMEOUT)
    return budget_s


def caller_of(request: Request, front: Front) -> Caller:
    """Who asks."""
    return caller_by(request.headers, front.access)


@dataclass(frozen=True, slots=True)
class Exchange:
    """The answer to `asked`: an ASGI app, to be called once."""

    front: Front
    asked: Asked
    make: Make
    caller: Caller
    budget_s: float | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers. Raises the TandemError with which the request ends if nothing has been sent by then."""
        work = asyncio.create_task(self._answer(send))
        gone = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Whoever comes first ends the other; both are awaited, so that the request is cancelled before we are done.
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()

    async def _answer(self, send: Send) -> None:
        async with contextlib.AsyncExitStack() as stack:
            streams: list[Events] = []
            accepted: list[pb.Accepted] = []
            for request in self.asked.requests:
                stream = self.front.generate(request, self.budget_s, self.caller)
                stack.push_async_callback(stream.aclose)
                streams.append(stream)
                accepted.append((await anext(stream)).accepted)
            tier = self.asked.service_tier
            request_id = accepted[0].request_id
            heading = Heading(request_id, int(time.time()), self.front.model, UNSET if tier is None else tier)
            answer = self.make(self.asked, heading, self.front.tokenizer)
            events = await stack.enter_async_context(contextlib.aclosing(merged(streams)))
            if self.asked.stream:
                await _stream(events, answer, self.asked.include_usage, request_id, send)
            else:
                await _whole(events, answer, request_id, send)


async def _left(receive: Receive) -> None:
    """Returns when the client has gone, or has its whole answer."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole(events: Numbered, answer: Answered, request_id: str, send: Send) -> None:
    async for number, event in events:
        _take(answer, number, event)
    body = msgspec.json.encode(answer.reply())
    await _start(send, b"application/json", request_id, [(b"content-length", str(len(body)).encode())])
    await send({"type": "http.response.body", "body": body})


async def _stream(
    events: Numbered,
    answer: Answered,
    include_usage: bool,
    request_id: str,
    send: Send,
) -> None:
    has_begun = False

    async def show(data: bytes, *, more: bool = True) -> None:
        nonlocal has_begun
        if not has_begun:
            has_begun = True
            # Proxies are not to gather a stream, nor to keep it.
            headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await _start(send, b"text/event-stream; charset=utf-8", request_id, headers)
        await send({"type": "http.response.body", "body": data, "more_body": more})

    try:
        async for number, event in events:
            if data := b"".join(_event(piece) for piece in _take(answer, number, event)):
                await show(data)
        usage = _event(answer.usage_piece()) if include_usage else b""
    except TandemError as error:
        if not has_begun:
            raise
        await show(_error_event(tandem_error_body(error)), more=False)
    except Exception:
        if not has_begun:
            raise
        log.exception("request %s failed in the middle of its stream", request_id)
        await show(_error_event(internal_error_body()), more=False)
    else:
        await show(usage + DONE, more=False)


async def _start(send: Send, kind: bytes, request_id: str, headers: list[tuple[bytes, bytes]]) -> None:
    named = [(b"content-type", kind), (REQUEST_ID.encode(), request_id.encode()), *headers]
    await send({"type": "http.response.start", "status": 200, "headers": named})


def _take(answer: Answered, number: int, event: pb.GenerateResponse) -> list[msgspec.Struct]:
    match event.WhichOneof("event"):
        case "chunk":
            return list(answer.take(number, event.chunk))
        case "completed":
            answer.complete(event.completed)
    return []


def _event(piece: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(piece) + b"\n\n"


def _error_event(body: dict[str, object]) -> bytes:
    return b"event: error\ndata: " + msgspec.json.encode(body) + b"\n\n"


async def merged(streams: list[Events]) -> Numbered:
    """The events of all streams as they come, each with its stream's number. Raises what the first one to fail raised. The
    streams stay their owner's, who closes them."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, pb.GenerateResponse | Exception | None]] = asyncio.Queue(len(streams))

    async def pump(number: int, stream: Events) -> None:
        try:
            async for event in stream:
                await queue.put((number, event))
        except Exception as error:
            await queue.put((number, error))
        else:
            await queue.put((number, None))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
