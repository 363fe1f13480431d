"""Workers that publish nothing are taken to hold what was sent there of late, as long and as much as they have room for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.keys import Key
from protos.kv_events import BlockStored, EventBatch
from router.approximate import Approximate
from router.prefix_index import PrefixIndex

EXPIRY_S = 10.0


def key(*path: int) -> Key:
    return bytes(step + 1 for step in path).ljust(16, b"\0")


def chain(*path: int) -> list[Key]:
    """Keys of a prompt; those that begin alike share keys."""
    return [key(*path[: end + 1]) for end in range(len(path))]


def world(*rooms: int) -> tuple[PrefixIndex, Approximate]:
    index = PrefixIndex(10_000)
    approximate = Approximate(index, EXPIRY_S)
    for number, room in enumerate(rooms):
        index.join(str(number), number, b"12345678", "DEVICE", 0.0)
        approximate.join(number, room)
    return index, approximate


def hit(index: PrefixIndex, number: int, keys: list[Key]) -> int:
    return int(index.longest(keys).counts[number].sum())


def test_what_was_sent_somewhere_is_found_there_until_it_was_not_used_for_long() -> None:
    index, approximate = world(100, 100)
    approximate.routed(0, chain(1, 2, 3), 0.0)
    assert (hit(index, 0, chain(1, 2, 3, 4)), hit(index, 1, chain(1, 2, 3, 4))) == (3, 0)
    approximate.routed(0, chain(1, 2), 6.0)
    approximate.tick(9.9)
    assert hit(index, 0, chain(1, 2, 3)) == 3
    approximate.tick(10.0)
    assert hit(index, 0, chain(1, 2, 3)) == 2, "what was used again is younger"
    approximate.tick(16.0)
    assert hit(index, 0, chain(1, 2, 3)) == 0
    assert (len(index), approximate.num_blocks_of(0)) == (0, 0)


def test_past_its_room_the_longest_unused_go_first_and_ends_before_begins() -> None:
    index, approximate = world(4)
    approximate.routed(0, chain(1, 2, 3), 0.0)
    approximate.routed(0, chain(7, 8), 1.0)
    assert hit(index, 0, chain(1, 2, 3)) == 2
    assert hit(index, 0, chain(7, 8)) == 2
    approximate.routed(0, chain(4, 4, 4, 4, 4, 4), 2.0)
    assert hit(index, 0, chain(4, 4, 4, 4, 4, 4)) == 4
    assert len(index) == approximate.num_blocks_of(0) == 4


def test_a_worker_that_is_gone_leaves_nothing_and_its_number_is_given_again() -> None:
    index, approximate = world(10, 10)
    approximate.routed(0, chain(1, 2), 0.0)
    approximate.routed(1, chain(1), 0.0)
    index.forget("0")
    approximate.forget(0)
    assert (hit(index, 0, chain(1, 2)), hit(index, 1, chain(1, 2))) == (0, 1)
    index.join("other", 0, b"87654321", "DEVICE", 1.0)
    approximate.routed(0, chain(1, 2), 1.0)
    assert hit(index, 0, chain(1, 2)) == 0, "it publishes by itself"
    approximate.tick(100.0)
    assert len(index) == 0


def test_guesses_leave_what_others_publish_alone() -> None:
    index, approximate = world(10)
    index.join("real", 1, b"12345678", "DEVICE", 0.0)
    index.on_replay_end("real", b"12345678")
    index.on_batch("real", b"12345678", 0, EventBatch(0.0, [BlockStored([*chain(1, 2)], None, [], 16)]), 0.0)
    approximate.routed(0, chain(1, 2), 0.0)
    approximate.tick(100.0)
    assert (hit(index, 0, chain(1, 2)), hit(index, 1, chain(1, 2))) == (0, 2)


class Oracle:
    """The same in one list, oldest first."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._uses: list[tuple[Key, float]] = []

    def routed(self, keys: list[Key], now_s: float) -> None:
        fresh = keys[: self._room]
        self._uses = [use for use in self._uses if use[0] not in fresh] + [(key, now_s) for key in fresh[::-1]]
        self._uses = self._uses[len(self._uses) - self._room :] if len(self._uses) > self._room else self._uses

    def tick(self, now_s: float) -> None:
        self._uses = [use for use in self._uses if now_s - use[1] < EXPIRY_S]

    def held(self) -> set[Key]:
        return {key for key, _ in self._uses}


prompts = st.lists(st.integers(0, 2), max_size=5)
steps = st.lists(
    st.tuples(st.sampled_from(["routed", "routed", "tick", "forget"]), st.integers(0, 2), prompts, st.integers(0, 6)),
    max_size=50,
)


@settings(max_examples=300)
@given(steps, st.tuples(st.integers(0, 3), st.integers(4, 12), st.just(1000)))
def test_any_history_gives_what_a_plain_list_gives(
    history: list[tuple[str, int, list[int], int]], rooms: tuple[int, int, int]
) -> None:
    index, approximate = world(*rooms)
    oracles = [Oracle(room) for room in rooms]
    now_s = 0.0
    for what, number, path, passed_s in history:
        now_s += passed_s
        if what == "routed":
            approximate.routed(number, chain(*path), now_s)
            oracles[number].routed(chain(*path), now_s)
        elif what == "tick":
            approximate.tick(now_s)
            for oracle in oracles:
                oracle.tick(now_s)
        else:
            index.forget(str(number))
            approximate.forget(number)
            index.join(str(number), number, b"12345678", "DEVICE", now_s)
            approximate.join(number, rooms[number])
            oracles[number] = Oracle(rooms[number])
        for at, oracle in enumerate(oracles):
            held = oracle.held()
            assert index.num_blocks_of(str(at)) == approximate.num_blocks_of(at) == len(held) <= rooms[at]
            assert all(hit(index, at, [each]) == 1 for each in held)
            keys = chain(*path)
            expected = next((end for end, each in enumerate(keys) if each not in held), len(keys))
            assert hit(index, at, keys) == expected
            assert all(each.rstrip(b"\0")[:-1].ljust(16, b"\0") in held for each in held if each[1]), "no gaps"
