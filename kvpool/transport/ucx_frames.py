"""The frames of the ucx transport: what a reader and a source say to each other besides blocks.

Owns their bytes, tags and bounds; sends nothing. Everything is a tagged message; each direction has one size of frame, so that
a receive can be posted for it, small enough that UCX sends it eagerly: whole, and never waiting for the other side. Numbers
are big-endian, the rest of a frame is zero.

    source → reader   REPLY_BYTES
        greeting magic 4s | version u16 | pad 2 | reader_tag u64                                         tag GREETING
        reply    num_blocks u64 | length u16 | why it refuses                                            tag base, REPLY_SEQ
    reader → source   FRAME_BYTES                                                                        tag reader_tag
        hello    kind u8 | pad 3 | magic 4s | version u16 | pad 2 | secret 16s | epoch 8s | slab_bytes u64 | tag_base u32
        ask      kind u8 | pad 1 | num u16 | seq u32 | num × location u64

An ask is answered by one message of tag (base, seq), the blocks in the order asked for. A source that is asked for what it
hasn't got, or can't make sense of a frame, refuses the reader. UCX matches tags across all connections of a worker, so tags
are drawn at random: who doesn't hear our frames can neither speak as a reader of ours nor make a message that is taken for
a block.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.errors import TransportError

UCX_VERSION = 1
FRAME_BYTES = 1024
REPLY_BYTES = 192
SECRET_BYTES = 16
EPOCH_BYTES = 8
MAX_ASKED = 120
"""Blocks of one ask."""

GREETING_TAG = 1
REPLY_SEQ = 2**32 - 1
"""Asks count from 0 and stay below it."""

MESSAGE_BYTES = 512 * 1024
"""Blocks that are smaller travel several in a message of about so many bytes. Larger messages are fewer, but have to be gathered:
blocks of 360 KiB went at 4.8 GB/s one by one and at 3.4 GB/s four by four (loopback, two cores)."""

Frame = NDArray[np.uint8]

_MAGIC = b"TKVU"
_HELLO, _ASK = 1, 2
_GREETING_FORMAT = struct.Struct(">4sH2xQ")
_REPLY_FORMAT = struct.Struct(">QH")
_HELLO_FORMAT = struct.Struct(">B3x4sH2x16s8sQI")
_ASK_FORMAT = struct.Struct(">BxHI")
_MAX_WHY = REPLY_BYTES - _REPLY_FORMAT.size


@dataclass(frozen=True, slots=True)
class Hello:
    secret: bytes
    epoch: bytes
    slab_bytes: int
    tag_base: int


@dataclass(frozen=True, slots=True)
class Ask:
    """`locations` as the reader named them, `[num]` uint64, unchecked."""

    seq: int
    locations: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Reply:
    """How many blocks the arena has, or `refused`: why there are none for this reader."""

    num_blocks: int
    refused: str = ""


def blocks_per_message(slab_bytes: int) -> int:
    """The most blocks that one ask may name."""
    return min(max(MESSAGE_BYTES // slab_bytes, 1), MAX_ASKED)


def tag_of(tag_base: int, seq: int) -> int:
    return tag_base << 32 | seq


def pack_greeting(reader_tag: int) -> Frame:
    return _padded(_GREETING_FORMAT.pack(_MAGIC, UCX_VERSION, reader_tag), REPLY_BYTES)


def pack_reply(reply: Reply) -> Frame:
    """A reason that is too long is cut."""
    why = reply.refused.encode()[:_MAX_WHY]
    return _padded(_REPLY_FORMAT.pack(reply.num_blocks, len(why)) + why, REPLY_BYTES)


def pack_hello(hello: Hello) -> Frame:
    fields = (hello.secret, hello.epoch, hello.slab_bytes, hello.tag_base)
    return _padded(_HELLO_FORMAT.pack(_HELLO, _MAGIC, UCX_VERSION, *fields), FRAME_BYTES)


def pack_ask(seq: int, locations: Sequence[int]) -> Frame:
    """`locations` has 1 to `MAX_ASKED` numbers of 64 bits."""
    assert 0 < len(locations) <= MAX_ASKED, f"{len(locations)} locations in an ask, the limit is {MAX_ASKED}"
    return _padded(struct.pack(f">BxHI{len(locations)}Q", _ASK, len(locations), seq, *locations), FRAME_BYTES)


def unpack_greeting(frame: Frame) -> int:
    """The `reader_tag`. Raises TransportError for anything else than a greeting."""
    magic, version, reader_tag = _GREETING_FORMAT.unpack_from(frame.data)
    _check(magic, version)
    return int(reader_tag)


def unpack_reply(frame: Frame) -> Reply:
    """Raises TransportError for a reason that is longer than a frame."""
    num_blocks, length = _REPLY_FORMAT.unpack_from(frame.data)
    if length > _MAX_WHY:
        raise TransportError(f"a reason of {length} bytes, the limit is {_MAX_WHY}")
    why = frame[_REPLY_FORMAT.size : _REPLY_FORMAT.size + length].tobytes()
    return Reply(num_blocks, why.decode("utf-8", "replace"))


def unpack_frame(frame: Frame) -> Hello | Ask:
    """What a reader said. Raises TransportError for anything else."""
    if frame[0] == _HELLO:
        _, magic, version, secret, epoch, slab_bytes, tag_base = _HELLO_FORMAT.unpack_from(frame.data)
        _check(magic, version)
        return Hello(secret, epoch, slab_bytes, tag_base)
    kind, num, seq = _ASK_FORMAT.unpack_from(frame.data)
    if kind != _ASK or not 0 < num <= MAX_ASKED or seq >= REPLY_SEQ:
        raise TransportError(f"a frame of kind {kind} with {num} locations and seq {seq}; the limit is {MAX_ASKED}")
    locations = np.frombuffer(frame, dtype=">u8", count=num, offset=_ASK_FORMAT.size)
    return Ask(seq, locations.astype(np.uint64))


def _check(magic: bytes, version: int) -> None:
    if magic != _MAGIC or version != UCX_VERSION:
        raise TransportError(f"magic {magic!r} version {version}, ours is {_MAGIC!r} version {UCX_VERSION}")


def _padded(data: bytes, size: int) -> Frame:
    return np.frombuffer(data.ljust(size, b"\0"), dtype=np.uint8)
