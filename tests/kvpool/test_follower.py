"""Following a publisher: gaps, replays, snapshots, and that the view converges whatever is lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.follower import ASK_AGAIN_S, REPLAY_TIMEOUT_S, RESYNC_S, EventFollower
from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch

EPOCH = b"epoch-01"
ROOT = b"r" * 16


def key_of(name: object) -> bytes:
    return f"{name!s:>16}".encode()[-16:]


def batch(*events: Event, epoch: bytes = EPOCH) -> EventBatch:
    return EventBatch(0.0, list(events), None, epoch)


def stored(*names: object, parent: bytes = ROOT) -> BlockStored:
    return BlockStored([key_of(name) for name in names], parent, [], 16, None, "DEVICE")


def started() -> EventFollower:
    follower = EventFollower(EPOCH)
    assert follower.ask(0.0) == 0
    follower.on_replay_end(0.0)
    return follower


def test_chains_are_learnt_with_each_blocks_parent() -> None:
    follower = started()
    follower.on_live(0, batch(stored("a", "b"), stored("c", parent=key_of("b"))), 0.0)
    assert follower.announced == {key_of("a"): ROOT, key_of("b"): key_of("a"), key_of("c"): key_of("b")}
    assert follower.take_stored() == [key_of(n) for n in "abc"]
    assert follower.take_stored() == []
    follower.on_live(1, batch(stored("d"), BlockRemoved([key_of("a"), key_of("d")])), 0.0)
    assert set(follower.announced) == {key_of("b"), key_of("c")}
    assert follower.take_stored() == []


def test_live_batches_wait_for_the_replay_that_precedes_them() -> None:
    follower = EventFollower(EPOCH)
    follower.on_live(2, batch(stored("c")), 0.0)
    assert follower.ask(0.0) == 0
    assert follower.ask(0.1) is None
    follower.on_replay(0, batch(stored("a")), 0.1)
    follower.on_replay(1, batch(stored("b")), 0.1)
    follower.on_live(3, batch(BlockRemoved([key_of("c")])), 0.1)
    follower.on_replay(2, batch(stored("c")), 0.1)
    follower.on_replay_end(0.1)
    assert set(follower.announced) == {key_of("a"), key_of("b")}


def test_a_gap_asks_from_the_first_missing_number_but_not_in_a_storm() -> None:
    follower = started()
    follower.on_live(0, batch(stored("a")), 10.0)
    follower.on_live(2, batch(stored("c")), 10.0)
    assert set(follower.announced) == {key_of("a")}
    assert follower.ask(10.0) == 1
    follower.on_replay_end(10.0)  # the publisher had nothing: the gap stays
    assert follower.ask(10.0 + ASK_AGAIN_S / 2) is None
    assert follower.ask(10.0 + ASK_AGAIN_S) == 1


def test_a_snapshot_replaces_everything() -> None:
    follower = started()
    follower.on_live(0, batch(stored("a", "b")), 0.0)
    follower.on_live(9, batch(stored("late")), 0.0)
    assert follower.ask(1.0) == 1
    follower.on_replay(8, batch(AllBlocksCleared(), stored("b")), 1.0)
    follower.on_replay(8, batch(stored("c", parent=key_of("b"))), 1.0)
    follower.on_replay_end(1.0)
    assert set(follower.announced) == {key_of("b"), key_of("c"), key_of("late")}


def test_silence_is_broken_by_asking_and_an_answer_that_does_not_come_by_asking_again() -> None:
    follower = started()
    assert follower.next_ask_s() == RESYNC_S
    assert follower.ask(RESYNC_S - 0.1) is None
    assert follower.ask(RESYNC_S) == 0
    assert follower.ask(RESYNC_S + REPLAY_TIMEOUT_S - 0.1) is None
    assert follower.ask(RESYNC_S + REPLAY_TIMEOUT_S) == 0


def test_another_epochs_and_undecodable_batches_are_counted_and_passed_over() -> None:
    follower = started()
    follower.on_live(0, batch(stored("x"), epoch=b"elsewhen"), 0.0)
    follower.on_live(1, None, 0.0)
    follower.on_live(2, batch(stored("a")), 0.0)
    assert set(follower.announced) == {key_of("a")}
    assert follower.num_bad_batches == 2


def test_names_of_a_foreign_worker_are_left_out() -> None:
    follower = started()
    follower.on_live(0, batch(BlockStored([1, 2**64 - 1, b"short"], None, [1, 2], 16)), 0.0)
    assert follower.announced == {}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_view_converges_whatever_is_lost(data: st.DataObject) -> None:
    follower, now = EventFollower(EPOCH), 0.0
    history: list[EventBatch] = []
    remembered = data.draw(st.sampled_from([1, 3, 100]))
    truth: dict[bytes, bytes] = {}

    def answer(start: int) -> list[tuple[int, EventBatch]]:
        oldest = max(0, len(history) - remembered)
        if oldest <= start <= len(history):
            return [(i, history[i]) for i in range(start, len(history))]
        alone = [batch(BlockStored([key], parent, [], 16)) for key, parent in truth.items()]
        return [(len(history) - 1, part) for part in (batch(AllBlocksCleared()), *alone)]

    def ask(lossy: bool) -> None:
        start = follower.ask(now)
        if start is None:
            return
        for seq, content in answer(start):
            if lossy and data.draw(st.integers(0, 3)) == 0:
                return
            follower.on_replay(seq, content, now)
        if not lossy or data.draw(st.booleans()):
            follower.on_replay_end(now)

    for i in range(data.draw(st.integers(1, 25))):
        now += data.draw(st.sampled_from([0.0, 0.1, 1.0]))
        if truth and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(truth)))
            del truth[gone]
            event: Event = BlockRemoved([gone])
        else:
            truth[key_of(i)] = ROOT
            event = stored(i)
        history.append(batch(event))
        if data.draw(st.booleans()):
            follower.on_live(len(history) - 1, history[-1], now)
        ask(lossy=True)
    for _ in range(3):
        now += 5.0
        ask(lossy=False)
    assert follower.announced == truth
