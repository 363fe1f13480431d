"""The structs of abi.h for ctypes, field by field in the same order."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

EMBED, RMS_NORM, QUANTIZE, LINEAR, ROPE_WRITE, ATTENTION, SELECT, NUM_KINDS = range(8)
FORMATS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
STORE, ADD, SILU_MUL = range(3)
F32, BF16 = range(2)

Field = tuple[str, type]


def _fields(kind: type, names: str) -> list[Field]:
    return [(name, kind) for name in names.split()]


class SpanStruct(Structure):
    _fields_ = (*_fields(c_int32, "first_row rows start reserved"), ("block_table", c_void_p))


class StepStruct(Structure):
    _fields_ = (
        *_fields(c_void_p, "token_ids positions slots logit_rows spans logits"),
        *_fields(c_int32, "rows num_logits num_spans reserved"),
    )


class MatrixStruct(Structure):
    _fields_ = (*_fields(c_void_p, "panels bias"), *_fields(c_int32, "format in_features num_panels reserved"))


class EmbedStruct(Structure):
    _fields_ = (*_fields(c_void_p, "table x"), ("stride", c_int64))


class RmsNormStruct(Structure):
    _fields_ = (
        *_fields(c_void_p, "x weight out"),
        ("stride", c_int64),
        *_fields(c_int32, "width out_dtype"),
        ("eps", c_float),
        ("logit_rows", c_int32),
    )


class QuantizeStruct(Structure):
    _fields_ = (*_fields(c_void_p, "x q scales sums"), ("stride", c_int64), *_fields(c_int32, "logit_rows reserved"))


class LinearStruct(Structure):
    _fields_ = (
        *_fields(c_void_p, "x scales sums out matrix"),
        *_fields(c_int64, "x_stride out_stride"),
        *_fields(c_int32, "width epilogue out_dtype logit_rows"),
    )


class RopeWriteStruct(Structure):
    _fields_ = (
        *_fields(c_void_p, "qkv cos sin q arena"),
        *_fields(c_int64, "stride block_stride layer_offset value_offset"),
        ("scale", c_float),
        *_fields(c_int32, "num_heads num_kv_heads head_dim block_size dtype"),
    )


class AttentionStruct(Structure):
    _fields_ = (
        *_fields(c_void_p, "q out arena workspace"),
        *_fields(c_int64, "workspace_bytes stride block_stride layer_offset value_offset"),
        *_fields(c_int32, "num_heads num_kv_heads head_dim block_size dtype out_dtype"),
    )


class SelectStruct(Structure):
    _fields_ = (
        *_fields(c_void_p, "x y"),
        *_fields(c_int64, "x_stride y_stride"),
        *_fields(c_int32, "y_dtype reserved"),
    )


class OpStruct(Structure):
    _fields_ = (*_fields(c_int32, "kind reserved"), ("arguments", c_void_p))


def address(struct: Structure) -> int:
    """Where it lies; the caller keeps it alive."""
    return ctypes.addressof(struct)
