"""KV events against an independent decoder, against vLLM's shape, and against garbage."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import kv_events
from protos.kv_events import (
    END_OF_REPLAY,
    MAX_BATCH_BYTES,
    MAX_SEQ,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    decode_batch,
    decode_seq,
    encode_batch,
    encode_seq,
)

A, B, ROOT = b"a" * 16, b"b" * 16, b"r" * 16
BATCH = EventBatch(
    12.5,
    [BlockStored([A, B], ROOT, [], 16, None, "HOST"), BlockRemoved([A], "HOST"), AllBlocksCleared()],
    None,
    b"epoch-01",
)


def test_the_format_is_arrays_that_begin_with_their_names() -> None:
    assert msgpack.unpackb(encode_batch(BATCH)) == [
        12.5,
        [["BlockStored", [A, B], ROOT, [], 16, None, "HOST"], ["BlockRemoved", [A], "HOST"], ["AllBlocksCleared"]],
        None,
        b"epoch-01",
    ]
    assert decode_batch(encode_batch(BATCH)) == BATCH


def test_a_batch_without_our_additions_is_understood() -> None:
    foreign = [1.0, [["BlockStored", [2**64 - 1, 7], None, [1, 2, 3, 4], 4], ["BlockRemoved", [7]]], 3]
    batch = decode_batch(msgpack.packb(foreign))
    assert batch == EventBatch(1.0, [BlockStored([2**64 - 1, 7], None, [1, 2, 3, 4], 4), BlockRemoved([7])], 3, None)


@pytest.mark.parametrize("seq", [-1, 0, 1, 2**40, MAX_SEQ])
def test_sequence_numbers_are_eight_bytes_big_endian(seq: int) -> None:
    assert decode_seq(encode_seq(seq)) == seq
    assert len(encode_seq(seq)) == 8
    assert encode_seq(1) == b"\0\0\0\0\0\0\0\1"
    assert encode_seq(-1) == END_OF_REPLAY == b"\xff" * 8


@pytest.mark.parametrize("seq", [MAX_SEQ + 1, 2**63 - 1, -2, -(2**63)])
def test_a_number_that_has_no_successor_or_no_meaning_is_a_value_error(seq: int) -> None:
    with pytest.raises(ValueError, match="sequence number"):
        decode_seq(encode_seq(seq))


@given(st.binary(max_size=20))
def test_a_sequence_frame_of_another_length_is_a_value_error(frame: bytes) -> None:
    if len(frame) == 8:
        number = int.from_bytes(frame, "big", signed=True)
        assert not -1 <= number <= MAX_SEQ or encode_seq(decode_seq(frame)) == frame
    else:
        with pytest.raises(ValueError, match=f"{len(frame)} bytes"):
            decode_seq(frame)


def test_bounds() -> None:
    with pytest.raises(ValueError, match=str(MAX_BATCH_BYTES)):
        decode_batch(bytes(MAX_BATCH_BYTES + 1))
    many = kv_events._encoder.encode(EventBatch(0.0, [BlockRemoved([A] * 65_537)]))
    with pytest.raises(msgspec.ValidationError):
        decode_batch(many)


@settings(max_examples=300)
@given(st.binary(max_size=120))
def test_random_bytes_raise_only_decode_errors(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_batch(data)


@settings(max_examples=300)
@given(st.data())
def test_damaged_batches_raise_only_decode_errors(data: st.DataObject) -> None:
    frame = bytearray(encode_batch(BATCH))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded: Any = decode_batch(bytes(frame[: data.draw(st.integers(0, len(frame)))]))
    except msgspec.DecodeError:
        return  # the promise: this and nothing else
    assert isinstance(decoded, EventBatch)


def test_deep_nesting_is_refused() -> None:
    later = bytearray(encode_batch(BATCH))
    later[0] += 1  # one more element than we know
    with pytest.raises(msgspec.DecodeError):
        decode_batch(bytes(later) + b"\x91" * 200_000)
