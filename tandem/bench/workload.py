"""The engine's workloads: prompts of random tokens through a `LocalEngine`, as tokens a second and what a step spends where.

Owns the prompts and what is timed. Every sequence has its own prompt, so a step of `batch` sequences reads the KV of `batch`
sequences. A prompt that decode starts from is computed once and found in the engine's own prefix cache by every later
measurement; a prompt whose prefill is timed is never seen before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from protos.control import Sampling
from tandem.bench.cases import DECODE_TOKENS, Case
from tandem.clock import now_s
from tandem.engine.local import LocalEngine, LocalOutput
from tandem.errors import TandemError

_SEED = 7


@dataclass(frozen=True, slots=True)
class Steps:
    """The average decode step of one run: its `seconds`, and those of its parts as the runner names them (none where torch
    computes)."""

    seconds: float
    parts: dict[str, float]


class EngineLoad:
    """Runs cases on one engine with blocks of `block_size` tokens. `num_prompts` is the largest batch of its decode cases."""

    def __init__(self, engine: LocalEngine, num_prompts: int, block_size: int) -> None:
        self._engine = engine
        self._block_size = block_size
        self._random = Random(_SEED)
        self._prompts: list[list[int]] = [[] for _ in range(num_prompts)]
        self._prepared = [0] * num_prompts

    def rate(self, case: Case) -> float:
        """Tokens a second of one run: prompt tokens until every sequence has its first token, or generated tokens while all
        sequences generate."""
        if case.what == "decode":
            return case.batch / self.decode(case).seconds
        outputs = self._answers([self._tokens(case.context) for _ in range(case.batch)], 1)
        return case.batch * case.context / max(output.token_times_s[0] for output in outputs)

    def decode(self, case: Case) -> Steps:
        """One run of a decode case: the steps after the first, which computes each prompt's last token. Its prompts are as
        many whole blocks as `context` has, and a token: with more to compute, they would not begin in the same step."""
        self.prepare(case)
        times_s: list[float] = []
        parts: list[dict[str, float]] = []

        def on_step() -> None:
            times_s.append(now_s())
            parts.append(self._engine.parts.runner.seconds())

        num_tokens = (case.context - 1) // self._block_size * self._block_size + 1
        self._answers([prompt[:num_tokens] for prompt in self._prompts[: case.batch]], DECODE_TOKENS, on_step)
        if len(times_s) != DECODE_TOKENS:
            raise TandemError(
                f"{case.name} took {len(times_s)} steps, not {DECODE_TOKENS}: its prompts' KV was not in the prefix cache"
            )
        count = DECODE_TOKENS - 1
        spent = {name: (parts[-1][name] - parts[0][name]) / count for name in parts[-1]}
        return Steps((times_s[-1] - times_s[0]) / count, spent)

    def missing_tokens(self, case: Case) -> int:
        """Prompt tokens that `prepare` would have to compute."""
        if case.what == "prefill":
            return 0
        return sum(max(0, case.context - done) for done in self._prepared[: case.batch])

    def prepare(self, case: Case) -> None:
        """Puts the KV of a decode case's prompts into the engine's prefix cache."""
        if not self.missing_tokens(case):
            return
        for prompt in self._prompts[: case.batch]:
            prompt.extend(self._tokens(case.context - len(prompt)))
        self._answers([prompt[: case.context] for prompt in self._prompts[: case.batch]], 1)
        self._prepared[: case.batch] = [max(case.context, done) for done in self._prepared[: case.batch]]

    def _tokens(self, count: int) -> list[int]:
        vocab_size = self._engine.parts.model.config.vocab_size
        return [self._random.randrange(vocab_size) for _ in range(count)]

    def _answers(
        self, prompts: list[list[int]], num_tokens: int, on_step: Callable[[], None] | None = None
    ) -> list[LocalOutput]:
        samplings = [Sampling(max_tokens=num_tokens)] * len(prompts)
        return [samples[0] for samples in self._engine.generate(prompts, samplings, on_step=on_step)]
