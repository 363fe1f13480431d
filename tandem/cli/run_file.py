"""The run file: which `tandem serve` owns a cluster's run folder.

Owns `serve.json` in that folder. The serving process holds a lock on the file as long as it lives, so a file that nobody
locks is left over from one that was killed, whatever process has its pid now.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster that is being served. `ray_dir` is Ray's temporary folder, empty before Ray starts."""

    pid: int
    target: str
    ray_dir: str


class RunFile:
    """The run file of one run folder: one process holds it, any may read it."""

    def __init__(self, run_path: Path) -> None:
        self.path = run_path / "serve.json"
        self._file: int | None = None

    def acquire(self) -> Running | None:
        """Takes the folder for this process until `release`. Returns what a killed holder left behind, if anything.

        Raises ConfigError, naming the holder, if a living process has it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            holder = self.read()
            who = f"process {holder.pid} at {holder.target}" if holder else "another process"
            raise ConfigError(
                f"{self.path.parent} is in use by {who}: stop it with `tandem down`, or set another `cluster`"
            ) from error
        self._file = file
        return _parse(self.path)

    def write(self, target: str, ray_dir: str = "") -> None:
        """Says who serves and where. Only between `acquire` and `release`."""
        assert self._file is not None
        data = json.dumps(asdict(Running(os.getpid(), target, ray_dir))).encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)

    def release(self) -> None:
        """Gives the folder up. Harmless if it isn't held."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None

    def read(self) -> Running | None:
        """The living holder, or None."""
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parse(self.path)
        finally:
            os.close(file)
        return None


def _parse(path: Path) -> Running | None:
    """What the file says; None if it is empty or only half written."""
    try:
        values = json.loads(path.read_bytes()[:4096])
        return Running(int(values["pid"]), str(values["target"]), str(values["ray_dir"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
