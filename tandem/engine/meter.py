"""How much this worker computed, and how fast it computes and fetches.

Owns the totals of steps and tokens, the smoothed speeds, the prices of a step (`step_model`), and the prediction that is made
of them. It reads no clock: seconds are given. 0 is a speed or a price that has not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from protos.control import StepPrices
from tandem.engine.scheduler import Scheduled
from tandem.engine.step_model import StepModel, Work

FETCH_SETUP_S = 0.001
_SMOOTHING = 0.2
"""Weight of the newest measurement in the smoothed speeds of `Load`."""


class Meter:
    """Told of every step and every fetch that brought something."""

    def __init__(self, block_size: int, slab_bytes: int) -> None:
        self._block_size = block_size
        self._slab_bytes = slab_bytes
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self.num_decode_tokens = 0
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self.fetch_bytes_per_s = 0.0
        self.prices = StepPrices()
        self._model = StepModel()

    def on_step(self, scheduled: Many[Scheduled], seconds: float) -> None:
        """A step computed this, in that time; before the sequences are told. Steps that mix prefill and decode count as
        prefill; those of little prefill measure nothing."""
        num_prefill = num_pairs = num_decode = num_context = 0
        for item in scheduled:
            num_tokens, num_before = item.num_tokens, item.sequence.num_computed_tokens
            if num_tokens == 1 and item.sequence.num_generated_tokens > 0:
                num_decode += 1
                num_context += num_before + 1
            else:
                num_prefill += num_tokens
                num_pairs += num_tokens * num_before + num_tokens * (num_tokens + 1) // 2
        self._model.observe(Work(num_prefill, num_pairs, num_decode, num_context), seconds)
        self.prices = self._model.prices
        self.num_steps += 1
        self.num_decode_tokens += num_decode
        self.num_prefill_tokens += num_prefill
        if num_prefill == 0:
            self.decode_step_s = _smoothed(self.decode_step_s, seconds)
        elif num_prefill >= 4 * self._block_size and seconds > 0:
            self.prefill_tokens_per_s = _smoothed(self.prefill_tokens_per_s, num_prefill / seconds)

    def on_fetch(self, num_bytes: int, seconds: float) -> None:
        """So many bytes came within that time, which is more than 0."""
        self.fetch_bytes_per_s = _smoothed(self.fetch_bytes_per_s, num_bytes / seconds)

    def fetching_is_faster(self, num_blocks: int, num_before: int) -> bool:
        """Whether so many full blocks after `num_before` tokens are predicted to be here sooner if they are fetched than if they
        are computed. True before both have been measured."""
        if not self.fetch_bytes_per_s or not self.prices.token_s:
            return True
        fetch_s = FETCH_SETUP_S + num_blocks * self._slab_bytes / self.fetch_bytes_per_s
        return fetch_s < self.prices.prefill_s(num_blocks * self._block_size, num_before)


def _smoothed(old: float, new: float) -> float:
    return new if old == 0 else old + _SMOOTHING * (new - old)
