"""Each operation of the native kernels against its reference, in every variant, and its rows against themselves: alone, in other
batches, and shared between threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu
from kernels.cpu import structs as c
from kernels.cpu.program import Heads, Program, Rows, supports
from kernels.linear import Matrix, WeightFormat, linear_ref, pack, padded, quantize_rows_ref, unpack
from kernels.ops import Span, Step
from kernels.paged_attention import paged_attention_ref
from kernels.rms_norm import rms_norm_ref
from kernels.rope import rope_tables
from kernels.rope_write import WritePlan, rope_write_ref
from kernels.silu_mul import silu_mul_ref
from tests import backends

FORMS: list[WeightFormat] = ["fp32", "bf16", "int8", "int4"]
REPOSITORY = Path(__file__).resolve().parents[2]
every_variant = pytest.mark.parametrize("variant", backends.NATIVE)
every_form = pytest.mark.parametrize("form", FORMS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


NO_HEADS = Heads(1, torch.zeros(1), torch.zeros(1), torch.zeros((1, 1, 2, 1, 1, 32)))


def program(
    variant: cpu.Variant, form: WeightFormat, max_rows: int, threads: int = 1, heads: Heads = NO_HEADS
) -> Program:
    return Program(backends.native(variant), form, heads, max_rows, threads)


def step(
    rows: int,
    *,
    token_ids: Sequence[int] = (),
    logit_rows: Sequence[int] = (),
    logits: Tensor | None = None,
    spans: tuple[Span, ...] = (),
    positions: Sequence[int] = (),
    slots: Sequence[int] = (),
) -> Step:
    return Step(
        token_ids=np.array(token_ids or [0] * rows, dtype=np.int32),
        positions=np.array(positions or [0] * rows, dtype=np.int32),
        slots=np.array(slots or [0] * rows, dtype=np.int64),
        logit_rows=np.array(logit_rows, dtype=np.int32),
        spans=spans,
        logits=torch.empty(0) if logits is None else logits,
    )


def fill(rows: Rows, values: Tensor) -> None:
    """Writes the first rows of a buffer; what pads them stays zero."""
    rows.memory[: values.shape[0], : values.shape[1]] = values


def a_matrix(out: int, width: int, form: WeightFormat, biased: bool, seed: int = 0) -> Matrix:
    bias = torch.zeros(padded(out))
    bias[:out] = randn(out, seed=seed + 1)
    return Matrix(pack(randn(out, width, seed=seed), form), bias if biased else None, out, width, form)


def near(found: Tensor, expected: Tensor, limit: float) -> None:
    """The error of all values together, and that of each against the greatest."""
    difference = found.double() - expected.double()
    assert difference.norm() <= limit * expected.double().norm()
    assert difference.abs().max() <= 4 * limit * expected.abs().max()


def near_linear(found: Tensor, x: Tensor, matrix: Matrix) -> None:
    """Within the rounding of fp32 sums in another order."""
    error = (found.double() - linear_ref(x, matrix).double()).abs()
    most = x.double().abs().sum(1, keepdim=True) * unpack(matrix).abs().max()
    assert (error <= 5e-7 * (most + (0 if matrix.bias is None else matrix.bias.abs().max()))).all()


class OneLinear:
    """A program of one product, from rows in the form that the model's would have."""

    def __init__(
        self, variant: cpu.Variant, matrix: Matrix, epilogue: int = c.STORE, max_rows: int = 40, threads: int = 1
    ) -> None:
        self.program = program(variant, matrix.format, max_rows, threads)
        dtype = torch.bfloat16 if matrix.format == "bf16" else torch.float32
        self.x = self.program._buffer("x", matrix.in_features, dtype)
        gated = epilogue == c.SILU_MUL
        self.width = matrix.panels.shape[0] * 16 if gated else matrix.out_features
        self.out = self.program._buffer("out", self.width, dtype if gated else torch.float32)
        self.program._linear(self.x, matrix, self.out, epilogue)

    def __call__(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """x: [rows, in] → [rows, padded width]; `before` is what the output's rows held."""
        self.out.memory.fill_(7)
        if before is not None:
            self.out.memory[: before.shape[0], : before.shape[1]] = before
        fill(self.x, x)
        self.program.run(step(x.shape[0]))
        assert (self.out.memory[x.shape[0] :] == 7).all(), "rows past the step's were written"
        return self.out.memory[: x.shape[0]].clone()


@every_variant
@every_form
@given(size=st.tuples(st.integers(1, 100), st.integers(1, 130)), rows=st.integers(1, 40), biased=st.booleans())
def test_a_linear_of_any_size_is_its_reference(
    variant: cpu.Variant, form: WeightFormat, size: tuple[int, int], rows: int, biased: bool
) -> None:
    matrix, x = a_matrix(*size, form, biased), randn(rows, size[1], seed=5)
    found = OneLinear(variant, matrix)(x)
    near_linear(found[:, : size[0]], x, matrix)
    assert not found[:, size[0] :].any(), "what pads a row must be zero"


@every_variant
@every_form
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_of_a_linear_has_the_same_bits_in_any_batch_and_on_any_threads(
    variant: cpu.Variant, form: WeightFormat, threads: int
) -> None:
    matrix, x = a_matrix(200, 600, form, biased=True), randn(512, 600, seed=5)
    whole = OneLinear(variant, matrix, max_rows=512)(x)
    near_linear(whole[:, :200], x, matrix)
    linear = OneLinear(variant, matrix, max_rows=512, threads=threads)
    for rows in (*range(1, 41), 63, 64, 65, 191, 192, 193, 511, 512):
        part = slice(512 - rows, 512) if rows % 2 else slice(0, rows)
        assert torch.equal(bits(linear(x[part])), bits(whole[part])), rows


@every_variant
@every_form
@pytest.mark.parametrize("width", [57, 96])
def test_a_linear_adds_to_the_residual_stream(variant: cpu.Variant, form: WeightFormat, width: int) -> None:
    matrix, x, before = a_matrix(width, 70, form, biased=True), randn(13, 70, seed=5), randn(13, padded(width), seed=6)
    before[:, width:] = 0
    found = OneLinear(variant, matrix, c.ADD)(x, before)
    plain = OneLinear(variant, matrix)(x)
    assert torch.equal(bits(found), bits(before + plain))
    assert not found[:, width:].any()


@every_variant
@every_form
@pytest.mark.parametrize("gates", [16, 64, 80])
def test_a_linear_of_gates_ends_with_swiglu(variant: cpu.Variant, form: WeightFormat, gates: int) -> None:
    matrix = a_matrix(2 * gates, 70, form, biased=True)
    x = 3 * randn(13, 70, seed=5)
    found = OneLinear(variant, matrix, c.SILU_MUL)(x)[:, :gates].float()
    both = linear_ref(x, matrix).unflatten(1, (-1, 2, 16))
    expected = silu_mul_ref(both[:, :, 0].flatten(1), both[:, :, 1].flatten(1))
    near(found, expected, 2.5e-3 if form == "bf16" else 3e-6)


@every_variant
def test_swiglu_of_great_gates_neither_overflows_nor_is_lost(variant: cpu.Variant) -> None:
    gates = torch.tensor([0.0, -0.0, 1e-30, -20, 20, -88, 88, -1e4, 1e4, -3e38, 3e38, 1, -1, 5, -5, 0.5])
    weight = torch.zeros(32, 32)
    weight[:16, 0], weight[16:, 1] = gates, 1.0
    x = torch.zeros(1, 32)
    x[0, :2] = 1
    found = OneLinear(variant, Matrix(pack(weight, "fp32"), None, 32, 32, "fp32"), c.SILU_MUL)(x)
    torch.testing.assert_close(found[0, :16], torch.nn.functional.silu(gates), rtol=1e-6, atol=1e-30)


@every_variant
@pytest.mark.parametrize("width", [17, 48, 96, 576])
def test_rows_are_quantised_as_the_reference_does_it(variant: cpu.Variant, width: int) -> None:
    matrix = a_matrix(32, width, "int8", biased=False)
    linear = OneLinear(variant, matrix)
    x = randn(40, width) * torch.logspace(-6, 4, 40)[:, None]
    x[7], x[8, :10] = 0, 1e-30
    linear(x)
    groups = padded(width) // 32
    found = {
        name: linear.program._buffers[padded(width), dtype, name].flatten()
        for name, dtype in (("q", torch.int8), ("scales", torch.float32), ("sums", torch.int32))
    }
    scales, integers = quantize_rows_ref(torch.nn.functional.pad(x, (0, padded(width) - width)))
    assert torch.equal(found["q"].view(40, groups, 32), integers)
    assert torch.equal(found["scales"][: 40 * groups].view(40, groups), scales)
    assert torch.equal(found["sums"][: 40 * groups].view(40, groups), integers.sum(-1, dtype=torch.int32))


@every_variant
@every_form
def test_logits_are_those_of_the_wanted_rows_and_nothing_else_is_written(
    variant: cpu.Variant, form: WeightFormat
) -> None:
    hidden, vocab, eps = 70, 101, 1e-5
    head, norm = a_matrix(vocab, hidden, form, biased=False), torch.zeros(padded(hidden))
    norm[:hidden] = 1 + 0.2 * randn(hidden, seed=3)
    x = 4 * randn(9, hidden, seed=2)
    rounded = torch.bfloat16 if form == "bf16" else torch.float32
    expected = linear_ref(rms_norm_ref(x, norm[:hidden], eps).to(rounded), head)
    for wanted in ([0, 1, 2], [4], [1, 5, 8], list(range(9)), []):
        for threads in (1, 3):
            run = program(variant, form, 9, threads)
            rows, attended = run._buffer("x", hidden, torch.float32), run._buffer("y", 40, rounded)
            fill(rows, x)
            y = randn(9, 40, seed=4).to(rounded)
            fill(attended, y)
            run.keep_logit_rows(rows, attended)
            run.logits(rows, norm, eps, head)
            memory = torch.full((len(wanted) + 1, vocab), 7.0)
            run.run(step(9, logit_rows=wanted, logits=memory[: len(wanted)]))
            assert torch.equal(attended.memory[: len(wanted), :40], y[wanted])
            assert (memory[len(wanted) :] == 7).all()
            if wanted:
                near(memory[: len(wanted)], expected[wanted], 1e-5 if form == "fp32" else 1e-2)


@every_variant
@every_form
@given(size=st.tuples(st.integers(1, 100), st.integers(1, 100)), data=st.data())
def test_an_embedding_is_its_row_of_the_packed_table(
    variant: cpu.Variant, form: WeightFormat, size: tuple[int, int], data: st.DataObject
) -> None:
    table = a_matrix(*size, form, biased=False)
    ids = data.draw(st.lists(st.integers(0, size[0] - 1), min_size=1, max_size=12))
    run = program(variant, form, 12, threads=data.draw(st.sampled_from([1, 2])))
    x = run.embed(table)
    run.run(step(len(ids), token_ids=ids))
    assert torch.equal(x.memory[: len(ids), : size[1]], unpack(table)[ids])
    if form != "int4":
        assert not x.memory[:, size[1] :].any()


@every_variant
@pytest.mark.parametrize("form", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 17, 48, 576])
def test_rms_norm(variant: cpu.Variant, form: WeightFormat, width: int) -> None:
    x, weight = 3 * randn(40, width), torch.zeros(padded(width))
    x[5] = 0
    weight[:width] = randn(width, seed=1)
    expected = rms_norm_ref(x, weight[:width], 1e-5)

    def normed(rows: Tensor, threads: int) -> Tensor:
        run = program(variant, form, 40, threads)
        source = run._buffer("x", width, torch.float32)
        fill(source, rows)
        out = run._norm(source, weight, 1e-5)
        run.run(step(rows.shape[0]))
        return out.memory[: rows.shape[0]].clone()

    whole = normed(x, 1)
    assert not whole[:, width:].any()
    near(whole[:, :width], expected, 2.5e-3 if form == "bf16" else 1e-6)
    for rows in (1, 2, 3, 7, 39, 40):
        for threads in (1, 3):
            assert torch.equal(bits(normed(x[40 - rows :], threads)), bits(whole[40 - rows :]))


# Attention: RoPE, the write of keys and values, and the sums over the whole context.

SHAPES = [(9, 3, 64), (4, 4, 32), (8, 1, 128), (2, 2, 256), (6, 2, 96), (5, 1, 64)]
CHUNKS = [
    (0, 1),
    (300, 1),
    (250, 13),
    (0, 5),
    (511, 1),
    (512, 2),
    (63, 4),
    (510, 4),
    (1090, 1),
    (960, 70),
    (3, 1),
    (0, 200),
]
"""(start, rows) of chunks of different sequences: within a tile and a split, at their ends, across them."""


class Attention:
    """Sequences in scattered blocks of an arena in which everything else is NaN, and the queries, keys and values of a step."""

    def __init__(
        self, chunks: Sequence[tuple[int, int]], shape: tuple[int, int, int], dtype: torch.dtype, block_size: int
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = shape
        self.form: WeightFormat = "bf16" if dtype == torch.bfloat16 else "fp32"
        self.block_size = block_size
        self.chunks = list(chunks)
        counts = [-(-(start + rows) // block_size) for start, rows in chunks]
        ids = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(3))
        self.tables = [part.numpy().astype(np.int32) for part in ids[: sum(counts)].split(counts)]
        self.arena = torch.full((len(ids), 2, 2, self.num_kv_heads, block_size, self.head_dim), torch.nan, dtype=dtype)
        for index, ((start, _), table) in enumerate(zip(chunks, self.tables, strict=True)):
            kv = 2 * randn(2, 2, self.num_kv_heads, start, self.head_dim, seed=index).to(dtype)
            for first in range(0, start, block_size):
                part = kv[..., first : first + block_size, :]
                self.arena[table[first // block_size], ..., : part.shape[3], :] = part
        frequencies = 1.0 / 10_000 ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        self.cos, self.sin = rope_tables(frequencies, 1200)
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = 2 * randn(sum(rows for _, rows in chunks), width, seed=99)

    def positions(self, picked: Sequence[int]) -> list[int]:
        return [position for i in picked for position in range(self.chunks[i][0], sum(self.chunks[i]))]

    def slots(self, picked: Sequence[int]) -> list[int]:
        return [
            int(self.tables[i][position // self.block_size]) * self.block_size + position % self.block_size
            for i in picked
            for position in range(self.chunks[i][0], sum(self.chunks[i]))
        ]

    def spans(self, picked: Sequence[int]) -> tuple[Span, ...]:
        found, row = [], 0
        for i in picked:
            start, rows = self.chunks[i]
            found.append(Span(row, rows, start, self.tables[i]))
            row += rows
        return tuple(found)

    def rows(self, i: int) -> slice:
        first = sum(rows for _, rows in self.chunks[:i])
        return slice(first, first + self.chunks[i][1])

    def reference(self) -> tuple[Tensor, Tensor]:
        """→ attended rows [rows, num_heads * head_dim], and the arena after the step."""
        everything = range(len(self.chunks))
        arena, at = self.arena.clone(), torch.tensor(self.positions(everything))
        plan = WritePlan(self.cos[at], self.sin[at], torch.tensor(self.slots(everything)))
        q = rope_write_ref(self.qkv, plan, arena, 1, self.num_heads, self.head_dim**-0.5)
        return paged_attention_ref(q, arena, 1, self.spans(everything)).flatten(1), arena

    def native(
        self,
        variant: cpu.Variant,
        picked: Sequence[int],
        threads: int = 1,
        prepare: Callable[[Program], None] = lambda _: None,
    ) -> tuple[Tensor, Tensor]:
        """As `reference`, of those chunks alone, in that order."""
        arena = self.arena.clone()
        qkv = torch.cat([self.qkv[self.rows(i)] for i in picked])
        run = program(variant, self.form, len(qkv), threads, Heads(self.num_heads, self.cos, self.sin, arena))
        source = run._buffer("qkv", qkv.shape[1], torch.float32)
        fill(source, qkv)
        out = run.attention(source, 1)
        prepare(run)
        run.run(step(len(qkv), spans=self.spans(picked), positions=self.positions(picked), slots=self.slots(picked)))
        assert not out.memory[:, self.num_heads * self.head_dim :].any()
        return out.memory[:, : self.num_heads * self.head_dim].clone(), arena


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@every_variant
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_the_textbook_form_and_ignores_unwritten_slots(
    variant: cpu.Variant, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    attention = Attention(CHUNKS, shape, dtype, 16)
    expected, arena = attention.reference()
    found, written = attention.native(variant, range(len(CHUNKS)))
    assert torch.equal(bits(written.nan_to_num(7.0)), bits(arena.nan_to_num(7.0))), "keys and values, or another slot"
    near(found, expected, 1e-2 if dtype == torch.bfloat16 else 3e-6)


@every_variant
@every_dtype
@pytest.mark.parametrize("block_size", [1, 4, 64, 256])
def test_block_sizes_change_no_bit_of_attention(variant: cpu.Variant, dtype: torch.dtype, block_size: int) -> None:
    one, other = (Attention(CHUNKS, (9, 3, 64), dtype, size) for size in (16, block_size))
    assert torch.equal(
        bits(one.native(variant, range(len(CHUNKS)))[0]), bits(other.native(variant, range(len(CHUNKS)))[0])
    )


def no_shared_parts(run: Program) -> None:
    for struct in run._kept:
        if isinstance(struct, c.AttentionStruct):
            struct.workspace_bytes = 0


@every_variant
@every_dtype
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 32), (8, 1, 128)], ids=str)
def test_rows_of_attention_have_the_same_bits_alone_in_any_batch_and_on_any_threads(
    variant: cpu.Variant, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    attention = Attention(CHUNKS, shape, dtype, 16)
    everything = list(range(len(CHUNKS)))
    whole, arena = attention.native(variant, everything)
    for i in everything:
        alone, _ = attention.native(variant, [i])
        assert torch.equal(bits(alone), bits(whole[attention.rows(i)])), CHUNKS[i]
    backwards = torch.cat([whole[attention.rows(i)] for i in reversed(everything)])
    assert torch.equal(bits(attention.native(variant, everything[::-1])[0]), bits(backwards))
    for threads in (2, 3):
        found, written = attention.native(variant, everything, threads)
        assert torch.equal(bits(found), bits(whole))
        assert torch.equal(bits(written), bits(arena))
        # One narrow chunk: threads share its splits.
        assert torch.equal(bits(attention.native(variant, [8], threads)[0]), bits(whole[attention.rows(8)]))
    without_room, _ = attention.native(variant, everything, 2, no_shared_parts)
    assert torch.equal(bits(without_room), bits(whole))


@every_variant
@every_dtype
def test_a_row_of_attention_has_the_same_bits_in_a_chunk_and_alone(variant: cpu.Variant, dtype: torch.dtype) -> None:
    """A chunk's rows once more, each as a chunk of its own over the KV that the chunk wrote."""
    for start, rows in ((0, 40), (500, 30), (1020, 9)):
        attention = Attention([(start, rows)], (9, 3, 64), dtype, 16)
        whole, arena = attention.native(variant, [0])
        singles = Attention([(start, rows)], (9, 3, 64), dtype, 16)
        singles.arena = arena
        singles.chunks, singles.tables = [(start + i, 1) for i in range(rows)], singles.tables * rows
        found, written = singles.native(variant, range(rows), threads=2)
        assert torch.equal(bits(found), bits(whole))
        assert torch.equal(bits(written), bits(arena))


@every_variant
def test_peaked_and_flat_attention_stay_finite(variant: cpu.Variant) -> None:
    attention = Attention([(700, 3), (0, 130)], (9, 3, 64), torch.float32, 16)
    flat, peaked = attention.qkv.clone(), attention.qkv * 60
    flat[:, : 9 * 64] = 0
    for qkv in (flat, peaked):
        attention.qkv = qkv
        near(attention.native(variant, [0, 1])[0], attention.reference()[0], 1e-4)


@every_variant
@pytest.mark.parametrize("threads", [1, 24])
def test_attention_of_the_greatest_shape_stays_within_its_workspace(variant: cpu.Variant, threads: int) -> None:
    """Every thread's part of the workspace is used, and memory next to it is as it was."""
    attention = Attention([(200, 4)] * 24, (256, 1, 256), torch.float32, 16)
    guards: list[Tensor] = []

    def guard(run: Program) -> None:
        for struct in run._kept:
            if isinstance(struct, c.AttentionStruct):
                size = run._workspace_bytes
                memory = torch.zeros(size + 2**20, dtype=torch.uint8)
                skip = -memory.data_ptr() % 64
                memory[skip + size :] = 5
                guards.append(memory[skip + size :])
                run._kept.append(memory)
                struct.workspace = memory.data_ptr() + skip

    found, _ = attention.native(variant, range(24), threads, guard)
    assert (guards[0] == 5).all()
    assert torch.isfinite(found).all()


def test_other_shapes_are_left_to_torch() -> None:
    def arena(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros((1, 1, 2, 1, 16, head_dim), dtype=dtype)

    assert {head_dim for head_dim in range(1, 300) if supports(4, arena(head_dim))} == cpu.HEAD_DIMS
    assert not supports(4, arena(64, torch.float16))
    assert not supports(257, arena(64))
    assert supports(256, arena(64))


@every_variant
def test_a_team_of_no_threads_or_too_many_is_refused(variant: cpu.Variant) -> None:
    for threads in (0, -1, 257):
        with pytest.raises(ValueError, match=f"threads is {threads}, must be 1 to 256"):
            program(variant, "fp32", 4, threads)


@every_variant
def test_every_thread_of_a_team_is_pinned_to_its_core(variant: cpu.Variant) -> None:
    """On a thread of its own: the caller's is pinned too."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("this machine has one core")

    def allowed() -> dict[int, set[int]]:
        return {int(task.name): os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()}

    def pinned() -> None:
        before = set(allowed())
        team = program(variant, "bf16", 4, threads=2)
        helper = set(allowed()) - before
        assert len(helper) == 1
        assert team.pin(cores)
        found = allowed()
        assert found[threading.get_native_id()] == {cores[0]}
        assert found[helper.pop()] == {cores[1]}
        with pytest.raises(ValueError, match="1 cores for 2 threads"):
            team.pin(cores[:1])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(pinned).result()


@every_variant
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_after_a_quantised_linear(variant: cpu.Variant, wrong: float) -> None:
    """And only by its own row."""
    x = randn(3, 64)
    x[1, 40] = wrong
    found = OneLinear(variant, a_matrix(32, 64, "int8", biased=False))(x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_a_team_that_the_system_has_no_room_for_is_refused_in_a_sentence() -> None:
    """In a process of its own, whose address space has room for the stacks of some threads, not of 256."""
    code = (
        "import resource, psutil\n"
        "from tests.kernels.test_native_ops import program\n"
        "from tandem.errors import ConfigError\n"
        "limit = psutil.Process().memory_info().vms + 300 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n    program('portable', 'fp32', 4, threads=256)\n"
        "except ConfigError as error:\n    print(error)\n"
        "program('portable', 'fp32', 4, threads=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (0, "threads is 256: the system doesn't give so many\n"), done.stderr
