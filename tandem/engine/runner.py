"""Runner: chunks of tokens and block tables in, KV into the arena, logits out.

Owns a step's metadata and the rope tables. Never allocates blocks, never schedules, never samples. A token's logits and KV
depend on nothing but the tokens up to it: not on the batch, the chunking, the prefix hit or the block ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged_attention import TILE, Span, plan_attention
from kernels.rope import rope_tables
from kernels.rope_write import WritePlan
from kvpool.layout import KVLayout
from tandem.models.config import ModelConfig
from tandem.models.llama import StepInputs
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

    def __init__(self, model: LoadedModel, arena: Tensor, layout: KVLayout, max_rows: int = 512) -> None:
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
        self._model = model.model
        self._config = model.config
        self._arena = arena
        self._layout = layout
        self._max_rows = max_rows
        positions = min(model.config.max_position, arena.shape[0] * layout.block_size)
        self._cos, self._sin = rope_tables(model.config.rope.inverse_frequencies(model.config.head_dim), positions)

    @property
    def max_rows(self) -> int:
        return self._max_rows

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

    def _inputs(self, chunks: Sequence[Chunk]) -> StepInputs:
        block_size = self._layout.block_size
        spans: list[Span] = []
        tokens: list[int] = []
        positions: list[Tensor] = []
        slots: list[Tensor] = []
        logit_rows: list[int] = []
        for chunk in chunks:
            count = len(chunk.token_ids)
            end = chunk.start + count
            table = torch.as_tensor(chunk.block_table[: self._layout.num_blocks_for(end)], dtype=torch.int64)
            spans.append(Span(len(tokens), count, chunk.start, table))
            tokens.extend(chunk.token_ids)
            position = torch.arange(chunk.start, end)
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
            if chunk.want_logits:
                logit_rows.append(len(tokens) - 1)
        self._check_ids(tokens, spans)
        padding = max(0, self._model.min_rows - len(tokens))
        position = torch.cat((*positions, torch.zeros(padding, dtype=torch.int64)))
        return StepInputs(
            token_ids=torch.tensor(tokens + [0] * padding),
            write=WritePlan(self._cos.index_select(0, position), self._sin.index_select(0, position), torch.cat(slots)),
            plan=plan_attention(
                spans,
                self._config.num_heads,
                self._config.num_kv_heads,
                self._config.head_dim,
                block_size,
                self._arena.dtype,
            ),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes and writes the KV of every chunk's tokens; returns fp32 logits [chunks with want_logits, vocab_size] of
        each such chunk's last token, in order, the caller's own.

        Chunks are of different sequences and write different blocks. Raises ValueError for chunks that break the contract and
        IndexError for a token or block id out of range, before anything is written.
        """
        self._check(chunks)
        # Not inference_mode: its tensors can't be changed in place outside it, and the logits are the caller's own.
        with torch.no_grad():
            return self._model.forward(self._inputs(chunks), self._arena)

    def _check_ids(self, tokens: Sequence[int], spans: Sequence[Span]) -> None:
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self._config.vocab_size:
            raise IndexError(f"token ids {low} to {high}, must be within 0 to {self._config.vocab_size - 1}")
        num_blocks = self._arena.shape[0]
        for span in spans:
            low, high = (int(value) for value in span.block_ids.aminmax())
            if low < 0 or high >= num_blocks:
                raise IndexError(f"block ids {low} to {high}, must be within 0 to {num_blocks - 1}")
