"""The numerics class: a digest of what decides a model's bits on this machine, confirmed by a start-up probe (design §1).

Owns the probe. Two processes of one class may exchange KV and continue each other's streams bit for bit. The digest holds
what is known to decide the bits (versions, instruction sets, threads, splits, weight format) and the bits of a fixed input,
so that what is not known decides too.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import Native
from kernels.linear import PACK_VERSION
from kernels.paged_attention import MIN_ROWS as ATTENTION_MIN_ROWS
from kernels.paged_attention import TILE
from kernels.rope import rope_tables
from kernels.torch_linear import MIN_ROWS, PACK_ROWS, torch_form
from tandem.engine.runner import Chunk, Runner, layout_for
from tandem.models.loader import TORCH_DTYPES, LoadedModel

PROBE_TOKENS = 600
"""More than a split of attention."""
_WHOLE = 512
"""Rows of the first pass's chunks: as many as a step may have."""
_PIECES = (63, 1, 2, 3, 63, 378, 4)
"""Rows of the second pass's first chunks, the last of them across a split; the rest is one more chunk."""
_BLOCK_SIZE = 16
_SWITCHES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
)
_CPUINFO_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class NumericsReport:
    """`digest` (32 bytes) names the class. `deterministic`: the probe found the same bits however it cut the work. `evidence`
    says in a sentence what was run and, if the bits differed, where."""

    digest: bytes
    deterministic: bool
    evidence: str


def _processor() -> str:
    """Vendor, family and model: libraries choose kernels and cache blocking by them."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            lines = file.read(_CPUINFO_BYTES).split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine()
    wanted = ("vendor_id", "cpu family", "model")
    return ", ".join(line.replace("\t", "") for line in lines if line.split("\t")[0].strip(": ") in wanted)


def _torch_ingredients(form: str) -> list[str]:
    kind = torch_form(form)
    return [
        f"backend torch-cpu {torch.__version__}",
        f"build {torch.__config__.show()}",
        f"capability {torch.backends.cpu.get_cpu_capability()}",
        f"processor {_processor()}",
        f"threads {torch.get_num_threads()}",
        *(f"{name} {os.environ.get(name, '')}" for name in _SWITCHES),
        f"weights {kind} packed for {PACK_ROWS} rows, at least {MIN_ROWS[kind]} rows",
        f"attention tiles of {TILE} positions, at least {ATTENTION_MIN_ROWS} rows",
    ]


def _ingredients(model: LoadedModel, computes: Native | None, draws: Native | None) -> list[str]:
    """`computes`: the kernels of the model's steps, None for torch. `draws`: those of the sampler, None for numpy."""
    # The native kernels' bits depend on nothing but their code: not on the processor, the number of threads or other libraries.
    backend = [f"native {computes.variant} {computes.build}"] if computes else _torch_ingredients(model.model.form)
    return [
        "tandem/numerics/3",
        *backend,
        f"sampler {draws.variant} {draws.build}" if draws else f"sampler numpy {np.__version__}",
        f"dtype {model.dtype}, weights {model.model.form} packed by version {PACK_VERSION}",
    ]


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def _first_difference(name: str, one: Tensor, other: Tensor) -> list[str]:
    return [] if torch.equal(_bits(one), _bits(other)) else [name]


def _decode_again(runner: Runner, tokens: Sequence[int], table: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Recomputes tokens at `positions` as one batch of one-row chunks, over KV that is there: it writes the same bits again."""
    return runner.run([Chunk(tokens[position : position + 1], position, table, True) for position in positions])


def numerics_class(model: LoadedModel, native: Native | None, threads: int = 1) -> NumericsReport:
    """Runs the probe on a small arena of its own and names the class. Takes about two prefills of 600 tokens.

    The same tokens are run in the largest chunks, in chunks of other sizes in other blocks, and some of them once more as a batch
    of one-row chunks. All KV and logits must be the same bits.
    """
    config = model.config
    length = min(PROBE_TOKENS, config.max_position)
    layout = layout_for(config, model.dtype, _BLOCK_SIZE)
    num_blocks = layout.num_blocks_for(length)
    arena = torch.full((2 * num_blocks, *layout.slab_shape), torch.nan, dtype=TORCH_DTYPES[model.dtype])
    runner = Runner(model, arena, layout, native=native, max_rows=_WHOLE, threads=threads)
    # Any fixed tokens do; a multiplicative walk visits far-apart rows of the embedding.
    tokens = [(7919 * (index + 1)) % config.vocab_size for index in range(length)]
    first, second = list(range(num_blocks)), list(range(2 * num_blocks - 1, num_blocks - 1, -1))

    for start in range(0, length, _WHOLE):
        whole = runner.run([Chunk(tokens[start : start + _WHOLE], start, first, True)])
    pieces: list[tuple[int, Tensor]] = []
    start = 0
    for size in (*_PIECES, length):
        size = min(size, length - start)
        if size > 0:
            start += size
            pieces.append((start - 1, runner.run([Chunk(tokens[start - size : start], start - size, second, True)])))
    found = _first_difference("logits of the last token in large chunks and in pieces", whole, pieces[-1][1])
    written = slice(0, length)
    kv = [arena[blocks].permute(0, 4, 1, 2, 3, 5).flatten(0, 1)[written] for blocks in (first, second)]
    found += _first_difference("KV in large chunks and in pieces", kv[0], kv[1])
    singles = _decode_again(runner, tokens, second, [position for position, _ in pieces])
    found += _first_difference(
        "logits in chunks and in one-row chunks", torch.cat([part for _, part in pieces]), singles
    )
    again = arena[second].permute(0, 4, 1, 2, 3, 5).flatten(0, 1)[written]
    found += _first_difference("KV in chunks and in one-row chunks", kv[1], again)

    digest = hashlib.sha256("\n".join(_ingredients(model, runner.native, native)).encode())
    digest.update(_bits(kv[0]).numpy())
    digest.update(_bits(singles).numpy())
    for table in rope_tables(
        config.rope.inverse_frequencies(config.head_dim), config.max_position
    ):  # torch's sine and cosine
        digest.update(_bits(table).numpy())
    backend = runner.native.variant if runner.native else "torch"
    sizes = ", ".join(str(size) for size in _PIECES)
    evidence = f"{length} tokens in chunks of {_WHOLE}, of {sizes} and the rest, and batched one-row chunks "
    evidence += f"({backend}, {model.model.form}): "
    evidence += f"different bits: {'; '.join(found)}" if found else "the same bits"
    return NumericsReport(digest.digest(), not found, evidence)
