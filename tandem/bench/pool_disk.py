"""The DISK tier of a pool node, beside plain direct I/O in the same directory, and the restart of a node that has one.

Owns the files that it makes inside the directory that it is given. Written is what is acknowledged: it outlives a killed
process, not a power cut; plain direct I/O is not synced either. Reads are cold: the page cache is passed by, and told to forget
where the file system has no direct I/O.
"""

from __future__ import annotations

import mmap
import os
import select
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.block_pool import BlockRecord
from kvpool.keys import Key
from kvpool.node_tiers import group_digest
from kvpool.sink import WantedBlock
from kvpool.tiers.disk.requests import Loaded, LoadRequest, Result, Stored
from kvpool.tiers.disk.segments import slot_bytes_for
from kvpool.tiers.disk.tier import DiskTier
from tandem.bench.kv_source import BLOCK_SIZE
from tandem.bench.pool_host import chain
from tandem.bench.pool_node import GROUP, PoolNodeProcess
from tandem.bench.report import Say
from tandem.bench.transfer_sink import Fetches
from tandem.errors import TandemError

RAW_BYTES = 4 << 20
"""Of one call of plain I/O."""
_WRITER = b"bench---"
_LIMIT_S = 120.0
_SPARE_SLOTS = 64
_RESTART_SLAB = 4096
_RESTART_ARENA_BLOCKS = 4096
_RESTART_HOST_BYTES = 64 << 20
_RESTART_FETCH = 64


class DiskWorld:
    """A tier over `arena` in `folder`, with room for `values` blocks: the first ones of the arena are what is stored, the
    next ones take what is loaded."""

    def __init__(self, arena: Arena, values: int, folder: Path) -> None:
        folder.mkdir()
        self._arena = arena
        self._values = values
        self._folder = folder
        self._round = 0
        self._checksums = [arena.checksum(block_id) for block_id in range(values)]
        self._blocks: list[tuple[Key, Key]] = []
        self._tier = DiskTier(
            [folder],
            bytes_per_directory=(values + _SPARE_SLOTS) * slot_bytes_for(arena.slab_bytes),
            arena=arena,
            block_size=BLOCK_SIZE,
            group=group_digest(GROUP),
            native=native(),
        )

    @property
    def direct(self) -> bool:
        """Whether the file system has direct I/O."""
        return all(state.direct_io for state in self._tier.stats().directories)

    def write(self) -> float:
        """Seconds until every block of a new round is stored. Raises TandemError."""
        self._round += 1
        self._blocks = chain(f"round {self._round}", self._values)
        records = records_of(self._blocks, self._checksums)
        began = time.perf_counter()
        store(self._tier, records)
        return time.perf_counter() - began

    def read(self) -> float:
        """Seconds until every block is there and verified, from the disk. Raises TandemError."""
        self._arena.array[self._values :] = 0
        drop_page_cache(self._folder)
        requests = [LoadRequest(key, self._values + row) for row, (key, _) in enumerate(self._blocks)]
        began = time.perf_counter()
        self._tier.load(requests)
        wait(self._tier, len(requests), Loaded)
        seconds = time.perf_counter() - began
        if not np.array_equal(self._arena.array[: self._values], self._arena.array[self._values :]):
            raise TandemError("what was loaded differs from what was stored")
        return seconds

    def close(self) -> None:
        self._tier.close()


class RawFile:
    """A preallocated file that is written and read past the page cache, `RAW_BYTES` a call."""

    def __init__(self, path: Path, num_bytes: int, direct: bool) -> None:
        self._num_bytes = max(1, num_bytes // RAW_BYTES) * RAW_BYTES
        self._path = path
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | (os.O_DIRECT if direct else 0), 0o600)
        os.posix_fallocate(self._fd, 0, self._num_bytes)
        self._memory = mmap.mmap(-1, self._num_bytes)
        view = np.frombuffer(self._memory, dtype=np.uint8)
        view[:] = 7  # every page is there
        del view
        self._parts = [
            memoryview(self._memory)[first : first + RAW_BYTES] for first in range(0, self._num_bytes, RAW_BYTES)
        ]

    def write(self) -> float:
        """GB/s."""
        began = time.perf_counter()
        for number, part in enumerate(self._parts):
            if os.pwrite(self._fd, part, number * RAW_BYTES) != RAW_BYTES:
                raise TandemError(f"{self._path}: a write was cut short")
        return self._rate(began)

    def read(self) -> float:
        """GB/s."""
        drop_page_cache(self._path.parent)
        began = time.perf_counter()
        for number, part in enumerate(self._parts):
            if os.preadv(self._fd, [part], number * RAW_BYTES) != RAW_BYTES:
                raise TandemError(f"{self._path}: a read was cut short")
        return self._rate(began)

    def close(self) -> None:
        os.close(self._fd)
        self._path.unlink()
        for part in self._parts:
            part.release()
        self._memory.close()

    def _rate(self, began: float) -> float:
        return self._num_bytes / (time.perf_counter() - began) / 1e9


class Restart:
    """A directory with `num_blocks` small blocks, and nodes that start on it, or with none."""

    def __init__(self, folder: Path, num_blocks: int, say: Say) -> None:
        folder.mkdir()
        self._folder = folder
        self._disk_bytes = max(1 << 20, (num_blocks + _SPARE_SLOTS) * slot_bytes_for(_RESTART_SLAB))
        self._blocks = chain("restart", num_blocks)
        self._arena = Arena(min(_RESTART_ARENA_BLOCKS, num_blocks), _RESTART_SLAB)
        say(f"storing {num_blocks} blocks of {_RESTART_SLAB} bytes, for the restart")
        tier = DiskTier(
            [folder],
            bytes_per_directory=self._disk_bytes,
            arena=self._arena,
            block_size=BLOCK_SIZE,
            group=group_digest(GROUP),
            native=native(),
        )
        try:
            checksum = self._arena.checksum(0)  # all blocks are zero: it is the index that counts here
            for first in range(0, num_blocks, self._arena.num_blocks):
                part = self._blocks[first : first + self._arena.num_blocks]
                store(tier, records_of(part, [checksum] * len(part)))
        finally:
            tier.close()

    def full(self) -> float:
        """Seconds from the start of a node until it has given out the last blocks from disk; then it is killed."""
        began = time.perf_counter()
        with PoolNodeProcess(_RESTART_SLAB, _RESTART_HOST_BYTES, str(self._folder), self._disk_bytes) as node:
            fetches = Fetches("shm", self._arena, node.source, None)
            try:
                last = self._blocks[-min(_RESTART_FETCH, self._arena.num_blocks) :]
                fetches.fetch(
                    [tuple(WantedBlock(key, parent, BLOCK_SIZE, number) for number, (key, parent) in enumerate(last))]
                )
                return time.perf_counter() - began
            finally:
                fetches.close()

    def empty(self) -> float:
        """Seconds from the start of a node without a DISK tier until it says where it serves."""
        began = time.perf_counter()
        with PoolNodeProcess(_RESTART_SLAB, _RESTART_HOST_BYTES):
            return time.perf_counter() - began

    def close(self) -> None:
        self._arena.close()


def records_of(blocks: Sequence[tuple[Key, Key]], checksums: Sequence[bytes]) -> list[BlockRecord]:
    """Of blocks `(key, parent)` that lie in an arena from its begin on."""
    return [
        BlockRecord(block_id, key, parent, BLOCK_SIZE, checksum, True, _WRITER, _WRITER)
        for block_id, ((key, parent), checksum) in enumerate(zip(blocks, checksums, strict=True))
    ]


def store(tier: DiskTier, records: Sequence[BlockRecord]) -> None:
    """Until all are stored. Raises TandemError if one isn't."""
    pending, num_stored = deque(records), 0
    while num_stored < len(records):
        room = min(tier.store_room(), len(pending))
        if room:
            tier.store([pending.popleft() for _ in range(room)])
        num_stored += len(ended(tier, Stored))


def wait(tier: DiskTier, num_results: int, expected: type[Stored | Loaded]) -> None:
    """Until so many requests have ended well. Raises TandemError if one doesn't."""
    num_ended = 0
    while num_ended < num_results:
        num_ended += len(ended(tier, expected))


def ended(tier: DiskTier, expected: type[Stored | Loaded]) -> list[Result]:
    """The next results. Raises TandemError for one that is something else, or if none comes."""
    if not select.select([tier.fileno()], [], [], _LIMIT_S)[0]:
        raise TandemError(f"the disk answered nothing for {_LIMIT_S:g} s")
    results = tier.poll()
    for result in results:
        if not isinstance(result, expected):
            raise TandemError(f"the DISK tier said {result}")
    return results


def drop_page_cache(folder: Path) -> None:
    """For the files in `folder`."""
    for path in folder.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
