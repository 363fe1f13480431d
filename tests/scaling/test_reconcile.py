"""From the workers that there are to those that are wanted."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tandem.scaling.reconcile import Leave, Start, State, Worker, reconcile
from tandem.scaling.scaler import Counts

RUNNING, STARTING, LEAVING = State.RUNNING, State.STARTING, State.LEAVING


def test_the_least_busy_leaves_and_one_that_does_not_serve_yet_before_it() -> None:
    workers = [
        Worker("decode-0", "decode", RUNNING, 5.0),
        Worker("decode-1", "decode", RUNNING, 2.0),
        Worker("decode-2", "decode", STARTING),
        Worker("prefill-0", "prefill", RUNNING),
    ]
    assert reconcile(Counts(1, 2), workers) == [Leave("decode-2")]
    assert reconcile(Counts(1, 1), workers) == [Leave("decode-2"), Leave("decode-1")]


def test_of_equally_busy_ones_the_youngest_leaves() -> None:
    workers = [Worker(f"decode-{number}", "decode", RUNNING, 1.0) for number in (2, 10, 9)]
    assert reconcile(Counts(1, 2), [*workers, Worker("prefill-0", "prefill", RUNNING)]) == [Leave("decode-10")]


def test_a_worker_changes_its_role_where_one_role_has_too_many_and_the_other_too_few() -> None:
    workers = [Worker("prefill-0", "prefill", RUNNING, 9.0), Worker("prefill-1", "prefill", RUNNING)]
    assert reconcile(Counts(1, 2), workers) == [Leave("prefill-1", "decode"), Start("decode")]


def test_the_place_of_one_that_leaves_is_taken_again_when_it_is_wanted_after_all() -> None:
    leaving = Worker("decode-1", "decode", LEAVING)
    here = [Worker("prefill-0", "prefill", RUNNING), Worker("decode-0", "decode", RUNNING), leaving]
    assert reconcile(Counts(1, 1), here) == []
    assert reconcile(Counts(1, 2), here) == [Leave("decode-1", "decode")]
    assert reconcile(Counts(1, 1), [*here[:2], replace(leaving, then="decode")]) == [Leave("decode-1")]


NAMES = st.sampled_from(["prefill", "decode"])


@st.composite
def clusters(draw: st.DrawFn) -> list[Worker]:
    found = []
    for number in range(draw(st.integers(0, 8))):
        role, state = draw(NAMES), draw(st.sampled_from(State))
        then = draw(st.none() | NAMES) if state is LEAVING else None
        found.append(Worker(f"{role}-{number}", role, state, draw(st.floats(0, 9)), then))
    return found


@given(clusters(), st.integers(1, 6), st.integers(1, 6))
def test_a_few_rounds_end_in_what_is_wanted_with_no_place_too_many(
    workers: list[Worker], prefill: int, decode: int
) -> None:
    wanted, number, places = Counts(prefill, decode), 100, max(len(workers), prefill + decode)
    for _ in range(4):
        by_name = {worker.name: worker for worker in workers}
        for action in reconcile(wanted, workers):
            match action:
                case Start(role=role):
                    number += 1
                    by_name[f"{role}-{number}"] = Worker(f"{role}-{number}", role, STARTING)
                case Leave(name=name, then=then):
                    by_name[name] = replace(by_name[name], state=LEAVING, then=then)
        assert len(by_name) <= places
        assert reconcile(wanted, list(by_name.values())) == []  # the same again asks for nothing
        workers = []
        for worker in by_name.values():  # who leaves has left, who starts serves
            if worker.state is not LEAVING:
                workers.append(replace(worker, state=RUNNING))
            elif worker.then is not None:
                number += 1
                workers.append(Worker(f"{worker.then}-{number}", worker.then, RUNNING))
    assert sorted(worker.role for worker in workers) == ["decode"] * decode + ["prefill"] * prefill
