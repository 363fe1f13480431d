"""RoPE of a step's queries and keys, and the write of its keys and values into their slots of the arena, in one pass.
The native one is cpu/rope_write.cpp."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.kv_write import head_rows, kv_write, kv_write_ref
from kernels.rope import rope, rope_ref


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Where a step's rows lie: the same for all layers. Rows from `slots.numel()` on are padding and are not written.

    cos, sin (signed): [num_rows, head_dim] fp32; slots: [num_tokens] int64 (`block_id * block_size + offset`), all different.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor


def rope_write_ref(qkv: Tensor, plan: WritePlan, arena: Tensor, layer: int, num_heads: int, scale: float) -> Tensor:
    """qkv: [num_rows, (num_heads + 2 * num_kv_heads) * head_dim]; arena: [num_blocks, num_layers, 2, num_kv_heads, block_size,
    head_dim] → scaled, rotated queries [num_rows, num_heads, head_dim] fp32."""
    num_kv_heads, head_dim = arena.shape[3], arena.shape[5]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim).float()
    turned = rope_ref(heads[:, : num_heads + num_kv_heads], plan.cos[:, None], plan.sin[:, None])
    tokens = plan.slots.numel()
    kv_write_ref(arena, layer, plan.slots, turned[:tokens, num_heads:], heads[:tokens, num_heads + num_kv_heads :])
    return turned[:, :num_heads] * scale


def rope_write(qkv: Tensor, plan: WritePlan, arena: Tensor, layer: int, num_heads: int, scale: float) -> Tensor:
    """As `rope_write_ref`. The arena is contiguous; queries of padding rows may be anything finite."""
    num_kv_heads, block_size, head_dim = arena.shape[3], arena.shape[4], arena.shape[5]
    num_rows, num_tokens = qkv.shape[0], plan.slots.numel()
    rotated = (num_heads + num_kv_heads) * head_dim
    turned = qkv[:, :rotated].float().view(num_rows, num_heads + num_kv_heads, head_dim)
    turned = rope(turned, plan.cos[:, None], plan.sin[:, None])
    v = qkv[:num_tokens, rotated:].view(num_tokens, num_kv_heads, head_dim)
    rows = head_rows(plan.slots, layer, arena.shape[1], num_kv_heads, block_size)
    kv_write(arena, rows, turned[:num_tokens, num_heads:], v)
    return turned[:, :num_heads] * scale
