"""The router's HTTP port, as the `openai` client sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

from kvpool.keys import tokens_from_bytes
from protos import tandem_pb2
from protos.control import Dispatch, TokenLogprobs, Tokens
from router.access import Caller
from tests.router.fake_cluster import LONG, collect, reference
from tests.router.http.conftest import HttpRouter, saying

USER: list[Any] = [{"role": "user", "content": LONG}]
RENDERED = f"user: {LONG}\n"
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def with_logprobs(message: Tokens) -> list[Tokens]:
    logprobs = [TokenLogprobs(-0.5, [(97, -0.5), (0xC3, float("-inf"))]) for _ in message.token_ids]
    return [Tokens(message.fence, message.index, message.position, message.token_ids, logprobs, message.finish_reason)]


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "tandem"
    with pytest.raises(openai.NotFoundError, match="'a/b' is not served here, 'fake' is"):
        client.models.retrieve("a/b")


def test_a_completion(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("prefill-0", "prefill")
    router.add("decode-0", "decode")
    raw = client.completions.with_raw_response.create(model="fake", prompt=LONG, max_tokens=20)
    answer = raw.parse()
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, reference(LONG, 20), "length")
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(LONG), 20)
    assert answer.usage.total_tokens == len(LONG) + 20
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    request_id = raw.headers["x-request-id"]
    assert answer.id == f"cmpl-{request_id}"
    assert router.stub.Explain(tandem_pb2.ExplainRequest(request_id=request_id)).outcome == "completed"


def test_several_prompts_have_their_choices_in_order(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode")
    prompts = [f"{number}: {LONG}" for number in range(3)]
    expected = [reference(prompt, 9, index) for prompt in prompts for index in range(2)]
    answer = client.completions.create(model="fake", prompt=prompts, max_tokens=9, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (sum(map(len, prompts)), 54)
    ids = [list(prompt.encode()) for prompt in prompts]
    texts = {}
    for piece in client.completions.create(model="fake", prompt=ids, max_tokens=9, n=2, stream=True):
        for choice in piece.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert [texts[index] for index in range(6)] == expected


def test_an_echo_shows_the_prompt_first(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode")
    for prompt in (LONG, list(LONG.encode())):
        answer = client.completions.create(model="fake", prompt=prompt, max_tokens=5, echo=True)
        assert answer.choices[0].text == LONG + reference(LONG, 5)


def test_a_chat(router: HttpRouter, client: openai.OpenAI) -> None:
    decode = router.add("decode-0", "decode")
    answer = client.chat.completions.create(
        model="fake", messages=USER, max_completion_tokens=12, n=2, service_tier="flex"
    )
    assert [choice.message.content for choice in answer.choices] == [reference(RENDERED, 12, i) for i in range(2)]
    assert {(choice.message.role, choice.finish_reason) for choice in answer.choices} == {("assistant", "length")}
    assert answer.choices[0].message.tool_calls is None
    assert answer.service_tier == "flex"
    (dispatch,) = decode.seen(Dispatch)
    assert bytes(tokens_from_bytes(dispatch.token_ids)) == RENDERED.encode()
    assert dispatch.sampling.temperature == 1.0


def test_a_streamed_chat_adds_up(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode")
    stream = client.chat.completions.create(
        model="fake", messages=USER, max_tokens=30, n=2, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert len({piece.id for piece in pieces}) == 1
    for index in range(2):
        choices = [choice for piece in pieces for choice in piece.choices if choice.index == index]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == reference(RENDERED, 30, index)
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert [piece.usage is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].choices == []
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 60


def test_a_streamed_completion_adds_up(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode")
    pieces = list(client.completions.create(model="fake", prompt=LONG, max_tokens=30, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == reference(LONG, 30)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert all(piece.usage is None for piece in pieces)


def test_many_streams_at_once_by_the_asynchronous_client(router: HttpRouter) -> None:
    router.add("prefill-0", "prefill")
    router.add("decode-0", "decode")

    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        messages: list[Any] = [{"role": "user", "content": f"{number}"}]
        expected = reference(f"user: {number}\n", 20)
        stream = await client.chat.completions.create(model="fake", messages=messages, max_tokens=20, stream=True)
        assert "".join([piece.choices[0].delta.content or "" async for piece in stream]) == expected
        whole = await client.chat.completions.create(model="fake", messages=messages, max_tokens=20)
        assert whole.choices[0].message.content == expected

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", timeout=120.0) as client:
            await asyncio.gather(*(one(client, number) for number in range(16)))

    asyncio.run(all_of_them())


def test_http_and_grpc_ask_for_the_same(router: HttpRouter, client: openai.OpenAI) -> None:
    decode = router.add("decode-0", "decode")
    asked = {"temperature": 0.7, "top_p": 0.9, "seed": 7, "max_tokens": 8, "logit_bias": {5: -1.5}}
    collect(router.ask(LONG, **asked))
    client.completions.create(model="fake", prompt=LONG, **asked)
    grpc, http = (dispatch.sampling for dispatch in decode.seen(Dispatch))
    assert http == grpc


def test_log_probabilities_in_the_form_of_chats(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode", tamper=with_logprobs)
    asked: Any = {"model": "fake", "messages": USER, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert [item.token for item in whole.content] == list(reference(RENDERED, 3))
    assert whole.content[0].bytes == list(reference(RENDERED, 1).encode())
    tops = [(top.token, top.bytes, top.logprob) for top in whole.content[0].top_logprobs]
    assert tops == [("a", [97], -0.5), ("�", [0xC3], -9999.0)]
    pieces = [piece.choices[0] for piece in client.chat.completions.create(**asked, stream=True)]
    assert [item for piece in pieces if piece.logprobs for item in piece.logprobs.content or []] == whole.content


def test_log_probabilities_in_the_form_of_completions(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode", tamper=with_logprobs)
    asked: Any = {"model": "fake", "prompt": LONG, "max_tokens": 3, "logprobs": 2}
    whole = client.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    text = reference(LONG, 3)
    assert whole.tokens == list(text)
    assert whole.token_logprobs == [-0.5] * 3
    assert whole.text_offset == [0, 1, 2]
    assert whole.top_logprobs is not None
    assert whole.top_logprobs[0] == {"a": -0.5, "bytes:\\xc3": -9999.0, text[0]: -0.5}
    pieces = [piece.choices[0].logprobs for piece in client.completions.create(**asked, stream=True)]
    assert [offset for piece in pieces if piece for offset in piece.text_offset or []] == [0, 1, 2]
    assert [token for piece in pieces if piece for token in piece.tokens or []] == whole.tokens


CALLS = (
    'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "add"}</tool_call>'
)


def test_tools_are_shown_and_calls_are_read_back(router: HttpRouter, client: openai.OpenAI) -> None:
    decode = router.add("decode-0", "decode", tamper=saying(CALLS, "No."))
    answer = client.chat.completions.create(model="fake", messages=USER, tools=[ADD], n=2)
    called, plain = answer.choices
    assert called.finish_reason == "tool_calls"
    assert called.message.content == "I add."
    assert called.message.tool_calls is not None
    functions = [(call.function.name, json.loads(call.function.arguments)) for call in called.message.tool_calls]
    assert functions == [("add", {"a": 1}), ("add", {})]
    ids = [call.id for call in called.message.tool_calls]
    assert len(set(ids)) == 2
    assert all(len(one) == 9 and one.isalnum() for one in ids)
    assert (plain.finish_reason, plain.message.content, plain.message.tool_calls) == ("stop", "No.", None)
    (dispatch,) = decode.seen(Dispatch)
    prompt = bytes(tokens_from_bytes(dispatch.token_ids)).decode()
    assert prompt == f"tools: {json.dumps([ADD], separators=(',', ':'))}\n{RENDERED}"


def test_streamed_calls_are_whole_and_come_behind_the_text(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode", tamper=saying(CALLS))
    stream = client.chat.completions.create(model="fake", messages=USER, tools=[ADD], stream=True)
    choices = [piece.choices[0] for piece in stream]
    assert "".join(choice.delta.content or "" for choice in choices) == "I add."
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert [(call.index, call.function and call.function.arguments) for call in calls] == [(0, '{"a": 1}'), (1, "{}")]
    assert choices[-1].finish_reason == "tool_calls"


def test_a_client_that_wants_one_call_gets_one(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode", tamper=saying(CALLS))
    answer = client.chat.completions.create(model="fake", messages=USER, tools=[ADD], parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls or []) == 1


def test_calls_go_back_with_their_results(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode", tamper=saying(CALLS))
    answer = client.chat.completions.create(model="fake", messages=USER, tools=[ADD])
    said = answer.choices[0].message
    assert said.tool_calls is not None
    results = [{"role": "tool", "tool_call_id": call.id, "content": "3"} for call in said.tool_calls]
    messages: list[Any] = [*USER, said.model_dump(), *results]
    again = client.chat.completions.create(model="fake", messages=messages, tools=[ADD])
    assert again.choices[0].message.tool_calls


@pytest.fixture
def grammars(router: HttpRouter, monkeypatch: pytest.MonkeyPatch) -> list[tandem_pb2.Grammar]:
    """Notes the grammars that reach the router, whose fake workers hold to none."""
    seen: list[tandem_pb2.Grammar] = []
    generate = router.server.generate

    async def noting(
        request: tandem_pb2.GenerateRequest, budget_s: float | None, caller: Caller
    ) -> AsyncIterator[tandem_pb2.GenerateResponse]:
        seen.append(tandem_pb2.Grammar.FromString(request.sampling.grammar.SerializeToString()))
        request.sampling.ClearField("grammar")
        async for event in generate(request, budget_s, caller):
            yield event

    monkeypatch.setattr(router.server, "generate", noting)
    return seen


def test_forms_and_forced_calls_reach_the_router_as_grammars(
    router: HttpRouter, client: openai.OpenAI, grammars: list[tandem_pb2.Grammar]
) -> None:
    router.add("decode-0", "decode")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    client.chat.completions.create(model="fake", messages=USER, max_tokens=2, response_format=form)
    client.completions.create(
        model="fake", prompt="x", max_tokens=2, extra_body={"structured_outputs": {"regex": "a+"}}
    )
    client.chat.completions.create(model="fake", messages=USER, max_tokens=2, tools=[ADD], tool_choice="required")
    assert [grammar.WhichOneof("kind") for grammar in grammars] == ["json_schema", "regex", "lark"]
    assert json.loads(grammars[0].json_schema) == schema


@pytest.mark.parametrize(
    ("fields", "kind", "param", "message"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature", r"temperature is -1, must be in \[0, 100\]"),
        ({"top_p": 0}, openai.BadRequestError, "top_p", "top_p is 0"),
        ({"n": 17}, openai.BadRequestError, "n", r"n is 17, must be in \[1, 16\]"),
        ({"max_tokens": 40_000}, openai.BadRequestError, "max_tokens", "max_tokens is 40000"),
        ({"stop": [""]}, openai.BadRequestError, "stop", "stop string 0 has 0 bytes"),
        ({"logit_bias": {"300": 1}}, openai.BadRequestError, "logit_bias", "logit_bias has token id 300"),
        ({"model": "gpt"}, openai.NotFoundError, "model", "'gpt' is not served here, 'fake' is"),
        ({"extra_body": {"best": 1}}, openai.BadRequestError, "best", "best is not supported"),
        ({"extra_headers": {"x-request-timeout-s": "soon"}}, openai.BadRequestError, "x-request-timeout-s", "'soon'"),
    ],
)
def test_refusals_name_their_field(
    client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str, message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(kind, match=message) as caught:
            client.completions.create(**{"model": "fake", "prompt": "x", "stream": stream} | fields)
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"


def test_a_deadline_is_a_status_before_the_first_token_and_an_event_after_it(
    router: HttpRouter, client: openai.OpenAI
) -> None:
    router.add("decode-0", "decode", step_s=0.02)
    hurried = client.with_options(default_headers={"x-request-timeout-s": "0.6"})
    with pytest.raises(openai.InternalServerError) as caught:
        hurried.completions.create(model="fake", prompt=LONG, max_tokens=1000)
    assert caught.value.status_code == 504
    assert caught.value.code == "deadline_exceeded"
    pieces: list[str] = []
    stream = hurried.completions.create(model="fake", prompt=LONG, max_tokens=1000, stream=True)
    with pytest.raises(openai.APIError, match=r"0\.60 s") as broken:
        pieces.extend(piece.choices[0].text for piece in stream)
    assert pieces
    assert reference(LONG, 1000).startswith("".join(pieces))
    assert broken.value.code == "deadline_exceeded"


def test_one_prompt_that_is_refused_ends_all(router: HttpRouter, client: openai.OpenAI) -> None:
    router.add("decode-0", "decode", step_s=0.01)
    with pytest.raises(openai.BadRequestError, match="20001"):
        client.completions.create(model="fake", prompt=[LONG, "x" * 20_001], max_tokens=1000)
    assert len(router.server.answers) == 0


def test_no_room_is_said_with_the_time_to_come_back(make_http_router: Callable[..., HttpRouter]) -> None:
    router = make_http_router(limits={"max_active_requests": 1})
    router.add("decode-0", "decode", step_s=0.01)
    with (
        openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client,
        client.completions.create(model="fake", prompt=LONG, max_tokens=1000, stream=True) as stream,
    ):
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="fake", prompt=LONG)
    assert caught.value.response.headers["retry-after"] == "1"
