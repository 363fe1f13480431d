"""Which beginnings of prompts come again: the tree of prefixes that the last requests share.

Owns the marks of a prompt, which are all that is remembered of its keys, and the tree over them. Pure. It never sees a token:
a prefix is named by the key of its last block.

A key says everything before it, so two prompts begin alike up to a block if they have one key there. Looking at every block is
not needed: marks are at each of the first 16 blocks, then at eight depths between each power of two and the next, so a prefix's
length is known to an eighth.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from kvpool.keys import Key

DEPTHS: tuple[int, ...] = (
    *range(1, 17),
    *(base * step // 8 for base in (2**n for n in range(4, 17)) for step in range(9, 17)),
)
"""In blocks, where marks are. What is deeper is not told apart."""


def marks(keys: Sequence[Key]) -> tuple[Key, ...]:
    """Of a prompt, by the keys of its full blocks: those at `DEPTHS`, as far as it goes."""
    return tuple(keys[depth - 1] for depth in DEPTHS[: bisect_right(DEPTHS, len(keys))])


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is known of one request's prompt: its marks, and how many leading blocks of it existed before."""

    marks: tuple[Key, ...]
    num_cached_blocks: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """One stretch of the tree: blocks `begin` to `end` of `num_requests` prompts, which are alike up to there. `parent` is the
    number of the stretch before it, None at the root; `found` the part of these blocks that existed when they were asked for,
    0 to 1."""

    key: Key
    parent: int | None
    begin: int
    end: int
    num_requests: int
    found: float


def shared_prefixes(prompts: Sequence[Prompt], limit: int) -> list[Prefix]:
    """What at least two prompts share, at most `limit` stretches: those with most blocks, counted once a request. Each comes
    right after its parent or a sibling's descendants; siblings have the most asked first."""
    stretches: list[Prefix] = []
    groups = _branches(prompts, 0, None)
    while groups and len(stretches) < limit:
        _, _, members, level, parent = heapq.heappop(groups)
        end_level = _shared(members, level)
        begin, end = DEPTHS[level - 1] if level else 0, DEPTHS[end_level - 1]
        found = sum(min(max(prompt.num_cached_blocks - begin, 0), end - begin) for prompt in members)
        stretches.append(
            Prefix(
                members[0].marks[end_level - 1],
                parent,
                begin,
                end,
                len(members),
                found / (len(members) * (end - begin)),
            )
        )
        for group in _branches(members, end_level, len(stretches) - 1):
            heapq.heappush(groups, group)
    return _in_order(stretches)


_Group = tuple[int, Key, list[Prompt], int, int | None]
"""Minus its blocks, its name, its prompts, the level from which on it is looked at, its parent."""


def _branches(prompts: Sequence[Prompt], level: int, parent: int | None) -> list[_Group]:
    """Those that go on alike at `level`, as a heap."""
    by_key: dict[Key, list[Prompt]] = {}
    for prompt in prompts:
        if len(prompt.marks) > level:
            by_key.setdefault(prompt.marks[level], []).append(prompt)
    groups: list[_Group] = []
    for key, members in by_key.items():
        if len(members) > 1:
            num_blocks = DEPTHS[_shared(members, level) - 1] - (DEPTHS[level - 1] if level else 0)
            groups.append((-num_blocks * len(members), key, members, level, parent))
    heapq.heapify(groups)
    return groups


def _shared(prompts: Sequence[Prompt], level: int) -> int:
    """How many marks all have in common, given that they share those before `level` and the one there."""
    first, shortest = prompts[0].marks, min(len(prompt.marks) for prompt in prompts)
    end = level + 1
    while end < shortest and all(prompt.marks[end] == first[end] for prompt in prompts):
        end += 1
    return end


def _in_order(stretches: Sequence[Prefix]) -> list[Prefix]:
    """Each right after its parent, with its number as it is then."""
    children: dict[int | None, list[int]] = {}
    for number, stretch in enumerate(stretches):
        children.setdefault(stretch.parent, []).append(number)
    ordered: list[Prefix] = []

    def add(parent: int | None, new_parent: int | None) -> None:
        for number in sorted(children.get(parent, []), key=lambda n: (-stretches[n].num_requests, stretches[n].key)):
            old = stretches[number]
            ordered.append(Prefix(old.key, new_parent, old.begin, old.end, old.num_requests, old.found))
            add(number, len(ordered) - 1)

    add(None, None)
    return ordered
