"""Rotary position embedding (Su et al. 2021), halves rotated together as in GPT-NeoX, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(inverse_frequencies: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """inverse_frequencies: [head_dim / 2] fp32 → cos and signed sin, each [num_positions, head_dim] fp32.

    The first half of the sines is negated, so that a rotation is `x * cos + roll(x, head_dim / 2) * sin`. Angles are products
    in fp32, as every implementation of these models makes them; their cosines come from fp64, so they don't depend on
    how many positions are made at once.
    """
    angles = (torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse_frequencies[None, :]).double()
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [num_rows, num_heads, head_dim] fp32; cos and signed sin: [num_rows, 1, head_dim] → as x."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (
            first * cos[..., :half] + second * sin[..., :half],
            second * cos[..., half:] + first * sin[..., half:],
        ),
        dim=-1,
    )


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rope_ref`; overwrites and returns x. Product and sum round separately, whatever the width."""
    turned = x.roll(x.shape[-1] // 2, dims=-1).mul_(sin)
    return x.mul_(cos).add_(turned)
