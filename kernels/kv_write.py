"""Writes K and V of a step's tokens into their slots of the arena."""

from __future__ import annotations

import torch
from torch import Tensor


def head_rows(slots: Tensor, layer: int, num_layers: int, num_kv_heads: int, block_size: int) -> Tensor:
    """slots: [num_tokens] int64 (`block_id * block_size + offset`) → [num_tokens, 2, num_kv_heads] int64: where each
    token's K and V of `layer` lie in the arena seen as `[-1, head_dim]`. The next layer is `2 * num_kv_heads * block_size`
    rows further.
    """
    heads = torch.arange(2 * num_kv_heads).view(1, 2, num_kv_heads) * block_size
    block, offset = slots // block_size, slots % block_size
    first = (block * num_layers + layer) * (2 * num_kv_heads * block_size) + offset
    return first.view(-1, 1, 1) + heads


def kv_write_ref(arena: Tensor, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """arena: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim].

    Slots must differ from each other.
    """
    block_size = arena.shape[4]
    for token, slot in enumerate(slots.tolist()):
        arena[slot // block_size, layer, 0, :, slot % block_size] = k[token]
        arena[slot // block_size, layer, 1, :, slot % block_size] = v[token]


def kv_write(arena: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> None:
    """As `kv_write_ref`, with `rows` = `head_rows(...)` of that layer. Mutates the arena alone, which is contiguous."""
    num_tokens, num_kv_heads, head_dim = k.shape
    both = torch.empty((num_tokens, 2, num_kv_heads, head_dim), dtype=arena.dtype)
    both[:, 0].copy_(k)
    both[:, 1].copy_(v)
    arena.view(-1, head_dim).index_copy_(0, rows.reshape(-1), both.view(-1, head_dim))
