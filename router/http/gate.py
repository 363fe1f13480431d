"""The gate before an HTTP app: who may ask, on which port.

Owns which paths are open. A path that is added later is behind it from the first day.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from protos.metadata import AUTHORIZATION, TENANT
from router.access import Access, Caller
from router.http.errors import error_response
from tandem.errors import TandemError

OPEN_PATHS = frozenset({"/health", "/alive", "/"})
"""What they say is no secret, and neither who watches over a router nor a browser that opens the live page has a key."""
OPEN_FOLDER = "/page/"
"""Of the live page's own files. What the page shows needs a key, which it asks for."""


class Gate:
    """Lets requests pass of which `access` knows the caller; with `admin`, of that role alone."""

    def __init__(self, app: ASGIApp, access: Access, *, admin: bool) -> None:
        self._app = app
        self._access = access
        self._admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and not _is_open(scope["path"]):
            try:
                caller = caller_by(Headers(scope=scope), self._access)
                if self._admin:
                    caller.check_admin(scope["path"])
            except TandemError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def caller_by(headers: Headers, access: Access) -> Caller:
    """Who sends these. Raises Unauthenticated if that must be said and isn't."""
    return access.caller(headers.get(AUTHORIZATION, ""), headers.get(TENANT, ""))
