"""The gate before the gRPC services: who may call what.

Owns which services are open and which calls need the role admin. A service that is added later is behind it from the first day.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from router.access import Access
from router.calls import Context, abort, caller_by
from tandem.errors import TandemError

OPEN_SERVICES = frozenset({health.SERVICE_NAME, reflection.SERVICE_NAME})
"""What they say is no secret, and who watches over a router has no key."""
ADMIN_CALLS = frozenset({"/tandem.v1.Tandem/Audit"})


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls pass of which `access` knows the caller, and whose role allows them."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        service = method.strip("/").partition("/")[0]
        if service not in OPEN_SERVICES:
            try:
                caller = caller_by(handler_call_details.invocation_metadata, self._access)
                if method in ADMIN_CALLS:
                    caller.check_admin(method.rpartition("/")[2])
            except TandemError as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: TandemError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(requests: object, context: Context) -> NoReturn:
        await abort(context, error)

    # Whatever kind of call it is: this one's messages are never read, and its status is all that comes back.
    return grpc.stream_stream_rpc_method_handler(refuse)
