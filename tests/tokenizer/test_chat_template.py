"""A conversation becomes the text the model was trained on; a hostile or broken template becomes a refusal."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tandem.errors import InvalidRequest
from tandem.tokenizer.chat_template import ChatTemplate
from tandem.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.conftest import CHATML, write_gguf, write_hf


def test_smollm2_renders_its_system_prompt_and_turns(smollm2: Tokenizer) -> None:
    text = smollm2.render_chat([("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")])
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
    assert load_tokenizer(directory).render_chat([("user", "Hi")]) == expected
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    assert load_tokenizer(write_hf(directory, chat_template=named)).render_chat([("user", "Hi")]) == expected
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}")
    assert load_tokenizer(directory).render_chat([("user", "Hi")]) == "<|im_start|>Hi<|im_end|>"


def test_a_model_without_a_template_refuses_chats(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", drop="template"))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat([("user", "Hi")])


def test_the_usual_helpers_work() -> None:
    source = (
        "{%- for m in messages %}{%- if loop.index > 2 %}{%- break %}{%- endif %}{{ m | tojson }}{%- endfor %}"
        "{{ '-' * 3 }}{{ strftime_now('%Y') | length }}"
    )
    text = ChatTemplate(source).render([("user", "<b> ü"), ("assistant", "x"), ("user", "y")])
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
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "longer than"),
    ],
)
def test_a_template_that_fails_is_a_refusal_with_its_reason(source: str, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(source).render([("user", "Hi")])
    assert time.monotonic() - begin < 10


def test_a_conversation_without_messages_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="0 messages"):
        ChatTemplate(CHATML).render([])
