"""Copies and checksums of many blocks in one call, with the GIL released: from arena to arena, into one contiguous buffer
and back.

Owns the check of every bound. The native copy (cpu/block_copy.cpp) checks ids itself and only says no: why is found out here.
The native checksum trusts its arguments. Memory is `[num_blocks, slab_bytes]` uint8, each block contiguous; blocks may lie
further apart than they are long. A checksum is xxh3-64; a copy that makes them reads its source once, and what it hashes is
what it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from kernels.cpu import Native

Blocks = NDArray[np.uint8]
BlockIds = Sequence[int] | NDArray[np.int64]
Checksums = NDArray[np.uint64]

SHORTEST = 241
"""XXH3 hashes fewer bytes in another way, which native code leaves to the library."""


def copy_blocks_ref(
    source: Blocks, source_ids: BlockIds, target: Blocks, target_ids: BlockIds, checksums: Checksums | None = None
) -> None:
    """As `copy_blocks`, unchecked."""
    targets = np.asarray(target_ids, dtype=np.int64)
    target[targets] = source[np.asarray(source_ids, dtype=np.int64)]
    if checksums is not None:
        checksums[:] = checksum_blocks_ref(target, targets)


def checksum_blocks_ref(memory: Blocks, ids: BlockIds) -> Checksums:
    """As `checksum_blocks`, unchecked."""
    return np.array([xxhash.xxh3_64_intdigest(memory[i].data) for i in ids], dtype=np.uint64)


def copy_blocks(
    native: Native | None,
    source: Blocks,
    source_ids: BlockIds,
    target: Blocks,
    target_ids: BlockIds,
    checksums: Checksums | None = None,
) -> None:
    """Copies block `source_ids[i]` of `source` to block `target_ids[i]` of `target`, for all i, in no promised order, and puts
    the checksums of what it wrote into `checksums` ([num]), if there is one.

    Raises, before anything is written, IndexError for an id out of range and ValueError for memory of other shapes, lists of
    different lengths, a target that comes twice, or one that overlaps a source.
    """
    check_memory("source", source)
    check_memory("target", target)
    sources, targets = np.asarray(source_ids, dtype=np.int64), np.asarray(target_ids, dtype=np.int64)
    num, slab_bytes = len(sources), source.shape[1]
    same = sources.shape == targets.shape == (num,) and slab_bytes == target.shape[1] and target.flags.writeable
    if checksums is not None and not (
        checksums.shape == (num,) and checksums.dtype == np.uint64 and checksums.flags.c_contiguous
    ):
        raise ValueError(f"{checksums.dtype} checksums of shape {checksums.shape} for {num} blocks")
    if native is not None and same and (checksums is None or slab_bytes >= SHORTEST):
        copied = native.library.tandem_copy_blocks(
            source.ctypes.data,
            source.strides[0],
            len(source),
            np.ascontiguousarray(sources).ctypes.data,
            target.ctypes.data,
            target.strides[0],
            len(target),
            np.ascontiguousarray(targets).ctypes.data,
            num,
            slab_bytes,
            checksums.ctypes.data if checksums is not None else None,
        )
        if copied:
            return
    _check_copy(source, sources, target, targets)
    copy_blocks_ref(source, sources, target, targets, checksums)


def checksum_blocks(native: Native | None, memory: Blocks, ids: BlockIds) -> Checksums:
    """The checksums of the blocks `ids` of `memory`. Raises as `copy_blocks`."""
    check_memory("memory", memory)
    found = np.ascontiguousarray(ids, dtype=np.int64)
    check_ids("memory", memory, found)
    if native is None or memory.shape[1] < SHORTEST:
        return checksum_blocks_ref(memory, found)
    checksums = np.empty(len(found), dtype=np.uint64)
    native.library.tandem_checksum_blocks(
        memory.ctypes.data, memory.strides[0], found.ctypes.data, len(found), memory.shape[1], checksums.ctypes.data
    )
    return checksums


def gather_blocks(native: Native | None, source: Blocks, ids: BlockIds, out: Blocks) -> None:
    """Copies the blocks `ids` of `source` to `out` ([len(ids), slab_bytes]), in that order; as `copy_blocks`."""
    copy_blocks(native, source, ids, out, np.arange(len(out), dtype=np.int64))


def check_memory(what: str, memory: Blocks) -> None:
    """Raises ValueError, which begins with `what`, unless `memory` is as the module says."""
    if memory.ndim != 2 or memory.dtype != np.uint8:
        raise ValueError(f"{what} is {memory.dtype} of shape {memory.shape}, must be uint8 [num_blocks, slab_bytes]")
    if memory.shape[1] and (memory.strides[1] != 1 or memory.strides[0] < memory.shape[1]):
        raise ValueError(f"{what} blocks of {memory.shape[1]} bytes with strides {memory.strides} are not contiguous")


def check_ids(what: str, memory: Blocks, ids: NDArray[np.int64]) -> None:
    """Raises IndexError for an id out of range, ValueError for what is no list; both begin with `what`."""
    if ids.ndim != 1:
        raise ValueError(f"{what} ids of shape {ids.shape}, must be a list")
    if len(ids) and (ids.min() < 0 or ids.max() >= len(memory)):
        raise IndexError(f"{what} blocks {ids.min()} to {ids.max()}, must be within 0 to {len(memory) - 1}")


def _check_copy(source: Blocks, sources: NDArray[np.int64], target: Blocks, targets: NDArray[np.int64]) -> None:
    """Raises what `copy_blocks` promises, but for the memory of each side and the checksums."""
    check_ids("source", source, sources)
    check_ids("target", target, targets)
    if source.shape[1] != target.shape[1]:
        raise ValueError(f"source blocks of {source.shape[1]} bytes, target blocks of {target.shape[1]}")
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} source blocks for {len(targets)} target blocks")
    if not target.flags.writeable:
        raise ValueError("the target is read-only")
    ordered = np.sort(targets)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again):
        raise ValueError(f"target block {again[0]} comes twice")
    if np.may_share_memory(source, target):
        _check_apart(source, sources, target, targets)


def _check_apart(source: Blocks, sources: NDArray[np.int64], target: Blocks, targets: NDArray[np.int64]) -> None:
    size = source.shape[1]
    starts = np.sort(source.ctypes.data + sources * source.strides[0])
    begins = target.ctypes.data + targets * target.strides[0]
    before = np.searchsorted(starts, begins + size) - 1  # the last source that begins before the target's end
    overlapping = np.flatnonzero((before >= 0) & (starts[before] + size > begins))
    if len(overlapping):
        raise ValueError(f"target block {targets[overlapping[0]]} overlaps a source block")
