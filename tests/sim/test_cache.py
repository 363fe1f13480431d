"""Simulated tiers, the plain and the native one: what they keep, what goes, and that both do the same."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.keys import Key
from tandem.sim import cache as module
from tandem.sim._chain_cache import Cache as Native
from tandem.sim.cache import CacheRef

KINDS = (Native, CacheRef)
either = pytest.mark.parametrize("kind", KINDS)
SomeCache = Native | CacheRef


def chain(path: Sequence[int]) -> list[Key]:
    """A key names all that is before it."""
    return [repr(tuple(path[: at + 1])).encode().ljust(16, b".") for at in range(len(path))]


def key(number: int) -> Key:
    """Neighbours share a slot and its tag, and differ in what is compared last."""
    return (number % 3).to_bytes(8, "little") + bytes(7) + bytes([number])


class Oracle:
    """Least recently used by time stamps: the root of what is used at once is the youngest."""

    def __init__(self) -> None:
        self.used: dict[Key, tuple[int, int]] = {}
        self.time = 0

    def match(self, keys: Sequence[Key]) -> int:
        num = next((at for at, key in enumerate(keys) if key not in self.used), len(keys))
        self._use(keys[:num])
        return num

    def store(self, keys: Sequence[Key], capacity: int) -> tuple[list[Key], list[Key]]:
        new = [key for key in keys if key not in self.used]
        self._use(keys)
        return new, self.shrink(capacity)

    def shrink(self, capacity: int) -> list[Key]:
        oldest = sorted(self.used, key=lambda key: self.used[key])
        gone = oldest[: max(0, len(oldest) - capacity)]
        for key in gone:
            del self.used[key]
        return gone

    def _use(self, keys: Sequence[Key]) -> None:
        self.time += 1
        for at, key in enumerate(keys):
            self.used[key] = (self.time, -at)


def steps(keys: st.SearchStrategy[list[int]]) -> st.SearchStrategy[list[tuple[str, list[int] | int]]]:
    return st.lists(
        st.one_of(
            st.tuples(st.just("match"), keys),
            st.tuples(st.just("store"), keys),
            st.tuples(st.just("capacity"), st.integers(0, 12)),
        ),
        max_size=40,
    )


@either
@given(capacity=st.integers(0, 12), steps=steps(st.lists(st.integers(0, 2), min_size=1, max_size=5)))
def test_a_cache_is_least_recently_used_and_never_keeps_what_follows_a_block_that_is_gone(
    kind: type[SomeCache], capacity: int, steps: list[tuple[str, list[int] | int]]
) -> None:
    cache, oracle = kind(capacity), Oracle()
    stored: set[Key] = set()
    parents: dict[Key, Key] = {}
    for what, value in steps:
        if isinstance(value, int):
            capacity = cache.capacity = value
            assert cache.shrink() == oracle.shrink(capacity)
        else:
            keys = chain(value)
            stored.update(keys)
            parents.update(zip(keys[1:], keys, strict=False))
            if what == "match":
                assert cache.match(keys) == oracle.match(keys)
            else:
                assert cache.store(keys) == oracle.store(keys, capacity)
        held = {key for key in stored if key in cache}
        assert held == set(oracle.used)
        assert len(cache) == len(held) <= capacity
        assert all(parents[key] in held for key in held if key in parents)


@settings(max_examples=400)
@given(capacity=st.integers(0, 30), steps=steps(st.lists(st.integers(0, 40), max_size=30)))
def test_any_keys_in_any_order_leave_both_alike(capacity: int, steps: list[tuple[str, list[int] | int]]) -> None:
    """Also what is no chain: the same key twice, and keys that all meet in one slot."""
    native, plain = Native(capacity), CacheRef(capacity)
    for what, value in steps:
        if isinstance(value, int):
            native.capacity = plain.capacity = value
            assert native.shrink() == plain.shrink()
        else:
            keys = tuple(key(number) for number in value)
            if what == "match":
                assert native.match(keys) == plain.match(keys)
            else:
                assert native.store(keys) == plain.store(keys)
        assert len(native) == len(plain)
        assert all((key(number) in native) == (key(number) in plain) for number in range(41))


def test_both_stay_alike_at_the_size_of_a_tier() -> None:
    rng = random.Random(2)
    native, plain = Native(3000), CacheRef(3000)
    known: list[tuple[Key, ...]] = [()]
    for _ in range(1500):
        start = rng.choice(known[-200:])
        keys = start[: rng.randint(0, len(start))] + tuple(rng.randbytes(16) for _ in range(rng.randint(0, 30)))
        known.append(keys)
        assert native.match(keys) == plain.match(keys)
        assert native.store(keys) == plain.store(keys)
    assert len(native) == len(plain) == 3000


def test_the_native_one_owns_each_key_that_it_holds_once_and_gives_it_back() -> None:
    keys = [bytes([at]) * 16 for at in range(40)]

    def references() -> list[int]:
        return [sys.getrefcount(one) for one in keys]

    before = references()
    cache = Native(30)
    for _ in range(3):
        cache.store(keys[:35])
        cache.match(keys)
    assert references() == [num + (one in cache) for num, one in zip(before, keys, strict=True)]
    with pytest.raises(ValueError, match="is no key of 16 bytes"):
        cache.store([*keys, b"short"])
    cache.capacity = 10
    cache.shrink()
    assert references() == [num + (one in cache) for num, one in zip(before, keys, strict=True)]
    del cache
    assert references() == before


@pytest.mark.parametrize("given", [b"short", b"s" * 17, 7, None])
def test_what_is_no_key_is_refused(given: object) -> None:
    cache = Native(3)
    cache.store([key(1)])
    for what in (cache.match, cache.store):
        with pytest.raises(ValueError, match="is no key of 16 bytes"):
            what([key(1), given])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="is no key of 16 bytes"):
        given in cache  # type: ignore[operator]  # noqa: B015
    assert len(cache) == 1
    with pytest.raises(TypeError, match="list or tuple"):
        cache.match(7)  # type: ignore[arg-type]


@either
def test_a_leaf_goes_before_what_it_follows_and_a_match_makes_young(kind: type[SomeCache]) -> None:
    cache = kind(4)
    one, other = chain([1, 1]), chain([2, 2])
    assert cache.store(one) == (one, [])
    assert cache.store(other) == (other, [])
    assert cache.match(one) == 2
    third = chain([3])
    assert cache.store(third) == (third, [other[1]])
    cache.capacity = 2
    assert cache.shrink() == [other[0], one[1]]


def test_simulations_use_the_native_one() -> None:
    assert module.new_cache is Native, "the native part was not built"
