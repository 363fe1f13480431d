"""Which slot of which directory each block of the tier is, and which of the recovered records count.

Pure functions of numbers and records: no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.tiers.disk.journal import Records, split

STRIPE_SLOTS = 16
"""Directories take turns in runs of so many slots: a chain is read from all of them, and from each in long runs."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Block `i` is slot `slots[i]` of directory `directories[i]`, both `[num_blocks]` int64; ascending blocks are ascending slots
    of each. The other way, slot `s` of directory `d` is block `blocks[first[d] + s]`."""

    directories: NDArray[np.int64]
    slots: NDArray[np.int64]
    blocks: NDArray[np.int64]
    first: NDArray[np.int64]


def placement(num_slots: Sequence[int]) -> Placement:
    """The blocks of directories with `num_slots` slots each."""
    directories = np.repeat(np.arange(len(num_slots)), num_slots)
    slots = np.concatenate([np.arange(count) for count in num_slots])
    order = np.lexsort((slots, directories, slots // STRIPE_SLOTS))
    blocks = np.empty(len(order), dtype=np.int64)
    blocks[order] = np.arange(len(order))
    return Placement(directories[order], slots[order], blocks, np.cumsum([0, *num_slots[:-1]]))


def recovered(where: Placement, live: Sequence[Records]) -> tuple[NDArray[np.int64], Records]:
    """The blocks that the directories' live records speak of, and the records, oldest first. Of several records of one key the
    last one counts: an earlier one is what a crash left of a block that had been evicted."""
    records = np.concatenate(live)
    directories = np.repeat(np.arange(len(live)), [len(one) for one in live])
    order = np.argsort(records["sequence"], kind="stable")
    records, directories = records[order], directories[order]
    last = dict(zip(split(records["key"]), range(len(records)), strict=True))
    if len(last) < len(records):
        kept = np.sort(np.fromiter(last.values(), np.int64, len(last)))
        records, directories = records[kept], directories[kept]
    return where.blocks[where.first[directories] + records["slot"].astype(np.int64)], records
