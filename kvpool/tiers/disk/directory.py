"""One directory of the DISK tier: its lock, its journal and its segments, opened, recovered and closed together.

Owns the file `lock` and the order of opening; refuses what can't work, and names it. Never decides what is stored.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import Native
from kvpool.tiers.disk import journal
from kvpool.tiers.disk.faults import DiskFull, fault
from kvpool.tiers.disk.journal import Entry, Journal, Records, Removal
from kvpool.tiers.disk.segments import FILE_PREFIX, Segments, slot_bytes_for
from tandem.errors import ConfigError

_LOCK_NAME = "lock"


class Directory:
    """A directory that nobody else uses while it is open. `live` are the records of what it held when it was opened.

    Raises ConfigError if it is missing, not writable, in use, of another version, slab size or group, or has no room for
    `num_bytes`; StorageFault if its files fail. Writing and the journal belong to one thread, reading to any.
    """

    def __init__(
        self, path: Path, *, num_bytes: int, memory: NDArray[np.uint8], group: bytes, native: Native | None
    ) -> None:
        self.path = path
        self.slots = num_bytes // slot_bytes_for(memory.shape[1])
        if self.slots < 1:
            raise ConfigError(
                f"{path}: {num_bytes} bytes are less than one slab, which takes {slot_bytes_for(memory.shape[1])}"
            )
        self._journal: Journal | None = None
        self._segments: Segments | None = None
        self._lock_fd = _lock(path)
        try:
            self._check_room(memory.shape[1])
            self._journal = Journal(path, slab_bytes=memory.shape[1], slots=self.slots, group=group)
            self.live: Records = self._journal.live
            self._segments = Segments(path, self.slots, memory, native)
        except DiskFull as error:
            self.close()
            raise ConfigError(f"{error}: {num_bytes} bytes were configured for this directory") from error
        except BaseException:
            self.close()
            raise

    @property
    def segments(self) -> Segments:
        assert self._segments is not None, f"{self.path} is closed"
        return self._segments

    @property
    def num_records(self) -> int:
        """The length of the journal."""
        assert self._journal is not None, f"{self.path} is closed"
        return self._journal.num_records

    def record(self, records: Sequence[Entry | Removal]) -> None:
        """Adds to the journal: of blocks that are written. Raises StorageFault, and then none of them is recorded."""
        assert self._journal is not None, f"{self.path} is closed"
        self._journal.append(records)

    def sync(self) -> None:
        """Returns when all of it survives a power cut. Raises StorageFault."""
        assert self._journal is not None, f"{self.path} is closed"
        self.segments.sync()
        self._journal.sync()

    def close(self) -> None:
        """Gives the directory up to others, without syncing; no thread may be using it. Idempotent."""
        if self._segments is not None:
            self._segments.close()
            self._segments = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _check_room(self, slab_bytes: int) -> None:
        needed = self.slots * slot_bytes_for(slab_bytes) + journal.max_bytes(self.slots)
        try:
            ours = sum(file.stat().st_blocks * 512 for file in self.path.glob(f"{FILE_PREFIX}*"))
            room = os.statvfs(self.path)
        except OSError as error:
            raise fault(self.path, "looking for room", error) from error
        available = ours + room.f_bavail * room.f_frsize
        if needed > available:
            raise ConfigError(
                f"{self.path}: {needed} bytes are needed for {self.slots} slabs of {slab_bytes} bytes and their journal, "
                f"{available} are available: configure fewer bytes, or make room"
            )


def _lock(path: Path) -> int:
    """The descriptor that holds the directory for us. It goes with the process, however that ends."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory: make it, or mount the disk that it is on")
    try:
        fd = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(fd, 20, 0).decode("ascii", "replace") or "unknown"
        os.close(fd)
        raise ConfigError(f"{path}: in use by another pool node, process {holder}: give each its own") from error
    except OSError as error:
        os.close(fd)
        raise fault(path / _LOCK_NAME, "locking the directory", error) from error
    return fd
