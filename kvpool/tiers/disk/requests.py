"""What the DISK tier is asked, and how it answers. To store a block it is given the `BlockRecord` of HOST's pool.

Owns these types alone. A request ends with exactly one result, in no promised order.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpool.keys import Key


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Bring the block `key` up into `block_id` of the HOST arena, a block that is the caller's alone until the result."""

    key: Key
    block_id: int


@dataclass(frozen=True, slots=True)
class Stored:
    """The block is on disk and in the journal: it is there after a kill."""

    key: Key
    block_id: int


@dataclass(frozen=True, slots=True)
class NotStored:
    """The block was not stored: no room, no budget, the queue is full, or the disk failed."""

    key: Key
    block_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """`block_id` holds the block, and its bytes have been compared with `checksum`."""

    key: Key
    block_id: int
    parent: Key
    num_tokens: int
    checksum: bytes
    writer: bytes
    owner: bytes


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """`block_id` holds anything; the block is not to be had from here."""

    key: Key
    block_id: int
    reason: str


Result = Stored | NotStored | Loaded | LoadFailed
