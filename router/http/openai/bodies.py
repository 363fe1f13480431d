"""What clients send to OpenAI's paths: the bodies as types, and how one is read.

Owns which fields there are. A field that is not here is refused by its name, since it might change what is meant; those typed
`Ignored` change nothing here, and those typed `None` may be there as long as they say nothing. Whether values suit the model is
the validation's to say (`router/validation.py`), which gRPC shares. Pure.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from tandem.errors import InvalidRequest

TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Listed = Annotated[int, Meta(ge=0, le=20)]
"""How many of the likeliest tokens are wanted."""
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
ToolName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Ignored = Any
JsonObject = dict[str, Any]
"""An object that is passed on as it is: a JSON Schema."""


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class StructuredOutputs(Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer must match as a whole: exactly one of these (an extra that vLLM has too). `grammar` is Lark."""

    json: JsonObject | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both paths take. None is unset."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    service_tier: Literal["auto", "default", "flex"] | None = None
    # Extras that vLLM has too.
    top_k: Annotated[int, Meta(ge=-1, le=2**32 - 1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    structured_outputs: StructuredOutputs | None = None
    # What changes no answer here.
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


class CompletionBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `/v1/completions`. `prompt`: a text, token ids, or a list of either."""

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Listed | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: None = None


class ContentPart(Struct, frozen=True):
    """A part of a message. Of all kinds only `text` can be read."""

    type: str
    text: str | None = None


class CalledFunction(Struct, frozen=True, forbid_unknown_fields=True):
    """What an assistant called: `arguments` is JSON, as text."""

    name: str
    arguments: str = "{}"


class MadeCall(Struct, frozen=True, forbid_unknown_fields=True):
    """A call in an assistant's earlier message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: Ignored = None


class MessageBody(Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation. What answers have beside their text comes back here and says nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_call_id: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    reasoning: Ignored = None
    reasoning_content: Ignored = None
    audio: None = None
    function_call: None = None


class Function(Struct, frozen=True, forbid_unknown_fields=True):
    """What may be called. `parameters` is a JSON Schema of an object; `strict` says nothing: forced calls always keep to it."""

    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: Ignored = None


class Tool(Struct, frozen=True, forbid_unknown_fields=True):
    """A tool, as yet always a function."""

    function: Function
    type: Literal["function"] = "function"


class NamedFunction(Struct, frozen=True, forbid_unknown_fields=True):
    """Which function."""

    name: str


class NamedTool(Struct, frozen=True, forbid_unknown_fields=True):
    """The tool that must be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchema(Struct, frozen=True, forbid_unknown_fields=True):
    """A schema with its name. Without `schema` any object will do; answers are always held to it, whatever `strict` says."""

    name: Ignored = None
    description: Ignored = None
    schema: JsonObject | None = None
    strict: Ignored = None


class ResponseFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[MessageBody], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Listed | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    functions: None = None
    function_call: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


B = TypeVar("B", bound=Body)

_AT = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`$")
_SHOWN_CHARS = 200


def read_body(data: bytes, kind: type[B]) -> B:
    """The body as its type. Raises InvalidRequest that names the field where there is one."""
    try:
        data.decode("utf-8")  # also of what is skipped
        return msgspec.json.decode(data, type=kind)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is {data[error.start]:#04x}") from error
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


def _refused(message: str) -> InvalidRequest:
    """A validation error in the words of the API: which field, and what is wrong with it."""
    found = _AT.search(message)
    path = found["path"] if found else ""
    said = message[: found.start()] if found else message
    for pattern, words in ((_UNKNOWN, "is not supported"), (_MISSING, "is missing")):
        if inner := pattern.match(said):
            param = f"{path}.{inner['name']}".strip(".")[:_SHOWN_CHARS]
            return InvalidRequest(f"{param} {words}", param)
    if said.startswith("Expected `null`"):
        return InvalidRequest(f"{path} is not supported", path)
    return InvalidRequest(f"{path or 'the body'}: {said[:_SHOWN_CHARS]}", path or None)
