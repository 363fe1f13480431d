"""OpenAI's paths of a router.

    POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /v1/models/{model}   GET /openapi.json

Owns which handler answers which of them. What a handler does is in the modules beside this one.
"""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.front import Front
from router.http.errors import error_body
from router.http.openai.answers import ChatAnswer, CompletionAnswer
from router.http.openai.bodies import Body, ChatBody, CompletionBody, read_body
from router.http.openai.exchange import Exchange, budget_of, caller_of, read_data
from router.http.openai.openapi import description
from router.http.openai.requests import chat_asked, completion_asked


def openai_routes(front: Front) -> list[Route]:
    """The routes of OpenAI's API, answered by `front`."""
    model = {"id": front.model, "object": "model", "created": int(time.time()), "owned_by": "tandem"}
    described = description()

    async def completions(request: Request) -> Exchange | Response:
        caller, budget_s = caller_of(request, front), budget_of(request)
        body = read_body(await read_data(request, front), CompletionBody)
        refused = _refused_model(body)
        return refused or Exchange(front, completion_asked(body), CompletionAnswer, caller, budget_s)

    async def chat(request: Request) -> Exchange | Response:
        caller, budget_s = caller_of(request, front), budget_of(request)
        body = read_body(await read_data(request, front), ChatBody)
        refused = _refused_model(body)
        return refused or Exchange(front, chat_asked(body, front.tokenizer.chat_template), ChatAnswer, caller, budget_s)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["model"]
        return JSONResponse(model) if name == front.model else _unknown_model(name)

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    def _refused_model(body: Body) -> Response | None:
        return _unknown_model(body.model) if body.model not in (None, "", front.model) else None

    def _unknown_model(name: str | None) -> Response:
        message = f"model {(name or '')[:200]!r} is not served here, {front.model!r} is"
        return JSONResponse(error_body(message, 404, "model_not_found", "model"), 404)

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", one_model),
        Route("/openapi.json", openapi),
    ]
