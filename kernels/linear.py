"""Linear layers: how their weights lie in memory, and what they compute.

Owns the weight formats and their packing. A packed matrix is panels of 32 outputs, each one contiguous stream over the inputs,
which is the order in which `cpu/linear.cpp` reads it; inputs and outputs are padded with zeros to multiples of 32. Formats:

    fp32, bf16   as they are; bf16 in pairs of inputs
    int8, int4   groups of 32 inputs with a scale (int4: and a minimum) in half precision: what GGUF calls Q8_0 and
                 Q4_1, so files in those types keep their values exactly. A token's activations become signed bytes, a
                 scale for each group of 32: the sum of a group is an exact integer, so no bit depends on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WeightFormat = Literal["fp32", "bf16", "int8", "int4"]
PACK_VERSION = 1
"""Changes whenever the bytes of a packed matrix do, or what a family's file packs: names, joined matrices, formats, padding."""
PANEL = 32
GROUP = 32
ALIGNMENT = 64


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A packed matrix of `out_features` by `in_features`. panels: [num_panels, bytes of a panel] uint8, 64-byte aligned;
    bias: [num_panels * 32] fp32, zero past `out_features`, or None. Not changed after it is made; may lie in a file."""

    panels: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    format: WeightFormat

    def __post_init__(self) -> None:
        expected = padded(self.out_features) // PANEL, panel_bytes(self.in_features, self.format)
        if self.panels.shape != expected or self.panels.dtype != torch.uint8:
            raise ValueError(f"panels are {tuple(self.panels.shape)} {self.panels.dtype}, must be {expected} bytes")

    @property
    def padded_in(self) -> int:
        return padded(self.in_features)


def padded(features: int) -> int:
    """`features`, rounded up to a multiple of 32."""
    return -(-features // PANEL) * PANEL


def panel_bytes(in_features: int, form: WeightFormat) -> int:
    """Bytes of one panel of 32 outputs over `padded(in_features)` inputs."""
    groups = padded(in_features) // GROUP
    per_group = {"fp32": GROUP * 4, "bf16": GROUP * 2, "int8": 2 + GROUP, "int4": 4 + GROUP // 2}[form]
    return groups * per_group * PANEL


def _groups(weight: Tensor) -> Tensor:
    """[out, in] → [out, num_groups, GROUP] fp32."""
    return weight.float().unflatten(1, (-1, GROUP))


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [out, in], `in` a multiple of 32 → scales [out, groups] fp16 and integers [out, groups, 32] in -127…127: the
    greatest magnitude of a group becomes 127."""
    groups = _groups(weight)
    scales = (groups.abs().amax(-1) / 127).half()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0)
    return scales, (groups * inverse[..., None]).round().clamp(-127, 127).to(torch.int8)


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight: [out, in], `in` a multiple of 32 → scales and minima [out, groups] fp16, integers [out, groups, 32] in 0…15: the
    least value of a group becomes 0, the greatest 15."""
    groups = _groups(weight)
    minima = groups.amin(-1).half()
    scales = ((groups.amax(-1) - minima.float()) / 15).half()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0)
    integers = ((groups - minima.float()[..., None]) * inverse[..., None]).round().clamp(0, 15)
    return scales, minima, integers.to(torch.uint8)


def pack(weight: Tensor, form: WeightFormat) -> Tensor:
    """weight: [out_features, in_features] → panels [num_panels, panel_bytes] uint8, of values rounded to `form`."""
    rows, columns = weight.shape
    full = F.pad(weight, (0, padded(columns) - columns, 0, padded(rows) - rows))
    num_panels = full.shape[0] // PANEL
    match form:
        case "fp32":
            stream = full.float().view(num_panels, PANEL, -1).transpose(1, 2)
        case "bf16":
            stream = full.bfloat16().view(num_panels, PANEL, -1, 2).transpose(1, 2)
        case "int8":
            scales, integers = quantize_int8(full)
            values = (integers.to(torch.int16) + 128).to(torch.uint8)
            return _join(num_panels, [scales], values.view(num_panels, PANEL, -1, GROUP // 4, 4).permute(0, 2, 3, 1, 4))
        case "int4":
            scales, minima, nibbles = quantize_int4(full)
            # Eight inputs a dword: the first four in the low nibbles of its bytes, the next four in the high ones.
            halves = nibbles.view(num_panels, PANEL, -1, GROUP // 8, 2, 4)
            both = halves[..., 0, :] | (halves[..., 1, :] << 4)
            return _join(num_panels, [scales, minima], both.permute(0, 2, 3, 1, 4))
    return stream.contiguous().view(torch.uint8).view(num_panels, -1)


def _join(num_panels: int, halves: list[Tensor], values: Tensor) -> Tensor:
    """halves: [out, groups] fp16 each; values: [num_panels, groups, dwords, PANEL, 4] uint8 → group by group, halves first."""
    groups = values.shape[1]
    parts = [h.view(num_panels, PANEL, groups).transpose(1, 2).contiguous().view(torch.uint8) for h in halves]
    return torch.cat([*parts, values.reshape(num_panels, groups, -1)], dim=2).view(num_panels, -1)


def unpack(matrix: Matrix) -> Tensor:
    """The values that the matrix stands for: [out_features, in_features] fp32."""
    num_panels, wide = matrix.panels.shape[0], matrix.padded_in
    groups = wide // GROUP
    match matrix.format:
        case "fp32":
            values = matrix.panels.view(torch.float32).view(num_panels, wide, PANEL).transpose(1, 2)
        case "bf16":
            values = matrix.panels.view(torch.bfloat16).view(num_panels, wide // 2, PANEL, 2).transpose(1, 2).float()
        case "int8":
            parts = matrix.panels.view(num_panels, groups, -1)
            scales = _half(parts[..., : PANEL * 2])
            integers = parts[..., PANEL * 2 :].reshape(num_panels, groups, GROUP // 4, PANEL, 4).permute(0, 3, 1, 2, 4)
            values = scales[..., None] * (integers.reshape(num_panels, PANEL, groups, GROUP).float() - 128)
        case "int4":
            parts = matrix.panels.view(num_panels, groups, -1)
            scales, minima = _half(parts[..., : PANEL * 2]), _half(parts[..., PANEL * 2 : PANEL * 4])
            both = parts[..., PANEL * 4 :].reshape(num_panels, groups, GROUP // 8, PANEL, 4).permute(0, 3, 1, 2, 4)
            nibbles = torch.stack((both & 15, both >> 4), dim=-2).reshape(num_panels, PANEL, groups, GROUP)
            values = scales[..., None] * nibbles.float() + minima[..., None]
    return values.reshape(num_panels * PANEL, wide)[: matrix.out_features, : matrix.in_features].contiguous()


def _half(part: Tensor) -> Tensor:
    """[num_panels, groups, PANEL * 2] uint8 → [num_panels, PANEL, groups] fp32."""
    return part.contiguous().view(torch.float16).float().transpose(1, 2)


def quantize_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [num_rows, in], `in` a multiple of 32, finite → scales [num_rows, groups] fp32 and integers [num_rows, groups, 32] int8;
    a group of nothing above 1e-30 has zeros."""
    groups = _groups(x)
    most = groups.abs().amax(-1)
    factor = torch.where(most > 1e-30, 127 / most, 0)
    return most / 127, (groups * factor[..., None]).round().to(torch.int8)


def linear_ref(x: Tensor, matrix: Matrix) -> Tensor:
    """x: [num_rows, in_features] → [num_rows, out_features] fp32. int8 and int4: of the quantized rows."""
    if matrix.format == "bf16":
        x = x.bfloat16()
    elif matrix.format in ("int8", "int4"):
        scales, integers = quantize_rows_ref(F.pad(x.float(), (0, matrix.padded_in - matrix.in_features)))
        x = (scales[..., None] * integers.float()).flatten(1)[:, : matrix.in_features]
    bias = None if matrix.bias is None else matrix.bias[: matrix.out_features]
    return F.linear(x.float(), unpack(matrix), bias)
