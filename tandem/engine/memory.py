"""Slabs as the engine sees them: a torch tensor over the arena, and the few things the engine does to slabs itself."""

from __future__ import annotations

from typing import Protocol

import torch

from kvpool.arena import Arena
from kvpool.layout import KVLayout

_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Memory(Protocol):
    """What the engine does to slabs itself; the runner writes KV, the sink writes what it fetches."""

    def checksum(self, block_id: int) -> bytes:
        """8 bytes over the whole slab."""

    def copy(self, source: int, target: int) -> None:
        """Copies a slab."""

    def zero_unused(self, block_id: int, num_tokens: int) -> None:
        """Zeroes the slots from `num_tokens` on: unused memory is never hashed and never leaves the process."""


class SlabMemory:
    """`Memory` of a CPU worker's DEVICE tier. `tensor` is `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, a
    view of the arena's bytes. Whoever owns a block in the `BlockPool` may write its slab; nobody else does."""

    def __init__(self, arena: Arena, layout: KVLayout) -> None:
        assert arena.slab_bytes == layout.slab_bytes
        self._arena = arena
        self.tensor = torch.from_numpy(arena.array).view(_TORCH_DTYPES[layout.dtype]).view(-1, *layout.slab_shape)

    def checksum(self, block_id: int) -> bytes:
        return self._arena.checksum(block_id)

    def copy(self, source: int, target: int) -> None:
        self._arena.array[target] = self._arena.array[source]

    def zero_unused(self, block_id: int, num_tokens: int) -> None:
        self.tensor[block_id, :, :, :, num_tokens:] = 0
