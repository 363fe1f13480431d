"""A core is claimed once, until its claimer is gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tandem import cores
from tandem.cores import claim_cores


@pytest.fixture(autouse=True)
def _only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Core numbers that no machine has, so that nothing else on this one claims them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {70_000, 70_001, 70_002})


def test_each_core_is_claimed_once_and_comes_back() -> None:
    first = claim_cores(2)
    assert first is not None
    assert first.ids == [70_000, 70_001]
    assert claim_cores(2) is None
    second = claim_cores(1)
    assert second is not None
    assert second.ids == [70_002]
    first.close()
    again = claim_cores(2)
    assert again is not None
    assert again.ids == first.ids
    again.close()
    second.close()


def test_a_killed_process_gives_its_cores_back() -> None:
    code = (
        "import os, sys; os.sched_getaffinity = lambda pid: {70_000}\n"
        "from tandem.cores import claim_cores\n"
        "held = claim_cores(1); print(held.ids, flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "[70000]\n"
        assert claim_cores(3) is None
    finally:
        other.kill()
        other.communicate()
    held = claim_cores(3)
    assert held is not None
    held.close()


def test_one_hardware_thread_of_each_core_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_others_before", lambda core: {70_000: 0, 70_001: 1, 70_002: 0}[core])
    held = claim_cores(2)
    assert held is not None
    assert held.ids == [70_000, 70_002]
    held.close()
