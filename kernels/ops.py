"""What a decoder is made of: the operations that a model's file puts in order, and the backends carry out.

`kernels.cpu.program` records them once and runs them natively, one call a step; `kernels.torch_ops` computes each with torch:
the reference, and the way where there is no native library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kernels.linear import Matrix

A = TypeVar("A")
"""A backend's rows: activations of the step's tokens."""


class Ops(Protocol[A]):
    """One step's rows on their way through a decoder. `x` is the fp32 residual stream; rows never see each other except in
    `attention`, and no row's bits depend on the others."""

    def embed(self, table: Matrix) -> A:
        """x: the rows of `table` [vocab, hidden] that the tokens name."""

    def norm_linear(self, x: A, norm: Tensor, eps: float, matrix: Matrix) -> A:
        """RMSNorm of x (norm: [padded(hidden)] fp32), times the matrix, in fp32."""

    def norm_gated(self, x: A, norm: Tensor, eps: float, matrix: Matrix) -> A:
        """RMSNorm of x, times a matrix whose panels hold 16 gates and the 16 values they gate → silu(gate) * value."""

    def attention(self, qkv: A, layer: int) -> A:
        """Turns queries and keys by their positions (RoPE), writes keys and values into the arena, and attends causally over the
        whole sequence of each row."""

    def add_linear(self, x: A, y: A, matrix: Matrix) -> None:
        """x += y times the matrix."""

    def keep_logit_rows(self, x: A, y: A) -> None:
        """Of x and y only the rows whose logits are wanted go on."""

    def logits(self, x: A, norm: Tensor, eps: float, head: Matrix) -> None:
        """The step's result: RMSNorm of x, times the head, fp32."""


@dataclass(frozen=True, slots=True)
class Span:
    """One chunk: `rows` rows of the step from `first_row`, at positions `start`…, over the blocks `block_ids` (int32, covering
    positions 0…start + rows - 1)."""

    first_row: int
    rows: int
    start: int
    block_ids: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes. Rows are its chunks' tokens, chunk after chunk.

    token_ids, positions: [num_rows] int32; slots: [num_rows] int64 (`block_id * block_size + offset`), all different;
    logit_rows: [num_logits] int32, ascending; logits: [num_logits, vocab_size] fp32, the result.
    """

    token_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int64]
    logit_rows: npt.NDArray[np.int32]
    spans: tuple[Span, ...]
    logits: Tensor
