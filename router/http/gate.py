"""The gate before an HTTP app: who may ask, on which port.

Owns which paths are open. A path that is added later is behind it from the first day.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from protos.metadata import AUTHORIZATION, TENANT
from router.access import Access, Caller
from router.http.errors import error_response
from tandem.errors import TandemError

OPEN_PATHS = frozenset({"/health"})
"""What they say is no secret, and who watches over a router has no key."""


class Gate:
    """Lets requests pass of which `access` knows the caller; with `admin`, of that role alone."""

    def __init__(self, app: ASGIApp, access: Access, *, admin: bool) -> None:
        self._app = app
        self._access = access
        self._admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"] not in OPEN_PATHS:
            try:
                caller = _caller(self._access, Headers(scope=scope))
                if self._admin:
                    caller.check_admin(scope["path"])
            except TandemError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def caller_of(access: Access, request: HTTPConnection) -> Caller:
    """Who asks. Raises Unauthenticated if that must be said and isn't."""
    return _caller(access, request.headers)


def _caller(access: Access, headers: Headers) -> Caller:
    return access.caller(headers.get(AUTHORIZATION, ""), headers.get(TENANT, ""))
