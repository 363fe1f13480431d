"""Linear layers whose rows don't depend on each other: packed oneDNN bf16, fp32, and bf16 computed in fp32.

Owns how weights are packed, which form this machine can run, and how many rows a call needs so that a row's bits don't
depend on how many there are: matrix-vector products and matrix-matrix products reduce in different orders, so a call
never has fewer rows than `min_rows`.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

WeightFormat = Literal["bf16-packed", "bf16-rounded", "fp32"]
MIN_ROWS: dict[WeightFormat, int] = {"bf16-packed": 2, "bf16-rounded": 8, "fp32": 8}
PACK_ROWS = 512
"""The batch that oneDNN chooses its packing for; part of what decides the bits."""


class Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_rows >= min_rows, in_features] contiguous, in the model's dtype → [num_rows, out_features], a new tensor."""


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [num_rows, in_features]; weight: [out_features, in_features] → fp32 product, rounded once to x's dtype."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class PackedLinear:
    """bf16 weights in oneDNN's blocked layout."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), PACK_ROWS)
        self._bias = None if bias is None else bias.bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


class RoundedLinear:
    """bf16 rows through fp32 arithmetic: for machines without a packed bf16 kernel. Twice the memory, the same rounding."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.float()
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self._weight, self._bias).bfloat16()


class Fp32Linear:
    """Plain fp32."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.float()
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


def weight_format(dtype: torch.dtype) -> WeightFormat:
    """The form that this machine runs for a model of `dtype`, found by trying the packed kernel once."""
    if dtype == torch.float32:
        return "fp32"
    try:
        PackedLinear(torch.zeros((64, 64)), None)(torch.zeros((2, 64), dtype=torch.bfloat16))
    except RuntimeError:
        return "bf16-rounded"
    return "bf16-packed"


def make_linear(weight: Tensor, bias: Tensor | None, form: WeightFormat) -> Linear:
    """weight: [out_features, in_features]; bias: [out_features] or None. Keeps its own copy."""
    if form == "bf16-packed":
        return PackedLinear(weight, bias)
    return RoundedLinear(weight, bias) if form == "bf16-rounded" else Fp32Linear(weight, bias)
