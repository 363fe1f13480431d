"""The decoder's operations with torch: the native backend's reference, and its stand-in where no library was built.

Owns the linears made for torch and the order of torch calls; allocates as it goes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import Matrix, WeightFormat, padded, unpack
from kernels.ops import Step
from kernels.paged_attention import AttentionPlan, paged_attention, plan_attention
from kernels.rms_norm import rms_norm
from kernels.rope_write import WritePlan, rope_write
from kernels.silu_mul import GATE_RUN, silu_mul
from kernels.torch_linear import MIN_ROWS, Linear, torch_form, torch_linear


class TorchOps:
    """Runs a model's forward (`kernels.ops.Ops`) step by step. Not reentrant.

    arena: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], contiguous; cos, sin: [positions, head_dim] fp32.
    """

    def __init__(self, form: WeightFormat, num_heads: int, cos: Tensor, sin: Tensor, arena: Tensor) -> None:
        self._form = torch_form(form)
        self._dtype = torch.bfloat16 if form == "bf16" else torch.float32
        self._num_heads = num_heads
        self._cos, self._sin = cos, sin
        self._arena = arena
        self._linears: dict[int, tuple[Matrix, Linear]] = {}
        self._tables: dict[int, tuple[Matrix, Tensor]] = {}
        self._step: Step | None = None
        self._rows = 0
        self._write: WritePlan | None = None
        self._plan: AttentionPlan | None = None

    def run(self, step: Step, forward: Callable[[TorchOps], None]) -> None:
        """Writes the step's KV into the arena and its logits into `step.logits`. The caller has checked every bound."""
        self._step = step
        self._rows = len(step.token_ids)
        padding = max(0, MIN_ROWS[self._form] - self._rows)
        position = F.pad(torch.from_numpy(step.positions).long(), (0, padding))
        slots = torch.from_numpy(step.slots)
        self._write = WritePlan(self._cos.index_select(0, position), self._sin.index_select(0, position), slots)
        self._plan = plan_attention(step.spans, self._num_heads, self._arena.shape[3], self._arena.shape[4])
        # Not inference_mode: its tensors can't be changed in place outside it, and the logits are the caller's own.
        with torch.no_grad():
            forward(self)

    def _linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x: [rows or more, in_features] → [as x, out_features]"""
        known = self._linears.get(id(matrix))
        if known is None:
            known = self._linears[id(matrix)] = (matrix, torch_linear(matrix, self._form))
        missing = max(0, MIN_ROWS[self._form] - x.shape[0])
        return known[1](F.pad(x, (0, 0, 0, missing)) if missing else x)

    def embed(self, table: Matrix) -> Tensor:
        assert self._step is not None
        known = self._tables.get(id(table))
        if known is None:
            dtype = torch.bfloat16 if table.format == "bf16" else torch.float32
            known = self._tables[id(table)] = (table, unpack(table).to(dtype))
        padding = max(0, MIN_ROWS[self._form] - self._rows)
        token_ids = F.pad(torch.from_numpy(self._step.token_ids).long(), (0, padding))
        return known[1].index_select(0, token_ids).float()

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
        return self._linear(rms_norm(x, norm[: x.shape[1]], eps, self._dtype), matrix)

    def norm_gated(self, x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
        both = self.norm_linear(x, norm, eps, matrix).unflatten(1, (-1, 2, GATE_RUN))
        gate, up = both[:, :, 0].flatten(1), both[:, :, 1].flatten(1)
        return silu_mul(gate.contiguous(), up)

    def attention(self, qkv: Tensor, layer: int) -> Tensor:
        assert self._write is not None
        assert self._plan is not None
        scale = self._arena.shape[5] ** -0.5
        q = rope_write(qkv, self._write, self._arena, layer, self._num_heads, scale)
        return paged_attention(q, self._arena, layer, self._plan, self._dtype)

    def add_linear(self, x: Tensor, y: Tensor, matrix: Matrix) -> None:
        x.add_(self._linear(y[:, : matrix.in_features], matrix)[: x.shape[0]])

    def keep_logit_rows(self, x: Tensor, y: Tensor) -> None:
        assert self._step is not None
        rows = torch.from_numpy(self._step.logit_rows).long()
        for value in (x, y):
            value.set_(F.pad(value.index_select(0, rows), (0, 0, 0, max(0, MIN_ROWS[self._form] - rows.numel()))))

    def logits(self, x: Tensor, norm: Tensor, eps: float, head: Matrix) -> None:
        assert self._step is not None
        found = self.norm_linear(x, norm, eps, head)
        self._step.logits.copy_(found[: self._step.logits.shape[0]])


def padded_norm(weight: Tensor) -> Tensor:
    """A norm's weight as `Ops` wants it: fp32, zero up to a multiple of 32."""
    return F.pad(weight.float(), (0, padded(weight.numel()) - weight.numel())).contiguous()
