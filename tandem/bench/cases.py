"""What the engine is measured on: cases of a batch and a context, and which of them a run can do.

Owns the choice and its order; runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DECODE_TOKENS = 32
"""Tokens that every sequence of a decode measurement generates; its context grows by as many."""


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: `batch` sequences whose prompts have `context` tokens each."""

    what: Literal["prefill", "decode"]
    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.what}_batch_{self.batch}_context_{self.context}"

    @property
    def num_tokens(self) -> int:
        """Tokens of KV that all its sequences have at the end."""
        return self.batch * (self.context + (DECODE_TOKENS if self.what == "decode" else 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures, in order; `skipped` says why it measures nothing else, a sentence each."""

    cases: tuple[Case, ...]
    skipped: tuple[str, ...]

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(case.context for case in self.cases) + DECODE_TOKENS

    @property
    def max_batch(self) -> int:
        return max(case.batch for case in self.cases)


def kv_tokens(cases: Sequence[Case]) -> int:
    """Tokens of KV to keep for `cases`: the longest prompt of each sequence, what all decode cases generate, and whatever a
    prefill case needs besides."""
    decode = [case for case in cases if case.what == "decode"]
    longest = [
        max(case.context for case in decode if case.batch > index)
        for index in range(max((case.batch for case in decode), default=0))
    ]
    generated = sum(case.batch * DECODE_TOKENS for case in decode)
    return sum(longest) + generated + max((case.num_tokens for case in cases if case.what == "prefill"), default=0)


def plan(
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    max_position: int,
    step_tokens: int,
    limit_tokens: int,
) -> Plan:
    """Which of `batches` times `contexts` are measured on a model of `max_position` tokens, with KV of at most `limit_tokens`:
    small ones first, prefill before decode (what it leaves in the prefix cache is evicted first).

    A prompt that fills a step of `step_tokens` by itself is prefilled alone: more of them are computed one after the other.
    Sequences start to decode together only if the last token of each prompt fits one step.
    """
    cases: list[Case] = []
    skipped: list[str] = []
    for batch in sorted({batch for batch in batches if batch > step_tokens}):
        skipped.append(f"batch {batch}: the last tokens of its prompts don't fit a step of {step_tokens} tokens")
    prefill_batches = []
    for context in sorted(set(contexts)):
        if context + DECODE_TOKENS > max_position:
            skipped.append(
                f"context {context}: with {DECODE_TOKENS} generated tokens it is longer than the model's {max_position}"
            )
            continue
        for batch in sorted({batch for batch in batches if batch <= step_tokens}):
            if batch > 1 and context >= step_tokens:
                prefill_batches.append(f"{batch} x {context}")
            else:
                _take(Case("prefill", batch, context), cases, limit_tokens, skipped)
            _take(Case("decode", batch, context), cases, limit_tokens, skipped)
    if prefill_batches:
        skipped.append(
            f"prefill of {', '.join(prefill_batches)} tokens: a step holds {step_tokens} tokens, so longer prompts are computed "
            "one after the other, at the speed of one"
        )
    cases.sort(key=lambda case: (case.what != "prefill", case.context, case.batch))
    return Plan(tuple(cases), tuple(skipped))


def _take(case: Case, cases: list[Case], limit_tokens: int, skipped: list[str]) -> None:
    needed = kv_tokens([*cases, case])
    if needed > limit_tokens:
        skipped.append(f"{case.name}: the KV of all cases up to it is {needed} tokens, memory holds {limit_tokens}")
    else:
        cases.append(case)
