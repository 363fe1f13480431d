"""The climb: runs every rung in its order, on the same memory and steps.

Owns the sizes that the rungs share. Prints nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

from tandem.bench.ladder.continuous import continuous
from tandem.bench.ladder.disaggregated import disaggregated
from tandem.bench.ladder.rungs import CACHE, CHUNKED, DISAGGREGATED, NO_CACHE, PAGED, PREFIX, STATIC, Rung
from tandem.bench.ladder.workload import MAX_PROMPT_TOKENS, MAX_TOKENS, Request, Run, requests, sample
from tandem.config import Config, WorkerConfig
from tandem.engine.build import EngineParts, build_engine
from tandem.engine.runner import layout_for
from tandem.errors import ConfigError
from tandem.models.loader import open_weights

BATCH = 8
"""Sequences of a static batch; the KV memory of every rung is what they reserve."""
CHUNK_TOKENS = 128
"""Step size of the rungs with chunked prefill: it bounds how long a prompt holds up the others' tokens."""
_WHOLE_STEP_TOKENS = 512
_MAX_RUNNING = _WHOLE_STEP_TOKENS - MAX_PROMPT_TOKENS
"""So that the longest prompt and a token for each running sequence fit one step."""


def climb(
    path: Path, config: Config, start_cluster: Callable[[Config], AbstractContextManager[str]]
) -> Iterator[tuple[Rung, Run]]:
    """Runs the workload on every rung, lowest first. `start_cluster` gives the `host:port` of a cluster of a configuration.

    Each engine has `config.decode.threads` threads; the last rung has two engines. Raises ConfigError outside a checkout.
    """
    lower = lower_rungs()
    whole = _build(path, config, _WHOLE_STEP_TOKENS)
    everything = requests(whole.model.config.vocab_size)
    _warm_up(whole, everything)
    # The arena of an idle engine is nobody's, but for a cache that the next rung clears.
    num_blocks = whole.layout.num_blocks_for(MAX_TOKENS)
    yield NO_CACHE, lower.no_kv_cache(whole.runner, sample(everything), num_blocks)
    yield CACHE, lower.reserved_batches(whole.runner, everything, num_blocks, 1)
    yield STATIC, lower.reserved_batches(whole.runner, everything, num_blocks, BATCH)
    yield PAGED, continuous(whole, everything, whole_prompts=True, share_prefixes=False)
    del whole
    chunked = _build(path, config, CHUNK_TOKENS)
    _warm_up(chunked, everything)
    yield CHUNKED, continuous(chunked, everything, whole_prompts=False, share_prefixes=False)
    yield PREFIX, continuous(chunked, everything, whole_prompts=False, share_prefixes=True)
    del chunked
    with start_cluster(_cluster_config(path, config)) as target:
        yield DISAGGREGATED, disaggregated(target, everything)


def lower_rungs() -> ModuleType:
    """`benchmarks/ladder/rungs.py` of the checkout that this file is in. Raises ConfigError if there is none."""
    name, file = "benchmarks.ladder.rungs", Path(__file__).resolve().parents[3] / "benchmarks" / "ladder" / "rungs.py"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(
            f"{file} is not there: the ladder runs from a checkout of the project, installed with `make setup`"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _worker(path: Path, config: Config, max_step_tokens: int) -> WorkerConfig:
    """The configured decode worker, with the memory that a static batch reserves."""
    layout = layout_for(open_weights(path).config, config.model.dtype, config.decode.block_size)
    values = {
        "arena_bytes": BATCH * layout.num_blocks_for(MAX_TOKENS) * layout.slab_bytes,
        "max_running": _MAX_RUNNING,
        "max_step_tokens": max_step_tokens,
    }
    return config.decode.model_copy(update=values)


def _build(path: Path, config: Config, max_step_tokens: int) -> EngineParts:
    worker = _worker(path, config, max_step_tokens)
    model = config.model
    return build_engine(path, model.dtype, worker, weights=model.weights, max_len=MAX_TOKENS, keep_events=False)


def _cluster_config(path: Path, config: Config) -> Config:
    """One prefill and one decode worker and no pool node: what the technique needs, and nothing else. Each worker has the
    memory that every rung has."""
    prefill = {"replicas": 1, "threads": config.prefill.threads}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": str(path), "max_len": MAX_TOKENS}),
            "prefill": _worker(path, config, _WHOLE_STEP_TOKENS).model_copy(update=prefill),
            "decode": _worker(path, config, CHUNK_TOKENS).model_copy(update={"replicas": 1}),
            "pool": config.pool.model_copy(update={"replicas": 0}),
        }
    )


def _warm_up(parts: EngineParts, everything: Sequence[Request]) -> None:
    """What the first steps of a process build is not the first rung's to pay for."""
    short = [dataclasses.replace(request, arrival_s=0.0, num_answer_tokens=2) for request in everything[:_MAX_RUNNING]]
    continuous(parts, short, whole_prompts=False, share_prefixes=False)
