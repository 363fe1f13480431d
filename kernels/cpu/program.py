"""A model as a program of native operations: recorded once, run with one call a step.

Owns the buffers between the operations, which live as long as the program, and its team of threads. Row buffers are
[max_rows, padded width]; what lies past a row's width is zero, always.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import HEAD_DIMS, Native
from kernels.cpu import structs as c
from kernels.linear import ALIGNMENT, GROUP, PANEL, Matrix, WeightFormat, padded
from kernels.ops import Step
from tandem.errors import ConfigError

THREAD_BYTES = 4 * 2**20
"""Of attention's workspace for each thread: what 256 heads of 256 dimensions need. Pages are touched as needed."""
SHARED_BYTES = 64 * 2**20
"""Of the workspace for what threads give each other; where that is too little, they share less of the work."""
_DTYPES = {torch.float32: c.F32, torch.bfloat16: c.BF16}


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A buffer of rows: [max_rows, padded(width)]."""

    memory: Tensor
    width: int


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of attention, and the arena it works on: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]."""

    num_heads: int
    cos: Tensor
    sin: Tensor
    arena: Tensor


def supports(num_heads: int, arena: Tensor) -> bool:
    """Whether the native kernels run attention of that shape."""
    return arena.shape[5] in HEAD_DIMS and arena.dtype in _DTYPES and num_heads <= 256


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), "a native kernel was given a strided tensor"
    return int(tensor.data_ptr())


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros, aligned to a cache line; pages that nobody touches cost nothing (torch.zeros writes them all)."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + ALIGNMENT, dtype=np.uint8))
    skip = -memory.data_ptr() % ALIGNMENT
    return memory[skip : skip + size].view(dtype).view(shape)


class Program:
    """Records the operations that a model's file calls (`kernels.ops.Ops`), then runs them for steps of up to `max_rows` rows.

    Not reentrant: one engine thread runs it. `threads` of them compute, the caller included.
    """

    def __init__(self, native: Native, form: WeightFormat, heads: Heads, max_rows: int, threads: int) -> None:
        self._library = native.library
        if not 1 <= threads <= 256:
            raise ValueError(f"threads is {threads}, must be 1 to 256")
        self._team = self._library.tandem_team_new(threads)
        self._threads = threads
        self._workspace_bytes = threads * THREAD_BYTES + SHARED_BYTES
        if not self._team:
            raise ConfigError(f"threads is {threads}: the system doesn't give so many")
        self._heads = heads
        self._max_rows = max_rows
        self._rows_dtype = torch.bfloat16 if form == "bf16" else torch.float32
        self._quantized = form in ("int8", "int4")
        self._ops: list[c.OpStruct] = []
        self._kept: list[Any] = []
        self._buffers: dict[tuple[int, torch.dtype, str], Tensor] = {}
        self._only_logit_rows = 0
        self._seconds = (ctypes.c_double * c.NUM_KINDS)()
        self._array: Any = None

    def __del__(self) -> None:
        team, self._team = getattr(self, "_team", None), None
        if team:
            self._library.tandem_team_free(team)

    # Recording

    def _buffer(self, name: str, width: int, dtype: torch.dtype) -> Rows:
        """Buffers of one name and shape are one: a layer's are free again in the next."""
        key = (width, dtype, name)
        if key not in self._buffers:
            self._buffers[key] = _empty((self._max_rows, padded(width)), dtype)
        return Rows(self._buffers[key], width)

    def _add(self, kind: int, arguments: ctypes.Structure) -> None:
        self._kept.append(arguments)
        self._ops.append(c.OpStruct(kind=kind, arguments=c.address(arguments)))

    def _matrix(self, matrix: Matrix) -> int:
        struct = c.MatrixStruct(
            panels=_address(matrix.panels),
            bias=None if matrix.bias is None else _address(matrix.bias),
            format=c.FORMATS[matrix.format],
            in_features=matrix.padded_in,
            num_panels=matrix.panels.shape[0],
        )
        self._kept += (matrix, struct)
        return c.address(struct)

    def _linear(self, x: Rows, matrix: Matrix, out: Rows | None, epilogue: int) -> None:
        """out None: the step's logits."""
        source, scales, sums = x.memory, None, None
        assert source.shape[1] == matrix.padded_in, f"rows of {source.shape[1]}, a matrix of {matrix.padded_in}"
        if self._quantized:
            stride = source.shape[1]
            q = self._buffer("q", stride, torch.int8).memory
            scales, sums = (
                self._buffer(name, stride, dtype).memory.view(-1)[: self._max_rows * (stride // GROUP)]
                for name, dtype in (("scales", torch.float32), ("sums", torch.int32))
            )
            self._add(
                c.QUANTIZE,
                c.QuantizeStruct(
                    x=_address(source),
                    q=_address(q),
                    scales=_address(scales),
                    sums=_address(sums),
                    stride=stride,
                    logit_rows=self._only_logit_rows,
                ),
            )
            source = q
        self._add(
            c.LINEAR,
            c.LinearStruct(
                x=_address(source),
                scales=None if scales is None else _address(scales),
                sums=None if sums is None else _address(sums),
                out=None if out is None else _address(out.memory),
                matrix=self._matrix(matrix),
                x_stride=source.shape[1],
                out_stride=matrix.out_features if out is None else out.memory.shape[1],
                width=matrix.out_features if out is None else out.memory.shape[1],
                epilogue=epilogue,
                out_dtype=c.F32 if out is None else _DTYPES[out.memory.dtype],
                logit_rows=self._only_logit_rows,
            ),
        )

    def _norm(self, x: Rows, norm: Tensor, eps: float) -> Rows:
        out = self._buffer("norm", x.width, self._rows_dtype)
        assert norm.shape == (padded(x.width),), f"a norm of {tuple(norm.shape)} for rows of {x.width}"
        self._kept.append(norm)
        self._add(
            c.RMS_NORM,
            c.RmsNormStruct(
                x=_address(x.memory),
                weight=_address(norm),
                out=_address(out.memory),
                stride=x.memory.shape[1],
                width=x.width,
                out_dtype=_DTYPES[out.memory.dtype],
                eps=eps,
                logit_rows=self._only_logit_rows,
            ),
        )
        return out

    def embed(self, table: Matrix) -> Rows:
        x = self._buffer("x", table.in_features, torch.float32)
        stride = x.memory.shape[1]
        self._add(c.EMBED, c.EmbedStruct(table=self._matrix(table), x=_address(x.memory), stride=stride))
        return x

    def norm_linear(self, x: Rows, norm: Tensor, eps: float, matrix: Matrix) -> Rows:
        out = self._buffer("linear", matrix.out_features, torch.float32)
        self._linear(self._norm(x, norm, eps), matrix, out, c.STORE)
        return out

    def norm_gated(self, x: Rows, norm: Tensor, eps: float, matrix: Matrix) -> Rows:
        out = self._buffer("gated", matrix.panels.shape[0] * PANEL // 2, self._rows_dtype)
        self._linear(self._norm(x, norm, eps), matrix, out, c.SILU_MUL)
        return out

    def attention(self, qkv: Rows, layer: int) -> Rows:
        heads, arena = self._heads, self._heads.arena
        num_kv_heads, block_size, head_dim = arena.shape[3], arena.shape[4], arena.shape[5]
        q = self._buffer("queries", heads.num_heads * head_dim, arena.dtype).memory
        out = self._buffer("attended", heads.num_heads * head_dim, self._rows_dtype)
        place = {
            "block_stride": arena.stride(0),
            "layer_offset": layer * arena.stride(1),
            "value_offset": arena.stride(2),
            "num_heads": heads.num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "block_size": block_size,
            "dtype": _DTYPES[arena.dtype],
        }
        self._add(
            c.ROPE_WRITE,
            c.RopeWriteStruct(
                qkv=_address(qkv.memory),
                cos=_address(heads.cos),
                sin=_address(heads.sin),
                q=_address(q),
                arena=_address(arena),
                stride=qkv.memory.shape[1],
                scale=head_dim**-0.5 * math.log2(math.e),  # the kernel takes powers of two
                **place,
            ),
        )
        workspace = self._workspace()
        self._add(
            c.ATTENTION,
            c.AttentionStruct(
                q=_address(q),
                out=_address(out.memory),
                arena=_address(arena),
                workspace=_address(workspace),
                workspace_bytes=self._workspace_bytes,
                stride=out.memory.shape[1],
                out_dtype=_DTYPES[out.memory.dtype],
                **place,
            ),
        )
        return out

    def _workspace(self) -> Tensor:
        key = (self._workspace_bytes, torch.uint8, "workspace")
        if key not in self._buffers:
            self._buffers[key] = _empty((self._workspace_bytes,), torch.uint8)
        return self._buffers[key]

    def add_linear(self, x: Rows, y: Rows, matrix: Matrix) -> None:
        self._linear(y, matrix, x, c.ADD)

    def keep_logit_rows(self, x: Rows, y: Rows) -> None:
        self._add(
            c.SELECT,
            c.SelectStruct(
                x=_address(x.memory),
                y=_address(y.memory),
                x_stride=x.memory.shape[1],
                y_stride=y.memory.shape[1],
                y_dtype=_DTYPES[y.memory.dtype],
            ),
        )
        self._only_logit_rows = 1

    def logits(self, x: Rows, norm: Tensor, eps: float, head: Matrix) -> None:
        self._linear(self._norm(x, norm, eps), head, None, c.STORE)

    # Running

    def run(self, step: Step) -> None:
        """Writes the step's KV into the arena and its logits into `step.logits`. The caller has checked every bound."""
        if self._array is None:
            self._array = (c.OpStruct * len(self._ops))(*self._ops)
        spans = (c.SpanStruct * len(step.spans))(
            *(c.SpanStruct(s.first_row, s.rows, s.start, 0, s.block_ids.ctypes.data) for s in step.spans)
        )
        struct = c.StepStruct(
            token_ids=step.token_ids.ctypes.data,
            positions=step.positions.ctypes.data,
            slots=step.slots.ctypes.data,
            logit_rows=step.logit_rows.ctypes.data,
            spans=ctypes.addressof(spans),
            logits=step.logits.data_ptr(),
            rows=len(step.token_ids),
            num_logits=len(step.logit_rows),
            num_spans=len(step.spans),
        )
        self._library.tandem_run(self._team, self._array, len(self._ops), ctypes.byref(struct), self._seconds)

    def pin(self, cores: Sequence[int]) -> bool:
        """Pins the calling thread and the team's others to those cores, one each; False if the system doesn't let it."""
        if len(cores) != self._threads:
            raise ValueError(f"{len(cores)} cores for {self._threads} threads")
        others = (ctypes.c_int32 * (self._threads - 1))(*cores[1:])
        if not self._library.tandem_team_pin(self._team, others):
            return False
        try:
            os.sched_setaffinity(0, {cores[0]})
        except OSError:
            return False
        return True

    def seconds(self) -> dict[str, float]:
        """What all steps so far took: "linear", "attention" and "rest", of the calling thread."""
        every = np.array(self._seconds)
        linear = float(every[[c.LINEAR, c.QUANTIZE]].sum())
        attention = float(every[c.ATTENTION])
        return {"linear": linear, "attention": attention, "rest": float(every.sum()) - linear - attention}
