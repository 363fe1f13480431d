"""vLLM's CPU build as a peer: its engine in this process, no prefix caching, greedy drawing, no tokenizer.

Runs in `.peers/vllm` (`make peers`). What is timed is the engine's own loop; a decode measurement computes its prompts each
time, untimed.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import time
from typing import Any

from child import arguments, own_stdout, random_tokens, serve

KV_GIB = 1


def prepare_environment(cpus: list[int]) -> None:
    """What vLLM reads while it is imported. Nothing is asked from a network."""
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(cpu) for cpu in cpus),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }


class VLLM:
    def __init__(self, path: str, vocab: int, max_batch: int, max_len: int) -> None:
        from vllm import LLM

        self._vocab = vocab
        self._random = random.Random(7)
        self._num_requests = 0
        llm = LLM(
            path,
            dtype="bfloat16",
            max_model_len=max_len,
            max_num_seqs=max_batch,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self._engine: Any = llm.llm_engine

    def _run(self, batch: int, context: int, tokens: int) -> list[list[float]]:
        """For each sequence the times after the start at which its tokens came; each draws `tokens`."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompts = [random_tokens(self._random, self._vocab, context) for _ in range(batch)]
        times: dict[str, list[float]] = {}
        began = time.perf_counter()
        for prompt in prompts:
            name = str(self._num_requests)
            self._num_requests += 1
            times[name] = []
            self._engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            elapsed = time.perf_counter() - began
            for output in outputs:
                times[output.request_id].extend(elapsed for _ in output.outputs[0].token_ids)
        if any(len(found) != tokens for found in times.values()):
            raise RuntimeError(f"vLLM drew {[len(found) for found in times.values()]} tokens, asked for {tokens} each")
        return list(times.values())

    def prefill(self, batch: int, context: int) -> tuple[int, float]:
        return batch * context, max(found[0] for found in self._run(batch, context, 1))

    def decode(self, batch: int, context: int, tokens: int) -> tuple[int, float]:
        """As many steps as asked for after all sequences have their first token; the first ones may draw more meanwhile."""
        # Prompts that don't fit in one step together: the first sequences draw while the last are computed.
        times = self._run(batch, context, tokens + batch)
        began, ended = max(found[0] for found in times), min(found[-1] for found in times)
        drawn = sum(sum(began < time_s <= ended for time_s in found) for found in times)
        return drawn, ended - began


if __name__ == "__main__":
    options = arguments()
    answers = own_stdout()
    prepare_environment(options.cpus)
    engine = VLLM(options.model, options.vocab, options.max_batch, options.max_len)
    serve(answers, importlib.metadata.version("vllm-cpu"), engine)
