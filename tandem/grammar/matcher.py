"""Which tokens may come next in an answer that must match a JSON schema, a regular expression or a Lark grammar.

Owns a vocabulary in llguidance's form, what is compiled for it, and `Matcher`: one answer's place in its grammar. A mask is a
function of the grammar and the answer's tokens alone: it allows exactly the tokens whose bytes may follow, and nothing that a
matcher learned on its way is shared with another request. (llguidance's copies of a matcher share their lexer: what one of them
runs into, all of them have. So every request compiles for itself, and only what nobody has used yet is kept.)
Knows no requests and no sequences; never imports torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Protocol

import llguidance
import numpy as np
from numpy.typing import NDArray

from protos.control import Grammar
from tandem.errors import InvalidRequest
from tandem.grammar.form import Wrapped, compiled, reason
from tandem.tokenizer.tokenizer import Tokenizer

Mask = NDArray[np.bool_]
"""`[vocab_size]`: which tokens are allowed."""

MAX_KEPT = 16
"""Grammars of which something compiled is kept: some megabytes each, 64 MiB at most (`tandem/grammar/trial_process.py`)."""


class MatcherSource(Protocol):
    """Whoever makes matchers."""

    def begin(self, grammar: Grammar, token_ids: Sequence[int]) -> Future[Matcher]:
        """A matcher after these tokens, now or later; its InvalidRequest if there can be none."""


class Grammars:
    """Compiles grammars for one vocabulary. Threads may share it.

    `tokenizer` is asked for at the first use, once. The vocabulary then takes some 0.4 s for 50,000 tokens, in which llguidance
    keeps the interpreter to itself, and 20 MiB. Tokens past `vocab_size`, where that is given, are never allowed: the model has
    no logits for them.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], vocab_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: _Vocabulary | None = None
        self._building = threading.Lock()
        self._kept: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._keeping = threading.Lock()

    def prepare(self, grammar: Grammar) -> None:
        """Compiles it for the next `matcher`. Raises InvalidRequest with the reason if it can't be used."""
        with self._keeping:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return
        found = self._compile(grammar)
        with self._keeping:
            self._kept[grammar] = found
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)

    def matcher(self, grammar: Grammar, token_ids: Sequence[int] = ()) -> Matcher:
        """One answer's matcher, the caller's own, after these tokens of it. Raises InvalidRequest if there can be none."""
        with self._keeping:
            found = self._kept.pop(grammar, None)
        if found is None:
            found = self._compile(grammar)
        vocabulary = self._built()
        matcher = Matcher(found, vocabulary.eos_token_ids, vocabulary.size)
        matcher.follow(token_ids)
        return matcher

    def begin(self, grammar: Grammar, token_ids: Sequence[int]) -> Future[Matcher]:
        """As MatcherSource: done when it returns."""
        future: Future[Matcher] = Future()
        try:
            future.set_result(self.matcher(grammar, token_ids))
        except InvalidRequest as error:
            future.set_exception(error)
        return future

    def _built(self) -> _Vocabulary:
        with self._building:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer(), self._vocab_size)
            return self._vocabulary

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        try:
            return compiled(self._built().tokens, grammar.kind, grammar.text)
        except ValueError as error:
            raise InvalidRequest(f"the {grammar.kind} can't be used: {error}") from error


class Matcher:
    """One answer's place in its grammar. Not for several threads at once."""

    def __init__(self, inner: llguidance.LLMatcher, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self._inner = inner
        self._vocab_size = vocab_size
        self._num_tokens = 0
        self._masked_at = 0  # the first mask has been asked for when it was compiled
        self.eos_token_ids = eos_token_ids
        """The tokens by which a match ends; each is allowed where the grammar accepts what there is."""

    def fork(self) -> Matcher:
        """Another answer of the same request that has begun with the same tokens."""
        sibling = Matcher(self._inner.deep_copy(), self.eos_token_ids, self._vocab_size)
        sibling._num_tokens, sibling._masked_at = self._num_tokens, self._masked_at
        return sibling

    def follow(self, token_ids: Sequence[int]) -> None:
        """Goes on to the place after `token_ids`, the answer's tokens so far. Raises InvalidRequest if the grammar does not allow
        them, or is too complex to be followed so far."""
        for position in range(self._num_tokens, len(token_ids)):
            # The mask is not looked at, but what it costs counts against the limits: whoever takes an answer up comes as far as
            # who began it.
            if self._masked_at != position:
                self._compute()
            if not self._inner.consume_token(token_ids[position]):
                raise InvalidRequest(
                    f"token {position} of the answer does not follow its grammar: {reason(self._inner)}"
                )
            self._num_tokens = position + 1

    def allowed(self, token_ids: Sequence[int], stop_token_ids: Collection[int]) -> Mask:
        """The tokens that may follow `token_ids`, the answer's tokens so far; at least one.

        An end-of-sequence token that is not among `stop_token_ids`, because the request ignores it, is allowed only where nothing
        else is. Raises InvalidRequest as `follow` does, and where no token of the vocabulary goes on with what there is.
        """
        self.follow(token_ids)
        bits = np.frombuffer(self._compute(), dtype=np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        ignored = [token_id for token_id in self.eos_token_ids if token_id not in stop_token_ids]
        if ignored:
            without = mask.copy()
            without[ignored] = False
            if without.any():
                return without
        return mask

    def _compute(self) -> bytes:
        mask: bytes = self._inner.compute_bitmask()  # once it fails, the end-of-sequence tokens, which is no answer
        if self._inner.is_error():
            raise InvalidRequest(f"the grammar can't go on after {self._num_tokens} tokens: {reason(self._inner)}")
        self._masked_at = self._num_tokens
        return mask


class _Vocabulary:
    """The tokens as llguidance wants them: bytes, marks apart from text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None) -> None:
        size = tokenizer.vocab_size if vocab_size is None else min(vocab_size, tokenizer.vocab_size)
        self.size = size
        self.eos_token_ids = frozenset(token_id for token_id in tokenizer.eos_token_ids if token_id < size)
        if not self.eos_token_ids:
            raise InvalidRequest(
                "the model has no end-of-sequence token, by which an answer that matches a grammar ends"
            )
        ends = sorted(self.eos_token_ids)
        # In two calls, all through each of which llguidance holds the interpreter. Slices halve the time of a mask.
        special_ids = [token_id for token_id in range(size) if tokenizer.is_special(token_id)]
        spelled = [tokenizer.token_bytes(token_id, skip_special=False) for token_id in range(size)]
        tokens = llguidance.LLTokenizer(Wrapped(spelled, special_ids, ends[0]), eos_token=ends, slices=[])
        self.tokens = tokens.with_slices(llguidance.LLTokenizer.general_slices())
