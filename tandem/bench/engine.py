"""The engine alone, in this process: tokens a second of prefill and decode, beside what one core allows at best.

Owns the workloads. A decode step of one sequence can't be faster than reading every weight once; a prefill can't be faster than
its multiplications at the speed of a plain matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Literal

from protos.control import Sampling
from tandem.bench.limits import MemoryReader, matmul_flops_per_s
from tandem.bench.report import Metric, metric
from tandem.config import WorkerConfig
from tandem.engine.local import LocalEngine, LocalOutput
from tandem.models.config import ModelConfig
from tandem.models.loader import TORCH_DTYPES

_PROMPT_TOKENS = 512
_DECODE_PROMPT_TOKENS = 32
_DECODE_TOKENS = 64
_BATCH = 8
_SEED = 7


def weights_per_token(config: ModelConfig) -> int:
    """Weights of all linears that one token meets, the output head included: multiplications, and values read from memory."""
    attention = config.hidden * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.hidden * config.intermediate) + config.vocab_size * config.hidden


def run(path: Path, dtype: Literal["bf16", "fp32"], worker: WorkerConfig, repetitions: int) -> Iterator[Metric]:
    """Measures and yields the metrics; the limits are measured between the repetitions of what they limit."""
    engine = LocalEngine(path, dtype=dtype, worker=worker)
    config = engine.parts.model.config
    weights = weights_per_token(config)
    value_bytes = TORCH_DTYPES[dtype].itemsize
    reader = MemoryReader()
    random = Random(_SEED)

    def prompts(count: int, num_tokens: int) -> list[list[int]]:
        return [[random.randrange(config.vocab_size) for _ in range(num_tokens)] for _ in range(count)]

    def answer(count: int, num_prompt_tokens: int, num_tokens: int) -> list[LocalOutput]:
        sampling = Sampling(max_tokens=num_tokens)
        outputs = engine.generate(prompts(count, num_prompt_tokens), [sampling] * count)
        return [samples[0] for samples in outputs]

    answer(1, _PROMPT_TOKENS, 2)  # first calls build and warm what later ones reuse
    prefill, decode, batch, reads, products = [], [], [], [], []
    for _ in range(repetitions):
        products.append(matmul_flops_per_s(TORCH_DTYPES[dtype]))
        prefill.append(_PROMPT_TOKENS / answer(1, _PROMPT_TOKENS, 1)[0].token_times_s[0])
        reads.append(reader.bytes_per_s())
        decode.append(_decode_rate(answer(1, _DECODE_PROMPT_TOKENS, _DECODE_TOKENS)))
        batch.append(_decode_rate(answer(_BATCH, _DECODE_PROMPT_TOKENS, _DECODE_TOKENS)))
    yield metric("memory_read_one_core", [rate / 1e9 for rate in reads], "GB/s")
    yield metric(f"matmul_{dtype}_one_core", [rate / 1e9 for rate in products], "GFLOP/s")
    yield metric(
        f"prefill_{_PROMPT_TOKENS}_tokens",
        prefill,
        "tokens/s",
        reference="all linears at the speed of a plain matrix product on one core",
        reference_values=[rate / (2 * (weights - config.vocab_size * config.hidden)) for rate in products],
    )
    bound = "every weight read once from memory by one core"
    yield metric(
        "decode_1_sequence",
        decode,
        "tokens/s",
        reference=bound,
        reference_values=[rate / (weights * value_bytes) for rate in reads],
    )
    yield metric(
        f"decode_{_BATCH}_sequences",
        batch,
        "tokens/s",
        reference=f"{bound}, for {_BATCH} tokens",
        reference_values=[_BATCH * rate / (weights * value_bytes) for rate in reads],
    )


def _decode_rate(outputs: list[LocalOutput]) -> float:
    """Tokens a second between the time when every sequence has its first token and the time when the first one ends."""
    began_s = max(output.token_times_s[0] for output in outputs)
    ended_s = min(output.token_times_s[-1] for output in outputs)
    drawn = sum(sum(began_s < time_s <= ended_s for time_s in output.token_times_s) for output in outputs)
    return drawn / (ended_s - began_s)
