"""SwiGLU's elementwise half: silu(gate) * up (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

WIDTH_MULTIPLE = 32
"""`width` is a multiple of this many elements, so that no row ends in a vector's scalar tail, whose silu has other bits.
Loaders pad the gate's and up's outputs with zero rows: silu(0) * 0 is 0."""


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """gate_up: [num_rows, 2 * width], gate first → [num_rows, width], computed in fp32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `silu_mul_ref`, with silu(gate) rounded to the input's dtype in between."""
    width = gate_up.shape[-1] // 2
    return F.silu(gate_up[:, :width]).mul_(gate_up[:, width:])
