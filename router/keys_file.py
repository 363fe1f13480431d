"""The file of API keys: read by routers, written by `tandem keys`.

Owns reading within bounds, and that a writer leaves either the old file or the new one, readable by its owner alone.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from router.keyring import MAX_FILE_BYTES, Keyring, dump_keyring, parse_keyring
from tandem.errors import ConfigError


class KeysFile:
    """The keys file at `path`; `key` names it in errors."""

    def __init__(self, path: Path, key: str = "router.keys_file") -> None:
        self.path = path
        self._where = f"{key}: {path}"

    def read(self) -> Keyring:
        """Raises ConfigError if it can't be read, isn't a keys file, or others than its owner and root could have written it."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                data = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError as error:
            raise ConfigError(f"{self._where} doesn't exist: make it with `tandem keys add`") from error
        except OSError as error:
            raise ConfigError(f"{self._where} can't be read: {error.strerror}") from error
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(f"{self._where} may be written by others, who could add keys: chmod go-w it")
        return parse_keyring(data, self._where)

    def update(self, change: Callable[[Keyring], Keyring]) -> None:
        """Writes what `change` makes of the keys there are; none, where there is no file yet. One at a time, across processes.
        Raises ConfigError as `read`, or if it can't be written, and whatever `change` raises."""
        path = self.path.resolve()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                keyring = change(self.read() if path.exists() else Keyring())
                _replace(path, dump_keyring(keyring))
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise ConfigError(f"{self._where} can't be written: {error.strerror}") from error


def _replace(path: Path, data: bytes) -> None:
    mine = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mine.replace(path)
    except BaseException:
        mine.unlink(missing_ok=True)
        raise
