"""RMSNorm (Zhang & Sennrich 2019), one row at a time in fp32. The native one is cpu/rms_norm.cpp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [num_rows, hidden] fp32; weight: [hidden] fp32 → [num_rows, hidden] fp32."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """As `rms_norm_ref`, rounded once to `dtype`."""
    return F.rms_norm(x, (x.shape[1],), weight, eps).to(dtype)
