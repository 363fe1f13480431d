"""One directory of the DISK tier: what it refuses, and how its segments keep bytes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvpool.arena import Arena, checksum_of
from kvpool.tiers.disk import segments as segments_module
from kvpool.tiers.disk.directory import Directory
from kvpool.tiers.disk.faults import DiskFull
from kvpool.tiers.disk.segments import ALIGNMENT, Segments, slot_bytes_for
from tandem.errors import ConfigError, StorageFault
from tests.kvpool.child import REPOSITORY

GROUP = b"g" * 32
NOBODY = 65534


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB. Tests that use it need root; the others say what they do without."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def memory(num_blocks: int = 8, slab_bytes: int = 4096) -> np.ndarray:
    return np.zeros((num_blocks, slab_bytes), dtype=np.uint8)


def open_directory(path: Path, num_bytes: int = 1 << 20) -> Directory:
    return Directory(path, num_bytes=num_bytes, memory=memory(), group=GROUP, native=None)


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/nowhere: no such directory"):
        open_directory(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_an_unwritable_directory_is_refused() -> None:
    root = os.geteuid() == 0
    path = Path(tempfile.mkdtemp(prefix="unwritable-"))
    path.chmod(0o555)
    if root:
        os.seteuid(NOBODY)  # root may write anywhere
    try:
        with pytest.raises(ConfigError, match=f"{path}: can't be written: Permission denied"):
            open_directory(path)
    finally:
        if root:
            os.seteuid(0)
        path.rmdir()


def test_a_directory_in_use_is_refused_with_its_holder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-m", "tests.kvpool.disk_blocks", "64", "4096", "0", str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match=f"{tmp_path}: in use by another pool node, process {holder.pid}: give"):
            open_directory(tmp_path, 64 * 4096)
    finally:
        holder.kill()
        holder.communicate()
    open_directory(tmp_path, 64 * 4096).close()  # a killed holder holds nothing


def test_one_process_can_not_use_a_directory_twice(tmp_path: Path) -> None:
    first = open_directory(tmp_path)
    with pytest.raises(ConfigError, match=f"in use by another pool node, process {os.getpid()}"):
        open_directory(tmp_path)
    first.close()
    open_directory(tmp_path).close()


def test_too_little_room_is_refused_with_what_is_needed_and_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}: \d{{15,}} bytes are needed .* \d+ are available"):
        open_directory(tmp_path, 1 << 50)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"], "nothing was begun"
    with pytest.raises(ConfigError, match="4095 bytes are less than one slab, which takes 4096"):
        open_directory(tmp_path, 4095)


def test_room_that_is_ours_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_directory(tmp_path, 4 << 20).close()
    real = os.statvfs

    class Full:
        f_frsize = 4096

        def __init__(self, path: object) -> None:
            self.f_bavail = min(real(str(path)).f_bavail, 512)  # 2 MiB: enough for a new journal, not for the slabs

    monkeypatch.setattr(os, "statvfs", Full)
    open_directory(tmp_path, 4 << 20).close()
    with pytest.raises(ConfigError, match="are available"):
        open_directory(tmp_path, 16 << 20)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root; test_disk_tier.py fills a disk without it")
def test_a_disk_that_fills_up_while_opening_is_refused(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Directory, "_check_room", lambda self, slab_bytes: None)
    with pytest.raises(ConfigError, match="No space left on device: 16777216 bytes were configured"):
        open_directory(small_disk, 16 << 20)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="16777216|are available"):
        open_directory(small_disk, 16 << 20)
    open_directory(small_disk, 4 << 20).close()


# --- segments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slab_bytes", [300, 4096, 5000, 12288])
@pytest.mark.parametrize("direct", [True, False])
def test_slots_keep_their_bytes_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab_bytes: int, direct: bool
) -> None:
    if not direct:
        real = os.open

        def refuse(path: object, flags: int, *mode: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(path, flags, *mode)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", refuse)
    slot_bytes = slot_bytes_for(slab_bytes)
    monkeypatch.setattr(segments_module, "SEGMENT_BYTES", 5 * slot_bytes)
    monkeypatch.setattr(segments_module, "RUN_BYTES", 3 * slot_bytes)
    arena = Arena(16, slab_bytes)
    rng = np.random.default_rng(slab_bytes)
    arena.array[:] = rng.integers(0, 256, arena.array.shape, dtype=np.uint8)
    expected = arena.array.copy()
    slots = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12]
    files = Segments(tmp_path, 13, arena.array, None)
    assert files.direct == direct
    buffer = files.buffer()
    blocks = rng.permutation(16)[: len(slots)].tolist()
    runs = files.runs(slots)
    assert [slots[run] for run in runs] == [[0, 1, 2], [3, 4], [5, 6], [8, 9], [10], [12]]
    for run in runs:
        files.flush(slots[run.start], files.gather(blocks[run], buffer))
    arena.array[:] = 0
    for run in reversed(runs):
        checksums = files.read(slots[run.start], blocks[run], files.buffer())
        assert [int(one).to_bytes(8, "big") for one in checksums] == [
            checksum_of(expected[b].data) for b in blocks[run]
        ]
    assert np.array_equal(arena.array[blocks], expected[blocks])
    others = sorted(set(range(16)).difference(blocks))
    assert not arena.array[others].any()
    files.sync()
    files.close()
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert sizes == [5 * slot_bytes, 5 * slot_bytes, 3 * slot_bytes]
    arena.close()


def test_segments_grow_and_shrink_with_their_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "SEGMENT_BYTES", 4 * ALIGNMENT)
    blocks = memory(8)
    blocks[:] = np.arange(8, dtype=np.uint8)[:, None]
    for slots, sizes in ((6, [4, 2]), (9, [4, 4, 1]), (3, [3])):
        files = Segments(tmp_path, slots, blocks, None)
        if slots == 6:
            files.flush(0, files.gather([7, 6, 5], files.buffer()))
        files.read(0, [0, 1, 2], files.buffer())
        assert blocks[:3, 0].tolist() == [7, 6, 5]
        files.close()
        assert [path.stat().st_size // ALIGNMENT for path in sorted(tmp_path.iterdir())] == sizes
        assert all(path.stat().st_blocks * 512 >= path.stat().st_size for path in tmp_path.iterdir()), "preallocated"


def test_moves_go_on_after_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = memory(8)
    blocks[:4] = np.arange(1, 5, dtype=np.uint8)[:, None]
    files = Segments(tmp_path, 8, blocks, None)
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:ALIGNMENT], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: read(fd, [into[0][:ALIGNMENT]], offset))
    files.flush(2, files.gather([0, 1, 2, 3], files.buffer()))
    files.read(2, [4, 5, 6, 7], files.buffer())
    assert np.array_equal(blocks[:4], blocks[4:])
    files.close()


def test_faults_name_the_file_and_leave_the_blocks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = memory(8)
    blocks[:] = 9
    files = Segments(tmp_path, 8, blocks, None)
    path = tmp_path / "segment-00000"

    def fail(code: int) -> object:
        def failing(*unused: object) -> int:
            raise OSError(code, os.strerror(code))

        return failing

    monkeypatch.setattr(os, "preadv", fail(errno.EIO))
    with pytest.raises(StorageFault, match=f"{path}: reading 8192 bytes at 4096: Input/output error"):
        files.read(1, [0, 1], files.buffer())
    assert (blocks == 9).all()
    monkeypatch.setattr(os, "pwrite", fail(errno.ENOSPC))
    with pytest.raises(DiskFull, match=f"{path}: writing 4096 bytes at 0: No space left"):
        files.flush(0, files.gather([0], files.buffer()))
    monkeypatch.undo()
    os.truncate(path, 2 * ALIGNMENT)
    with pytest.raises(StorageFault, match=f"{path}: reading at 8192: the file ends 4096 bytes before it should"):
        files.read(1, [0, 1], files.buffer())
    files.close()
