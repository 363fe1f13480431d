"""The memory of one tier: `num_blocks` slabs in one sealed memfd.

Owns the memfd, its only writable mapping and the checksum of a slab. Never decides what a block holds or who may read
it (`block_pool`), and never hands out anything but the read-only way in: other processes get the fd, and its seals
refuse shrinking, growing and new writable mappings.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import psutil
import xxhash
from numpy.typing import NDArray

log = logging.getLogger(__name__)

F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
F_SEAL_FUTURE_WRITE = 0x0010
"""From <linux/fcntl.h>; Python 3.11 lacks the last one."""

ARENA_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL
"""What a reader may rely on: the size is fixed, and nobody but the owner's existing mapping writes."""

MADV_POPULATE_WRITE = 23
"""From <linux/mman.h>, Linux 5.14."""
_MEMINFO = Path("/proc/meminfo")
_POPULATE_BYTES = 1024 * 1024
_POPULATE_PAUSE_S = 0.006
"""So much at a time, some seconds for a GiB: the first requests need the memory's speed too. Meanwhile the process's other
threads can't map memory, nor then touch new pages, and on a busy machine this thread waits in the middle for its turn."""

MEMFD_NAME = "tandem-arena"


def checksum_of(data: memoryview | bytes) -> bytes:
    """xxh3-64 of contiguous bytes, 8 bytes big-endian: made once by a block's producer, verified by every reader."""
    return xxhash.xxh3_64_digest(data)


def _mapped(num_bytes: int) -> tuple[int, mmap.mmap, int]:
    """A sealed memfd of at least so many bytes, our writable mapping of it, and the size of its pages."""
    for page_bytes in [*_reserved_pages(num_bytes), mmap.PAGESIZE]:
        huge = page_bytes > mmap.PAGESIZE
        size = -(-num_bytes // page_bytes) * page_bytes if huge else num_bytes
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if huge else 0)
        fd = -1
        try:
            fd = os.memfd_create(MEMFD_NAME, flags)
            os.ftruncate(fd, size)
            mapped = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ARENA_SEALS)
            if not huge:
                with contextlib.suppress(OSError):  # a kernel without huge pages
                    mapped.madvise(mmap.MADV_HUGEPAGE)
            return fd, mapped, page_bytes
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
            if not (huge and isinstance(error, OSError)):
                raise
            log.info("huge pages are reserved and could not be had (%s)", error)
    raise AssertionError("plain pages were neither had nor refused")


def _reserved_pages(num_bytes: int) -> list[int]:
    """The size of the system's huge pages, if enough of them are reserved and free."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines())
        page_bytes = int(fields["Hugepagesize"].split()[0]) * 1024
        free = int(fields["HugePages_Free"]) - int(fields["HugePages_Rsvd"])
    except (OSError, ValueError, KeyError):
        return []
    return [page_bytes] if free * page_bytes >= num_bytes else []


def mapped_arenas(maps: Path = Path("/proc/self/maps")) -> list[int]:
    """The inodes of all arenas that a process has mapped, its own and others'."""
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    return sorted({int(line.split(maxsplit=5)[4]) for line in lines if f"/memfd:{MEMFD_NAME}" in line})


class Arena:
    """`num_blocks` slabs of `slab_bytes` bytes each; pages appear when they are first written, or with `populate`. They are huge
    ones (`page_bytes`) if the system has enough of them reserved.

    `array` is `[num_blocks, slab_bytes]` uint8, writable, shared with every view made of it. Not synchronised: whoever
    owns a block in the `BlockPool` may write its slab. Raises OSError if the memory can't be reserved.
    """

    def __init__(self, num_blocks: int, slab_bytes: int) -> None:
        if num_blocks < 1 or slab_bytes < 1:
            raise ValueError(f"an arena of {num_blocks} blocks of {slab_bytes} bytes; both must be at least 1")
        self.num_blocks = num_blocks
        self.slab_bytes = slab_bytes
        self.fd, self._map, self.page_bytes = _mapped(self.num_bytes)
        self.array: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8, count=self.num_bytes).reshape(
            num_blocks, slab_bytes
        )
        self._populating: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def inode(self) -> int:
        """Of the memfd: what it is called in every `/proc/PID/maps`. 0 once it is closed."""
        return os.fstat(self.fd).st_ino if self.fd >= 0 else 0

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.slab_bytes

    def slab(self, block_id: int) -> memoryview:
        """The bytes of one block, writable, `[slab_bytes]`. Raises IndexError outside `0 … num_blocks - 1`."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is not in an arena of {self.num_blocks} blocks")
        slab: memoryview = self.array[block_id].data
        return slab

    def checksum(self, block_id: int) -> bytes:
        """`checksum_of` the whole slab: unused slots must be zero before."""
        return checksum_of(self.slab(block_id))

    def populate(self) -> None:
        """Has the system provide all pages now, beside whatever else happens: the first write to a page costs microseconds, which
        the first fetches and prefills would pay. Not done where that would take the last of the machine's memory."""
        available = int(psutil.virtual_memory().available)
        if 2 * self.num_bytes > available:
            log.info("pages of %d bytes come as they are needed: %d bytes are available", self.num_bytes, available)
            return
        self._populating = threading.Thread(target=self._populate, name="populate", daemon=True)
        self._populating.start()

    def _populate(self) -> None:
        with contextlib.suppress(OSError):  # of this thread alone: whoever has something to do comes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        begin = self.array.ctypes.data
        portion = max(_POPULATE_BYTES, self.page_bytes)
        for at in range(0, self.num_bytes, portion):
            size = min(portion, self.num_bytes - at)
            if libc.madvise(begin + at, size, MADV_POPULATE_WRITE):
                return  # a system that doesn't know this provides pages as they are written
            if self._closing.wait(_POPULATE_PAUSE_S):
                return

    def close(self) -> None:
        """Gives the memory up: at once, or when the last view somebody made of `array` is gone. Idempotent."""
        if self.fd < 0:
            return
        self._closing.set()
        if self._populating is not None:
            self._populating.join()
        os.close(self.fd)
        self.fd = -1
        self.array = np.empty((0, self.slab_bytes), dtype=np.uint8)
        try:
            self._map.close()
        except BufferError:
            pass  # a view is still out; the mapping goes with it
