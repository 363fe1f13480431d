"""The native block map against the plain one: any changes, any queries, at the sizes where it has to work."""

from __future__ import annotations

import random
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.keys import digest_of
from router._block_map import BlockMap
from router.block_map import MAX_PROCESSES, NUM_TIERS, BlockMapRef, new_block_map

KINDS = (BlockMap, BlockMapRef)
either = pytest.mark.parametrize("kind", KINDS)
SomeMap = BlockMap | BlockMapRef


def key(number: int) -> bytes:
    """Neighbours share a segment and a slot, and differ in what is compared last."""
    return (number % 3).to_bytes(4, "little") + bytes(4) + bytes(7) + bytes([number])


def hits(found: SomeMap, keys: list[bytes], num_processes: int = 8) -> list[list[int]]:
    counts = np.full((num_processes, NUM_TIERS), -1, dtype=np.int32)
    there, longest = found.longest(keys, counts)
    assert longest == counts.sum(axis=1).max(initial=0)
    assert there == np.flatnonzero(counts.any(axis=1)).tolist()
    return [*counts.tolist(), there]


changes = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["add", "remove"]),
            st.integers(0, 5),
            st.integers(0, 2),
            st.lists(st.integers(0, 40), max_size=12),
        ),
        st.tuples(st.just("clear"), st.integers(0, 5), st.just(0), st.just([])),
    ),
    max_size=60,
)


@settings(max_examples=400)
@given(changes, st.lists(st.lists(st.integers(0, 40), max_size=10), max_size=4), st.sampled_from([1, 7, 1000]))
def test_any_changes_leave_both_alike(
    steps: list[tuple[str, int, int, list[int]]], chains: list[list[int]], max_keys: int
) -> None:
    native, plain = BlockMap(max_keys), BlockMapRef(max_keys)
    for what, process, tier, numbers in steps:
        keys = [key(number) for number in numbers]
        if what == "clear":
            native.clear(process)
            plain.clear(process)
        elif what == "add":
            assert native.add(process, tier, keys) == plain.add(process, tier, keys)
        else:
            assert native.remove(process, tier, keys) == plain.remove(process, tier, keys)
        assert native.sound()
        assert (len(native), native.num_entries) == (len(plain), plain.num_entries)
        assert native.num_place_sets == plain.num_place_sets
    for chain in chains:
        keys = [key(number) for number in chain]
        assert hits(native, keys) == hits(plain, keys)
    assert [native.num_held(process) for process in range(6)] == [plain.num_held(process) for process in range(6)]
    places = [(process, tier) for process in range(6) for tier in range(NUM_TIERS)]
    assert [native.digest(*place) for place in places] == [plain.digest(*place) for place in places]


@pytest.mark.parametrize("seed", range(20))
def test_sets_that_are_gone_leave_nothing_to_those_that_get_their_numbers(seed: int) -> None:
    """Few keys, so that sets come and go with every change."""
    rng = random.Random(seed)
    native, plain = BlockMap(100), BlockMapRef(100)
    for _ in range(400):
        process, tier = rng.randrange(4), rng.randrange(2)
        keys = [key(rng.randrange(5)) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.6:
            assert native.add(process, tier, keys) == plain.add(process, tier, keys)
        else:
            assert native.remove(process, tier, keys) == plain.remove(process, tier, keys)
        assert native.sound()
        for number in range(5):
            assert hits(native, [key(number)]) == hits(plain, [key(number)])


@either
def test_a_block_counts_in_the_first_tier_that_has_it(kind: type[SomeMap]) -> None:
    found = kind(100)
    for tier, numbers in ((2, (0, 1, 2, 3)), (1, (1, 2)), (0, (2,))):
        found.add(4, tier, [key(number) for number in numbers])
    found.add(7, 0, [key(0), key(1)])
    counts = hits(found, [key(number) for number in range(6)])
    assert (counts[4], counts[7], counts[-1]) == ([1, 1, 2], [2, 0, 0], [4, 7])
    assert sum(map(sum, counts[:4])) == 0
    small = np.full((5, NUM_TIERS), -1, dtype=np.int32)
    assert found.longest([key(0)], small) == ([4, 7], 1)
    assert small.sum() == 1, "processes past the counts are left out"


@either
def test_what_is_no_key_is_counted_or_refused(kind: type[SomeMap]) -> None:
    found = kind(100)
    assert found.add(0, 0, [b"short", 7, key(1)]) == 1
    assert found.remove(0, 0, [b"short", key(2)]) == 0
    assert found.num_ignored == 3
    with pytest.raises(ValueError, match="is no key of 16 bytes"):
        found.longest([key(1), b"short"], np.zeros((1, NUM_TIERS), dtype=np.int32))
    for process, tier in ((MAX_PROCESSES, 0), (0, NUM_TIERS)):
        with pytest.raises(ValueError, match=f"process {process}, tier {tier}: must be below"):
            found.add(process, tier, [key(1)])
    for wrong in (0, 2**32 - 1):
        with pytest.raises(ValueError, match="max_keys"):
            kind(wrong)
    assert len(found) == 1


def test_counts_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="counts has 16 bytes"):
        BlockMap(10).longest([key(1)], np.zeros(4, dtype=np.int32))
    fixed = np.zeros((1, NUM_TIERS), dtype=np.int32)
    fixed.flags.writeable = False
    with pytest.raises(TypeError, match="read-write bytes-like object"):
        BlockMap(10).longest([key(1)], fixed)


@either
def test_sets_of_places_are_kept_once_and_only_while_a_key_has_them(kind: type[SomeMap]) -> None:
    found = kind(1000)
    for number, order in enumerate(permutations(range(5))):
        for process in order:
            found.add(process, 0, [key(number)])
    assert found.num_place_sets == 1
    found.clear(3)
    assert (found.num_place_sets, len(found), found.num_entries) == (1, 120, 480)
    for process in range(5):
        found.clear(process)
    assert (found.num_place_sets, len(found), found.num_entries) == (0, 0, 0)


def test_processes_that_go_are_gone_at_once_and_their_keys_make_room_later() -> None:
    found, generator = BlockMap(10_000_000), random.Random(1)
    chains = [[generator.randbytes(16) for _ in range(100)] for _ in range(300)]
    for number, chain in enumerate(chains):
        for process in generator.sample(range(64), 4):
            found.add(process, number % 3, chain[: generator.randrange(50, 101)])
    before = found.num_bytes
    for process in range(64):
        found.clear(process)
        assert found.num_held(process) == 0
        if process % 9 == 0:
            assert found.sound()
    assert (len(found), found.num_entries, found.num_place_sets) == (0, 0, 0)
    for chain in chains:
        assert hits(found, chain, 64)[-1] == []
    for chain in chains:
        found.add(1, 0, chain)
    assert found.sound()
    assert len(found) == 30_000
    assert found.num_bytes < 1.5 * before


@either
def test_a_key_that_comes_back_is_as_young_as_its_return(kind: type[SomeMap]) -> None:
    found = kind(3)
    found.add(0, 0, [key(0)])
    found.clear(0)
    found.add(0, 0, [key(1), key(2), key(0), key(3)])
    assert [hits(found, [key(number)])[-1] for number in range(4)] == [[0], [], [0], [0]], "the oldest one made room"


def test_a_million_entries_take_less_memory_than_is_promised() -> None:
    """The shape of the bench: prompts that several hold, and tails of one each."""
    found, generator = BlockMap(10_000_000), random.Random(2)
    for _ in range(200):
        prompt = [generator.randbytes(16) for _ in range(64)]
        for process in generator.sample(range(64), 8):
            found.add(process, 0, prompt)
    while found.num_entries < 200_000:
        found.add(generator.randrange(64), 0, [generator.randbytes(16) for _ in range(32)])
    assert found.num_bytes / found.num_entries <= 88
    assert isinstance(new_block_map(10), BlockMap), "the native one is built wherever the tests run"


@either
def test_a_digest_is_that_of_the_keys_that_a_place_holds(kind: type[SomeMap]) -> None:
    found = kind(1000)
    keys = [key(number) for number in range(40)]
    found.add(1, 0, keys)
    found.add(2, 1, keys[:20])
    found.add(3, 0, keys[10:])
    found.remove(1, 0, keys[5:7])
    found.clear(3)
    left = keys[:5] + keys[7:]
    assert found.digest(1, 0) == (38, digest_of(left)) == (38, digest_of(reversed(left)))
    assert found.digest(2, 1) == (20, digest_of(keys[:20]))
    assert found.digest(3, 0) == found.digest(2, 0) == (0, bytes(16))
    with pytest.raises(ValueError, match="must be below"):
        found.digest(0, NUM_TIERS)
