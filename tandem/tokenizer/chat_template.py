"""Chat templates: a conversation as the one text that the model was trained to continue.

Owns what templates are given: messages and tools in the form that they expect, and what Hugging Face's use (`raise_exception`,
`strftime_now`, `tojson`, loop controls). They come with the model's files, so they run in a sandbox that bounds what they do
(template_sandbox.py), and their output is bounded. Never tokenizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta

from tandem.errors import InvalidRequest
from tandem.tokenizer.template_sandbox import BoundedEnvironment, bounded, counted

MAX_RENDERED_CHARS = 32 * 2**20
MAX_TEMPLATE_CHARS = 256 * 1024
MAX_INDENT = 16


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made before: `arguments` is a JSON object, as text."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `tool_calls` are of an assistant's turn, `tool_call_id` is of a tool's; `name` says who speaks,
    for templates that show it."""

    role: str
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    @property
    def num_chars(self) -> int:
        """Of all its texts."""
        calls = sum(len(call.name) + len(call.arguments) + len(call.id) for call in self.tool_calls)
        return len(self.role) + len(self.content) + len(self.name) + len(self.tool_call_id) + calls


def _raise_exception(message: object) -> NoReturn:
    raise InvalidRequest(f"the model's chat template refuses the conversation: {str(message)[:1000]}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: object) -> str:
    # Jinja2's own filter escapes for HTML, which no model was trained on.
    if indent is not None and not (isinstance(indent, int) and indent <= MAX_INDENT):
        raise InvalidRequest(f"the chat template indents JSON by {str(indent)[:40]}, the limit is {MAX_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = counted("string", _tojson)
    return environment


def _shown(number: int, message: Message) -> dict[str, Any]:
    """A message as templates see it: arguments are objects there, not text."""
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        shown["name"] = message.name
    if message.tool_call_id:
        shown["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(number, call)}}
            for call in message.tool_calls
        ]
    return shown


def _arguments(number: int, call: ToolCall) -> dict[str, Any]:
    value = _parsed(call.arguments or "{}", f"arguments of the call of {call.name!r} in message {number}")
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InvalidRequest(
            f"arguments of the call of {call.name!r} in message {number} are a {kind}, must be an object"
        )
    return value


def _tools(tools_json: str) -> list[Any] | None:
    """What `tools` is in a template: None without any, as templates written for Hugging Face expect."""
    if not tools_json:
        return None
    value = _parsed(tools_json, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InvalidRequest("tools must be a JSON array of objects")
    return value or None


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} can't be read as JSON: {str(error)[:200]}") from error


class ChatTemplate:
    """One model's template. A template that can't be compiled refuses every conversation, not the model."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._template: jinja2.Template | None = None
        self._problem = ""
        self._shows_tools = False
        if len(source) > MAX_TEMPLATE_CHARS:
            self._problem = f"it has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARS}"
            return
        try:
            with bounded(len(source)):
                environment = _environment()
                self._template = environment.from_string(source)
                self._shows_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:  # the template's text may make the compiler raise anything
            self._problem = f"{type(error).__name__}: {error}"

    def render(self, messages: Sequence[Message], tools_json: str = "") -> str:
        """The text for `messages`, up to where the assistant's answer begins. `tools_json` is a JSON array of tools as OpenAI's
        API describes them; empty: none.

        Raises InvalidRequest if there is no message, a call's arguments or the tools are not what they must be, the template has
        no place for tools, refuses or fails, or the text is too long.
        """
        if not messages:
            raise InvalidRequest("the conversation has 0 messages, needs at least 1")
        if self._template is None:
            raise InvalidRequest(f"the model's chat template can't be compiled: {self._problem[:1000]}")
        conversation = [_shown(number, message) for number, message in enumerate(messages)]
        tools = _tools(tools_json)
        if tools and not self._shows_tools:
            raise InvalidRequest(
                f"{len(tools)} tools are given, and the model's chat template shows none", param="tools"
            )
        parts: list[str] = []
        size = 0
        try:
            num_chars = len(tools_json) + sum(message.num_chars for message in messages)
            with bounded(num_chars, len(messages)):
                for part in self._template.generate(
                    messages=conversation, tools=tools, documents=None, add_generation_prompt=True, **self._tokens
                ):
                    parts.append(part)
                    size += len(part)
                    if size > MAX_RENDERED_CHARS:
                        raise InvalidRequest(
                            f"the rendered conversation is longer than {MAX_RENDERED_CHARS} characters"
                        )
        except InvalidRequest:
            raise
        except Exception as error:  # a template may raise anything
            message = f"the model's chat template failed: {type(error).__name__}: {str(error)[:1000]}"
            raise InvalidRequest(message) from error
        return "".join(parts)
