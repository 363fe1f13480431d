"""What a grammar allows is what its language says, for each answer by itself."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.control import Grammar
from tandem.errors import InvalidRequest
from tandem.grammar import matcher as matcher_module
from tandem.grammar.matcher import MAX_KEPT, Grammars, Matcher
from tests.vocabulary import SmallVocabulary

WORDS = ["ab", "abc", "ba", "cab", "bb", "aaaa", '{"', '":', "true", " a"]
TOKENIZER = SmallVocabulary(WORDS)
ENDS = TOKENIZER.eos_token_ids


def new(**options: Any) -> Grammars:
    return Grammars(lambda: TOKENIZER, **options)  # type: ignore[arg-type, return-value]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return new()


def texts(matcher: Matcher, token_ids: list[int], stop: frozenset[int] = ENDS) -> set[bytes]:
    """What may come next: an end is b""."""
    allowed = np.flatnonzero(matcher.allowed(token_ids, stop)).tolist()
    return {TOKENIZER.token_bytes(token_id) for token_id in allowed}


def walk(matcher: Matcher, seed: int, most: int = 60) -> tuple[list[int], list[bytes]]:
    """Random tokens that the matcher allows, to an end if it comes to one; and each mask on the way."""
    rng = random.Random(seed)
    token_ids: list[int] = []
    masks = []
    while len(token_ids) < most:
        mask = matcher.allowed(token_ids, ENDS)
        masks.append(mask.tobytes())
        token_id = rng.choice(np.flatnonzero(mask).tolist())
        if token_id in ENDS:
            break
        token_ids.append(token_id)
    return token_ids, masks


@given(st.sets(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=6), st.integers(0, 2**32))
@settings(deadline=None)
def test_allowed_is_what_goes_on_with_the_language_and_an_end_only_after_a_whole_word(
    language: set[str], seed: int
) -> None:
    matcher = SHARED.matcher(Grammar("regex", "|".join(sorted(language))))
    rng = random.Random(seed)
    token_ids: list[int] = []
    while True:
        text = TOKENIZER.decode(token_ids)
        mask = matcher.allowed(token_ids, ENDS)
        for token_id in range(TOKENIZER.vocab_size):
            longer = text + TOKENIZER.token_bytes(token_id).decode()
            goes_on = not TOKENIZER.is_special(token_id) and any(word.startswith(longer) for word in language)
            ends = token_id in ENDS and text in language
            assert mask[token_id] == (goes_on or ends), (text, token_id)
        token_ids.append(rng.choice(np.flatnonzero(mask).tolist()))
        if token_ids[-1] in ENDS:
            break


SHARED = new()

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "<|mark|>"]}, "c": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
)
LARK = 'start: word (" " word)*\nword: /[a-c]{1,4}/ | "(" start ")"'
GRAMMARS = [Grammar("json_schema", SCHEMA), Grammar("regex", r"(ab|c){2,5}\d{1,3}"), Grammar("lark", LARK)]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
def test_every_finished_walk_matches(grammars: Grammars, grammar: Grammar) -> None:
    num_ended = 0
    for seed in range(30):
        token_ids, _ = walk(grammars.matcher(grammar), seed)
        text = TOKENIZER.decode(token_ids)
        if len(token_ids) == 60:
            continue
        num_ended += 1
        match grammar.kind:
            case "json_schema":
                value = json.loads(text)
                assert type(value["a"]) is int
                assert value["b"] in ("x", "<|mark|>")
                assert set(value) <= {"a", "b", "c"}
                assert type(value.get("c", True)) is bool
            case "regex":
                assert re.fullmatch(grammar.text, text)
            case "lark":
                assert text.count("(") == text.count(")")
                assert re.fullmatch(r"[abc() ]+", text)
    assert num_ended >= 10


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
def test_who_takes_an_answer_up_at_any_position_sees_the_same_masks(grammars: Grammars, grammar: Grammar) -> None:
    token_ids, masks = walk(grammars.matcher(grammar), 7)
    for cut in range(len(masks)):
        other = grammars.matcher(grammar, token_ids[:cut])
        assert [other.allowed(token_ids[:end], ENDS).tobytes() for end in range(cut, len(masks))] == masks[cut:]


def stuck(matcher: Matcher, token_ids: list[int]) -> int:
    """After how many tokens the matcher has met its limits."""
    for end in range(len(token_ids) + 1):
        try:
            matcher.allowed(token_ids[:end], ENDS)
        except InvalidRequest as error:
            if "too many" not in str(error):
                raise
            return end
    raise AssertionError("it goes on to the end")


HEAVY = Grammar("regex", "(a{1,1000}){1,1000}")


def test_a_limit_is_met_at_the_same_token_by_whoever_goes_on_with_the_answer(grammars: Grammars) -> None:
    token_ids = [TOKENIZER.encode("a")[0]] * 2000
    end = stuck(grammars.matcher(HEAVY), token_ids)
    assert 1 < end < 2000
    for cut in (1, end // 2, end - 1):
        assert stuck(grammars.matcher(HEAVY, token_ids[:cut]), token_ids) == end


def test_a_matcher_that_met_a_limit_takes_nobody_else_with_it(grammars: Grammars) -> None:
    token_ids = [TOKENIZER.encode("a")[0]] * 2000
    begun = grammars.matcher(HEAVY, token_ids[:1])
    kept = new()
    kept.prepare(HEAVY)
    end = stuck(kept.matcher(HEAVY), token_ids)
    begun.allowed(token_ids[: end - 1], ENDS)
    assert stuck(kept.matcher(HEAVY), token_ids) == end


def test_samples_of_one_request_go_their_own_ways(grammars: Grammars) -> None:
    trunk = grammars.matcher(GRAMMARS[1], TOKENIZER.encode("ab"))
    sibling = trunk.fork()
    assert texts(trunk, TOKENIZER.encode("ab")) == texts(sibling, TOKENIZER.encode("ab"))
    assert texts(trunk, TOKENIZER.encode("aba")) == {b"b", b"ba"}
    assert texts(sibling, TOKENIZER.encode("abc")) > {b"0", b"c", b"a"}


def test_an_end_that_the_request_ignores_is_allowed_only_where_there_is_nothing_else(grammars: Grammars) -> None:
    matcher = grammars.matcher(Grammar("regex", "ab?"))
    a, b = TOKENIZER.encode("ab")
    assert set(np.flatnonzero(matcher.allowed([a], ENDS))) == {b, *ENDS}
    assert set(np.flatnonzero(matcher.allowed([a], [TOKENIZER.EOS]))) == {b, TOKENIZER.EOS}
    assert set(np.flatnonzero(matcher.allowed([a], ()))) == {b}
    assert set(np.flatnonzero(matcher.allowed([a, b], ()))) == ENDS


def test_a_mark_is_no_text_and_is_allowed_only_where_a_grammar_names_it(grammars: Grammars) -> None:
    spelled = grammars.matcher(Grammar("regex", r"<\|mark\|>"))
    assert texts(spelled, []) == {b"<"}
    named = grammars.matcher(Grammar("lark", 'start: <|mark|> "a"'))
    assert np.flatnonzero(named.allowed([], ENDS)).tolist() == [TOKENIZER.MARK]
    assert texts(named, [TOKENIZER.MARK]) == {b"a"}


def test_tokens_that_the_model_has_no_logits_for_are_never_allowed() -> None:
    few = new(vocab_size=98)
    mask = few.matcher(Grammar("regex", "ab")).allowed([], ENDS)
    assert np.flatnonzero(mask).tolist() == TOKENIZER.encode("a")
    assert len(mask) == 98


def test_tokens_that_do_not_match_are_refused(grammars: Grammars) -> None:
    with pytest.raises(InvalidRequest, match="token 1 of the answer"):
        grammars.matcher(GRAMMARS[1], TOKENIZER.encode("ax"))
    matcher = grammars.matcher(Grammar("lark", 'start: "a" B\nB: /b/ & /c/'))
    with pytest.raises(InvalidRequest, match="after 1 tokens: no token can follow"):
        matcher.allowed(TOKENIZER.encode("a"), ENDS)


def test_a_model_without_an_end_refuses_grammars() -> None:
    endless = SmallVocabulary()
    endless.eos_token_ids = frozenset()
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        Grammars(lambda: endless).matcher(Grammar("regex", "a"))  # type: ignore[arg-type, return-value]


def test_the_vocabulary_is_built_once_and_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    built, compiled = [], []
    real = matcher_module.compiled
    monkeypatch.setattr(matcher_module, "compiled", lambda *asked: compiled.append(asked[2]) or real(*asked))
    few = Grammars(lambda: built.append(1) or TOKENIZER)  # type: ignore[arg-type, return-value, func-returns-value]
    assert not built
    for number in range(MAX_KEPT + 1):
        few.prepare(Grammar("regex", f"a{{{number + 1}}}"))
    few.prepare(Grammar("regex", "a{2}"))
    assert (len(built), len(compiled), len(few._kept)) == (1, MAX_KEPT + 1, MAX_KEPT)
    few.prepare(Grammar("regex", "a{1}"))
    assert compiled[MAX_KEPT + 1 :] == ["a{1}"]
    few.matcher(Grammar("regex", "a{1}"))
    assert compiled[MAX_KEPT + 1 :] == ["a{1}"]
    few.matcher(Grammar("regex", "a{1}"))
    assert compiled[MAX_KEPT + 1 :] == ["a{1}"] * 2
