"""Errors as OpenAI's API words them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tandem.errors import InvalidRequest, Overloaded, TandemError, Unauthenticated

log = logging.getLogger(__name__)

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, object]:
    """The body of an answer with this status."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def tandem_error_body(error: TandemError) -> dict[str, object]:
    """The body of an answer that ends with `error`."""
    param = error.param if isinstance(error, InvalidRequest) else None
    return error_body(str(error), error.http_code, error.code, param)


def internal_error_body() -> dict[str, object]:
    """The body where a fault of ours ends an answer: nothing of it is told."""
    return error_body("the router failed; its log says why", 500, "internal")


def error_response(error: TandemError) -> Response:
    """The answer to a request that ends with `error`."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(tandem_error_body(error), error.http_code, headers)


async def on_tandem_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of TandemErrors."""
    assert isinstance(error, TandemError)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of what it refuses itself: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(message, error.status_code), error.status_code, error.headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """Starlette's handler of everything else, which is a fault of ours: it is logged, and nothing of it is told."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(internal_error_body(), 500)
