"""OpenAI's bodies as requests of `tandem.v1`: what HTTP and gRPC ask for goes the same way from here.

Owns the translation of names, defaults and shapes. Values are checked where gRPC's are (`router/validation.py`). Pure.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

import msgspec

from protos import tandem_pb2 as pb
from router.http.openai.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    Function,
    JsonObject,
    MessageBody,
    NamedTool,
    ResponseFormat,
    StructuredOutputs,
    Tool,
)
from router.http.openai.tools import Offer, format_of
from tandem.errors import InvalidRequest

TEMPERATURE = 1.0
"""OpenAI's default. gRPC's is 0: a request that says nothing is greedy there."""
MAX_PROMPTS = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """What one body asks for: a request for each prompt, with `n` choices each. `echoes`: what is shown before each prompt's
    answers."""

    requests: tuple[pb.GenerateRequest, ...]
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool
    service_tier: str | None
    echoes: tuple[str | tuple[int, ...], ...] = ()
    offer: Offer | None = None


def completion_asked(body: CompletionBody) -> Asked:
    """Raises InvalidRequest for what can't be done, naming the field."""
    sampling = _sampling(body, body.max_tokens)
    if body.best_of not in (None, body.n or 1):
        raise InvalidRequest(f"best_of is {body.best_of}, must be n, {body.n or 1}, or absent", "best_of")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("echo with logprobs is not supported: a prompt's tokens have none", "echo")
    if body.logprobs is not None:
        sampling.num_logprobs = body.logprobs
    requests = []
    prompts = _prompts(body)
    for prompt in prompts:
        request = pb.GenerateRequest(sampling=sampling, batch=body.service_tier == "flex")
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.token_ids.ids.extend(prompt)
        requests.append(request)
    return _asked(body, requests, body.logprobs is not None, echoes=tuple(prompts) if body.echo else ())


def _prompts(body: CompletionBody) -> list[str | tuple[int, ...]]:
    """The prompts, of the four forms that there are."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequest("prompt has 0 entries, needs at least 1", "prompt")
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InvalidRequest("prompt mixes texts, token ids and lists: all entries must be of one kind", "prompt")
    if kinds == {int}:
        return [tuple(item for item in given if isinstance(item, int))]
    if len(given) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt has {len(given)} entries, the limit is {MAX_PROMPTS}", "prompt")
    return [item if isinstance(item, str) else tuple(item) for item in given if not isinstance(item, int)]


def chat_asked(body: ChatBody, chat_template: str) -> Asked:
    """`chat_template` is the source of the model's template. Raises InvalidRequest for what can't be done, naming the field."""
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequest(
            f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}: give one",
            "max_tokens",
        )
    sampling = _sampling(body, next(iter(limits), None))
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest(f"top_logprobs is {body.top_logprobs}, and logprobs is not true", "top_logprobs")
    if body.logprobs:
        sampling.num_logprobs = body.top_logprobs or 0
    held = _response_grammar(body.response_format)
    if held is not None:
        _hold(sampling, held, "response_format")
    chat = pb.Chat(messages=[_message(number, message) for number, message in enumerate(body.messages)])
    offer = _offer_tools(body, chat, sampling, chat_template)
    request = pb.GenerateRequest(chat=chat, sampling=sampling, batch=body.service_tier == "flex")
    return _asked(body, [request], bool(body.logprobs), offer=offer)


def _asked(
    body: Body,
    requests: list[pb.GenerateRequest],
    logprobs: bool,
    *,
    echoes: tuple[str | tuple[int, ...], ...] = (),
    offer: Offer | None = None,
) -> Asked:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is given, and stream is not true", "stream_options")
    options = body.stream_options
    return Asked(
        requests=tuple(requests),
        n=1 if body.n is None else body.n,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        logprobs=logprobs,
        service_tier=body.service_tier,
        echoes=echoes,
        offer=offer,
    )


def _sampling(body: Body, max_tokens: int | None) -> pb.SamplingParams:
    """What both paths have. What is unset here has gRPC's default, but for the temperature."""
    sampling = pb.SamplingParams(
        max_tokens=max_tokens,
        temperature=TEMPERATURE if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k) if body.top_k is not None else None,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias or {},
        # OpenAI's seeds may be negative; ours are 63 bits.
        seed=None if body.seed is None else body.seed % 2**63,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens,
        n=body.n,
    )
    if body.structured_outputs is not None:
        _hold(sampling, _structured_grammar(body.structured_outputs), "structured_outputs")
    return sampling


# --- what an answer is held to ---------------------------------------------------------------------------------------------


def _hold(sampling: pb.SamplingParams, grammar: pb.Grammar, param: str) -> None:
    if sampling.HasField("grammar"):
        raise InvalidRequest(f"{param} is given, and the answer is held to something else already", param)
    sampling.grammar.CopyFrom(grammar)


def _structured_grammar(wanted: StructuredOutputs) -> pb.Grammar:
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"structured_outputs has {len(given)} of its fields, needs exactly 1", "structured_outputs"
        )
    if wanted.json is not None:
        return pb.Grammar(json_schema=json.dumps(wanted.json))
    if wanted.choice is not None:
        return pb.Grammar(lark="start: " + " | ".join(map(json.dumps, wanted.choice)))
    return pb.Grammar(regex=wanted.regex) if wanted.regex is not None else pb.Grammar(lark=wanted.grammar or "")


def _response_grammar(wanted: ResponseFormat | None) -> pb.Grammar | None:
    if wanted is None or wanted.type == "text":
        return None
    schema: JsonObject | None = None
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidRequest("response_format.json_schema is missing", "response_format.json_schema")
        schema = wanted.json_schema.schema
    return pb.Grammar(json_schema=json.dumps({"type": "object"} if schema is None else schema))


# --- conversations and tools -----------------------------------------------------------------------------------------------


def _message(number: int, message: MessageBody) -> pb.ChatMessage:
    where = f"messages[{number}]"
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequest(f"{where}.content is missing", f"{where}.content")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"{where}.tool_calls is of an assistant's message alone", f"{where}.tool_calls")
    calls = [
        pb.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or []
    ]
    return pb.ChatMessage(
        # Templates know the older name alone.
        role="system" if message.role == "developer" else message.role,
        content=_text(where, message),
        name=message.name or "",
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
    )


def _text(where: str, message: MessageBody) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    texts = []
    for number, part in enumerate(message.content):
        param = f"{where}.content[{number}]"
        if part.type != "text":
            raise InvalidRequest(f"{param} is of type {part.type[:100]!r}, and the model reads text alone", param)
        if part.text is None:
            raise InvalidRequest(f"{param}.text is missing", f"{param}.text")
        texts.append(part.text)
    return "\n".join(texts)


def _offer_tools(body: ChatBody, chat: pb.Chat, sampling: pb.SamplingParams, chat_template: str) -> Offer | None:
    """Puts the tools before the model, and forces a call where one is asked for. None: the answer is text."""
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if not body.tools:
        if choice not in ("none", "auto"):
            raise InvalidRequest("tool_choice asks for a call, and there are no tools", "tool_choice")
        return None
    functions = [tool.function for tool in body.tools]
    names = [function.name for function in functions]
    if twice := next((name for name, group in itertools.groupby(sorted(names)) if len(list(group)) > 1), None):
        raise InvalidRequest(f"there are two tools with the name {twice!r}", "tools")
    if choice == "none":
        return None
    if sampling.HasField("grammar"):
        raise InvalidRequest(
            "the answer is held to a form, which leaves no room for calls: tool_choice must be 'none' then",
            "tool_choice",
        )
    way = format_of(chat_template)
    several = body.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        wanted = [function for function in functions if function.name == choice.function.name]
        if not wanted:
            raise InvalidRequest(
                f"tool_choice names {choice.function.name[:100]!r}, which is not among the tools", "tool_choice"
            )
        sampling.grammar.lark = way.grammar(wanted, several=False)
    elif choice == "required":
        sampling.grammar.lark = way.grammar(functions, several=several)
    chat.tools_json = "[" + ",".join(_shown(tool) for tool in body.tools) + "]"
    return Offer(way, frozenset(names), several)


def _shown(tool: Tool) -> str:
    """A tool in the order of keys in which models saw tools: name, description, parameters."""
    function: Function = tool.function
    shown: JsonObject = {"name": function.name}
    if function.description is not None:
        shown["description"] = function.description
    if function.parameters is not None:
        shown["parameters"] = function.parameters
    return msgspec.json.encode({"type": "function", "function": shown}).decode()
