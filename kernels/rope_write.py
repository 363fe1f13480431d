"""RoPE of a step's queries and keys, and the write of its keys and values into their slots of the arena, in one pass."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu import HEAD_DIMS, OK, RopeStruct, data, native
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
    kernels = native()
    if kernels is not None and qkv.dtype == arena.dtype == torch.bfloat16 and head_dim in HEAD_DIMS:
        q = torch.empty((num_rows, num_heads, head_dim))
        q[num_tokens:] = 0
        positions = torch.arange(num_tokens)
        arguments = RopeStruct(
            qkv=data(qkv),
            cos=data(plan.cos),
            sin=data(plan.sin),
            positions=data(positions),
            slots=data(plan.slots),
            q=data(q),
            arena=data(arena),
            block_stride=arena.stride(0),
            layer_offset=layer * arena.stride(1),
            value_offset=arena.stride(2),
            scale=scale,
            rows=num_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
        )
        code = kernels.rope_write(ctypes.byref(arguments))
        assert code == OK
        return q
    rotated = (num_heads + num_kv_heads) * head_dim
    turned = qkv[:, :rotated].float().view(num_rows, num_heads + num_kv_heads, head_dim)
    turned = rope(turned, plan.cos[:, None], plan.sin[:, None])
    v = qkv[:num_tokens, rotated:].view(num_tokens, num_kv_heads, head_dim)
    rows = head_rows(plan.slots, layer, arena.shape[1], num_kv_heads, block_size)
    kv_write(arena, rows, turned[:num_tokens, num_heads:], v)
    return turned[:, :num_heads] * scale
