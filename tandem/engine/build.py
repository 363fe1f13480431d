"""Puts an engine together from a model and a worker's values: the same way for a worker and for a single process."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kernels.cpu import Native, native
from kernels.linear import WeightFormat
from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.layout import KVLayout
from protos.control import NOBODY, RoutingGroup
from tandem.config import WorkerConfig, packed_dir
from tandem.engine.compiling import Compiling
from tandem.engine.engine import Engine
from tandem.engine.limits import EngineLimits
from tandem.engine.memory import SlabMemory
from tandem.engine.numerics import NumericsReport, numerics_class
from tandem.engine.runner import Runner, layout_for
from tandem.errors import ConfigError
from tandem.grammar.matcher import Grammars
from tandem.models.loader import LoadedModel, load_model
from tandem.tokenizer.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """An engine and what it is made of. The arena lives as long as anything uses its memory; `close` gives it up."""

    engine: Engine
    runner: Runner
    model: LoadedModel
    layout: KVLayout
    arena: Arena
    pool: BlockPool
    limits: EngineLimits
    group: RoutingGroup
    numerics: NumericsReport
    native: Native | None
    compiling: Compiling


def build_engine(
    model_path: Path,
    dtype: Literal["bf16", "fp32"],
    worker: WorkerConfig,
    *,
    weights: WeightFormat | None = None,
    max_len: int = 0,
    fetch_timeout_s: float = 0.0,
    keep_events: bool = True,
    epoch: bytes = NOBODY,
) -> EngineParts:
    """Loads the model, reserves the arena, probes the numerics. Raises ModelError or ConfigError in one sentence.

    `max_len` 0 is the model's own context; the arena may shorten it. `epoch` is that of this process.
    """
    torch.set_num_threads(worker.threads)
    kernels = native()
    model = load_model(model_path, dtype, weights, packed_dir())
    layout = layout_for(model.config, dtype, worker.block_size)
    num_blocks = worker.arena_bytes // layout.slab_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"arena_bytes is {worker.arena_bytes}, which holds {num_blocks} blocks of {layout.slab_bytes} bytes; "
            "at least 2 are needed"
        )
    context = model.config.max_position
    if max_len > context:
        raise ConfigError(f"model.max_len is {max_len}, the model's context is {context} tokens")
    wanted, held = max_len or context, num_blocks * worker.block_size
    if held < wanted:
        log.warning(
            "arena_bytes is %d, which holds %d tokens: prompt and answer are limited to that, not to %d",
            worker.arena_bytes, held, wanted,
        )  # fmt: skip
    limits = EngineLimits(
        max_model_len=min(wanted, held),
        vocab_size=model.config.vocab_size,
        max_running=worker.max_running,
        max_step_tokens=worker.max_step_tokens,
        recompute_limit_tokens=worker.recompute_limit_tokens,
        fetch_timeout_s=fetch_timeout_s,
        block_size=worker.block_size,
        slab_bytes=layout.slab_bytes,
    )
    arena = Arena(num_blocks, layout.slab_bytes)
    pool = BlockPool(num_blocks, worker.block_size, "DEVICE", keep_events=keep_events)
    memory = SlabMemory(arena, layout)
    numerics = numerics_class(model, kernels, worker.threads)
    if not numerics.deterministic:
        log.error("streams are not bit-exact on this machine: %s", numerics.evidence)
    runner = Runner(model, memory.tensor, layout, native=kernels, threads=worker.threads)
    if runner.native is None:
        reason = "a C++ compiler is needed when Tandem is installed"
        if kernels is not None:
            reason = f"none are made for {model.config.num_heads} heads of {model.config.head_dim} dimensions"
        log.warning("no native kernels (%s): torch computes, several times slower", reason)
    compiling = Compiling(Grammars(lambda: load_tokenizer(model_path), model.config.vocab_size))
    engine = Engine(
        pool=pool,
        memory=memory,
        runner=runner,
        limits=limits,
        new_fetch_id=lambda: uuid.uuid4().bytes,
        writer=epoch,
        matchers=compiling,
    )
    group = RoutingGroup(
        model_fingerprint=model.fingerprint,
        kv_format=layout.kv_format,
        numerics_class=numerics.digest,
        block_size=worker.block_size,
    )
    return EngineParts(engine, runner, model, layout, arena, pool, limits, group, numerics, kernels, compiling)
