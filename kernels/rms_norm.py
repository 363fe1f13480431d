"""RMSNorm (Zhang & Sennrich 2019), one row at a time in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import OK, WIDTH_MULTIPLE, data, native


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [num_rows, hidden] fp32; weight: [hidden] fp32 → [num_rows, hidden] fp32."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, delta: Tensor | None = None) -> Tensor:
    """As `rms_norm_ref` of `x + delta`, rounded once to `dtype`; x becomes the sum. delta: as x, in `dtype`."""
    kernels = native()
    rows, hidden = x.shape
    if kernels is not None and dtype == torch.bfloat16 and hidden % WIDTH_MULTIPLE == 0:
        out = torch.empty((rows, hidden), dtype=dtype)
        address = None if delta is None else data(delta)
        code = kernels.add_rms_norm(data(x), address, data(weight), data(out), rows, hidden, eps)
        assert code == OK
        return out
    if delta is not None:
        x.add_(delta)
    return F.rms_norm(x, (hidden,), weight, eps).to(dtype)
