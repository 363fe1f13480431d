"""Runner: chunks of tokens and block tables in, KV into the arena, logits out.

Owns a step's metadata, the rope tables and the choice of backend: the native program where there is one, else torch. Never
allocates blocks, never schedules, never samples. A token's logits and KV depend on nothing but the tokens up to it: not on the
batch, the chunking, the prefix hit or the block ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.cpu import Native
from kernels.cpu.program import Heads, Program, supports
from kernels.ops import Span, Step
from kernels.paged_attention import TILE
from kernels.rope import rope_tables
from kernels.torch_ops import TorchOps
from kvpool.layout import KVLayout
from tandem.models.config import ModelConfig
from tandem.models.loader import TORCH_DTYPES, Dtype, LoadedModel


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence, at positions `start`…`start + len(token_ids) - 1`.

    `block_table` covers at least positions 0 up to the last one, in order; the KV of positions before `start` is there.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    want_logits: bool


def layout_for(config: ModelConfig, dtype: Dtype, block_size: int) -> KVLayout:
    """The layout of this model's slabs. Raises ValueError unless `block_size` divides the attention tile (256 positions)."""
    if block_size < 1 or TILE % block_size:
        raise ValueError(f"block_size is {block_size}, must divide {TILE}")
    return KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype)


class Runner:
    """Runs steps of one model over one arena, on the thread that calls it.

    `arena`: [num_blocks, *layout.slab_shape] in the model's dtype, contiguous; `run` writes the slots of its chunks' tokens
    and nothing else. Slots that no token has written may hold anything.
    """

    def __init__(
        self,
        model: LoadedModel,
        arena: Tensor,
        layout: KVLayout,
        *,
        native: Native | None,
        max_rows: int = 512,
        threads: int = 1,
    ) -> None:
        expected = layout_for(model.config, model.dtype, layout.block_size)
        if layout != expected:
            raise ValueError(f"layout {layout} is not this model's {expected}")
        if (
            arena.shape[1:] != layout.slab_shape
            or arena.dtype != TORCH_DTYPES[model.dtype]
            or not arena.is_contiguous()
        ):
            raise ValueError(
                f"arena {tuple(arena.shape)} {arena.dtype} must be contiguous [num_blocks, {layout.slab_shape}] {model.dtype}"
            )
        self._config = model.config
        self._arena = arena
        self._layout = layout
        self._max_rows = max_rows
        positions = min(model.config.max_position, arena.shape[0] * layout.block_size)
        self._cos, self._sin = rope_tables(model.config.rope.inverse_frequencies(model.config.head_dim), positions)
        self._model = model.model
        self._native: Native | None = None
        self._program: Program | None = None
        heads = model.config.num_heads
        if native is not None and supports(heads, arena):
            self._native = native
            shape = Heads(heads, self._cos, self._sin, arena)
            self._program = Program(native, model.model.form, shape, max_rows, threads)
            model.model.forward(self._program)
        else:
            self._torch = TorchOps(model.model.form, heads, self._cos, self._sin, arena)
        self._token_ids = np.zeros(max_rows, dtype=np.int32)
        self._positions = np.zeros(max_rows, dtype=np.int32)
        self._slots = np.zeros(max_rows, dtype=np.int64)
        self._every_position = np.arange(positions, dtype=np.int32)

    @property
    def max_rows(self) -> int:
        return self._max_rows

    @property
    def native(self) -> Native | None:
        """The kernels that compute; None: torch does, also where the kernels weren't made for this model's shape."""
        return self._native

    def _check(self, chunks: Sequence[Chunk]) -> None:
        rows = sum(len(chunk.token_ids) for chunk in chunks)
        if not 1 <= rows <= self._max_rows:
            raise ValueError(f"a step of {rows} rows, must have 1 to {self._max_rows}")
        for chunk in chunks:
            end = chunk.start + len(chunk.token_ids)
            if not chunk.token_ids or chunk.start < 0:
                raise ValueError(f"a chunk of {len(chunk.token_ids)} tokens at position {chunk.start}")
            if end > self._cos.shape[0]:
                raise ValueError(f"a chunk ends at position {end}, the limit is {self._cos.shape[0]}")
            if len(chunk.block_table) < self._layout.num_blocks_for(end):
                raise ValueError(f"{len(chunk.block_table)} blocks don't cover {end} positions")

    def _inputs(self, chunks: Sequence[Chunk]) -> Step:
        block_size = self._layout.block_size
        spans: list[Span] = []
        logit_rows: list[int] = []
        row = 0
        for chunk in chunks:
            count = len(chunk.token_ids)
            end = chunk.start + count
            table = np.array(chunk.block_table[: self._layout.num_blocks_for(end)], dtype=np.int32)
            self._check_range("block ids", table, self._arena.shape[0])
            spans.append(Span(row, count, chunk.start, table))
            rows = slice(row, row + count)
            if count == 1:
                self._token_ids[row] = chunk.token_ids[0]
                self._positions[row] = chunk.start
                self._slots[row] = int(table[-1]) * block_size + chunk.start % block_size
            else:
                self._token_ids[rows] = chunk.token_ids
                positions = self._positions[rows] = self._every_position[chunk.start : end]
                blocks, offsets = np.divmod(positions, block_size)
                self._slots[rows] = table[blocks].astype(np.int64) * block_size + offsets
            row += count
            if chunk.want_logits:
                logit_rows.append(row - 1)
        self._check_range("token ids", self._token_ids[:row], self._config.vocab_size)
        return Step(
            token_ids=self._token_ids[:row],
            positions=self._positions[:row],
            slots=self._slots[:row],
            logit_rows=np.array(logit_rows, dtype=np.int32),
            spans=tuple(spans),
            logits=torch.empty((len(logit_rows), self._config.vocab_size)),
        )

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes and writes the KV of every chunk's tokens; returns fp32 logits [chunks with want_logits, vocab_size] of
        each such chunk's last token, in order, the caller's own.

        Chunks write different slots; what a row attends to was written before, or is by this step. Raises ValueError for chunks
        that break the contract and IndexError for a token or block id out of range, before anything is written.
        """
        self._check(chunks)
        step = self._inputs(chunks)
        if self._program is not None:
            self._program.run(step)
        else:
            self._torch.run(step, self._model.forward)
        return step.logits

    def pin(self, cores: Sequence[int]) -> bool:
        """Pins the threads that compute to those cores, one each, the calling one, which must be the one that runs, to the first.
        False if that can't be done: the system doesn't let it, or torch computes."""
        return self._program is not None and self._program.pin(cores)

    def seconds(self) -> dict[str, float]:
        """What all steps so far spent in "linear", "attention" and "rest" of the native program; empty where torch computes."""
        return {} if self._program is None else self._program.seconds()

    @staticmethod
    def _check_range(what: str, ids: npt.NDArray[np.int32], limit: int) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= limit:
            raise IndexError(f"{what} {low} to {high}, must be within 0 to {limit - 1}")
