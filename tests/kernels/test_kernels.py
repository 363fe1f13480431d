"""Each kernel against its reference, and the rows of each against themselves at other row counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu import native
from kernels.kv_write import head_rows, kv_write, kv_write_ref
from kernels.linear import MIN_ROWS, WeightFormat, linear_ref, make_linear, weight_format
from kernels.paged_attention import AttentionPlan, Span, paged_attention, paged_attention_ref, plan_attention
from kernels.rms_norm import rms_norm, rms_norm_ref
from kernels.rope import rope, rope_ref, rope_tables
from kernels.rope_write import WritePlan, rope_write, rope_write_ref
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
    found = paged_attention(
        q, arena, 1, plan_attention(spans, heads, num_kv_heads, head_dim, 16, torch.float32), torch.float32
    )
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
    chunk = plan_attention([Span(0, rows, start, tables[0])], heads, num_kv_heads, head_dim, block_size, torch.float32)
    whole = paged_attention(q[start : start + rows], arena, 0, chunk, torch.float32)
    picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=12, unique=True))
    singles = plan_attention(
        [Span(row, 1, start + index, tables[0]) for row, index in enumerate(picked)],
        heads,
        num_kv_heads,
        head_dim,
        block_size,
        torch.float32,
    )
    alone = paged_attention(q[start : start + rows][picked], arena, 0, singles, torch.float32)
    assert torch.equal(alone, whole[picked])


needs_native = pytest.mark.skipif(native() is None, reason="no native kernels for this processor, or not built")
NATIVE_SHAPES = [(9, 3, 64), (4, 4, 32), (8, 1, 128), (2, 2, 256)]


def native_plan(spans: list[Span], heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> AttentionPlan:
    plan = plan_attention(spans, heads, num_kv_heads, head_dim, block_size, torch.bfloat16)
    assert plan.native is not None
    return plan


def test_the_native_kernels_are_built_where_the_processor_has_what_they_need() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert (native() is not None) == ("avx512_bf16" in flags)


@needs_native
@pytest.mark.parametrize(("heads", "num_kv_heads", "head_dim"), NATIVE_SHAPES)
def test_native_attention_is_the_textbook_form_and_ignores_unwritten_slots(
    heads: int, num_kv_heads: int, head_dim: int
) -> None:
    starts_and_rows = [(0, 1), (300, 1), (250, 13), (0, 5), (511, 1), (512, 2), (63, 1), (64, 1), (770, 130), (3, 1)]
    lengths = [start + rows for start, rows in starts_and_rows]
    arena, tables = scattered_arena(16, num_kv_heads, head_dim, torch.bfloat16, lengths)
    spans, row = [], 0
    for (start, rows), table in zip(starts_and_rows, tables, strict=True):
        spans.append(Span(row, rows, start, table))
        row += rows
    q = randn(row + 2, heads, head_dim, seed=9).bfloat16().float() / head_dim**0.5
    plan = native_plan(spans, heads, num_kv_heads, head_dim, 16)
    found = paged_attention(q, arena, 1, plan, torch.bfloat16).float()
    expected = paged_attention_ref(q, arena, 1, spans)
    assert (found.view(q.shape)[:row] - expected[:row]).norm() / expected[:row].norm() < 5e-3
    torch.testing.assert_close(found.view(q.shape), expected, rtol=2e-2, atol=2e-2)
    assert not found[row:].any()


@needs_native
@settings(max_examples=60)
@given(data=st.data())
def test_native_attention_of_a_row_has_the_same_bits_alone_in_a_chunk_and_in_a_batch(data: st.DataObject) -> None:
    heads, num_kv_heads, head_dim = data.draw(st.sampled_from(NATIVE_SHAPES))
    block_size = data.draw(st.sampled_from([1, 4, 16, 256]))
    length = data.draw(st.integers(1, 500))
    arena, tables = scattered_arena(block_size, num_kv_heads, head_dim, torch.bfloat16, [length, length])
    q = randn(length, heads, head_dim, seed=4)
    start = data.draw(st.integers(0, max(0, length - 1)))
    rows = data.draw(st.integers(1, min(length - start, 512)))
    chunk = native_plan([Span(0, rows, start, tables[0])], heads, num_kv_heads, head_dim, block_size)
    whole = paged_attention(q[start : start + rows].contiguous(), arena, 0, chunk, torch.bfloat16)
    picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=12, unique=True))
    spans = [Span(row, 1, start + index, tables[0]) for row, index in enumerate(picked)]
    singles = native_plan(spans, heads, num_kv_heads, head_dim, block_size)
    alone = paged_attention(q[start : start + rows][picked], arena, 0, singles, torch.bfloat16)
    assert torch.equal(alone, whole[picked])


@needs_native
def test_native_elementwise_kernels_agree_with_their_references_and_no_row_depends_on_others() -> None:
    x, delta, weight = randn(37, 96) * 3, randn(37, 96, seed=1).bfloat16(), randn(96, seed=2)
    total = x.clone()
    found = rms_norm(total, weight, 1e-5, torch.bfloat16, delta)
    assert torch.equal(total, x + delta.float())
    torch.testing.assert_close(found.float(), rms_norm_ref(x + delta.float(), weight, 1e-5), rtol=1e-2, atol=1e-3)
    for row in (0, 17, 36):
        alone = rms_norm(x[row : row + 1].clone(), weight, 1e-5, torch.bfloat16, delta[row : row + 1])
        assert torch.equal(alone[0], found[row])
    gate_up = (randn(37, 2 * 80, seed=3) * 20).bfloat16()
    gated = silu_mul(gate_up)
    torch.testing.assert_close(gated.float(), silu_mul_ref(gate_up).float(), rtol=1e-2, atol=1e-5)
    assert all(torch.equal(silu_mul(gate_up[row : row + 1])[0], gated[row]) for row in range(37))


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
