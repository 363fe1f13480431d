"""How long a step takes, learned from the steps: what a router predicts with.

Owns five prices and how sure it is of them. A step's seconds are taken to be linear in what it computes,

    base + token · prefill tokens + pair · prefill pairs + sequence · decoding sequences + context · their tokens

where a pair is a computed token and one that it attends to. The prices are fitted by recursive least squares with forgetting
(Ljung, *System Identification*, 1999, section 11.2) on relative errors: a short step counts as much as a long one. Where a worker
sees no work of some kind for long, it keeps what it knew of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protos.control import StepPrices

GUESS = StepPrices(base_s=2e-3, token_s=5e-4, pair_s=2e-8, sequence_s=1e-3, context_s=1e-6)
"""Before the first step, for no machine in particular."""

_FORGET = 0.998
"""Of what was learned, a step: the last five hundred steps count."""
_DOUBT = 30.0
"""Standard deviation of the first guess, as a part of it."""
_MIN_PREFILL_TOKENS = 16
"""Of a step that says something about prefill: fewer are hidden in the base."""
_OUTLIER = 0.5
"""Relative error from which on a step counts less: the machine had other things to do."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one step computes."""

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_sequences: int = 0
    decode_tokens: int = 0
    """Tokens that the decoding sequences attend to."""


class StepModel:
    """Give it each step's work and seconds; `prices` is what it makes of them."""

    def __init__(self, guess: StepPrices = GUESS) -> None:
        self._scale = np.array([guess.base_s, guess.token_s, guess.pair_s, guess.sequence_s, guess.context_s])
        self._theta = np.ones(5)
        self._doubt = np.eye(5) * _DOUBT**2
        self._most_doubt = 5 * _DOUBT**2
        self.num_steps = 0
        self._knows_prefill = False
        self._knows_decode = False

    def observe(self, work: Work, seconds: float) -> None:
        """A step of `work` took so long. One without work or time is ignored."""
        if seconds <= 0.0 or not (work.prefill_tokens or work.decode_sequences):
            return
        amounts = (1, work.prefill_tokens, work.prefill_pairs, work.decode_sequences, work.decode_tokens)
        row = self._scale * amounts / seconds
        error = 1.0 - float(row @ self._theta)
        weight = 1.0 if abs(error) <= _OUTLIER or self.num_steps < 5 else _OUTLIER / abs(error)
        spread = self._doubt @ row
        gain = spread / (1.0 / weight + float(row @ spread))
        self._theta = self._theta + gain * error
        self._doubt = self._doubt - np.outer(gain, spread)
        if float(np.trace(self._doubt)) < self._most_doubt:
            self._doubt = self._doubt / _FORGET
        self.num_steps += 1
        self._knows_prefill |= work.prefill_tokens >= _MIN_PREFILL_TOKENS
        self._knows_decode |= work.decode_sequences > 0

    @property
    def prices(self) -> StepPrices:
        """Seconds each, none below 0; 0 for what no step has had yet."""
        base, token, pair, sequence, context = (np.maximum(self._theta, 0.0) * self._scale).tolist()
        if not self._knows_prefill:
            token = pair = 0.0
        if not self._knows_decode:
            sequence = context = 0.0
        return StepPrices(base if self.num_steps else 0.0, token, pair, sequence, context)
