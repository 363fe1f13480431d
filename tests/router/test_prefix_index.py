"""The prefix index follows events in order, notices what is missing, and finds the longest hits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch
from router.prefix_index import REPLAY_RETRY_S, PrefixIndex

E1, E2 = b"1" * 8, b"2" * 8
NUMBERS = {"a": 0, "b": 1, "c": 2, "pool": 3}
TIERS = ("DEVICE", "HOST", "DISK")


def longest_hits(index: PrefixIndex, keys: list[bytes]) -> dict[tuple[str, str], int]:
    """By process, and by the slowest tier that is needed."""
    hits = index.longest(keys)
    found = {}
    for number in hits.holders:
        counts = hits.counts[number].tolist()
        name = next(name for name, given in NUMBERS.items() if given == number)
        found[name, TIERS[max(tier for tier, count in enumerate(counts) if count)]] = sum(counts)
    return found


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def stored(*numbers: int, medium: str = "DEVICE") -> EventBatch:
    hashes: list[bytes | int] = [key(n) for n in numbers]
    return EventBatch(0.0, [BlockStored(hashes, None, [], 16, medium=medium)], epoch=E1)


def removed(*numbers: int, medium: str = "DEVICE") -> EventBatch:
    hashes: list[bytes | int] = [key(n) for n in numbers]
    return EventBatch(0.0, [BlockRemoved(hashes, medium=medium)], epoch=E1)


def joined(*names: str, max_keys: int = 1000) -> PrefixIndex:
    index = PrefixIndex(max_keys)
    for name in names:
        index.join(name, NUMBERS[name], E1, "DEVICE", 0.0)
        index.on_replay_end(name, E1)
    return index


def test_longest_hits_count_leading_blocks_only() -> None:
    index = joined("a", "b", "c")
    index.on_batch("a", E1, 0, stored(0, 1, 2), 0.0)
    index.on_batch("b", E1, 0, stored(0, 2, 3), 0.0)
    index.on_batch("c", E1, 0, stored(1, 2), 0.0)
    hits = longest_hits(index, [key(n) for n in range(5)])
    assert hits == {("a", "DEVICE"): 3, ("b", "DEVICE"): 1}
    assert longest_hits(index, []) == {}


def test_a_process_is_one_place_whatever_tiers_its_blocks_are_in() -> None:
    index = joined("pool")
    index.on_batch("pool", E1, 0, stored(0, 1, 2, medium="HOST"), 0.0)
    index.on_batch("pool", E1, 1, stored(0, 2, 3, medium="DISK"), 0.0)
    index.on_batch("pool", E1, 2, removed(2, medium="HOST"), 0.0)
    assert longest_hits(index, [key(n) for n in range(5)]) == {("pool", "DISK"): 4}
    assert longest_hits(index, [key(n) for n in range(2)]) == {("pool", "HOST"): 2}
    assert index.num_blocks_of("pool") == 5
    index.on_batch("pool", E1, 3, removed(0, 3, medium="DISK"), 0.0)
    assert longest_hits(index, [key(n) for n in range(5)]) == {("pool", "DISK"): 3}
    index.on_batch("pool", E1, 4, EventBatch(0.0, [BlockRemoved([key(0), key(2)], medium=None)], epoch=E1), 0.0)
    assert longest_hits(index, [key(1)]) == {("pool", "HOST"): 1}
    assert len(index) == 1


def test_what_says_nothing_is_counted_and_changes_nothing() -> None:
    index = joined("a")
    index.on_batch("a", E1, 0, stored(0), 0.0)
    foreign = EventBatch(0.0, [BlockStored([7, b"short", key(1)], None, [], 16)], epoch=E1)
    index.on_batch("a", E1, 1, foreign, 0.0)
    assert index.num_rejected == 1
    assert longest_hits(index, [key(0), key(1)]) == {("a", "DEVICE"): 2}
    index.on_batch("a", E1, 1, removed(0), 0.0)  # again
    index.on_batch("a", E2, 2, removed(0), 0.0)  # of another epoch
    index.on_batch("a", E1, 2, EventBatch(0.0, removed(0).events, epoch=E2), 0.0)
    index.on_replay("a", E2, 2, removed(0), 0.0)
    index.on_replay("a", E1, 0, removed(0), 0.0)
    index.on_batch("a", E1, 2, EventBatch(0.0, [BlockStored([key(2)], None, [], 64)], epoch=E1), 0.0)
    assert index.num_rejected == 7
    assert len(index) == 2
    assert longest_hits(index, [key(0), key(1)]) == {("a", "DEVICE"): 2}
    assert index.sound()


def test_numbers_of_processes_that_left_are_given_again() -> None:
    index = joined("a", "b")
    index.on_batch("a", E1, 0, stored(0), 0.0)
    index.on_batch("b", E1, 0, stored(0, 1), 0.0)
    index.forget("a")
    index.join("c", NUMBERS["c"], E1, "HOST", 1.0)
    index.on_replay_end("c", E1)
    index.on_batch("c", E1, 0, stored(1, medium=""), 1.0)
    assert longest_hits(index, [key(0), key(1)]) == {("b", "DEVICE"): 2}
    assert longest_hits(index, [key(1)]) == {("b", "DEVICE"): 1, ("c", "HOST"): 1}


def test_a_gap_asks_for_a_replay_and_nothing_is_applied_out_of_order() -> None:
    index = joined("a")
    assert index.on_batch("a", E1, 0, stored(0), 0.0) is None
    assert index.on_batch("a", E1, 2, removed(1), 0.0) == 1
    assert index.on_batch("a", E1, 3, stored(2), 0.1) is None, "a replay is under way"
    index.on_replay("a", E1, 1, stored(1), 0.0)
    index.on_replay_end("a", E1)
    assert longest_hits(index, [key(0), key(1)]) == {("a", "DEVICE"): 1}
    assert longest_hits(index, [key(2)]) == {("a", "DEVICE"): 1}, "held batches follow"


def test_batches_twice_change_nothing() -> None:
    index = joined("a")
    index.on_batch("a", E1, 0, stored(0), 0.0)
    index.on_batch("a", E1, 1, removed(0), 0.0)
    assert index.on_batch("a", E1, 0, stored(0), 0.0) is None
    assert len(index) == 0


def test_a_replay_that_has_forgotten_the_beginning_starts_afresh() -> None:
    index = joined("a")
    index.on_batch("a", E1, 0, stored(0), 0.0)
    index.on_batch("a", E1, 5, stored(5), 0.0)
    index.on_replay("a", E1, 4, stored(4), 0.0)
    index.on_replay_end("a", E1)
    assert longest_hits(index, [key(0)]) == {}, "may have been removed in what was forgotten"
    assert longest_hits(index, [key(4)]) == {("a", "DEVICE"): 1}
    assert longest_hits(index, [key(5)]) == {("a", "DEVICE"): 1}


def test_a_snapshot_of_several_batches_of_one_number_is_applied_whole() -> None:
    index = joined("a")
    index.on_batch("a", E1, 0, stored(0), 0.0)
    index.on_batch("a", E1, 8, stored(8), 0.0)
    cleared = EventBatch(0.0, [AllBlocksCleared(), *stored(1, 2).events], epoch=E1)
    for batch in (cleared, stored(3), stored(4)):
        index.on_replay("a", E1, 7, batch, 0.0)
    index.on_replay_end("a", E1)
    assert longest_hits(index, [key(n) for n in (1, 2, 3, 4, 8)]) == {("a", "DEVICE"): 5}
    assert longest_hits(index, [key(0)]) == {}


def test_a_snapshot_that_breaks_off_is_asked_for_again() -> None:
    index = joined("a")
    index.on_announced("a", E1, 7, 0.0)
    assert index.on_announced("a", E1, 7, 3.0) == 0
    index.on_replay("a", E1, 7, EventBatch(0.0, [AllBlocksCleared(), *stored(1).events], epoch=E1), 0.0)
    index.on_replay_end("a", E1, complete=False)
    assert index.on_announced("a", E1, 7, 3.1) == 7


def test_a_replay_that_brings_batches_is_left_to_finish_however_long_it_takes() -> None:
    index = joined("a")
    index.on_announced("a", E1, 7, 0.0)
    assert index.on_announced("a", E1, 9, 0.25) == 0
    for second in range(1, 30):
        assert index.on_announced("a", E1, 9, float(second)) is None
        index.on_replay("a", E1, 7, stored(second), float(second))
    index.on_replay_end("a", E1)
    assert len(index) == 29


def test_a_snapshot_that_falls_silent_is_asked_for_again_from_its_number() -> None:
    index = joined("a")
    index.on_announced("a", E1, 7, 0.0)
    assert index.on_announced("a", E1, 9, 0.25) == 0
    index.on_replay("a", E1, 7, stored(1), 1.0)
    assert index.on_announced("a", E1, 9, 1.0 + REPLAY_RETRY_S) == 7


def test_a_lost_last_event_is_noticed_by_the_second_heartbeat_that_announces_it() -> None:
    index = joined("a")
    assert index.on_announced("a", E1, 0, 1.0) is None
    assert index.on_announced("a", E1, 0, 1.25) == 0
    index.on_replay("a", E1, 0, stored(0), 0.0)
    index.on_replay_end("a", E1)
    assert index.on_announced("a", E1, 0, 1.5) is None


def test_a_new_epoch_forgets_the_old_one_whose_events_are_ignored() -> None:
    index = joined("a")
    index.on_batch("a", E1, 0, stored(0), 0.0)
    index.join("a", NUMBERS["a"], E2, "DEVICE", 1.0)
    assert len(index) == 0
    assert index.on_batch("a", E1, 1, stored(1), 1.0) is None
    assert len(index) == 0


def test_a_dead_process_leaves_nothing() -> None:
    index = joined("a", "b")
    index.on_batch("a", E1, 0, stored(0, 1), 0.0)
    index.on_batch("b", E1, 0, stored(0), 0.0)
    index.forget("a")
    assert index.processes() == {"b"}
    assert index.num_blocks_of("a") == 0
    assert longest_hits(index, [key(0), key(1)]) == {("b", "DEVICE"): 1}


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    index = joined("a", max_keys=3)
    index.on_batch("a", E1, 0, stored(0, 1, 2, 3, 4), 0.0)
    assert len(index) == 3
    assert index.num_blocks_of("a") == 3
    assert longest_hits(index, [key(2), key(3), key(4)]) == {("a", "DEVICE"): 3}
    assert longest_hits(index, [key(0)]) == {}


operations = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["store", "remove", "clear"]), st.integers(0, 5)), max_size=60
)


@given(operations, st.lists(st.integers(0, 5), max_size=6, unique=True))
def test_hits_equal_those_of_plain_sets(steps: list[tuple[str, str, int]], chain: list[int]) -> None:
    index = joined("a", "b", "c")
    model: dict[str, set[int]] = {"a": set(), "b": set(), "c": set()}
    seqs = dict.fromkeys("abc", 0)
    for name, what, number in steps:
        if what == "store":
            batch = stored(number)
            model[name].add(number)
        elif what == "remove":
            batch = removed(number)
            model[name].discard(number)
        else:
            batch = EventBatch(0.0, [AllBlocksCleared()], epoch=E1)
            model[name].clear()
        index.on_batch(name, E1, seqs[name], batch, 0.0)
        seqs[name] += 1
    expected = {}
    for name, held in model.items():
        num = next((i for i, number in enumerate(chain) if number not in held), len(chain))
        if num:
            expected[(name, "DEVICE")] = num
    assert longest_hits(index, [key(n) for n in chain]) == expected
    assert len(index) == len(set.union(*model.values()))
