"""SwiGLU's elementwise half: silu(gate) * up (Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import OK, data, native
from kernels.cpu import WIDTH_MULTIPLE as NATIVE_MULTIPLE

WIDTH_MULTIPLE = 32
"""`width` is a multiple of this many elements, so that no row ends in a vector's scalar tail, whose silu has other bits.
Loaders pad the gate's and up's outputs with zero rows: silu(0) * 0 is 0."""


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """gate_up: [num_rows, 2 * width], gate first → [num_rows, width], computed in fp32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `silu_mul_ref`; where torch computes it, silu(gate) is rounded to the input's dtype in between."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    kernels = native()
    if kernels is not None and gate_up.dtype == torch.bfloat16 and width % NATIVE_MULTIPLE == 0:
        out = torch.empty((rows, width), dtype=gate_up.dtype)
        code = kernels.silu_mul(data(gate_up), data(out), rows, width)
        assert code == OK
        return out
    return F.silu(gate_up[:, :width]).mul_(gate_up[:, width:])
