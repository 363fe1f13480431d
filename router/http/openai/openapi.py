"""The OpenAPI description of the port for clients, made from the types of its bodies and answers.

Owns what the types don't say: paths, statuses, headers. A test asks a router what is described here, and what is not. Pure.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
from msgspec import Struct

from router.http.openai.bodies import ChatBody, CompletionBody
from router.http.openai.replies import ChatPiece, ChatReply, CompletionReply


class Error(Struct, frozen=True):
    """What is wrong: `param` is the field of the request, `code` names the kind."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Struct, frozen=True):
    """Every answer that is no success."""

    error: Error


class Model(Struct, frozen=True):
    """The served model."""

    id: str
    object: str
    created: int
    owned_by: str


class Models(Struct, frozen=True):
    """All served models: one."""

    object: str
    data: list[Model]


class Health(Struct, frozen=True):
    """Whether a request can be served now."""

    ready: bool


_TYPES = (CompletionBody, ChatBody, CompletionReply, ChatReply, ChatPiece, ErrorReply, Model, Models, Health)
_REFUSALS = {
    "400": "the request can never work",
    "404": "no such model",
    "408": "the body came too slowly",
    "413": "the body is too large",
    "415": "the body is not JSON by its content type",
    "429": "no room now: `Retry-After` says when it is worth trying again",
    "500": "a fault of the server",
    "503": "nothing that could serve the request is alive",
    "504": "the deadline passed",
}
_JSON, _EVENTS = "application/json", "text/event-stream"
_TIMEOUT_HEADER = {
    "name": "x-request-timeout-s",
    "in": "header",
    "required": False,
    "description": "after so many seconds the answer is not wanted any more",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(words: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": words, "content": {_JSON: {"schema": schema}}}


def _generating(summary: str, body: str, reply: str, piece: str) -> dict[str, Any]:
    answered = _answer("the answer; with `stream`, events whose data are its pieces and at last `[DONE]`", _ref(reply))
    answered["content"][_EVENTS] = {"schema": {"type": "string", "description": f"`data:` lines of {piece}"}}
    return {
        "summary": summary,
        "parameters": [_TIMEOUT_HEADER],
        "requestBody": {"required": True, "content": {_JSON: {"schema": _ref(body)}}},
        "responses": {"200": answered}
        | {status: _answer(words, _ref("ErrorReply")) for status, words in _REFUSALS.items()},
    }


def _reading(summary: str, reply: str, refusals: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    refused = {status: _answer(_REFUSALS[status], _ref("ErrorReply")) for status in refusals}
    return {"summary": summary, "responses": {"200": _answer("the answer", _ref(reply))} | refused, **more}


def description() -> bytes:
    """The description, as JSON."""
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    health = _reading("whether requests can be served", "Health")
    health["responses"]["503"] = _answer("not now", _ref("Health"))
    paths = {
        "/v1/completions": {
            "post": _generating("continue a prompt", "CompletionBody", "CompletionReply", "CompletionReply")
        },
        "/v1/chat/completions": {"post": _generating("answer in a chat", "ChatBody", "ChatReply", "ChatPiece")},
        "/v1/models": {"get": _reading("what is served", "Models")},
        "/v1/models/{model}": {"get": _reading("one model", "Model", ("404",), parameters=[model])},
        "/health": {"get": health},
        "/openapi.json": {
            "get": {"summary": "this", "responses": {"200": _answer("the description", {"type": "object"})}}
        },
    }
    info = {"title": "Tandem", "version": "1", "description": "OpenAI's API over a disaggregated cluster"}
    return json.dumps({"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}).encode()
