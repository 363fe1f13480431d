"""What packing keeps of a matrix's values, in every format."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.linear import GROUP, PANEL, Matrix, WeightFormat, pack, padded, panel_bytes, unpack

FORMS: list[WeightFormat] = ["fp32", "bf16", "int8", "int4"]
HALF = 2.0**-11
LEAST = 2.0**-25
"""Rounding to half precision: the relative error, and the absolute one of the smallest numbers."""
SIZES = st.tuples(st.integers(1, 100), st.integers(1, 100))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: Tensor, form: WeightFormat) -> Matrix:
    return Matrix(pack(weight, form), None, *weight.shape, form)


def by_groups(weight: Tensor) -> Tensor:
    """[out, groups, GROUP], with zeros past the last input."""
    missing = padded(weight.shape[1]) - weight.shape[1]
    return torch.nn.functional.pad(weight, (0, missing)).unflatten(1, (-1, GROUP))


@given(size=SIZES)
def test_fp32_keeps_every_bit_and_bf16_those_of_bf16(size: tuple[int, int]) -> None:
    weight = randn(*size)
    assert torch.equal(unpack(packed(weight, "fp32")), weight)
    assert torch.equal(unpack(packed(weight, "bf16")), weight.bfloat16().float())


@given(size=SIZES, scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_int8_is_within_half_a_step(size: tuple[int, int], scale: float) -> None:
    weight = scale * randn(*size)
    steps = by_groups(weight).abs().amax(-1, keepdim=True) / 127
    error = by_groups(unpack(packed(weight, "int8"))) - by_groups(weight)
    assert (error.abs() <= steps * (0.5 + 128 * HALF) + 127 * LEAST).all()


@given(size=SIZES, scale=st.sampled_from([1e-3, 1.0, 300.0]), shift=st.sampled_from([0.0, 2.0]))
def test_int4_is_within_half_a_step(size: tuple[int, int], scale: float, shift: float) -> None:
    weight = scale * (randn(*size) + shift)
    groups = by_groups(weight)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    error = by_groups(unpack(packed(weight, "int4"))) - groups
    # The minimum is rounded to half precision, and with it the whole group.
    limit = (high - low) / 15 * (0.5 + 16 * HALF) + 2 * HALF * low.abs() + 16 * LEAST
    inside = torch.arange(groups.shape[1] * GROUP).view(1, -1, GROUP) < weight.shape[1]
    assert (error.abs() <= limit)[inside.expand_as(error)].all()


@pytest.mark.parametrize("form", FORMS)
def test_groups_of_zeros_and_of_hardly_anything_stay_finite(form: WeightFormat) -> None:
    weight = randn(40, 96)
    weight[:, :32] = 0
    weight[3] = 1e-9
    found = unpack(packed(weight, form))
    assert torch.isfinite(found).all()
    assert not found[:3, :32].any()
    assert (found[3, 32:] - 1e-9).abs().max() <= 1e-9


@pytest.mark.parametrize("form", FORMS)
@given(size=SIZES)
def test_what_pads_a_matrix_is_zero(form: WeightFormat, size: tuple[int, int]) -> None:
    matrix = packed(randn(*size) + 3, form)
    assert matrix.panels.shape == (padded(size[0]) // PANEL, panel_bytes(size[1], form))
    assert matrix.panels.dtype == torch.uint8
    whole = unpack(Matrix(matrix.panels, None, padded(size[0]), padded(size[1]), form))
    assert torch.equal(whole[: size[0], : size[1]], unpack(matrix))
    assert not whole[size[0] :].any()
    if form != "int4":  # whose groups needn't have a zero: the activations have there
        assert not whole[:, size[1] :].any()


@given(
    seed=st.integers(0, 2**32), scale=st.sampled_from([1e-5, 0.02, 1.0, 1e3]), shift=st.sampled_from([0.0, 0.5, -3.0])
)
@pytest.mark.parametrize(
    ("kind", "form"), [(gguf.GGMLQuantizationType.Q8_0, "int8"), (gguf.GGMLQuantizationType.Q4_1, "int4")]
)
def test_a_quantised_gguf_tensor_keeps_its_values_bit_for_bit(
    kind: gguf.GGMLQuantizationType, form: WeightFormat, seed: int, scale: float, shift: float
) -> None:
    values = (np.random.default_rng(seed).standard_normal((37, 96)) + shift).astype(np.float32) * np.float32(scale)
    values[1, :32] = 0
    dequantised = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind))
    assert dequantised.dtype == torch.float32
    assert torch.equal(unpack(packed(dequantised, form)), dequantised)


def test_panels_of_another_size_than_the_matrix_are_refused() -> None:
    matrix = Matrix(pack(randn(40, 70), "bf16"), None, 40, 70, "bf16")
    with pytest.raises(ValueError, match="panels are"):
        dataclasses.replace(matrix, in_features=200)
    with pytest.raises(ValueError, match="panels are"):
        dataclasses.replace(matrix, out_features=100)
