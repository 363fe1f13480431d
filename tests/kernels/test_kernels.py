"""Each kernel against its reference, and the rows of each against themselves at other row counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv_write import head_rows, kv_write, kv_write_ref
from kernels.linear import MIN_ROWS, WeightFormat, linear_ref, make_linear, weight_format
from kernels.paged_attention import Span, paged_attention, paged_attention_ref, plan_attention
from kernels.rms_norm import rms_norm, rms_norm_ref
from kernels.rope import rope, rope_ref, rope_tables
from kernels.silu_mul import silu_mul, silu_mul_ref

ROWS = [1, 2, 3, 7, 8, 9, 63, 64, 100, 511]
FORMS: list[WeightFormat] = ["bf16-packed", "bf16-rounded", "fp32"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [17, 48, 576])
def test_rms_norm(width: int) -> None:
    x, weight = 3 * randn(512, width), randn(width, seed=1)
    whole = rms_norm(x, weight, 1e-5, torch.float32)
    torch.testing.assert_close(whole, rms_norm_ref(x, weight, 1e-5))
    for rows in ROWS:
        assert torch.equal(rms_norm(x[1 : 1 + rows], weight, 1e-5, torch.float32), whole[1 : 1 + rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = (4 * randn(512, 2 * 96)).to(dtype)
    whole = silu_mul(gate_up)
    torch.testing.assert_close(whole.float(), silu_mul_ref(gate_up).float(), rtol=1e-2, atol=1e-5)
    for rows in ROWS:
        assert torch.equal(silu_mul(gate_up[1 : 1 + rows].contiguous()), whole[1 : 1 + rows])


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "out"), [(48, 80), (88, 48), (33, 65), (576, 960), (1536, 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(form: WeightFormat, width: int, out: int, biased: bool) -> None:
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    if form == "bf16-packed" and weight_format(torch.bfloat16) != "bf16-packed":
        with pytest.raises(RuntimeError):
            make_linear(randn(64, 64), None, form)(randn(2, 64).bfloat16())
        return
    weight, bias = randn(out, width).to(dtype), randn(out, seed=1).to(dtype) if biased else None
    x = randn(512, width, seed=2).to(dtype)
    linear = make_linear(weight, bias, form)
    whole = linear(x)
    assert whole.dtype == dtype
    torch.testing.assert_close(whole, linear_ref(x, weight, bias), rtol=1e-2, atol=1e-2 if form != "fp32" else 1e-4)
    for rows in ROWS:
        padded = F.pad(x[1 : 1 + rows], (0, 0, 0, max(0, MIN_ROWS[form] - rows)))
        assert torch.equal(linear(padded)[:rows], whole[1 : 1 + rows])


def scattered_arena(block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, lengths: list[int]) -> tuple:
    """An arena of NaN in which sequences of `lengths` tokens have KV in scattered blocks, and their block tables."""
    counts = [-(-length // block_size) for length in lengths]
    arena = torch.full((sum(counts) + 3, 2, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    ids = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(3))
    tables, first = [], 0
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table = ids[first : first + count]
        first += count
        tables.append(table)
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
        [Span(row, 1, start + index, tables[0]) for row, index in enumerate(picked)], heads, num_kv_heads, block_size
    )
    alone = paged_attention(q[start : start + rows][picked], arena, 0, singles, torch.float32)
    assert torch.equal(alone, whole[picked])
