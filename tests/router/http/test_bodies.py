"""Bodies of OpenAI's paths: what is read, and what is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.openai.bodies import Body, ChatBody, CompletionBody, read_body
from tandem.errors import InvalidRequest

HI = {"messages": [{"role": "user", "content": "hi"}]}


def refusal(kind: type[Body], data: bytes | dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read_body(data if isinstance(data, bytes) else json.dumps(data).encode(), kind)
    return caught.value


def test_what_changes_no_answer_is_accepted() -> None:
    more = {"user": "me", "store": True, "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"}
    says_nothing = {"functions": None, "audio": None, "temperature": None, "tools": None}
    body = read_body(json.dumps(HI | more | says_nothing | {"modalities": ["text"]}).encode(), ChatBody)
    assert body.messages[0].content == "hi"


@pytest.mark.parametrize(
    ("more", "message", "param"),
    [
        ({"best_answer": 1}, "best_answer is not supported", "best_answer"),
        ({"functions": [{}]}, "functions is not supported", "functions"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported", "reasoning_effort"),
        ({"chat_template": "{{ x }}"}, "chat_template is not supported", "chat_template"),
        ({"n": "2"}, "n: Expected `int | null`, got `str`", "n"),
        ({"n": 1.5}, "n: Expected `int | null`, got `float`", "n"),
        ({"n": True}, "n: Expected `int | null`, got `bool`", "n"),
        ({"max_tokens": -1}, "max_tokens: Expected `int` >= 0", "max_tokens"),
        ({"max_tokens": 2**32}, "max_tokens: Expected `int` <= 4294967295", "max_tokens"),
        ({"seed": 2**63}, "seed: Expected `int` <= 9223372036854775807", "seed"),
        ({"top_logprobs": 21}, "top_logprobs: Expected `int` <= 20", "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias: Expected `int`, got `str`", "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias[...]: Expected `float`, got `str`", "logit_bias[...]"),
        ({"messages": []}, "messages: Expected `array` of length >= 1", "messages"),
        ({"messages": [{"role": "user", "x": 1}]}, "messages[0].x is not supported", "messages[0].x"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing", "messages[0].role"),
        ({"messages": [{"role": "boss"}]}, "messages[0].role: Invalid enum value 'boss'", "messages[0].role"),
        ({"response_format": {"type": "xml"}}, "response_format.type: Invalid", "response_format.type"),
        ({"service_tier": "priority"}, "service_tier: Invalid enum value 'priority'", "service_tier"),
        (
            {"tools": [{"function": {"name": "no spaces"}}]},
            "tools[0].function.name: Expected",
            "tools[0].function.name",
        ),
        ({"modalities": ["audio"]}, "modalities[0]: Invalid enum value 'audio'", "modalities[0]"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_name(more: dict[str, Any], message: str, param: str) -> None:
    error = refusal(ChatBody, HI | more)
    assert message in str(error)
    assert error.param == param


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": NaN}', "not JSON"),
        (b'{"prompt": "a"} b', "not JSON"),
        (b"[]", "the body: Expected `object`, got `array`"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 12 is 0xff"),
        (b'{"prompt": "a", "user": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"prompt": "a", "user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "user": ' + b'{"a":' * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature: Number out of range"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "seed: "),
        (b'{"prompt": [1, -2]}', "prompt[1]: Expected `int` >= 0"),
        (b'{"prompt": [[1.5]]}', "prompt[0][0]: Expected `int`, got `float`"),
        (b'{"prompt": null}', "prompt: Expected"),
        (b'{"prompt": "a", "' + b"x" * 10_000 + b'": 1}', "xxx is not supported"),
        (b'{"prompt": "a", "suffix": "b"}', "suffix is not supported"),
    ],
)
def test_malformed_bodies_are_refused(data: bytes, message: str) -> None:
    error = refusal(CompletionBody, data)
    assert message in str(error)
    assert len(str(error)) < 500


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(repr).map(str.encode)
)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for kind in (ChatBody, CompletionBody):
        try:
            read_body(data, kind)
        except InvalidRequest:
            pass


@given(
    st.dictionaries(
        st.sampled_from([*ChatBody.__struct_fields__, "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["role", "content"]), inner),
        ),
    )
)
def test_any_values_of_fields_are_read_or_refused(body: dict[str, Any]) -> None:
    try:
        read_body(json.dumps(body).encode(), ChatBody)
    except InvalidRequest:
        pass
