"""Chat templates: a conversation as the one text that the model was trained to continue.

Owns the Jinja2 environment, which is sandboxed and immutable, because a template comes with the model's files; its output is
bounded. Offers what Hugging Face's templates use (`raise_exception`, `strftime_now`, `tojson`, loop controls). Never tokenizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import InvalidRequest

MAX_RENDERED_CHARS = 32 * 2**20
_MAX_REPEAT = 1_000_000


class _Environment(ImmutableSandboxedEnvironment):
    """Also keeps `*` and `**` from building huge values."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and not (numbers and abs(left) <= _MAX_REPEAT and abs(right) <= 64):
            raise InvalidRequest("the chat template raises a number to a power past the limit of 64")
        if operator == "*" and not numbers:
            factor, sequence = (left, right) if isinstance(left, int) else (right, left)
            if not isinstance(factor, int) or len(sequence) * factor > _MAX_REPEAT:
                raise InvalidRequest(f"the chat template repeats a value past the limit of {_MAX_REPEAT}")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: object) -> NoReturn:
    raise InvalidRequest(f"the model's chat template refuses the conversation: {str(message)[:1000]}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: object) -> str:
    # Jinja2's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _tojson
    return environment


class ChatTemplate:
    """One model's template. A template that can't be compiled refuses every conversation, not the model."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._template: jinja2.Template | None = None
        self._problem = ""
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            self._problem = str(error)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text for `messages`, `(role, content)` each, up to where the assistant's answer begins.

        Raises InvalidRequest if there is no message, the template refuses them or fails, or the text is too long.
        """
        if not messages:
            raise InvalidRequest("the conversation has 0 messages, needs at least 1")
        if self._template is None:
            raise InvalidRequest(f"the model's chat template can't be compiled: {self._problem[:1000]}")
        conversation = [{"role": role, "content": content} for role, content in messages]
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(messages=conversation, add_generation_prompt=True, **self._tokens):
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise InvalidRequest(f"the rendered conversation is longer than {MAX_RENDERED_CHARS} characters")
        except InvalidRequest:
            raise
        except Exception as error:  # a template may raise anything
            message = f"the model's chat template failed: {type(error).__name__}: {str(error)[:1000]}"
            raise InvalidRequest(message) from error
        return "".join(parts)
