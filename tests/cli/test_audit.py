"""The local checks of `tandem audit`: what dead processes left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kvpool.arena import Arena
from tandem.cli.audit import left_memory, left_run_file
from tandem.cli.run_file import RunFile

HOLD = """
import mmap, sys
memory = mmap.mmap(int(sys.argv[1]), 4096, mmap.MAP_SHARED, mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_an_arena_is_left_when_only_a_reader_still_maps_it() -> None:
    arena = Arena(1, 4096)
    os.set_inheritable(arena.fd, True)
    reader = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(arena.fd)], pass_fds=[arena.fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"mapped\n"
        assert str(reader.pid) not in left_memory().evidence
        arena.close()
        found = left_memory()
        assert not found.ok
        assert str(reader.pid) in found.evidence
        assert reader.stdin is not None
        reader.stdin.close()
    assert str(reader.pid) not in left_memory().evidence


def test_a_run_file_is_left_when_nobody_holds_it(tmp_path: Path) -> None:
    assert left_run_file(tmp_path).ok
    run_file = RunFile(tmp_path)
    run_file.acquire()
    run_file.write("127.0.0.1:1")
    assert left_run_file(tmp_path).ok
    data = run_file.path.read_bytes()
    run_file.release()
    assert left_run_file(tmp_path).ok, "it was given up cleanly"
    run_file.path.write_bytes(data)
    assert not left_run_file(tmp_path).ok
