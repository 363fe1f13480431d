"""What llguidance is given: a grammar in its own form, a vocabulary, limits; and what it says.

Owns nothing else, and imports nothing else: the process in which a grammar is tried starts with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

import llguidance

LIMITS = llguidance.LLParserLimits(
    step_lexer_fuel=50_000,
    step_max_items=25_000,
    max_lexer_states=10_000,
    verbose_errors=False,
)
"""For each mask, and for what a matcher may take on its way: some 20 MiB. What compiling takes they don't bound
(`tandem/grammar/trial.py` does)."""

# The model chooses how it writes what the grammar forces: a forced tokenisation would have to be computed in the midst of a mask,
# by a tokenizer that knows marks and spaces before words. Appended, so that lines keep their numbers in messages.
_OPTIONS = '\n%llguidance {"no_forcing": true}'
_OPTIONS_LINE = re.compile(r"\n *\d+ \| " + re.escape(_OPTIONS.strip()))


def serialized(kind: str, text: str) -> str:
    """A `json_schema`, `regex` or `lark` as llguidance reads it. Raises ValueError for a schema that is no JSON."""
    match kind:
        case "json_schema":
            try:
                schema = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"it is no JSON: {error}") from error
            grammars = [{"lark_grammar": f"start: @answer{_OPTIONS}"}, {"name": "answer", "json_schema": schema}]
        case "regex":
            (regex,) = json.loads(llguidance.LLMatcher.grammar_from_regex(text))["grammars"]
            grammars = [{**regex, "lark_grammar": regex["lark_grammar"] + _OPTIONS}]
        case "lark":
            grammars = [{"lark_grammar": text + _OPTIONS}]
        case _:
            raise ValueError(f"{kind!r} is no kind of grammar")
    return json.dumps({"grammars": grammars})


def compiled(tokens: llguidance.LLTokenizer, kind: str, text: str) -> llguidance.LLMatcher:
    """A fresh matcher, which has been asked for its first mask: what can't even begin is refused. Raises ValueError with the
    reason."""
    matcher = llguidance.LLMatcher(tokens, serialized(kind, text), log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(reason(matcher))
    return matcher


def reason(matcher: llguidance.LLMatcher) -> str:
    """What llguidance says, without the traces that it may append and the line that we did."""
    said = _OPTIONS_LINE.sub("", matcher.get_error().split("\n<", 1)[0]).strip()
    return "no token can follow" if said in ("", "NoExtensionBias") else said[:1000]


class Wrapped(llguidance.TokenizerWrapper):
    """A vocabulary as llguidance reads it: the bytes of each token, b"" where an id has none; marks are no text."""

    def __init__(self, tokens: Sequence[bytes], special_ids: Collection[int], eos_token_id: int) -> None:
        self.is_tokenizer_wrapper = True
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.tokens = tokens
        self.special_token_ids = [token_id for token_id in special_ids if tokens[token_id]]

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("no tokenisation is forced, so none is asked for")
