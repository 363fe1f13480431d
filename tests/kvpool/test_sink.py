"""The sink's core under a virtual clock: order of sources, what is believed, leases, taint, and that it always ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvpool.sink import (
    LEASE_MARGIN,
    TRANSITIONS,
    AbortRead,
    Action,
    AskState,
    Committed,
    FetchEnded,
    FetchMachine,
    FetchPlan,
    Send,
    StartRead,
    WantedBlock,
)
from protos.control import Cancel, Done, Endpoints, Fetch, Miss, Parked, Ready, ReadyBlock, Source

SIZE = 16
ROOT = b"r" * 16
DEADLINE = 20.0


def key_of(name: str) -> bytes:
    return f"{name:>16}".encode()


def sum_of(name: str) -> bytes:
    return f"{name:>8}".encode()


def source_of(process: str) -> Source:
    return Source(process, f"epoch{process:>3}".encode(), "HOST", Endpoints("", "", ""))


P, Q, W = source_of("p"), source_of("q"), source_of("w")


def plan_of(names: str, sources: Sequence[Source], wait: str = "") -> FetchPlan:
    parents = [ROOT, *map(key_of, names)]
    wanted = tuple(
        WantedBlock(key_of(n), p, SIZE, 100 + i) for i, (n, p) in enumerate(zip(names, parents, strict=False))
    )
    return FetchPlan(b"f" * 16, "request", wanted, tuple(sources), wait, DEADLINE)


def as_array(sums: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(sums), dtype=">u8").astype(np.uint64)


class Run:
    """A machine and everything it said, by kind."""

    def __init__(
        self,
        names: str,
        sources: Sequence[Source],
        wait: str = "",
        *,
        portion: int = 100,
        held: Sequence[int] = (),
        parallel: Sequence[int] = (),
    ) -> None:
        self.names = names
        plan = replace(plan_of(names, sources, wait), held=tuple(held))
        self.machine = FetchMachine(plan, max_read_blocks=portion, parallel=parallel, silence_s=3.0)
        self.portion = portion
        self.fetches: list[tuple[Source, Fetch]] = []
        self.others: list[Done | Cancel] = []
        self.reads: list[StartRead] = []
        self.aborts: list[AbortRead] = []
        self.committed: dict[bytes, str] = {}
        self.ended: FetchEnded | None = None
        self.do(self.machine.start(0.0))

    def do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            assert self.ended is None, "something was done after the end"
            match action:
                case Send(source=source, message=message):
                    if isinstance(message, Fetch):
                        self.fetches.append((source, message))
                    else:
                        self.others.append(message)
                case StartRead():
                    self.reads.append(action)
                case AbortRead():
                    self.aborts.append(action)
                case Committed(batch=batch):
                    wanted = {w.key: w.block_id for w in self.machine.plan.wanted}
                    assert [wanted[block.key] for block in batch.blocks] == list(batch.block_ids)
                    self.committed |= {block.key: batch.source.process for block in batch.blocks}
                case FetchEnded():
                    self.ended = action

    def asked(self) -> list[tuple[str, str, bool]]:
        """`(process, names, wait)` of each Fetch so far."""
        return [(s.process, b"".join(k.strip() for k in f.keys).decode(), f.wait) for s, f in self.fetches]

    def block(self, name: str, **wrong: object) -> ReadyBlock:
        parent = key_of(self.names[self.names.index(name) - 1]) if self.names.index(name) else ROOT
        fields: dict[str, object] = {
            "key": key_of(name), "location": 7, "num_tokens": SIZE, "checksum": sum_of(name), "parent": parent, **wrong
        }  # fmt: skip
        return ReadyBlock(**fields)  # type: ignore[arg-type]

    def ready(
        self, ask: int, names: str, now: float = 0.1, *, batch: int = 0, waited_s: float = 0.0, lease_s: float = 5.0
    ) -> None:
        source, fetch = self.fetches[ask]
        blocks = [self.block(n) for n in names]
        self.do(self.machine.on_message(Ready(fetch.fetch_id, batch, source.epoch, 5.0, blocks, waited_s), now))

    def miss(self, ask: int, names: str, now: float = 0.1) -> None:
        self.do(self.machine.on_message(Miss(self.fetches[ask][1].fetch_id, [key_of(n) for n in names]), now))

    def read(self, number: int, sums: str | None, now: float = 0.2) -> None:
        checksums = None if sums is None else as_array([sum_of(n) for n in sums])
        self.do(self.machine.on_read(self.reads[number].read_id, checksums, "shm", now))

    def result(self) -> tuple[str, str]:
        assert self.ended is not None
        return "".join(k.decode().strip() for k in self.ended.committed), "".join(
            k.decode().strip() for k in self.ended.missing
        )


def test_a_plain_fetch_reads_verifies_commits_and_says_done() -> None:
    run = Run("abc", [P, Q])
    assert run.asked() == [("p", "abc", False)]
    run.ready(0, "abc")
    assert run.reads == [StartRead(P, 0, (7, 7, 7), (100, 101, 102), 4.0)]
    assert not run.committed
    run.read(0, "abc")
    assert run.committed == {key_of(n): "p" for n in "abc"}
    assert run.others == [Done(run.fetches[0][1].fetch_id, 0)]
    assert run.result() == ("abc", "")


def test_missed_keys_go_to_the_next_source_while_others_are_still_read() -> None:
    run = Run("abcd", [P, Q, W], wait="w")
    run.ready(0, "ab")
    run.miss(0, "cd")
    run.miss(1, "cd")
    assert run.asked() == [("p", "abcd", False), ("q", "cd", False), ("w", "cd", True)]
    assert len({fetch.fetch_id for _, fetch in run.fetches}) == 3
    run.read(0, "ab")
    run.ready(2, "c", 8.0, waited_s=7.9)
    run.ready(2, "d", 9.0, batch=1, waited_s=8.9)
    run.read(2, "d", 9.0)
    run.read(1, "c", 9.1)
    assert run.committed == {key_of(n): p for n, p in zip("abcd", "ppww", strict=True)}
    assert run.result() == ("abcd", "")


def test_what_no_source_has_is_missing() -> None:
    run = Run("ab", [P, Q])
    run.miss(0, "ab")
    run.ready(1, "a")
    run.miss(1, "b")
    run.read(0, "a")
    assert run.result() == ("a", "b")
    assert Run("ab", []).result() == ("", "ab")


def test_a_corrupt_block_is_not_committed_and_its_source_not_asked_again() -> None:
    run = Run("abc", [P, Q])
    run.ready(0, "ab")
    run.read(0, "ax")
    assert run.committed == {key_of("a"): "p"}
    assert sorted(run.asked()[1:]) == [("q", "b", False), ("q", "c", False)]
    assert run.machine.num_corrupt_blocks == 1
    for ask, name in enumerate("cb" if run.asked()[1][1] == "c" else "bc", start=1):
        run.ready(ask, name)
        run.read(ask, name)
    assert run.result() == ("abc", "")


@pytest.mark.parametrize(
    "wrong", [{"parent": b"x" * 16}, {"num_tokens": 15}, {"key": key_of("z")}], ids=["parent", "num_tokens", "key"]
)
def test_an_answer_that_cannot_be_true_is_not_read(wrong: dict[str, object]) -> None:
    run = Run("ab", [P, Q])
    source, fetch = run.fetches[0]
    run.do(run.machine.on_message(Ready(fetch.fetch_id, 0, source.epoch, 5.0, [run.block("b", **wrong)]), 0.1))
    assert not run.reads
    assert run.asked()[1:] == [("q", "ab", False)]


def test_another_epoch_or_a_key_twice_is_not_read() -> None:
    for epoch, blocks in ((b"epoch999", "a"), (P.epoch, "aa")):
        run = Run("ab", [P, Q])
        ready = Ready(run.fetches[0][1].fetch_id, 0, epoch, 5.0, [run.block(n) for n in blocks])
        run.do(run.machine.on_message(ready, 0.1))
        assert not run.reads
        assert run.asked()[1:] == [("q", "ab", False)]


def test_a_lost_source_hands_its_keys_on_once_its_reads_are_quiet() -> None:
    run = Run("abc", [P, Q])
    run.ready(0, "a")
    run.do(run.machine.on_source_lost("p", P.epoch, 0.2))
    assert run.asked()[1:] == [("q", "bc", False)]
    assert run.aborts == [AbortRead(P, 0)]
    run.do(run.machine.on_aborted(0, True, 0.2))
    assert run.asked()[2:] == [("q", "a", False)]
    run.ready(1, "bc")
    run.ready(2, "a")
    run.read(1, "bc")
    run.read(2, "a")
    assert run.result() == ("abc", "")


def test_a_source_that_was_lost_before_its_turn_is_skipped() -> None:
    run = Run("a", [P, Q, W])
    run.do(run.machine.on_source_lost("q", Q.epoch, 0.1))
    run.miss(0, "a")
    assert run.asked()[1:] == [("w", "a", False)]


def test_memory_that_a_transport_may_still_write_is_tainted_and_not_read_into_again() -> None:
    run = Run("ab", [P, Q])
    run.ready(0, "a")
    run.do(run.machine.on_source_lost("p", P.epoch, 0.2))
    run.do(run.machine.on_aborted(0, False, 0.2))
    run.ready(1, "b")
    run.read(1, "b")
    assert run.result() == ("b", "a")
    assert run.ended is not None
    assert run.ended.tainted == (100,)
    assert all("a" not in names for _, names, _ in run.asked()[1:])
    assert not any(isinstance(message, Cancel) for message in run.others), "its lease must not end early"


def test_a_lease_that_may_be_over_is_not_used_and_the_source_asked_again() -> None:
    run = Run("a", [P])
    late = 5.0 * (1 - LEASE_MARGIN)
    run.ready(0, "a", late)
    assert not run.reads
    assert run.others == [Done(run.fetches[0][1].fetch_id, 0)]
    assert run.asked() == [("p", "a", False)] * 2
    run.ready(1, "a", late + 3.9)
    assert len(run.reads) == 1


def test_the_time_that_the_source_waited_does_not_count_against_its_lease() -> None:
    run = Run("a", [W], wait="w")
    run.ready(0, "a", 10.0, waited_s=9.0)
    assert len(run.reads) == 1
    run = Run("a", [W], wait="w")
    run.ready(0, "a", 10.0, waited_s=5.0)
    assert not run.reads


def test_a_silent_source_is_given_up_but_one_that_is_asked_to_wait_is_asked_again_until_the_deadline() -> None:
    run = Run("ab", [P, W], wait="w")
    assert run.machine.next_deadline() == 3.0
    run.do(run.machine.tick(2.9))
    assert len(run.fetches) == 1
    run.do(run.machine.tick(3.0))
    assert run.asked()[1:] == [("w", "ab", True)]
    assert run.others == [Cancel(run.fetches[0][1].fetch_id)]
    assert run.fetches[1][1].deadline_s == DEADLINE - 3.0
    assert run.machine.next_deadline() == 6.0
    run.do(run.machine.tick(6.0))
    first, again = run.fetches[1][1], run.fetches[2][1]
    assert (again.fetch_id, again.keys, again.wait) == (first.fetch_id, first.keys, True), "the same, if it is known"
    run.ready(1, "a", 6.1, waited_s=5.0)
    run.read(0, "a", 6.2)
    run.do(run.machine.tick(DEADLINE - 0.1))
    assert run.asked()[3:] == [("w", "b", True)], "what it has answered is not asked for again"
    assert run.ended is None
    run.do(run.machine.tick(DEADLINE))
    assert run.result() == ("a", "b")


def test_a_source_that_is_asked_to_wait_is_given_up_when_it_does_not_even_say_that_it_knows() -> None:
    run = Run("ab", [W, P], wait="w")
    run.do(run.machine.tick(3.0))
    run.do(run.machine.on_message(Parked(run.fetches[0][1].fetch_id), 3.1))
    run.do(run.machine.tick(6.2))
    run.do(run.machine.on_message(Parked(run.fetches[0][1].fetch_id), 6.3))
    run.do(run.machine.tick(9.4))
    assert run.asked() == [("w", "ab", True)] * 4
    assert not run.others
    run.do(run.machine.tick(12.4))
    assert run.others == [Cancel(run.fetches[0][1].fetch_id)]
    assert run.asked()[4:] == [("p", "ab", False)]
    run.do(run.machine.tick(15.4))
    assert run.result() == ("", "ab")


def test_a_batch_is_read_in_portions_and_done_after_the_last() -> None:
    run = Run("abcde", [P], portion=2)
    run.ready(0, "abcde")
    assert [len(read.locations) for read in run.reads] == [2, 2, 1]
    run.read(2, "e")
    assert run.committed == {key_of("e"): "p"}
    run.read(0, "ab")
    assert not run.others
    run.read(1, "cd")
    assert run.others == [Done(run.fetches[0][1].fetch_id, 0)]
    assert run.result() == ("abcde", "")


def test_a_portion_that_is_wrong_ends_the_others_of_its_source() -> None:
    run = Run("abcd", [P, Q], portion=2)
    run.ready(0, "abcd")
    run.read(0, None)
    assert run.aborts == [AbortRead(P, 1)]
    assert run.asked()[1:] == [("q", "ab", False)]
    run.do(run.machine.on_aborted(1, True, 0.3))
    assert run.asked()[2:] == [("q", "cd", False)]


def test_a_read_that_could_not_begin_in_time_is_asked_of_the_same_source_again() -> None:
    run = Run("abc", [P, Q], portion=2)
    run.ready(0, "abc")
    run.read(0, "ab")
    run.do(run.machine.on_read_late(run.reads[1].read_id, 4.5))
    assert run.others == [Done(run.fetches[0][1].fetch_id, 0)], "its lease has no use any more"
    assert run.asked()[1:] == [("p", "c", False)]
    run.ready(1, "c", 4.6)
    run.read(2, "c", 4.7)
    assert run.result() == ("abc", "")


def test_sources_that_hold_the_same_blocks_share_the_work_and_stand_in_for_each_other() -> None:
    run = Run("abcdefgh", [P, Q, W], wait="w", portion=2, held=[8, 6, 8], parallel=[0, 1])
    assert run.asked() == [("p", "abefgh", False), ("q", "cd", False)]
    run.miss(1, "cd")
    assert run.asked()[2:] == [("p", "cd", False)]
    run.miss(2, "d")
    assert run.asked()[3:] == [("w", "d", True)]
    run = Run("abcd", [P, Q], portion=2, held=[4, 4])
    assert run.asked() == [("p", "abcd", False)], "there is nothing to gain"


def test_a_late_answer_of_a_source_that_was_given_up_is_ignored() -> None:
    run = Run("a", [P, Q])
    run.do(run.machine.tick(3.0))
    run.ready(0, "a", 3.1)
    assert not run.reads
    run.ready(1, "a", 3.2)
    run.read(0, "a", 3.3)
    assert run.committed == {key_of("a"): "q"}


def test_cancel_ends_with_what_is_there_and_after_the_reads() -> None:
    run = Run("abc", [P, Q])
    run.ready(0, "a")
    run.read(0, "a")
    run.ready(0, "b", batch=1)
    run.do(run.machine.cancel(0.5))
    assert run.ended is None, "a read is still running"
    assert not any(isinstance(message, Cancel) for message in run.others)
    run.do(run.machine.on_aborted(1, True, 0.6))
    assert run.result() == ("a", "bc")
    assert isinstance(run.others[-1], Cancel)
    assert len(run.fetches) == 1


def test_a_source_named_twice_is_asked_once() -> None:
    run = Run("a", [P, P, Q])
    run.miss(0, "a")
    assert run.asked()[1:] == [("q", "a", False)]


def test_the_table_reaches_its_end_from_everywhere() -> None:
    for state in AskState:
        out = {after for (before, _), after in TRANSITIONS.items() if before is state}
        assert (not out) if state is AskState.OVER else AskState.OVER in out


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_sources_do_the_fetch_ends_once_with_every_key_accounted_for(data: st.DataObject) -> None:
    names = "abcdef"[: data.draw(st.integers(1, 6))]
    sources = data.draw(st.lists(st.sampled_from([P, Q, W]), max_size=4))
    run = Run(
        names,
        sources,
        wait=data.draw(st.sampled_from(["", "w"])),
        portion=data.draw(st.sampled_from([1, 2, 100])),
        held=data.draw(st.lists(st.integers(0, 6), min_size=len(sources), max_size=len(sources))),
        parallel=data.draw(st.lists(st.integers(0, 3), unique=True, max_size=4)),
    )
    now, batch = 0.0, 0
    pending: dict[int, StartRead] = {}
    seen_reads = seen_aborts = 0
    landed: set[bytes] = set()
    expected: dict[int, list[bytes]] = {}

    def note() -> None:
        nonlocal seen_reads, seen_aborts
        for read in run.reads[seen_reads:]:
            pending[read.read_id] = read
        seen_reads = len(run.reads)
        for abort in run.aborts[seen_aborts:]:
            seen_aborts += 1
            if abort.read_id in pending:
                del pending[abort.read_id]
                run.do(run.machine.on_aborted(abort.read_id, data.draw(st.booleans()), now))
                note()

    def on_ready() -> None:
        nonlocal batch
        source, fetch = data.draw(st.sampled_from(run.fetches))
        keys = data.draw(st.lists(st.sampled_from(fetch.keys), unique=True, max_size=3))
        blocks = [run.block(k.decode().strip()) for k in keys]
        lie = data.draw(st.sampled_from(["", "", "", "epoch", "parent", "tokens"]))
        if lie in ("parent", "tokens") and blocks:
            wrong: dict[str, object] = {"parent": b"?" * 16} if lie == "parent" else {"num_tokens": 3}
            blocks[0] = run.block(keys[0].decode().strip(), **wrong)
        epoch = b"elsewhen" if lie == "epoch" else source.epoch
        lease_s = data.draw(st.sampled_from([5.0, 0.5, 0.0, -1.0, float("nan")]))
        before = len(run.reads)
        run.do(run.machine.on_message(Ready(fetch.fetch_id, batch, epoch, lease_s, blocks, 0.0), now))
        batch += 1
        if len(run.reads) > before:
            assert not lie or not blocks
            assert now < fetch_sent[fetch.fetch_id] + lease_s
            portion = [keys[i : i + run.portion] for i in range(0, len(keys), run.portion)]
            expected.update((read.read_id, part) for read, part in zip(run.reads[before:], portion, strict=True))

    def on_miss() -> None:
        _, fetch = data.draw(st.sampled_from(run.fetches))
        keys = data.draw(st.lists(st.sampled_from([*fetch.keys, b"?" * 16]), max_size=4))
        run.do(run.machine.on_message(Miss(fetch.fetch_id, keys), now))

    def on_read() -> None:
        if not pending:
            return
        read_id = data.draw(st.sampled_from(sorted(pending)))
        del pending[read_id]
        keys = expected[read_id]
        how = data.draw(st.sampled_from(["good", "good", "failed", "corrupt", "late"]))
        if how == "late":
            run.do(run.machine.on_read_late(read_id, now))
            return
        sums: list[bytes] | None = [sum_of(k.decode().strip()) for k in keys]
        if how == "corrupt" and sums:
            sums[0] = b"corrupt!"
        if how == "failed":
            sums = None
        landed.update(k for k, s in zip(keys, sums or [], strict=False) if s != b"corrupt!")
        run.do(run.machine.on_read(read_id, None if sums is None else as_array(sums), "shm", now))

    def on_lost() -> None:
        source = data.draw(st.sampled_from([P, Q, W]))
        run.do(run.machine.on_source_lost(source.process, source.epoch, now))

    fetch_sent: dict[bytes, float] = {}
    steps: list[Callable[[], None]] = [on_ready, on_ready, on_miss, on_read, on_read, on_lost]
    for _ in range(data.draw(st.integers(0, 30))):
        for _, fetch in run.fetches:
            fetch_sent.setdefault(fetch.fetch_id, now)
        if run.ended is not None or not run.fetches:
            break
        now += data.draw(st.sampled_from([0.0, 0.1, 1.0]))
        data.draw(st.sampled_from(steps))()
        note()
        run.do(run.machine.tick(now))
        note()
    if run.ended is None and data.draw(st.booleans()):
        run.do(run.machine.cancel(now))
        note()
    while run.ended is None:
        now = max(now, run.machine.next_deadline())
        assert now <= DEADLINE + 1
        run.do(run.machine.tick(now))
        note()
    assert not pending, "the fetch ended with a read running"
    assert set(run.ended.committed) == set(run.committed)
    assert set(run.committed) <= landed, "something was committed that never arrived whole"
    assert set(run.ended.committed) | set(run.ended.missing) == {key_of(n) for n in names}
    assert not set(run.ended.committed) & set(run.ended.missing)
    destinations = {w.block_id: w.key for w in run.machine.plan.wanted}
    assert all(destinations[block_id] in run.ended.missing for block_id in run.ended.tainted)
    assert all(wait == (process == run.machine.plan.wait_source) for process, _, wait in run.asked())
    assert run.machine.tick(now + 100) == []
    assert run.machine.on_source_lost("p", P.epoch, now) == []
