"""Block copies against numpy's, for any size of slab, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kernels.block_copy import (
    Blocks,
    checksum_blocks,
    copy_blocks,
    copy_blocks_ref,
    gather_blocks,
)
from kernels.cpu import Native
from tests.backends import ALL, backend

every_backend = pytest.mark.parametrize("name", ALL)
LARGE = 2 * 2**20
"""Bytes of a call from which on the native copy streams past the caches."""


def blocks(num: int, slab_bytes: int, seed: int = 0) -> Blocks:
    return np.random.default_rng(seed).integers(0, 256, (num, slab_bytes), dtype=np.uint8)


@every_backend
@given(
    slab_bytes=st.one_of(st.integers(0, 300), st.sampled_from([4096, 4097, 10_007])),
    pairs=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=12, unique_by=lambda pair: pair[1]),
    skip=st.integers(0, 65),
)
def test_copies_are_numpys_and_touch_nothing_else(
    name: str, slab_bytes: int, pairs: list[tuple[int, int]], skip: int
) -> None:
    # Blocks further apart than they are long, at any alignment.
    source, target = (blocks(16, slab_bytes + 66, seed)[:, skip : skip + slab_bytes] for seed in (1, 2))
    whole = target.base
    assert whole is not None
    expected = whole.copy()
    source_ids, target_ids = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    copy_blocks_ref(source, source_ids, expected[:, skip : skip + slab_bytes], target_ids)
    copy_blocks(backend(name), source, source_ids, target, target_ids)
    assert np.array_equal(whole, expected)


@every_backend
@pytest.mark.parametrize("slab_bytes", [368_640, 131_071, 100_003])
def test_large_copies_to_and_from_one_run(name: str, slab_bytes: int) -> None:
    found: Native | None = backend(name)
    count = LARGE // slab_bytes + 2
    arena = blocks(count + 9, slab_bytes)
    ids = np.random.default_rng(1).permutation(len(arena))[:count].astype(np.int64)
    packed = np.zeros((count, slab_bytes + 1), dtype=np.uint8)[:, 1:]
    gather_blocks(found, arena, ids, packed)
    assert np.array_equal(packed, arena[ids])
    back = np.zeros_like(arena)
    copy_blocks(found, packed, range(count), back, ids)
    assert np.array_equal(back[ids], arena[ids])
    others = np.setdiff1d(np.arange(len(arena)), ids)
    assert not back[others].any()


@every_backend
def test_within_one_memory_blocks_move_if_none_is_both_source_and_target(name: str) -> None:
    found: Native | None = backend(name)
    arena = blocks(10, 1000)
    before = arena.copy()
    copy_blocks(found, arena, [0, 1, 0], arena, [5, 9, 7])
    assert np.array_equal(arena[[5, 9, 7]], before[[0, 1, 0]])
    for source, target in (([0, 5], [5, 6]), ([3], [3])):
        with pytest.raises(ValueError, match=f"target block {target[0]} overlaps a source block"):
            copy_blocks(found, arena, source, arena, target)
    shifted = arena.reshape(-1)[500:-500].reshape(9, 1000)  # block i covers the halves of i and i + 1
    with pytest.raises(ValueError, match="target block 4 overlaps"):
        copy_blocks(found, arena, [0, 5], shifted, [2, 4])
    copy_blocks(found, arena, [0, 6], shifted, [2, 4])


@every_backend
@pytest.mark.parametrize(
    ("source_ids", "target_ids", "error", "message"),
    [
        ([4], [0], IndexError, "source blocks 4 to 4, must be within 0 to 3"),
        ([-1], [0], IndexError, "source blocks -1 to -1"),
        ([0, 1], [0, 9], IndexError, "target blocks 0 to 9, must be within 0 to 3"),
        ([0, 1], [0], ValueError, "2 source blocks for 1 target blocks"),
        ([0, 1, 2], [3, 1, 3], ValueError, "target block 3 comes twice"),
        ([[0]], [[0]], ValueError, "must be a list"),
    ],
)
def test_ids_that_break_the_contract_write_nothing(
    name: str, source_ids: list[int], target_ids: list[int], error: type[Exception], message: str
) -> None:
    source, target = blocks(4, 64), np.zeros((4, 64), dtype=np.uint8)
    with pytest.raises(error, match=message):
        copy_blocks(backend(name), source, source_ids, target, target_ids)
    assert not target.any()


def test_memory_that_breaks_the_contract_is_refused() -> None:
    good = blocks(4, 64)
    fixed = good.copy()
    fixed.flags.writeable = False
    copy_blocks(None, fixed, [0], good, [1])
    cases: list[tuple[Any, str]] = [
        (good[:, ::2], "not contiguous"),
        (good[::-1], "not contiguous"),
        (good[0], "must be uint8"),
        (good.view(np.int8), "must be uint8"),
        (blocks(4, 63), "target blocks of 63"),
        (fixed, "read-only"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            copy_blocks(None, blocks(4, 64, 1), [0], bad, [0])


@every_backend
@given(
    slab_bytes=st.one_of(
        st.integers(0, 2200), st.sampled_from([4096, 16_384, 65_535, 65_536, 65_537]), st.integers(240, 242)
    ),
    skip=st.integers(0, 65),
)
def test_checksums_are_the_librarys_whatever_the_length_and_alignment(name: str, slab_bytes: int, skip: int) -> None:
    source = blocks(4, slab_bytes + 66, seed=3)[:, skip : skip + slab_bytes]
    expected = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in source]
    target, checksums = np.zeros((4, slab_bytes), dtype=np.uint8), np.zeros(4, dtype=np.uint64)
    copy_blocks(backend(name), source, [2, 0, 3, 1], target, [0, 1, 2, 3], checksums)
    assert checksums.tolist() == [expected[i] for i in (2, 0, 3, 1)]
    assert np.array_equal(target, source[[2, 0, 3, 1]])
    assert checksum_blocks(backend(name), source, [3, 3, 0]).tolist() == [expected[3], expected[3], expected[0]]


@every_backend
def test_large_copies_have_checksums_too(name: str) -> None:
    count = LARGE // 368_640 + 2
    arena, back = blocks(count, 368_640), np.zeros((count, 368_640), dtype=np.uint8)
    checksums = np.zeros(count, dtype=np.uint64)
    copy_blocks(backend(name), arena, range(count), back, range(count), checksums)
    assert np.array_equal(back, arena)
    assert checksums.tolist() == [xxhash.xxh3_64_intdigest(row.data) for row in arena]


def test_checksums_need_room_of_their_own_kind() -> None:
    arena, target = blocks(4, 1000), np.zeros((4, 1000), dtype=np.uint8)
    for wrong in (np.zeros(3, dtype=np.uint64), np.zeros(2, dtype=np.int64), np.zeros(4, dtype=np.uint64)[::2]):
        with pytest.raises(ValueError, match="checksums of shape"):
            copy_blocks(None, arena, [0, 1], target, [0, 1], wrong)
    assert not target.any()
