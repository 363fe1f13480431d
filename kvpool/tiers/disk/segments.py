"""The bytes of one directory of the DISK tier: preallocated files of slots, one slab each.

Owns the files `segment-00000` and so on, their size and their descriptors, and the buffers between them and the arena. Never
knows what a slot holds or should hold.

A slot is a slab rounded up to `ALIGNMENT`. Consecutive slots move in one call, past the page cache; where the file system has
no direct I/O the page cache is used and asked to forget.

Bytes go through buffers, in huge pages where there are some, also when an arena's slabs are aligned: a disk
moves 4 MiB into a thousand scattered pages at a third to two thirds of the speed at which it moves them into two, and the
copy on the way up makes the checksums of what it copies.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.block_copy import copy_blocks, gather_blocks
from kernels.cpu import Native
from kvpool.tiers.disk.faults import fault
from tandem.errors import StorageFault

ALIGNMENT = 4096
SEGMENT_BYTES = 1 << 30
RUN_BYTES = 4 << 20
"""Most bytes of one call, if a slot isn't larger: more makes no disk faster, and a load would wait longer for its turn."""
_HUGE_PAGE_BYTES = 2 << 20
FILE_PREFIX = "segment-"


def slot_bytes_for(slab_bytes: int) -> int:
    """What a slab takes on disk."""
    return -(-slab_bytes // ALIGNMENT) * ALIGNMENT


class Segments:
    """The slots `0 … slots - 1` of one directory, between which and `memory` (an arena, [num_blocks, slab_bytes]) bytes move.

    Opening allocates all space; extra files of a larger past are removed. Any thread may read and write; nobody else may
    write a slot that somebody reads or writes. Raises StorageFault, `DiskFull` where space ran out.
    """

    def __init__(self, directory: Path, slots: int, memory: NDArray[np.uint8], native: Native | None) -> None:
        self._memory = memory
        self._native = native
        self._slab_bytes = memory.shape[1]
        self.slot_bytes = slot_bytes_for(self._slab_bytes)
        self._per_segment = max(1, SEGMENT_BYTES // self.slot_bytes)
        self.run_slots = max(1, RUN_BYTES // self.slot_bytes)
        """Most slots of one `read` or `flush`."""
        self._paths = [directory / f"{FILE_PREFIX}{number:05d}" for number in range(-(-slots // self._per_segment))]
        self._fds: list[int] = []
        self.direct = True
        """Whether the page cache is passed by."""
        path = directory
        try:
            for path in set(directory.glob(f"{FILE_PREFIX}*")).difference(self._paths):
                path.unlink()
            for number, path in enumerate(self._paths):
                self._fds.append(self._open(path))
                self._allocate(self._fds[-1], min(self._per_segment, slots - number * self._per_segment))
        except OSError as error:
            self.close()
            raise fault(path, "preallocating a segment", error) from error

    def runs(self, slots: Sequence[int]) -> list[slice]:
        """Cuts a list of slots into runs that one `read` or `flush` can move: consecutive, in one segment, not too long."""
        cuts: list[slice] = []
        begin = 0
        for index in range(1, len(slots) + 1):
            if (
                index == len(slots)
                or slots[index] != slots[index - 1] + 1
                or slots[index] % self._per_segment == 0
                or index - begin == self.run_slots
            ):
                cuts.append(slice(begin, index))
                begin = index
        return cuts

    def buffer(self) -> NDArray[np.uint8]:
        """A buffer for one run, `[run_slots, slot_bytes]`, zero: the caller's, for one thread at a time."""
        num_bytes = self.run_slots * self.slot_bytes
        rounded = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        pages = mmap.mmap(-1, rounded, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # small pages are slower, no more
        return np.frombuffer(pages, dtype=np.uint8, count=num_bytes).reshape(self.run_slots, self.slot_bytes)

    def gather(self, block_ids: Sequence[int], buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Copies the blocks of a run into `buffer`, and returns what `flush` takes: the part of it that they fill."""
        filled = buffer[: len(block_ids)]
        gather_blocks(self._native, self._memory, block_ids, filled[:, : self._slab_bytes])
        return filled

    def flush(self, slot: int, filled: NDArray[np.uint8]) -> None:
        """Writes what `gather` made to the slots from `slot` on, a run."""
        self._move(os.pwrite, "writing", slot, filled)

    def read(self, slot: int, block_ids: Sequence[int], buffer: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """Reads the slots from `slot` on, a run, by way of `buffer` into blocks, and returns the checksums of what these hold
        now, `[num]`. Where the disk failed they hold what they held."""
        filled = buffer[: len(block_ids)]
        self._move(_pread, "reading", slot, filled)
        checksums = np.empty(len(block_ids), dtype=np.uint64)
        slabs = filled[:, : self._slab_bytes]
        copy_blocks(self._native, slabs, range(len(slabs)), self._memory, block_ids, checksums)
        return checksums

    def sync(self) -> None:
        """Returns when what was written survives a power cut."""
        for path, fd in zip(self._paths, self._fds, strict=True):
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise fault(path, "syncing a segment", error) from error

    def close(self) -> None:
        """Gives the files up; nobody may be reading or writing. Idempotent."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _open(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        if self.direct:
            try:
                return os.open(path, flags | os.O_DIRECT, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
        return os.open(path, flags, 0o600)

    def _allocate(self, fd: int, num_slots: int) -> None:
        size = num_slots * self.slot_bytes
        if os.fstat(fd).st_size > size:
            os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)

    def _move(
        self, call: Callable[[int, memoryview, int], int], doing: str, slot: int, buffer: NDArray[np.uint8]
    ) -> None:
        segment, first = divmod(slot, self._per_segment)
        assert first + len(buffer) <= self._per_segment, f"slots {slot} to {slot + len(buffer)} lie in two segments"
        path, fd = self._paths[segment], self._fds[segment]
        begin = first * self.slot_bytes
        left = buffer.data.cast("B")
        try:
            while left:
                offset = begin + buffer.nbytes - len(left)
                moved = call(fd, left, offset)
                if moved <= 0:
                    raise StorageFault(f"{path}: {doing} at {offset}: the file ends {len(left)} bytes before it should")
                left = left[moved:]
            if not self.direct:
                os.posix_fadvise(fd, begin, buffer.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise fault(path, f"{doing} {buffer.nbytes} bytes at {begin}", error) from error


def _pread(fd: int, into: memoryview, offset: int) -> int:
    return os.preadv(fd, [into], offset)
