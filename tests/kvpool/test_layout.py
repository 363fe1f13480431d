"""The shape of slabs."""

from __future__ import annotations

import math

import pytest

from kvpool.layout import DTYPE_BYTES, KVLayout


def test_a_slab_holds_keys_and_values_of_all_layers_contiguously() -> None:
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bf16")
    assert layout.slab_shape == (30, 2, 3, 16, 64)
    assert layout.slab_bytes == 368_640 == math.prod(layout.slab_shape) * DTYPE_BYTES["bf16"]
    assert KVLayout(30, 3, 64, 16, "fp32").slab_bytes == 2 * 368_640


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_blocks_cover_the_tokens(num_tokens: int, num_blocks: int) -> None:
    assert KVLayout(1, 1, 1, 16, "bf16").num_blocks_for(num_tokens) == num_blocks


def test_every_field_of_the_shape_is_in_the_format() -> None:
    base = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 4, "block_size": 5, "dtype": "bf16"}
    formats = {KVLayout(**base).kv_format}  # type: ignore[arg-type]
    for name, value in base.items():
        other = "fp32" if name == "dtype" else value + 1  # type: ignore[operator]
        formats.add(KVLayout(**{**base, name: other}).kv_format)  # type: ignore[arg-type]
    assert len(formats) == 1 + len(base)


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "block_size"])
def test_an_empty_dimension_is_refused(name: str) -> None:
    fields = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "block_size": 1, "dtype": "bf16", name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        KVLayout(**fields)  # type: ignore[arg-type]


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="'int3'"):
        KVLayout(1, 1, 1, 1, "int3")
