"""The tree of prefixes: what prompts share, and no more; as much of it as is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvpool.keys import prompt_keys
from router.prefixes import DEPTHS, Prefix, Prompt, marks, shared_prefixes

ROOT = b"r" * 16


def prompt(*parts: tuple[int, int], cached: int = 0) -> Prompt:
    """`(token, num_blocks)` parts, of blocks of 4."""
    tokens = [token for token, num_blocks in parts for _ in range(4 * num_blocks)]
    return Prompt(marks(prompt_keys(ROOT, tokens, 4).full), cached)


def shape(prefixes: Sequence[Prefix]) -> list[tuple[int | None, int, int, int]]:
    return [(prefix.parent, prefix.begin, prefix.end, prefix.num_requests) for prefix in prefixes]


def test_marks_are_dense_at_first_and_within_an_eighth_later() -> None:
    assert DEPTHS[:16] == tuple(range(1, 17))
    assert all(after <= before * 9 / 8 for before, after in itertools.pairwise(DEPTHS[15:]))
    assert len(marks([bytes([n % 256]) * 16 for n in range(100)])) == len([depth for depth in DEPTHS if depth <= 100])


def test_prompts_that_share_a_beginning_are_one_stretch_that_branches() -> None:
    prompts = [
        prompt((1, 8), (2, 4), (9, 1)),
        prompt((1, 8), (2, 4), (8, 3)),
        prompt((1, 8), (3, 2)),
        prompt((1, 8), (3, 2), (7, 1)),
        prompt((5, 6)),
    ]
    found = shared_prefixes(prompts, 10)
    assert shape(found) == [(None, 0, 8, 4), (0, 8, 12, 2), (0, 8, 10, 2)] or shape(found) == [
        (None, 0, 8, 4),
        (0, 8, 10, 2),
        (0, 8, 12, 2),
    ]
    assert found[0].key == prompts[0].marks[7]


def test_what_was_found_counts_within_each_stretch() -> None:
    prompts = [prompt((1, 8), (2, 4), (n, 1), cached=cached) for n, cached in ((7, 0), (8, 10), (9, 12))]
    prompts.append(prompt((1, 8), cached=4))
    first, second = shared_prefixes(prompts, 10)
    assert (first.end, first.found) == (8, (0 + 8 + 8 + 4) / 32)
    assert (second.begin, second.end, second.found) == (8, 12, (0 + 2 + 4) / 12)


def test_a_prompt_alone_is_not_in_it() -> None:
    assert shared_prefixes([prompt((1, 3)), prompt((2, 3))], 10) == []
    assert shared_prefixes([], 10) == []


prompts_of_few_tokens = st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9)), min_size=1, max_size=4))


@given(prompts_of_few_tokens, st.integers(1, 8))
def test_a_parent_comes_before_its_children_and_is_asked_for_as_often(
    shapes: list[list[tuple[int, int]]], limit: int
) -> None:
    prompts = [prompt(*parts) for parts in shapes]
    found = shared_prefixes(prompts, limit)
    assert len(found) <= limit
    for number, prefix in enumerate(found):
        holders = [one for one in prompts if prefix.key in one.marks]
        assert prefix.num_requests == len(holders) >= 2
        assert 0 <= prefix.begin < prefix.end
        if prefix.parent is not None:
            parent = found[prefix.parent]
            assert prefix.parent < number
            assert parent.end == prefix.begin
            assert parent.num_requests >= prefix.num_requests
        else:
            assert prefix.begin == 0
