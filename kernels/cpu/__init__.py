"""The native CPU kernels: one shared library behind a plain C ABI, loaded with ctypes.

Owns the library's discovery, its prototypes and the fact whether this processor can run it. Which op uses it when is
decided in the op's own file. Calls release the GIL.
"""

from __future__ import annotations

import ctypes
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

OK = 0
HEAD_DIMS = frozenset({32, 64, 128, 256})
"""Head dimensions that the attention kernel is compiled for."""
WIDTH_MULTIPLE = 16
"""Row widths that the elementwise kernels take are multiples of this."""
WORKSPACE_BYTES = 64 * 2**20
"""Enough for 512 rows of 64 heads of one group at the largest head dimension; pages are touched as needed."""


class SpanStruct(ctypes.Structure):
    """`tandem_span` in common.h."""

    _fields_ = (
        ("first_row", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("start", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("block_table", ctypes.c_void_p),
    )


class AttentionStruct(ctypes.Structure):
    """`tandem_attention` in common.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("arena", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("layer_offset", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("spans", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("num_spans", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class RopeStruct(ctypes.Structure):
    """`tandem_rope` in common.h."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("arena", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("layer_offset", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("rows", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Native:
    """The kernels that this processor can run, and `build`, which names their sources and compiler. Each returns `OK` or
    refuses a shape; the caller has checked every bound."""

    build: str
    attention: Any
    rope_write: Any
    add_rms_norm: Any
    silu_mul: Any


@cache
def native() -> Native | None:
    """The kernels for this processor (AVX-512 with BF16), or None: no library was built, or it can't run here."""
    path = Path(__file__).with_name(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    if not library.tandem_has_avx512_bf16():
        return None
    library.tandem_build.restype = ctypes.c_char_p
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    library.tandem_attention_avx512.argtypes = [pointer]
    library.tandem_rope_write_avx512.argtypes = [pointer]
    library.tandem_add_rms_norm_avx512.argtypes = [pointer, pointer, pointer, pointer, int64, int64, ctypes.c_float]
    library.tandem_silu_mul_avx512.argtypes = [pointer, pointer, int64, int64]
    return Native(
        build=library.tandem_build().decode(),
        attention=library.tandem_attention_avx512,
        rope_write=library.tandem_rope_write_avx512,
        add_rms_norm=library.tandem_add_rms_norm_avx512,
        silu_mul=library.tandem_silu_mul_avx512,
    )


def data(tensor: Tensor) -> int:
    """The address of a contiguous tensor's first element."""
    assert tensor.is_contiguous(), "a native kernel was given a strided tensor"
    return int(tensor.data_ptr())
