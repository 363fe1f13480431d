"""The two HTTP apps of a router: one for clients, one for those who run the cluster.

Owns which path is whose. Each path's handler is a module of its own. Once there are keys, every path but /health needs one
(`router/http/gate.py`), on the admin port one of the role admin.

    client_app   router.http_port    /health /alive, OpenAI's paths (router/http/openai/routes.py), the live page to read
    admin_app    router.admin_port   /health /alive /metrics, the live page with what it can start
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.front import Front
from router.http.errors import on_bug, on_http_error, on_tandem_error
from router.http.gate import Gate
from router.http.live_page import page_routes
from router.http.openai.routes import openai_routes
from router.trace_context import TraceHeaders
from tandem.errors import TandemError

HANDLERS = {TandemError: on_tandem_error, HTTPException: on_http_error, Exception: on_bug}


def client_app(front: Front) -> Starlette:
    """What clients reach."""
    gate = Middleware(Gate, front.access, admin=False)
    routes = [_health(front), _alive(), *openai_routes(front), *page_routes(front, "client")]
    return Starlette(routes=routes, middleware=[gate, Middleware(TraceHeaders)], exception_handlers=HANDLERS)


def admin_app(front: Front) -> Starlette:
    """What those reach who run the cluster."""

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    gate = Middleware(Gate, front.access, admin=True)
    routes = [_health(front), _alive(), Route("/metrics", metrics), *page_routes(front, "admin")]
    return Starlette(routes=routes, middleware=[gate], exception_handlers=HANDLERS)


def _health(front: Front) -> Route:
    async def health(request: Request) -> Response:
        return JSONResponse({"ready": front.ready}, 200 if front.ready else 503)

    return Route("/health", health)


def _alive() -> Route:
    """For whoever would start a router anew that hangs: it answers as long as the event loop goes round, ready or not."""

    async def alive(request: Request) -> Response:
        return JSONResponse({"live": True})

    return Route("/alive", alive)
