"""The Jinja2 environment that chat templates run in: sandboxed, immutable, and bounded in work.

A template comes with the model's files and is fed with what clients send. Jinja2's sandbox keeps it from reaching out of itself,
not from going on for ever or from building huge values. So everything that repeats or grows is counted against a `Budget`:
rounds of loops, calls, filters, operators, slices, captured output. The count is the same on every machine; a limit on the
thread's processor time stands behind it, for what is slow and doesn't grow.

Owns the hooks and the list of filters and methods there are: those whose result can be predicted. Never renders.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tandem.errors import InvalidRequest

BASE_WORK = 64 * 2**20
WORK_PER_CHAR = 64
ROUND = 256
"""What a round of a loop, a call and an operator cost, besides what they make."""
WORK_PER_MESSAGE = 64 * ROUND
"""A conversation may cost so much for each of its characters and messages, besides `BASE_WORK`. A unit is a character that is
made."""
MAX_CPU_S = 5.0
MAX_REPEAT = 1_000_000
MAX_BITS = 4096
"""Of a whole number."""
MAX_FORMAT_DIGITS = 4
MAX_STRIP_CHARS = 1000
_LOOK_EVERY = 512

# fmt: off
_PLAIN_METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
    "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "lower", "partition",
    "removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "split", "splitlines", "startswith",
    "swapcase", "title", "upper",
})
_FILTERS = frozenset({
    "abs", "attr", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "forceescape", "format", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min",
    "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title",
    "trim", "truncate", "unique", "upper",
})
# fmt: on


class Budget:
    """What one rendering may still do."""

    def __init__(self, work: int) -> None:
        self._limit = self._left = work
        self._end_s = time.thread_time() + MAX_CPU_S
        self._num_spent = 0

    def spend(self, work: int) -> None:
        """Raises InvalidRequest if that is too much."""
        self._left -= work
        if self._left < 0:
            raise InvalidRequest(
                f"the chat template does more work than the limit of {self._limit} for this conversation"
            )
        self._num_spent += 1
        if self._num_spent % _LOOK_EVERY == 0 and time.thread_time() > self._end_s:
            raise InvalidRequest(f"the chat template takes more processor time than the limit of {MAX_CPU_S:g} s")


class _Active(threading.local):
    budget: Budget | None = None


_active = _Active()


@contextmanager
def bounded(num_chars: int, num_messages: int = 0) -> Iterator[None]:
    """Within it templates of this thread are compiled and rendered, on a budget for so much conversation."""
    work = BASE_WORK + WORK_PER_CHAR * num_chars + WORK_PER_MESSAGE * num_messages
    before, _active.budget = _active.budget, Budget(work)
    try:
        yield
    finally:
        _active.budget = before


def _spend(work: int) -> None:
    assert _active.budget is not None, "a template is used outside of `bounded`"
    _active.budget.spend(work)


class _Hooks(NodeTransformer):
    """Puts a call of the environment where Jinja2 itself has no hook: into each round of a loop, in the place of `~` and of
    slices."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick))
        if node.test is not None:
            node.test = nodes.And(tick, node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("join_texts"), node.nodes, [], None, None)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        parts = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return nodes.Call(nodes.EnvironmentAttribute("cut"), [node.node, *parts], [], None, None)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Templates of it run only within `bounded`."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            optimized=False,  # nothing is computed while it is compiled
            finalize=_shown,
        )
        self.filters = {name: counted(name, self.filters[name]) for name in _FILTERS}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        _Hooks().visit(parsed)
        parsed.set_environment(self)
        return parsed

    # --- what `_Hooks` puts in ---------------------------------------------------------------------------------------

    @staticmethod
    def tick() -> bool:
        return True  # `call` has counted it

    @staticmethod
    def join_texts(*parts: Any) -> str:
        _spend(sum(map(_text_size, parts)))
        return "".join(map(str, parts))

    @staticmethod
    def cut(value: Any, start: Any, stop: Any, step: Any) -> Any:
        return value[start:stop:step]  # what came of it is counted like that of every call

    # --- Jinja2's own hooks ------------------------------------------------------------------------------------------

    @staticmethod
    def concat(parts: Any) -> str:
        """Puts captured output together."""
        captured = list(parts)
        _spend(ROUND + sum(map(len, captured)))
        return "".join(captured)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _spend(ROUND)
        if __obj is BoundedEnvironment.tick:
            return True
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = _checked_method(owner, getattr(__obj, "__name__", ""), args, kwargs)
        elif isinstance(owner, int | float) and getattr(__obj, "__name__", "") != "is_integer":
            raise InvalidRequest("the chat template calls a method of a number")
        return _measured(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        made = super().wrap_str_format(value)
        if made is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, args, kwargs)
            return made(*args, **kwargs)

        return formatted

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # most of what templates do
            made = left + right
            _spend(ROUND + len(made))
            return made
        _spend(ROUND)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and not (numbers and abs(left) <= MAX_REPEAT and abs(right) <= 64):
            raise InvalidRequest("the chat template raises a number to a power past the limit of 64")
        if operator == "*" and not numbers:
            factor, sequence = (left, right) if isinstance(left, int) else (right, left)
            if not isinstance(factor, int) or len(sequence) * factor > MAX_REPEAT:
                raise InvalidRequest(f"the chat template repeats a value past the limit of {MAX_REPEAT}")
        if operator == "%" and isinstance(left, str):
            _check_format(left, (right,), {})
        if operator == "+" and not numbers:
            _spend(_len(left) + _len(right))
        return _measured(super().call_binop(context, operator, left, right))


@pass_context  # which also keeps it from being called while a template is compiled
def _shown(context: jinja2.runtime.Context, value: Any) -> Any:
    """What `{{ … }}` shows of a value."""
    _spend(_text_size(value))
    return value


def _len(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | set | frozenset) else 1


def _measured(value: Any) -> Any:
    """`value`, which was just made, counted."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise InvalidRequest(f"the chat template makes a number of {value.bit_length()} bits, the limit is {MAX_BITS}")
    _spend(_len(value))
    return value


def _text_size(value: Any) -> int:
    """About how long the text of a value is; what it takes to find out is counted too."""
    if type(value) is str:
        return len(value)
    size, todo = 0, [value]
    while todo:
        found = todo.pop()
        if isinstance(found, str):
            size += len(found)
        elif isinstance(found, Mapping):
            _spend(len(found))
            size += 8 * len(found)
            todo += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple | set | frozenset):
            _spend(len(found))
            size += 4 * len(found)
            todo += found
        else:
            size += 32
    return size


def _check_format(text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for a format that may make more than its values are long."""
    numbers = re.findall(r"[0-9]+", text)
    if "*" in text or re.search(r"\{[^{}]*\{", text) or any(len(number) > MAX_FORMAT_DIGITS for number in numbers):
        raise InvalidRequest("the chat template formats with a width that is not known, or of more than 4 digits")
    _spend(10**MAX_FORMAT_DIGITS * len(numbers) + (text.count("{") + text.count("%")) * _text_size([*args, kwargs]))


def _checked_method(text: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments to call a text's method with. Raises InvalidRequest for one that may make too much."""
    sizes = [abs(value) for value in (*args, *kwargs.values()) if isinstance(value, int)]
    match method:
        case "center" | "ljust" | "rjust" | "zfill":
            _spend(max(sizes, default=0))
        case "expandtabs":
            _spend(text.count("\t") * max(sizes, default=8))
        case "strip" | "lstrip" | "rstrip":
            if any(_len(value) > MAX_STRIP_CHARS for value in args):
                raise InvalidRequest(f"the chat template strips more than {MAX_STRIP_CHARS} different characters")
        case "replace":
            old, new = (str(value) for value in (*args, "", "")[:2])
            _spend(text.count(old) * len(new))
        case "join":
            items = list(args[0]) if args else []
            _spend(sum(map(_len, items)) + len(text) * len(items))
            args = (items, *args[1:])
        case "format" | "format_map":
            pass  # `wrap_str_format` saw to it
        case _ if method not in _PLAIN_METHODS:
            raise InvalidRequest(f"the chat template calls the method {method[:40]!r} of a text, which there is not")
    return args


def counted(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose work is counted. Its first arguments may be what Jinja2 passes: a context, an environment."""
    passed = getattr(filter_, "jinja_pass_arg", None) is not None

    def filtered(*all_args: Any, **kwargs: Any) -> Any:
        _spend(ROUND)
        value, args = all_args[passed], list(all_args[passed + 1 :])
        sizes = [abs(given) for given in (*args, *kwargs.values()) if isinstance(given, int)]
        match name:
            case "center":
                _spend(max(sizes, default=80))
            case "indent":
                _spend((str(value).count("\n") + 1) * max([_len(given) for given in args] + sizes, default=4))
            case "round" if max(sizes, default=0) > 100:
                raise InvalidRequest("the chat template rounds to more than 100 digits")
            case "format":
                _check_format(str(value), tuple(args), kwargs)
            case "trim" if any(_len(given) > MAX_STRIP_CHARS for given in args):
                raise InvalidRequest(f"the chat template strips more than {MAX_STRIP_CHARS} different characters")
            case "replace":
                old, new = (str(given) for given in (*args, *kwargs.values(), "", "")[:2])
                _spend(_text_size(value) + str(value).count(old) * len(new))
            case "sum" if not isinstance(kwargs.get("start", args[1] if len(args) > 1 else 0), int | float):
                raise InvalidRequest("the chat template adds up what are no numbers")
            case "join":
                value = list(value)
                _spend(_text_size(value) + len(value) * max(map(_len, [*args, *kwargs.values()]), default=0))
            case "sort" | "dictsort" | "unique":
                value = value if isinstance(value, Mapping) else list(value)
                _spend(ROUND * len(value))
            case "string" | "escape" | "e" | "forceescape":
                _spend(_text_size(value))
        return _measured(filter_(*all_args[:passed], value, *args, **kwargs))

    filtered.__name__ = name
    for attribute in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(filter_, attribute):
            setattr(filtered, attribute, getattr(filter_, attribute))
    return filtered
