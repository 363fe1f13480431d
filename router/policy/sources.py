"""From whom a worker fetches what it lacks of a prompt, in the order to ask.

Owns the choice in numpy, `sources_ref`. `sources` is the native one (`router/native/weigh.cpp`) where it was built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from router.fleet import Fleet
from router.policy.base import TIERS, SourcePlace
from router.prefix_index import Hits

MAX_SOURCES = 8


def _native() -> Any:
    try:
        from router import _weigh
    except ImportError:  # `router/policy/weigh.py` says it
        return None
    return _weigh.sources


_SOURCES = _native()


def sources(hits: Hits, fleet: Fleet, more_than: int, but: Sequence[int]) -> tuple[SourcePlace, ...]:
    """Reachable processes that hold more than so many leading blocks, longest first; of equal ones first whose tiers are
    faster."""
    if hits.longest <= more_than:
        return ()
    if _SOURCES is None:
        return sources_ref(hits, fleet, more_than, but)
    found = _SOURCES(hits.counts, hits.holders, fleet.reachable, more_than, but, MAX_SOURCES)
    return tuple([SourcePlace(number, TIERS[tier], num_blocks) for number, tier, num_blocks in found])


def sources_ref(hits: Hits, fleet: Fleet, more_than: int, but: Sequence[int]) -> tuple[SourcePlace, ...]:
    """As `sources`."""
    if not hits.holders:
        return ()
    holders = np.array(hits.holders, dtype=np.int64)
    counts = hits.counts[holders]
    totals = counts.sum(axis=1)
    order = np.lexsort((counts[:, 1] + 2 * counts[:, 2], -totals))
    found: list[SourcePlace] = []
    for at in order.tolist():
        number, total = int(holders[at]), int(totals[at])
        if total <= more_than or len(found) == MAX_SOURCES:
            break
        if number in but or not fleet.reachable[number]:
            continue
        _, host, disk = counts[at].tolist()
        found.append(SourcePlace(number, TIERS[2] if disk else TIERS[1] if host else TIERS[0], total))
    return tuple(found)
