"""KV events: which blocks a process holds, as it changes (design §11).

The format is vLLM's (`vllm/distributed/kv_events.py`), so that either side can be somebody else. A publication is three frames
`[topic, seq u64 big-endian, MessagePack of a batch]`; a batch is an array `[ts, events, data_parallel_rank, epoch]` (ours adds
the epoch) and an event an array that begins with its name. A replay request is `[b"", start_seq u64 BE]` to the ROUTER
socket; the answer is batches as `[b"", seq, payload]`, ended by seq -1 (eight 0xff bytes) with an empty payload.

Sequence numbers are 0, 1, 2 … of one epoch. If the publisher remembers everything from `start_seq` on (up to the one it will
publish next, for which nothing but the end is sent), the answer is those batches. Otherwise it is a snapshot: batches that
all carry the last published number, the first of which begins with `AllBlocksCleared`; together they are the state after
that number. So a follower subscribes, asks for a replay from the number it needs next (0 at first), applies the whole answer
in order, and then those live batches whose number is greater than the last one applied. It asks again after a gap and
begins anew, at 0 and with nothing, with a new epoch.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

MAX_BATCH_BYTES = 16 * 1024 * 1024
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
TOPIC = b"kv"
MAX_SEQ = 2**62

BlockHash = bytes | int
"""Ours are 16-byte keys; vLLM sends bytes or unsigned 64-bit integers."""


class KVEvent(Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    """Base of the events; the first array element is the class name."""


class BlockStored(KVEvent):
    """Blocks `block_hashes`, in chain order after `parent_block_hash`, can now be read. Ours leave `token_ids` empty: the key
    is the name. `medium` is the tier: DEVICE, HOST or DISK (vLLM: GPU, CPU)."""

    block_hashes: Annotated[list[BlockHash], Meta(max_length=65_536)]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None


class BlockRemoved(KVEvent):
    """Blocks `block_hashes` can no longer be read in `medium`."""

    block_hashes: Annotated[list[BlockHash], Meta(max_length=65_536)]
    medium: str | None = None


class AllBlocksCleared(KVEvent):
    """Nothing is held any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(Struct, array_like=True, omit_defaults=True, gc=False):
    """What one publication carries. `ts` is wall-clock seconds, for people; order comes from the sequence number."""

    ts: float
    events: Annotated[list[Event], Meta(max_length=65_536)]
    data_parallel_rank: int | None = None
    epoch: bytes | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(EventBatch)


def encode_batch(batch: EventBatch) -> bytes:
    """The MessagePack payload of one batch."""
    return _encoder.encode(batch)


def decode_batch(payload: bytes) -> EventBatch:
    """Raises msgspec.DecodeError on anything that is not a batch, ValueError on one past `MAX_BATCH_BYTES`."""
    if len(payload) > MAX_BATCH_BYTES:
        raise ValueError(f"event batch has {len(payload)} bytes, the limit is {MAX_BATCH_BYTES}")
    try:
        return _decoder.decode(payload)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through
        raise msgspec.DecodeError(f"not an event batch: {error}") from error


def encode_seq(seq: int) -> bytes:
    """A sequence number as it travels; -1 is `END_OF_REPLAY`."""
    return seq.to_bytes(8, "big", signed=True)


def decode_seq(frame: bytes) -> int:
    """Inverse of `encode_seq`. Raises ValueError if the frame is not 8 bytes or no sequence number (-1 … `MAX_SEQ`)."""
    if len(frame) != 8:
        raise ValueError(f"sequence frame has {len(frame)} bytes, not 8")
    seq = int.from_bytes(frame, "big", signed=True)
    if not -1 <= seq <= MAX_SEQ:
        raise ValueError(f"sequence number {seq} is not within -1 to {MAX_SEQ}")
    return seq
