"""torch's kernels against their references, and the rows of each against themselves at other row counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv_write import head_rows, kv_write, kv_write_ref
from kernels.linear import Matrix, WeightFormat, linear_ref, pack, padded, unpack
from kernels.ops import Span
from kernels.paged_attention import paged_attention, paged_attention_ref, plan_attention
from kernels.rms_norm import rms_norm, rms_norm_ref
from kernels.rope import rope, rope_ref, rope_tables
from kernels.rope_write import WritePlan, rope_write, rope_write_ref
from kernels.silu_mul import silu_mul, silu_mul_ref
from kernels.torch_linear import MIN_ROWS, PackedLinear, TorchForm, bf16_form, torch_linear

ROWS = [1, 2, 3, 7, 8, 9, 63, 64, 100, 511]
FORMS: list[TorchForm] = ["bf16-packed", "bf16-rounded", "fp32"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [17, 48, 576])
def test_rms_norm(width: int) -> None:
    x, weight = 3 * randn(512, width), randn(width, seed=1)
    whole = rms_norm(x, weight, 1e-5, torch.float32)
    torch.testing.assert_close(whole, rms_norm_ref(x, weight, 1e-5))
    for rows in ROWS:
        assert torch.equal(rms_norm(x[1 : 1 + rows], weight, 1e-5, torch.float32), whole[1 : 1 + rows])


@pytest.mark.parametrize("width", [57, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    gate, up = (4 * randn(512, width)).to(dtype), randn(512, width, seed=1).to(dtype)
    whole = silu_mul(gate.clone(), up)
    torch.testing.assert_close(whole.float(), silu_mul_ref(gate, up).float(), rtol=1e-2, atol=1e-5)
    for rows in ROWS:
        part = slice(1, 1 + rows)
        assert torch.equal(silu_mul(gate[part].clone(), up[part]), whole[part])


@pytest.mark.parametrize("head_dim", [6, 20, 64])
def test_rope(head_dim: int) -> None:
    x = randn(512, 3, head_dim)
    cos, sin = (table[:, None] for table in rope_tables(torch.rand(head_dim // 2), 512))
    whole = rope(x.clone(), cos, sin)
    torch.testing.assert_close(whole, rope_ref(x, cos, sin))
    torch.testing.assert_close(whole.norm(dim=-1), x.norm(dim=-1))
    for rows in ROWS:
        part = slice(1, 1 + rows)
        assert torch.equal(rope(x[part].clone(), cos[part], sin[part]), whole[part])


def test_rope_tables_of_a_position_do_not_depend_on_their_length() -> None:
    frequencies = torch.rand(10)
    long, short = rope_tables(frequencies, 777), rope_tables(frequencies, 13)
    assert all(torch.equal(a[:13], b) for a, b in zip(long, short, strict=True))


def test_kv_write_writes_its_slots_and_nothing_else() -> None:
    arena = randn(6, 2, 2, 3, 4, 8).bfloat16()
    expected = arena.clone()
    slots = torch.tensor([5, 17, 4, 23])
    k, v = randn(4, 3, 8, seed=1), randn(4, 3, 8, seed=2).bfloat16()
    kv_write_ref(expected, 1, slots, k, v)
    kv_write(arena, head_rows(slots, 1, 2, 3, 4), k, v)
    assert torch.equal(arena, expected)
    next_layer = head_rows(slots, 0, 2, 3, 4) + 2 * 3 * 4
    assert torch.equal(next_layer, head_rows(slots, 1, 2, 3, 4))


def a_matrix(weight: Tensor, bias: Tensor | None, form: WeightFormat) -> Matrix:
    wide = None if bias is None else F.pad(bias, (0, padded(bias.numel()) - bias.numel()))
    return Matrix(pack(weight, form), wide, *weight.shape, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("width", "out"), [(48, 80), (88, 48), (33, 65), (576, 960), (1536, 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(form: TorchForm, weights: WeightFormat, width: int, out: int, biased: bool) -> None:
    if form == "bf16-packed" and bf16_form() != "bf16-packed":
        with pytest.raises(RuntimeError):
            PackedLinear(randn(64, 64), None)(randn(2, 64).bfloat16())
        return
    matrix = a_matrix(randn(out, width) / 4, randn(out, seed=1) if biased else None, weights)
    x = randn(512, width, seed=2)
    linear = torch_linear(matrix, form)
    whole = linear(x)
    assert whole.dtype == (torch.float32 if form == "fp32" else torch.bfloat16)
    # Of the weights' values: what int8 and int4 make of the rows is the native kernels' affair.
    expected = linear_ref(x, Matrix(pack(unpack(matrix), "fp32"), matrix.bias, out, width, "fp32"))
    error = (whole.float() - expected).norm() / expected.norm()
    assert error < (1e-6 if form == "fp32" else 6e-3)
    for rows in ROWS:
        part = F.pad(x[1 : 1 + rows], (0, 0, 0, max(0, MIN_ROWS[form] - rows)))
        assert torch.equal(linear(part)[:rows], whole[1 : 1 + rows])


def scattered_arena(block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, lengths: list[int]) -> tuple:
    """An arena of NaN in which sequences of `lengths` tokens have KV in scattered blocks, and their block tables."""
    counts = [-(-length // block_size) for length in lengths]
    arena = torch.full((sum(counts) + 3, 2, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    ids = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(3))
    tables, first = [], 0
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table = ids[first : first + count]
        first += count
        tables.append(table.numpy().astype(np.int32))
        for layer in range(2):
            slots = torch.arange(length)
            k, v = (2 * randn(length, num_kv_heads, head_dim, seed=10 * index + layer + part) for part in (0, 5))
            kv_write(
                arena,
                head_rows(
                    table[slots // block_size] * block_size + slots % block_size, layer, 2, num_kv_heads, block_size
                ),
                k,
                v,
            )
    return arena, tables


@pytest.mark.parametrize(("heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 8), (6, 1, 20), (20, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_attention_of_mixed_chunks_is_the_textbook_form_and_ignores_unwritten_slots(
    heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    starts_and_rows = [(0, 1), (300, 1), (250, 13), (0, 5), (511, 1), (512, 2), (255, 1), (770, 1), (3, 1)]
    lengths = [start + rows for start, rows in starts_and_rows]
    arena, tables = scattered_arena(16, num_kv_heads, head_dim, dtype, lengths)
    spans, row = [], 0
    for (start, rows), table in zip(starts_and_rows, tables, strict=True):
        spans.append(Span(row, rows, start, table))
        row += rows
    q = randn(row + 2, heads, head_dim, seed=9) / head_dim**0.5
    found = paged_attention(q, arena, 1, plan_attention(spans, heads, num_kv_heads, 16), torch.float32)
    torch.testing.assert_close(found.view(q.shape), paged_attention_ref(q, arena, 1, spans), rtol=1e-4, atol=1e-4)
    assert not found[row:].any()


@settings(max_examples=40)
@given(data=st.data())
def test_paged_attention_of_a_row_has_the_same_bits_alone_in_a_chunk_and_in_a_batch(data: st.DataObject) -> None:
    heads, num_kv_heads, head_dim = data.draw(st.sampled_from([(9, 3, 64), (4, 4, 8), (6, 1, 20), (20, 2, 16)]))
    block_size = data.draw(st.sampled_from([1, 4, 16, 256]))
    length = data.draw(st.integers(1, 800))
    arena, tables = scattered_arena(block_size, num_kv_heads, head_dim, torch.bfloat16, [length, length])
    q = randn(length, heads, head_dim, seed=4)
    start = data.draw(st.integers(0, max(0, length - 1)))
    rows = data.draw(st.integers(1, min(length - start, 512)))
    chunk = plan_attention([Span(0, rows, start, tables[0])], heads, num_kv_heads, block_size)
    whole = paged_attention(q[start : start + rows], arena, 0, chunk, torch.float32)
    picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=12, unique=True))
    singles = plan_attention(
        [Span(row, 1, start + index, tables[0]) for row, index in enumerate(picked)],
        heads,
        num_kv_heads,
        block_size,
    )
    alone = paged_attention(q[start : start + rows][picked], arena, 0, singles, torch.float32)
    assert torch.equal(alone, whole[picked])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 2, 24), (4, 4, 32)])
def test_rope_write_turns_queries_and_keys_and_writes_its_slots_alone(
    heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    cos, sin = rope_tables(1.0 / 10_000 ** (torch.arange(0, head_dim, 2) / head_dim), 64)
    positions = torch.tensor([0, 5, 63, 17, 0, 0])
    slots = torch.tensor([2, 21, 5, 19])  # the last two rows are padding
    plan = WritePlan(cos[positions], sin[positions], slots)
    qkv = randn(6, (heads + 2 * num_kv_heads) * head_dim).to(dtype)
    arena = torch.full((6, 2, 2, num_kv_heads, 4, head_dim), 7.0, dtype=dtype)
    expected = arena.clone()
    q_expected = rope_write_ref(qkv, plan, expected, 1, heads, 0.125)
    q = rope_write(qkv, plan, arena, 1, heads, 0.125)
    torch.testing.assert_close(q[:4], q_expected[:4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(arena, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert torch.isfinite(q).all()
