"""SwiGLU's elementwise half: silu(gate) * up (Shazeer 2020). The native one ends cpu/linear.cpp's products."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

GATE_RUN = 16
"""Gates and the values they gate alternate in runs of so many outputs, so that both are in one panel of a packed matrix."""
WIDTH_MULTIPLE = 32
"""torch's silu has other bits in a vector's scalar tail: it is given widths that are multiples of this."""


def silu_mul_ref(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: [num_rows, width] → as they, computed in fp32, rounded once."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `silu_mul_ref`, but silu(gate) is rounded to the input's dtype in between; overwrites `gate`, which is contiguous."""
    width = gate.shape[1]
    missing = -width % WIDTH_MULTIPLE
    if missing:
        return F.silu(F.pad(gate, (0, missing)))[:, :width].mul_(up)
    return F.silu(gate).mul_(up)
