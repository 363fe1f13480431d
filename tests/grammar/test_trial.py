"""What is said of a grammar before a request is taken, whatever it would do to whoever compiles it."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from protos.control import Grammar
from tandem.errors import InvalidRequest, Overloaded
from tandem.grammar import trial as trial_module
from tandem.grammar.trial import MAX_VERDICTS, Trials
from tests.vocabulary import SmallVocabulary


@pytest.fixture(scope="module")
def trials() -> Trials:
    return Trials(SmallVocabulary())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", "{", "no JSON"),
        ("json_schema", "[" * 3000, "no JSON"),
        ("json_schema", '{"a":' * 400 + "1" + "}" * 400, "recursion"),
        ("json_schema", "[1]", "object or boolean"),
        ("json_schema", "false", "Unsatisfiable"),
        ("json_schema", '{}}],"max_tokens":1,"x":[{"a":{}', "no JSON"),
        ("json_schema", '{"type":"foo"}', "foo"),
        ("json_schema", '{"$ref":"http://example.com/s.json"}', "not present"),
        ("json_schema", '{"$ref":"file:///etc/passwd"}', "not present"),
        ("json_schema", '{"type":"string","minLength":5,"maxLength":2}', "minLength"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("lark", "start: foo", "foo"),
        ("lark", "start: <|nope|>", "nope"),
        ("lark", "start: s\ns: s", "no token can follow"),
        ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "nested"),
        # What llguidance would go on compiling.
        ("json_schema", '{"type":"integer","multipleOf":9999991}', "takes more than"),
        ("lark", "start: X\nX: " + " & ".join(f"/(.{{{i}}}a)*/" for i in range(1, 40)), "takes more than"),
    ],
)
def test_what_no_answer_can_be_held_to_is_refused_with_the_reason(
    trials: Trials, kind: Any, text: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refusal:
        trials.check(Grammar(kind, text))
    assert kind in str(refusal.value)
    assert "no_forcing" not in str(refusal.value)
    assert "backtrace" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"type":"object","properties":{"a":{"type":"number","multipleOf":0.05}}}'),
        ("regex", "é{1,3}"),
        ("lark", 'start: <|mark|> "a" <[97]>'),
    ],
)
def test_what_can_be_held_to_passes(trials: Trials, kind: Any, text: str) -> None:
    trials.check(Grammar(kind, text))


def test_verdicts_are_remembered_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    trials = Trials(SmallVocabulary())  # type: ignore[arg-type]
    monkeypatch.setattr(trials, "_try", lambda grammar: tried.append(grammar.text) or grammar.text.strip("a"))
    for _ in range(2):
        trials.check(Grammar("regex", "a"))
        with pytest.raises(InvalidRequest, match="the regex can't be used: b"):
            trials.check(Grammar("regex", "b"))
    assert tried == ["a", "b"]
    for number in range(MAX_VERDICTS):
        trials.check(Grammar("regex", "aa" + "a" * number))
    assert len(trials._verdicts) == MAX_VERDICTS
    trials.check(Grammar("regex", "a"))
    assert tried[-1] == "a"


def test_a_trial_that_gets_no_time_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "WAIT_S", 0.001)
    trials = Trials(SmallVocabulary())  # type: ignore[arg-type]
    with pytest.raises(Overloaded):
        trials.check(Grammar("regex", "a"))
    assert not trials._verdicts


def test_a_process_that_breaks_refuses_its_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = subprocess.CompletedProcess([], -6, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: broken)
    trials = Trials(SmallVocabulary())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="more than 64 MiB, or breaks"):
        trials.check(Grammar("regex", "a"))


def test_a_model_without_an_end_refuses_grammars() -> None:
    endless = SmallVocabulary()
    endless.eos_token_ids = frozenset()
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        Trials(endless).check(Grammar("regex", "a"))  # type: ignore[arg-type]
