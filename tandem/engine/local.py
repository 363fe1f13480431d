"""One engine in this process, tokens in, tokens out: what everything else is compared with.

Owns nothing that a cluster has: no router, no other process, no fetches. The engine is the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kernels.linear import WeightFormat
from kvpool.keys import root_key, tokens_as_bytes
from protos.control import Dispatch, Failed, Fence, FinishReason, Sampling, TokenLogprobs, Tokens
from tandem.clock import now_s
from tandem.config import WorkerConfig
from tandem.engine.build import build_engine
from tandem.errors import error_from_code

_DEADLINE_S = 86_400.0


@dataclass(slots=True)
class LocalOutput:
    """One sample's answer. Times are seconds after `generate` was called."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    token_times_s: list[float] = field(default_factory=list)


class LocalEngine:
    """Loads a model and runs batches of prompts through the engine with continuous batching."""

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: Literal["bf16", "fp32"] = "bf16",
        weights: WeightFormat | None = None,
        worker: WorkerConfig | None = None,
        max_len: int = 0,
    ) -> None:
        self.parts = build_engine(
            model_path, dtype, worker or WorkerConfig(), weights=weights, max_len=max_len, keep_events=False
        )
        group = self.parts.group
        self._root = root_key(
            model_fingerprint=group.model_fingerprint, kv_format=group.kv_format, numerics_class=group.numerics_class
        )
        self._num_requests = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        *,
        n: int = 1,
        on_step: Callable[[], None] | None = None,
    ) -> list[list[LocalOutput]]:
        """Runs all prompts together; returns `n` outputs a prompt, in order. `on_step` is called after each step.

        Raises the TandemError of the first prompt that is refused; nothing keeps running then.
        """
        engine = self.parts.engine
        began_s = now_s()
        outputs: dict[Fence, list[LocalOutput]] = {}
        for prompt, sampling in zip(prompts, samplings, strict=True):
            fence = Fence(f"local-{self._num_requests}", 0, "decode", 0)
            self._num_requests += 1
            outputs[fence] = [LocalOutput() for _ in range(n)]
            engine.on_dispatch(
                0,
                Dispatch(
                    fence=fence,
                    root=self._root,
                    token_ids=tokens_as_bytes(prompt),
                    num_prompt_tokens=max(1, len(prompt)),
                    sampling=sampling,
                    n=n,
                    sources=[],
                    deadline_s=_DEADLINE_S,
                    prefill_here=True,
                ),
                began_s,
            )
        try:
            while True:
                for _, reply in engine.step(now_s(), now_s).replies:
                    match reply:
                        case Failed(code=code, message=message):
                            raise error_from_code(code, message)
                        case Tokens():
                            self._take(outputs[reply.fence][reply.index], reply, now_s() - began_s)
                if on_step is not None:
                    on_step()
                if engine.is_idle:
                    break
        finally:
            if not engine.is_idle:
                engine.on_router_lost(0)
                engine.take_output()
        self.parts.pool.check()
        return list(outputs.values())

    @staticmethod
    def _take(output: LocalOutput, tokens: Tokens, elapsed_s: float) -> None:
        output.token_ids.extend(tokens.token_ids)
        output.logprobs.extend(tokens.logprobs)
        output.token_times_s.extend(elapsed_s for _ in tokens.token_ids)
        output.finish_reason = tokens.finish_reason
