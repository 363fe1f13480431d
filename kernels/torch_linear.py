"""Linears computed by torch: the reference backend's, and the way of machines without a native library.

Owns which form torch runs here, and how many rows a call needs so that a row's bits don't depend on how many there are:
matrix-vector and matrix-matrix products reduce in different orders, so a call never has fewer rows than `MIN_ROWS`.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import Matrix, unpack

TorchForm = Literal["bf16-packed", "bf16-rounded", "fp32"]
MIN_ROWS: dict[TorchForm, int] = {"bf16-packed": 2, "bf16-rounded": 8, "fp32": 8}
PACK_ROWS = 512
"""The batch that oneDNN chooses its packing for; part of what decides the bits."""


class Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_rows >= MIN_ROWS, in_features] → [num_rows, out_features], a new tensor: bf16 forms in bf16."""


class PackedLinear:
    """bf16 weights in oneDNN's blocked layout."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), PACK_ROWS)
        self._bias = None if bias is None else bias.bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self._weight, self._bias, "none", [], "")
        return out


class RoundedLinear:
    """bf16 rows through fp32 arithmetic: for machines without a packed bf16 kernel. Twice the memory, the same rounding."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.float()
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16().float(), self._weight, self._bias).bfloat16()


class Fp32Linear:
    """Plain fp32; int8 and int4 weights by their values."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.float()
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self._weight, self._bias)


@cache
def bf16_form() -> TorchForm:
    """What this machine's torch runs for bf16, found by trying the packed kernel once."""
    try:
        PackedLinear(torch.zeros((64, 64)), None)(torch.zeros((2, 64), dtype=torch.bfloat16))
    except RuntimeError:
        return "bf16-rounded"
    return "bf16-packed"


def torch_form(form: str) -> TorchForm:
    """The form that computes weights of that format."""
    return bf16_form() if form == "bf16" else "fp32"


def torch_linear(matrix: Matrix, form: TorchForm) -> Linear:
    """Keeps its own copy of the matrix."""
    bias = None if matrix.bias is None else matrix.bias[: matrix.out_features]
    weight = unpack(matrix)
    match form:
        case "bf16-packed":
            return PackedLinear(weight, bias)
        case "bf16-rounded":
            return RoundedLinear(weight, bias)
        case "fp32":
            return Fp32Linear(weight, bias)
