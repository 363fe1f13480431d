"""Whether files have changed since somebody looked.

Owns what was seen of them. A file that is gone, or can't be looked at, has changed as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_Seen = tuple[int, int, int, int] | None


class WatchedFiles:
    """Files that are replaced as a whole or written again; links are followed, as mounted secrets need it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._seen = self._look()

    def changed(self) -> bool:
        """Since it was last asked, or since the beginning."""
        before, self._seen = self._seen, self._look()
        return before != self._seen

    def _look(self) -> list[_Seen]:
        return [_seen(path) for path in self._paths]


def _seen(path: Path) -> _Seen:
    try:
        found = os.stat(path)  # noqa: PTH116 (all of one call)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
