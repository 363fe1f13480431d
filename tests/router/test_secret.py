"""The secret that routers share."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from router.secret import read_secret, shared_secret
from tandem.errors import ConfigError


def test_all_who_come_at_once_get_the_same_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "router.secret"
    found: list[bytes] = []
    gate = threading.Barrier(8)

    def ask() -> None:
        gate.wait(10)
        found.append(shared_secret(path))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(found[0]) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["router.secret"]


def test_what_is_no_secret_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(ConfigError, match=r"router.secret_file: .*can't be read"):
        read_secret(path)
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="has 5 bytes, must be at least 16"):
        shared_secret(path)
    path.write_bytes(b"0123456789abcdef\n")
    assert shared_secret(path) == b"0123456789abcdef"
    with pytest.raises(ConfigError, match="can't be made"):
        shared_secret(path / "below a file")
