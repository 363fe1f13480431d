"""Calls in a model's text: read back however the text was split, and forced by grammars that say the same."""

from __future__ import annotations

import json

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.openai.bodies import Function
from router.http.openai.tools import FORMATS, Call, CallReader, Read, ToolFormat, format_of
from tandem.errors import InvalidRequest

BY_NAME = {way.name: way for way in FORMATS}
NAMES = frozenset({"add", "now"})
ADD, NOW = Call("add", '{"a": 1, "b": "ü"}'), Call("now", "{}")

CASES = [
    ("hermes", "no calls <tool", Read("no calls <tool")),
    ("hermes", "spaces stay  \n", Read("spaces stay  \n")),
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>', Read("", (ADD,))),
    ("hermes", 'Well: \n<tool_call>{"name": "now", "arguments": {}}</tool_call>\n', Read("Well:", (NOW,))),
    (
        "hermes",
        '<tool_call>{"name": "now"}</tool_call>\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": "ü"}}</tool_call>',
        Read("", (NOW, ADD)),
    ),
    ("hermes", 'a <tool_call>{"name": "now"}</tool_call> b', Read("a b", (NOW,))),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}', Read("", (NOW,))),
    ("hermes", '<tool_call>{"name": "now", "argu', Read('<tool_call>{"name": "now", "argu')),
    ("hermes", '<tool_call>{"name": "rm"}</tool_call>', Read('<tool_call>{"name": "rm"}</tool_call>')),
    ("hermes", "<tool_call>[</tool_call>", Read("<tool_call>[</tool_call>")),
    (
        "hermes",
        '<tool_call>{"name": "now", "arguments": 1}</tool_call>!',
        Read('<tool_call>{"name": "now", "arguments": 1}</tool_call>!'),
    ),
    ("hermes", f"<tool_call>{'[' * 100_000}</tool_call>", Read(f"<tool_call>{'[' * 100_000}</tool_call>")),
    ("llama", ' {"name": "add", "parameters": {"a": 1, "b": "ü"}}', Read("", (ADD,))),
    ("llama", '<|python_tag|>{"name": "now", "parameters": {}}', Read("", (NOW,))),
    ("llama", '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', Read("", (NOW, NOW))),
    ("llama", '{"name": "Ann", "parameters": {}}', Read('{"name": "Ann", "parameters": {}}')),
    ("llama", '{"name": "now"} is JSON', Read('{"name": "now"} is JSON')),
    ("llama", "  text {", Read("  text {")),
    ("llama", "<|python", Read("<|python")),
    (
        "mistral",
        '[{"name": "add", "arguments": {"a": 1, "b": "ü"}}, {"name": "now", "arguments": {}}]',
        Read("", (ADD, NOW)),
    ),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}]', Read("", (NOW,))),
    ("mistral", "[1] is a citation", Read("[1] is a citation")),
    ("mistral", '[{"name": "now"}] and more', Read('[{"name": "now"}] and more')),
    ("mistral", "[]", Read("[]")),
    ("mistral", "[TOOL", Read("[TOOL")),
    ("mistral", "", Read("")),
]


def read(reader: CallReader, pieces: list[str]) -> Read:
    parts = [reader.push(piece) for piece in pieces] + [reader.finish()]
    return Read("".join(part.text for part in parts), tuple(call for part in parts for call in part.calls))


@pytest.mark.parametrize(("way", "text", "expected"), CASES, ids=lambda value: str(value)[:30])
def test_calls_are_read_and_all_else_stays_text(way: str, text: str, expected: Read) -> None:
    assert read(BY_NAME[way].reader(NAMES), [text]) == expected
    if len(text) < 1000:
        assert read(BY_NAME[way].reader(NAMES), list(text)) == expected


@given(st.sampled_from([case for case in CASES if len(case[1]) < 1000]), st.data())
def test_how_the_text_was_split_changes_nothing(case: tuple[str, str, Read], data: st.DataObject) -> None:
    way, text, expected = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(BY_NAME[way].reader(NAMES), pieces) == expected


@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<", " ", "{", "}", "[", "]", "x", ";"])),
)
def test_without_a_call_no_character_is_lost(way: ToolFormat, pieces: list[str]) -> None:
    found = read(way.reader(NAMES), pieces)
    assert found.calls == ()
    assert found.text.replace(" ", "") == "".join(pieces).replace(" ", "")


def test_text_before_a_call_streams_and_a_call_comes_at_once_when_it_is_whole() -> None:
    reader = BY_NAME["hermes"].reader(NAMES)
    assert reader.push("Let me see") == Read("Let me see")
    assert reader.push(". <tool_") == Read(".")
    assert reader.push('call>{"name": "now"') == Read()
    assert reader.push("}</tool_call>") == Read("", (NOW,))


def test_the_form_is_seen_from_the_template() -> None:
    assert format_of("… <tool_call> …").name == "hermes"
    assert (
        format_of('… {"name": function name, "parameters": dictionary of argument name and its value} …').name
        == "llama"
    )
    assert format_of("… [TOOL_CALLS] …").name == "mistral"
    with pytest.raises(InvalidRequest, match="none of the known forms of calls"):
        format_of("{{ tools }}")


FUNCTIONS = [
    Function(
        "add",
        parameters={
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/N"}},
            "required": ["a"],
            "additionalProperties": False,
            "$defs": {"N": {"type": "integer"}},
        },
    ),
    Function("now"),
]


def accepts(grammar: str, text: str) -> bool:
    """Whether the grammar takes the text, as a whole."""
    matcher = llguidance.LLMatcher(byte_tokens(), llguidance.LLMatcher.grammar_from_lark(grammar))
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


class Bytes:
    """A vocabulary of bytes, as llguidance takes one."""

    def __init__(self) -> None:
        self.eos_token_id = 256
        self.bos_token_id = None
        self.tokens = [bytes([byte]) for byte in range(256)] + [b"<eos>"]
        self.special_token_ids = [256]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def byte_tokens() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


@pytest.mark.parametrize("way", FORMATS, ids=lambda way: way.name)
def test_a_forced_answer_is_calls_as_the_reader_reads_them(way: ToolFormat) -> None:
    one, several = (way.grammar(FUNCTIONS, several=several) for several in (False, True))
    assert llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(several)) == ""

    def written(*calls: tuple[str, str]) -> str:
        inner = (f'{way.before}{{"name": "{name}", "{way.key}": {arguments}}}{way.after}' for name, arguments in calls)
        return way.opening + way.between.join(inner) + way.closing

    single, double = written(("add", '{"a": 5}')), written(("add", '{"a": 5}'), ("now", "{}"))
    assert accepts(one, single)
    assert accepts(several, single)
    assert accepts(several, double)
    assert not accepts(one, double)
    assert not accepts(several, "")
    assert not accepts(several, written(("rm", "{}")))
    assert not accepts(several, written(("add", '{"a": "x"}')))
    assert not accepts(several, written(("now", "[]")))
    found = read(way.reader(NAMES), [double])
    assert found == Read("", (Call("add", '{"a": 5}'), NOW))
    assert json.loads(found.calls[0].arguments) == {"a": 5}
