"""The arena: lazy, sealed, and its checksum."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import xxhash

from kernels.cpu import native
from kvpool.arena import ARENA_SEALS, Arena
from kvpool.transport.base import ReadResult
from kvpool.transport.shm import ShmTransport
from protos.control import Endpoints, Source
from tests.kvpool.processes import wait_for


def test_pages_are_not_touched_before_they_are_written() -> None:
    arena = Arena(1024, 1 << 20)
    assert os.fstat(arena.fd).st_size == 1 << 30
    assert os.fstat(arena.fd).st_blocks == 0
    arena.slab(3)[:5] = b"hello"
    assert 0 < os.fstat(arena.fd).st_blocks * 512 <= 4 << 20
    arena.close()


def test_seals_refuse_resizing_and_new_writable_mappings() -> None:
    arena = Arena(4, 4096)
    assert fcntl.fcntl(arena.fd, fcntl.F_GET_SEALS) == ARENA_SEALS
    for size in (0, 4096, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        mmap.mmap(arena.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(arena.fd, b"x", 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    arena.array[2] = 7
    with mmap.mmap(arena.fd, 4 * 4096, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
        assert seen[2 * 4096 : 3 * 4096] == b"\x07" * 4096
    arena.close()


def test_slabs_are_rows_that_do_not_overlap_even_when_slabs_are_not_whole_pages() -> None:
    arena = Arena(5, 1000)
    for i in range(5):
        arena.slab(i)[:] = bytes([i + 1]) * 1000
    assert arena.array.shape == (5, 1000)
    assert [set(row.tolist()) for row in arena.array] == [{1}, {2}, {3}, {4}, {5}]
    arena.slab(2)[:] = bytes(1000)
    assert not arena.array[2].any()
    assert arena.array[[0, 1, 3, 4]].all()
    arena.close()


def test_checksum_is_xxh3_64_big_endian_over_the_whole_slab() -> None:
    arena = Arena(2, 4096)
    arena.array[1] = np.arange(4096) % 251
    data = arena.array[1].tobytes()
    assert arena.checksum(1) == xxhash.xxh3_64_intdigest(data).to_bytes(8, "big")
    arena.array[1, -1] ^= 1
    assert arena.checksum(1) != xxhash.xxh3_64_digest(data)
    arena.close()


@pytest.mark.parametrize("block_id", [-1, 2, 10**12])
def test_a_block_outside_the_arena_is_refused(block_id: int) -> None:
    arena = Arena(2, 64)
    for use in (arena.slab, arena.checksum):
        with pytest.raises(IndexError, match=f"block {block_id} is not in an arena of 2"):
            use(block_id)
    arena.close()


def test_close_with_a_view_still_out_is_safe_and_repeatable() -> None:
    arena = Arena(2, 4096)
    view = arena.array[1]
    arena.close()
    arena.close()
    view[:] = 9
    assert view.all()


@pytest.mark.parametrize(("num_blocks", "slab_bytes"), [(0, 1), (1, 0), (-1, 4096)])
def test_an_empty_arena_is_refused(num_blocks: int, slab_bytes: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Arena(num_blocks, slab_bytes)


def test_populated_pages_are_there_and_still_zero() -> None:
    arena = Arena(64, 1 << 20)
    try:
        before = os.fstat(arena.fd).st_blocks
        arena.array[3] = 7
        arena.populate()
        wait_for(lambda: os.fstat(arena.fd).st_blocks * 512 == arena.num_bytes)
        assert before == 0
        assert arena.array[3].all()
        assert not arena.array[4:].any()
    finally:
        arena.close()


def test_an_arena_can_be_closed_while_it_is_populated() -> None:
    for _ in range(5):
        arena = Arena(512, 1 << 20)
        arena.populate()
        arena.close()
        assert arena.fd == -1


def test_pages_that_would_take_the_last_memory_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(64, 1 << 20)
    try:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=arena.num_bytes))
        arena.populate()
        assert arena._populating is None
    finally:
        arena.close()


RESERVED = Path("/proc/sys/vm/nr_hugepages")


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """Reserves 8 huge pages more; their size."""
    before = int(RESERVED.read_text())
    try:
        RESERVED.write_text(str(before + 8))
        if int(RESERVED.read_text()) < before + 8:
            pytest.skip("the system gives no huge pages now")
        yield 2 << 20
    except PermissionError:
        pytest.skip("reserving huge pages needs root")
    finally:
        with contextlib.suppress(PermissionError):
            RESERVED.write_text(str(before))


def test_reserved_huge_pages_are_used_sealed_and_read_by_others(huge_pages: int) -> None:
    ours, theirs = Arena(5, 700_000), Arena(9, 700_000)
    assert (ours.page_bytes, theirs.page_bytes) == (huge_pages, huge_pages)
    assert os.fstat(theirs.fd).st_size == 8 << 20
    assert fcntl.fcntl(theirs.fd, fcntl.F_GET_SEALS) == ARENA_SEALS
    theirs.array[:] = np.arange(9, dtype=np.uint8)[:, None]
    source = ShmTransport(theirs, b"epoch-01", "here", native())
    sink = ShmTransport(ours, b"epoch-02", "here", native())
    channel = sink.connect(Source("p", b"epoch-01", "HOST", Endpoints("", "", "", source.endpoint, "here")))
    channel.start_read(1, [8, 3], [0, 1])
    results: list[ReadResult] = []

    def step() -> None:
        source.poll()
        results.extend(sink.poll())

    wait_for(lambda: results, step=step)
    assert results[0].checksums is not None
    assert (ours.array[0] == 8).all()
    assert (ours.array[1] == 3).all()
    for transport in (source, sink):
        transport.close()
    for arena in (ours, theirs):
        arena.close()
    with pytest.raises(ValueError, match="closed"):
        theirs._map[0]


def test_an_arena_larger_than_what_is_reserved_has_plain_pages(huge_pages: int) -> None:
    arena = Arena(64, 1 << 20)
    assert arena.page_bytes == mmap.PAGESIZE
    arena.close()
