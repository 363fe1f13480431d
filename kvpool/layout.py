"""The shape of KV memory: slabs and arenas (design §6).

A slab is one block of one KV group, all layers, one contiguous run of bytes, and views as
`[num_layers, 2, num_kv_heads, block_size, head_dim]` (K at 0, V at 1; HND inside).
"""

from __future__ import annotations

from dataclasses import dataclass

LAYOUT_VERSION = 1
DTYPE_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one KV group's slabs. `dtype` is `"bf16"` or `"fp32"`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}")
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")

    @property
    def slab_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def slab_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def kv_format(self) -> str:
        """Names dtype, block size, layout version and shape: part of every root key and of the hello."""
        return f"v{LAYOUT_VERSION}:{self.dtype}:bs{self.block_size}:L{self.num_layers}:H{self.num_kv_heads}:D{self.head_dim}"

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)
