"""Blocks that are called by words: their keys and bytes follow from these, and neighbours in a list are neighbours in a chain."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.sink import FetchPlan, WantedBlock
from protos.control import Source
from tandem.clock import now_s

SIZE = 16
ROOT = b"r" * 16


def key_of(name: object) -> bytes:
    return f"{name!s:>16}".encode()[-16:]


def bytes_of(name: str, slab_bytes: int) -> bytes:
    """The bytes of the block of that name: different at every offset."""
    return (name.encode() * (slab_bytes // len(name) + 1))[:slab_bytes]


def put(
    pool: BlockPool, arena: Arena, names: Sequence[str], parent: bytes = ROOT, corrupt: Collection[str] = ()
) -> list[int]:
    """Publishes a chain, whose blocks stay referenced. The bytes of those in `corrupt` don't fit their checksums."""
    blocks = pool.allocate(len(names))
    assert blocks is not None
    for block_id, name in zip(blocks, names, strict=True):
        arena.slab(block_id)[:] = bytes_of(name, arena.slab_bytes)
        checksum = arena.checksum(block_id)
        if name in corrupt:
            arena.slab(block_id)[arena.slab_bytes // 2] ^= 0x40
        pool.publish(block_id, key_of(name), parent, SIZE, checksum)
        parent = key_of(name)
    return blocks


def plan(
    pool: BlockPool, names: Sequence[str], sources: Sequence[Source], *,
    wait: str = "", seconds: float = 15.0, root: bytes = ROOT,
) -> FetchPlan:  # fmt: skip
    """To fetch a chain into blocks that are allocated for it."""
    blocks = pool.allocate(len(names))
    assert blocks is not None
    parents = [root, *map(key_of, names)]
    wanted = tuple(WantedBlock(key_of(n), p, SIZE, b) for n, p, b in zip(names, parents, blocks, strict=False))
    return FetchPlan(os.urandom(16), "request", wanted, tuple(sources), wait, now_s() + seconds)
