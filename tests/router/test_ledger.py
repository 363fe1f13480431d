"""The ledger adds what a worker's report doesn't include yet, once."""

from __future__ import annotations

from protos.control import Fence, Load
from router.ledger import Ledger, WorkerLoad


def fence(number: int) -> Fence:
    return Fence("q", 0, "decode", number)


def test_own_dispatches_count_until_a_report_includes_them() -> None:
    ledger = Ledger()
    ledger.join("d0")
    ledger.dispatched("d0", fence(0), 100, 1)
    ledger.dispatched("d0", fence(1), 50, 2)
    assert ledger.load("d0") == WorkerLoad(150, 3)
    ledger.reported("d0", Load(num_dispatches=1, num_waiting=1, waiting_tokens=90))
    assert ledger.load("d0") == WorkerLoad(140, 3)
    ledger.reported("d0", Load(num_dispatches=2, num_running=3, waiting_tokens=10))
    assert ledger.load("d0") == WorkerLoad(10, 3)
    assert ledger.num_unreported() == 0


def test_what_ended_before_it_was_reported_counts_no_more() -> None:
    ledger = Ledger()
    ledger.join("d0")
    ledger.dispatched("d0", fence(0), 100, 1)
    ledger.ended("d0", fence(0))
    ledger.ended("d0", fence(0))
    assert ledger.load("d0") == WorkerLoad(0, 0)


def test_a_lost_worker_takes_its_account_along_and_counts_anew_when_it_comes_back() -> None:
    ledger = Ledger()
    ledger.join("d0")
    ledger.dispatched("d0", fence(0), 100, 1)
    ledger.forget("d0")
    assert ledger.processes() == set()
    ledger.join("d0")
    ledger.dispatched("d0", fence(1), 7, 1)
    assert ledger.load("d0") == WorkerLoad(7, 1)
    ledger.reported("d0", Load(num_dispatches=1))
    assert ledger.load("d0") == WorkerLoad(0, 0)
