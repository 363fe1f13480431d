"""Tools: how a model writes its calls, read back from its text; and the grammar of an answer that must be a call.

Owns the registry of the ways in which models write calls. Which one a model has is seen from its chat template. A call is one
only if it names a tool that was offered and its arguments are an object; everything else stays text, to the last character. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from router.http.openai.bodies import Function
from tandem.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Call:
    """One call: `arguments` is a JSON object, as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Read:
    """What a piece of an answer turned out to be: text that can be shown, and calls that are whole."""

    text: str = ""
    calls: tuple[Call, ...] = ()


class CallReader(Protocol):
    """Reads one sample. What it returns doesn't depend on how the text was split."""

    def push(self, text: str) -> Read:
        """Takes the next text."""

    def finish(self) -> Read:
        """The rest; to be called once, after the last text."""


def _call(value: object, key: str, names: frozenset[str]) -> Call | None:
    """`value` as a call, if it is one."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get(key, {})
    if not isinstance(arguments, dict):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class TaggedReader:
    """Calls between `<tool_call>` and `</tool_call>`, with text before, between and after them. White space next to a call is not
    shown."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, key: str, names: frozenset[str]) -> None:
        self._key = key
        self._names = names
        self._held = ""
        self._inside = False
        self._has_called = False

    def push(self, text: str) -> Read:
        self._held += text
        shown: list[str] = []
        calls: list[Call] = []
        while True:
            before, mark, after = self._held.partition(self.CLOSE if self._inside else self.OPEN)
            if not mark:
                break
            self._held = after
            if self._inside:
                self._take(before, self.CLOSE, shown, calls)
            else:
                shown.append(before.rstrip())
            self._inside = not self._inside
        if not self._inside:
            cut = self._certain()
            shown.append(self._held[:cut])
            self._held = self._held[cut:]
        return Read("".join(shown), tuple(calls))

    def finish(self) -> Read:
        shown: list[str] = []
        calls: list[Call] = []
        if self._inside:  # some models end their answer instead of the call
            self._take(self._held, "", shown, calls)
        elif not self._has_called or not self._held.isspace():
            shown.append(self._held)
        self._held = ""
        return Read("".join(shown), tuple(calls))

    def _take(self, body: str, close: str, shown: list[str], calls: list[Call]) -> None:
        call = _call(_json(body), self._key, self._names)
        if call is None:
            shown.append(self.OPEN + body + close)
        else:
            self._has_called = True
            calls.append(call)

    def _certain(self) -> int:
        """How much of what is held can't belong to a call: all but white space and the beginning of a mark at its end."""
        held = self._held
        size = next((n for n in range(len(self.OPEN) - 1, 0, -1) if held.endswith(self.OPEN[:n])), 0)
        return len(held[: len(held) - size].rstrip())


class _Kind(Enum):
    UNKNOWN = 0
    CALLS = 1
    TEXT = 2


class WholeReader:
    """An answer that is calls and nothing else, or text: its first characters say which. `mark` may stand before calls; mostly it
    is a special token, which is no text. Calls are a JSON array (`is_list`), or objects with `;` between."""

    def __init__(self, mark: str, is_list: bool, key: str, names: frozenset[str]) -> None:
        self._mark = mark
        self._is_list = is_list
        self._key = key
        self._names = names
        self._held = ""
        self._kind = _Kind.UNKNOWN

    def push(self, text: str) -> Read:
        self._held += text
        if self._kind is _Kind.UNKNOWN:
            self._kind = self._seen()
        return self._show() if self._kind is _Kind.TEXT else Read()

    def finish(self) -> Read:
        calls = self._calls() if self._kind is _Kind.CALLS else ()
        return Read(calls=calls) if calls else self._show()

    def _show(self) -> Read:
        text, self._held = self._held, ""
        return Read(text)

    def _seen(self) -> _Kind:
        rest = self._held.lstrip()
        if self._mark.startswith(rest):
            return _Kind.UNKNOWN
        for opening in ("[", "{") if self._is_list else ("{",):
            rest = rest.removeprefix(self._mark).lstrip()
            if not rest:
                return _Kind.UNKNOWN
            if not rest.startswith(opening):
                return _Kind.TEXT
            rest = rest[1:]
        return _Kind.CALLS

    def _calls(self) -> tuple[Call, ...]:
        """All calls, or none if anything else is there too."""
        rest = self._held.strip().removeprefix(self._mark).strip()
        values: list[object] = []
        decoder = json.JSONDecoder()
        try:
            while rest:
                value, end = decoder.raw_decode(rest)
                values.append(value)
                rest = rest[end:].lstrip("; \n\t\r")
        except (ValueError, RecursionError):
            return ()
        if self._is_list:
            if len(values) != 1 or not isinstance(values[0], list):
                return ()
            values = values[0]
        calls = [_call(value, self._key, self._names) for value in values]
        return tuple(call for call in calls if call is not None) if all(calls) else ()


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way of writing calls. `marks`: any of them in a chat template shows that its model writes so. `key`: where arguments
    are. `opening`, `between`, `closing`: what stands around the calls of a forced answer, `before` and `after` around each."""

    name: str
    marks: tuple[str, ...]
    key: str
    opening: str = ""
    before: str = ""
    after: str = ""
    between: str = ""
    closing: str = ""

    def reader(self, names: frozenset[str]) -> CallReader:
        """A reader of one sample, to whose model the tools `names` were offered."""
        if self.name == "hermes":
            return TaggedReader(self.key, names)
        return WholeReader(self.marks[0], self.name == "mistral", self.key, names)

    def grammar(self, functions: Sequence[Function], *, several: bool) -> str:
        """Lark (as llguidance reads it) of an answer that calls one of `functions`, or with `several` one or more."""
        rules = [
            f"call: {_literal(self.before)} ({' | '.join(f'c{i}' for i in range(len(functions)))}) {_literal(self.after)}"
        ]
        for number, function in enumerate(functions):
            begin = f'{{"name": {json.dumps(function.name)}, "{self.key}": '
            rules.append(f'c{number}: {_literal(begin)} a{number} "}}"')
            rules.append(f"a{number}: %json {json.dumps(_arguments_schema(function))}")
        more = f" ({_literal(self.between)} call)*" if several else ""
        start = f"start: {_literal(self.opening)} call{more} {_literal(self.closing)}"
        return "\n".join([start, *rules])


def _literal(text: str) -> str:
    return json.dumps(text)


def _arguments_schema(function: Function) -> dict[str, object]:
    parameters = function.parameters or {}
    return parameters if {"type", "$ref"} & parameters.keys() else {**parameters, "type": "object"}


FORMATS = (
    ToolFormat("mistral", ("[TOOL_CALLS]",), "arguments", opening="[", between=", ", closing="]"),
    ToolFormat(
        "hermes",
        ("<tool_call>",),
        "arguments",
        before="<tool_call>\n",
        after="\n</tool_call>",
        between="\n",
    ),
    ToolFormat(
        "llama",
        ("<|python_tag|>", '"parameters": dictionary of argument name'),
        "parameters",
        between="; ",
    ),
)
"""The ways that are known; the first one that a template shows is its model's."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools of one request, its model's way of calling them, and whether several calls are wanted."""

    way: ToolFormat
    names: frozenset[str]
    several: bool

    def reader(self) -> CallReader:
        """A reader of one sample."""
        return self.way.reader(self.names)


def format_of(chat_template: str) -> ToolFormat:
    """How the model with this template writes calls. Raises InvalidRequest if it shows none of the known ways."""
    for way in FORMATS:
        if any(mark in chat_template for mark in way.marks):
            return way
    known = ", ".join(way.name for way in FORMATS)
    raise InvalidRequest(
        f"tools are given, and the model's chat template shows none of the known forms of calls ({known})", "tools"
    )
