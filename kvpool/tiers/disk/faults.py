"""What the files of the DISK tier fail with.

Owns the turning of an OSError into a `StorageFault` that names the file, and the one kind that passes by itself: a full
disk. Never decides what a fault means for a directory.
"""

from __future__ import annotations

import errno
from pathlib import Path

from tandem.errors import StorageFault

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(StorageFault):
    """There is no room for this write; what is stored stays readable, and a later write may succeed."""


def fault(path: Path, doing: str, error: OSError) -> StorageFault:
    """The fault to raise from `error`, which came while `doing` something with `path`."""
    kind = DiskFull if error.errno in _FULL else StorageFault
    return kind(f"{path}: {doing}: {error.strerror or error}")
