"""Runs: what they promise without faults and with them, and that a seed is a run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tandem.sim.faults.run import run_seed, run_seeds
from tandem.sim.faults.shape import Shape
from tests.sim.faults.mutants import send_a_second_terminal_message

DIGEST = "from tandem.sim.faults.run import run_seed; r = run_seed(7, 120); print(r.digest, r.num_events, r.violation)"


def test_without_faults_whoever_stays_gets_everything() -> None:
    result = run_seed(3, 100, Shape(requests_per_fault=0))
    assert result.violation == ""
    outcomes = result.totals.outcomes
    assert outcomes["completed"] + outcomes["cancelled"] + outcomes["deadline_exceeded"] == 100
    assert outcomes["completed"] > 85
    assert result.seen["reads"] > 100, "blocks were handed over"
    assert result.faults.total() == 0


def test_a_seed_is_a_run_whatever_the_order_of_sets() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout
        for seed in (1, 2)
    }
    assert len(said) == 1


def test_a_seed_that_fails_comes_with_the_story_of_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    send_a_second_terminal_message(monkeypatch)
    (result,) = run_seeds(1, 1, 100)
    assert "after its terminal message" in result.violation
    assert "VIOLATION" in result.story[-1]
    assert any("FAULT" in line for line in result.story)
    assert not any(logged for logged in result.story if "Traceback" in logged)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_seeds_hold() -> None:
    assert [(result.seed, result.violation) for result in run_seeds(1, 100, 300) if result.violation] == []
