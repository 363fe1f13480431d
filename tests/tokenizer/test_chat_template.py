"""A conversation becomes the text the model was trained on; a hostile or broken template becomes a refusal."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tandem.errors import InvalidRequest
from tandem.tokenizer import template_sandbox
from tandem.tokenizer.chat_template import ChatTemplate, Message, ToolCall
from tandem.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.conftest import CHATML, write_gguf, write_hf


def test_smollm2_renders_its_system_prompt_and_turns(smollm2: Tokenizer) -> None:
    text = smollm2.render_chat([Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Bye")])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.encode(text)
    assert ids[0] == 1
    assert ids.count(2) == 4


def test_a_directorys_template_comes_from_either_file(tmp_path: Path) -> None:
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    directory = write_hf(tmp_path / "hf")
    assert load_tokenizer(directory).render_chat([Message("user", "Hi")]) == expected
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    assert load_tokenizer(write_hf(directory, chat_template=named)).render_chat([Message("user", "Hi")]) == expected
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}")
    assert load_tokenizer(directory).render_chat([Message("user", "Hi")]) == "<|im_start|>Hi<|im_end|>"


def test_a_model_without_a_template_refuses_chats(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", drop="template"))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat([Message("user", "Hi")])


def test_the_usual_helpers_work() -> None:
    source = (
        "{%- for m in messages %}{%- if loop.index > 2 %}{%- break %}{%- endif %}{{ m | tojson }}{%- endfor %}"
        "{{ '-' * 3 }}{{ strftime_now('%Y') | length }}"
    )
    text = ChatTemplate(source).render([Message("user", "<b> ü"), Message("assistant", "x"), Message("user", "y")])
    first, second = {"role": "user", "content": "<b> ü"}, {"role": "assistant", "content": "x"}
    assert text == json.dumps(first, ensure_ascii=False) + json.dumps(second) + "---4"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{% for", "can't be compiled"),
        ("{{ messages[5].content }}", "failed: UndefinedError"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "failed: SecurityError"),
        ("{{ messages.append(1) }}", "failed: SecurityError"),
        ("{{ 'a' * 10000000 }}", "past the limit"),
        ("{{ 10000000 * 'a' }}", "past the limit"),
        ("{{ 9 ** 9 ** 9 }}", "past the limit"),
        ("{% for i in range(1000000000) %}{% endfor %}", "failed: OverflowError"),
        ("{% set a = 'a' * 1000 %}{% for i in range(99999) %}{{ a }}{% endfor %}", "longer than"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more work"),
        ("{% set s = 'a' * 999999 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}", "more work"),
        ("{% set s = 'a' * 999999 %}{% for a in s for b in s if b == 'c' %}{% endfor %}", "can't be compiled"),
        ("{% for a in 'a' * 999999 if a == 'b' %}{% for b in range(9) %}{% endfor %}{% endfor %}" * 9, "more work"),
        ("{% macro m() %}{{ m() ~ m() }}{% endmacro %}{{ m() }}", "failed: RecursionError"),
        ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}", "more work"),
        ("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "more work"),
        ("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", "more work"),
        ("{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", "more work"),
        ("{% set n = namespace(s=9) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}", "bits"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set t %}{{ n.s }}{{ n.s }}{% endset %}"
            "{% set n.s = t %}{% endfor %}",
            "more work",
        ),
        (
            "{% set n = namespace(l=[]) %}{% set s = 'a' * 999999 %}{% for i in range(99999) %}"
            "{% set n.l = n.l + [s[1:]] %}{% endfor %}",
            "more work",
        ),
        ("{% set s = 'a' * 99999 %}{{ s.replace('a', s) }}", "more work"),
        ("{% set s = 'a' * 99999 %}{{ s | replace('a', s) }}", "more work"),
        ("{% set s = 'a' * 99999 %}{{ s.join(s) }}", "more work"),
        ("{% set s = 'a' * 99999 %}{{ s | join(s) }}", "more work"),
        ("{{ ['a' * 999999] * 999999 }}", "more work"),
        ("{{ (['a' * 999999] * 999999) | tojson }}", "more work"),
        ("{{ (['a' * 999999] * 999999) | string }}", "more work"),
        ("{{ [1] | tojson(indent=999999999) }}", "indents JSON"),
        ("{{ 'a'.center(999999999) }}", "more work"),
        ("{{ 'a' | center(999999999) }}", "more work"),
        ("{{ 'a'.zfill(999999999) }}", "more work"),
        ("{{ 'a' | indent(999999999, true) }}", "more work"),
        ("{{ '\t'.expandtabs(999999999) }}", "more work"),
        ("{{ '%999999999d' % 1 }}", "formats with a width"),
        ("{{ '%*d' % (999999999, 1) }}", "formats with a width"),
        ("{{ '%999999999d' | format(1) }}", "formats with a width"),
        ("{{ '{:999999999}'.format(1) }}", "formats with a width"),
        ("{{ '{:{}}'.format(1, 999999999) }}", "formats with a width"),
        ("{{ 'a'.translate({97: 'a'}) }}", "which there is not"),
        ("{{ (1).to_bytes(999999999, 'big') }}", "method of a number"),
        ("{{ ('a' * 999999).strip('b' * 999999) }}", "strips more than"),
        ("{{ 1 | round(999999999, 'ceil') }}", "rounds to more"),
        ("{{ [[1]] | sum(start=[]) }}", "no numbers"),
        ("{{ [1] | batch(999999999, 0) | list }}", "can't be compiled"),
        ("{{ lipsum(99999) }}", "failed: UndefinedError"),
        ("{% include 'x' %}", "failed: TypeError"),
        ("x" * 300_000, "the limit is 262144"),
    ],
)
def test_a_template_that_fails_is_a_refusal_with_its_reason(source: str, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(source).render([Message("user", "Hi")])
    assert time.monotonic() - begin < 10


def test_what_is_slow_and_does_not_grow_ends_by_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_CPU_S", 0.2)
    source = "{% set s = 'a' * 999999 %}{% set t = 'a' * 999999 %}"
    source += "{% for i in range(99999) %}{% if s == t %}{% endif %}{% endfor %}"
    with pytest.raises(InvalidRequest, match=r"processor time than the limit of 0\.2 s"):
        ChatTemplate(source).render([Message("user", "Hi")])


def test_a_long_conversation_may_cost_what_its_length_is_worth() -> None:
    source = "{% for m in messages %}{% for i in range(20) %}{% if m.content | trim | upper == 'x' %}y{% endif %}"
    source += "{% endfor %}{% endfor %}"
    assert ChatTemplate(source).render([Message("user", "word " * 20_000)] * 40) == ""


def test_a_conversation_without_messages_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="0 messages"):
        ChatTemplate(CHATML).render([])


HERMES = (
    "{% if tools is not none %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} "
    "| tojson }}</tool_call>{% endfor %}{% if m.role == 'tool' %} ({{ m.name }}, {{ m.tool_call_id }}){% endif %}{% endfor %}"
)
TOOLS = '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'


def test_tools_calls_and_their_results_are_shown_as_hugging_faces_templates_expect_them() -> None:
    text = ChatTemplate(HERMES).render(
        [
            Message("user", "2 + 3?"),
            Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 2, "b": 3}', "c1"),)),
            Message("tool", "5", name="add", tool_call_id="c1"),
        ],
        TOOLS,
    )
    assert text == (
        '<tools>{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}</tools>'
        '[user] 2 + 3?[assistant] <tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
        "[tool] 5 (add, c1)"
    )


def test_without_tools_a_template_sees_none() -> None:
    for none in ("", "[]"):
        assert ChatTemplate(HERMES).render([Message("user", "Hi")], none) == "[user] Hi"


@pytest.mark.parametrize(
    ("template", "call", "tools", "message"),
    [
        (CHATML, ToolCall("f", "{}"), TOOLS, "1 tools are given, and the model's chat template shows none"),
        (HERMES, ToolCall("f", "[1]"), "", "arguments of the call of 'f' in message 0 are a list, must be an object"),
        (HERMES, ToolCall("f", "{"), "", "arguments of the call of 'f' in message 0 can't be read as JSON"),
        (HERMES, ToolCall("f", '{"a":' + "[" * 100_000), "", "can't be read as JSON"),
        (HERMES, ToolCall("f", "{}"), "{}", "tools must be a JSON array of objects"),
        (HERMES, ToolCall("f", "{}"), "[1]", "tools must be a JSON array of objects"),
        (HERMES, ToolCall("f", "{}"), "[", "tools can't be read as JSON"),
    ],
)
def test_tools_and_calls_that_cant_be_shown_are_refused(
    template: str, call: ToolCall, tools: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(template).render([Message("assistant", "", tool_calls=(call,))], tools)
