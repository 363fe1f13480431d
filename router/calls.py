"""What every gRPC service of the router does with a call: who calls, answers one after the other, errors as statuses.

Owns no service and decides nothing about requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
import grpc.aio

from protos.metadata import AUTHORIZATION, TENANT, TRACEPARENT, TRACESTATE
from protos.rich_errors import MAX_MESSAGE_CHARS, STATUS_DETAILS, status_details
from router import trace_context
from router.access import Access, Caller
from tandem.errors import DeadlineExceeded, TandemError

Context = grpc.aio.ServicerContext[Any, Any]


def caller_by(metadata: Any, access: Access) -> Caller:
    """Who makes the call that came with this. Raises Unauthenticated if that must be said and isn't."""
    said = dict(metadata or ())
    return access.caller(str(said.get(AUTHORIZATION, "")), str(said.get(TENANT, "")))


async def caller_of(context: Context, access: Access) -> Caller:
    """Who calls. The call ends if its key was taken back since the gate let it pass. What it is served for belongs to the trace
    that came with it."""
    said = dict(context.invocation_metadata() or ())
    trace_context.enter(str(said.get(TRACEPARENT, "")), str(said.get(TRACESTATE, "")))
    try:
        return caller_by(context.invocation_metadata(), access)
    except TandemError as error:
        await abort(context, error)


async def write_all(context: Context, responses: AsyncIterator[Any], patience_s: float) -> None:
    """Writes them as they come, and closes the iterator whatever happens. A TandemError that it raises, and a client that reads
    nothing for `patience_s`, end the call with a status."""
    try:
        async for response in responses:
            async with asyncio.timeout(patience_s):  # unlike wait_for, it makes no task of each message
                await context.write(response)
    except TandemError as error:
        await abort(context, error)
    except TimeoutError:
        # What it holds here would be held for ever: gRPC waits for the client's window without a deadline of its own.
        await abort(context, DeadlineExceeded(f"the client read nothing for {patience_s:g} s"))
    finally:
        await responses.aclose()  # type: ignore[attr-defined]


async def abort(context: Context, error: TandemError) -> NoReturn:
    """Ends a call with an error's status and its details: without these, a client knows that the connection broke."""
    context.set_trailing_metadata(((STATUS_DETAILS, status_details(error)),))
    await context.abort(grpc.StatusCode[error.grpc_status], str(error)[:MAX_MESSAGE_CHARS])
