"""OpenAI's bodies as requests of tandem.v1."""

from __future__ import annotations

import json
from typing import Any

import pytest

from protos import tandem_pb2 as pb
from router.http.openai.bodies import ChatBody, CompletionBody, read_body
from router.http.openai.requests import Asked, chat_asked, completion_asked
from tandem.errors import InvalidRequest

HERMES = "{% if tools %}…<tool_call>…{% endif %}"
ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
SUB = {"type": "function", "function": {"name": "sub"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "integer"}}}


def chat(template: str = HERMES, **fields: Any) -> Asked:
    body = {"messages": [{"role": "user", "content": "hi"}]} | fields
    return chat_asked(read_body(json.dumps(body).encode(), ChatBody), template)


def completion(**fields: Any) -> Asked:
    return completion_asked(read_body(json.dumps({"prompt": "hi"} | fields).encode(), CompletionBody))


def test_what_is_unset_is_left_to_the_server_but_for_the_temperature() -> None:
    for asked in (chat(), completion()):
        (request,) = asked.requests
        assert request.sampling == pb.SamplingParams(temperature=1.0)
        assert not request.batch
        assert (asked.n, asked.stream, asked.include_usage, asked.logprobs) == (1, False, False, False)


def test_every_parameter_has_its_place() -> None:
    common = {
        "n": 2,
        "stop": ["a", "b"],
        "seed": -1,
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "logit_bias": {"7": -100, "8": 1.5},
        "top_k": 5,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [9],
    }
    expected = pb.SamplingParams(
        n=2,
        stop=["a", "b"],
        seed=2**63 - 1,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        logit_bias={7: -100.0, 8: 1.5},
        top_k=5,
        min_p=0.125,
        repetition_penalty=1.5,
        min_tokens=3,
        ignore_eos=True,
        stop_token_ids=[9],
        max_tokens=10,
        num_logprobs=4,
    )
    assert completion(max_tokens=10, logprobs=4, **common).requests[0].sampling == expected
    for limit in ("max_tokens", "max_completion_tokens"):
        assert chat(**{limit: 10}, logprobs=True, top_logprobs=4, **common).requests[0].sampling == expected
    assert completion(top_k=-1, stop="x").requests[0].sampling == pb.SamplingParams(
        temperature=1.0, top_k=0, stop=["x"]
    )


def test_the_flexible_tier_is_the_batch_class() -> None:
    assert [chat(service_tier=tier).requests[0].batch for tier in ("flex", "auto", "default")] == [True, False, False]
    assert completion(service_tier="flex").requests[0].batch


def test_prompts_have_four_forms() -> None:
    text, ids = {"prompt": "a"}, {"token_ids": pb.TokenIds(ids=[1, 2])}
    for prompt, expected in (
        ("a", [text]),
        (["a", "a"], [text, text]),
        ([1, 2], [ids]),
        ([[1, 2], [1, 2]], [ids, ids]),
    ):
        requests = completion(prompt=prompt, temperature=0).requests
        assert list(requests) == [
            pb.GenerateRequest(sampling=pb.SamplingParams(temperature=0.0), **one) for one in expected
        ]


def test_content_is_text_or_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": "me"}]
    sent = chat(messages=messages).requests[0].chat.messages
    assert [(m.role, m.content, m.name) for m in sent] == [("system", "s", ""), ("user", "a\nb", "me")]


def test_tools_calls_and_results_go_to_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    asked = chat(messages=messages, tools=[ADD, SUB])
    sent = asked.requests[0].chat
    assert sent.messages[1] == pb.ChatMessage(
        role="assistant", tool_calls=[pb.ToolCall(id="c1", name="add", arguments='{"a": 1}')]
    )
    assert sent.messages[2] == pb.ChatMessage(role="tool", content="1", tool_call_id="c1")
    assert json.loads(sent.tools_json) == [ADD, SUB]
    assert asked.offer is not None
    assert asked.offer.names == {"add", "sub"}
    assert not asked.requests[0].sampling.HasField("grammar")


def test_a_choice_of_none_shows_no_tools() -> None:
    asked = chat(template="", tools=[ADD], tool_choice="none")
    assert asked.offer is None
    assert asked.requests[0].chat.tools_json == ""


def test_a_required_or_named_call_is_forced() -> None:
    required = chat(tools=[ADD, SUB], tool_choice="required").requests[0].sampling.grammar.lark
    assert '\\"add\\"' in required
    assert '\\"sub\\"' in required
    one = chat(tools=[ADD, SUB], tool_choice={"type": "function", "function": {"name": "sub"}})
    assert '\\"add\\"' not in one.requests[0].sampling.grammar.lark
    assert len(json.loads(one.requests[0].chat.tools_json)) == 2


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, pb.Grammar(json_schema='{"type": "object"}')),
        ({"response_format": FORMAT}, pb.Grammar(json_schema='{"type": "integer"}')),
        ({"structured_outputs": {"json": {"type": "array"}}}, pb.Grammar(json_schema='{"type": "array"}')),
        ({"structured_outputs": {"regex": "a+"}}, pb.Grammar(regex="a+")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, pb.Grammar(lark='start: "a"')),
        ({"structured_outputs": {"choice": ["yes", '"no"']}}, pb.Grammar(lark='start: "yes" | "\\"no\\""')),
    ],
)
def test_an_answers_form_becomes_a_grammar(fields: dict[str, Any], grammar: pb.Grammar | None) -> None:
    sampling = chat(**fields).requests[0].sampling
    assert (sampling.grammar if sampling.HasField("grammar") else None) == grammar
    if "structured_outputs" in fields:
        assert completion(**fields).requests[0].sampling.grammar == grammar


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens is 1 and max_completion_tokens 2", "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs is 2, and logprobs is not true", "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "and stream is not true", "stream_options"),
        ({"tool_choice": "required"}, "there are no tools", "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools", "tool_choice"),
        ({"tools": [ADD, SUB, ADD]}, "two tools with the name 'add'", "tools"),
        ({"tools": [ADD], "template": "{{ tools }}"}, "none of the known forms of calls", "tools"),
        ({"tools": [ADD], "tool_choice": {"function": {"name": "mul"}}}, "'mul', which is not among", "tool_choice"),
        ({"tools": [ADD], "response_format": FORMAT}, "leaves no room for calls", "tool_choice"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": FORMAT},
            "held to something else already",
            "response_format",
        ),
        ({"structured_outputs": {}}, "has 0 of its fields", "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "has 2 of its fields", "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "is missing", "response_format.json_schema"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "is of type 'image_url', and the model reads text alone",
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "text is missing",
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
            "of an assistant's message alone",
            "messages[0].tool_calls",
        ),
    ],
)
def test_chats_that_make_no_sense_are_refused(fields: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert message in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"prompt": []}, "prompt has 0 entries", "prompt"),
        ({"prompt": ["a", 1]}, "prompt mixes", "prompt"),
        ({"prompt": ["a"] * 65}, "prompt has 65 entries, the limit is 64", "prompt"),
        ({"best_of": 2}, "best_of is 2, must be n, 1", "best_of"),
        ({"echo": True, "logprobs": 0}, "echo with logprobs", "echo"),
    ],
)
def test_completions_that_make_no_sense_are_refused(fields: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert message in str(caught.value)
    assert caught.value.param == param
