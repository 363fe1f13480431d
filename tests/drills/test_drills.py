"""Drills as they are played, on real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tandem.drills import spec
from tandem.drills.run import Runner
from tandem.drills.spec import ClusterSpec, SignalStep, When

SMALL = ClusterSpec(processes=["router", "decode-0", "decode-1"], config={"pool": {"replicas": 0}}, layers=1)


@pytest.mark.timeout(240)
def test_a_drill_holds_and_one_whose_fault_does_not_fire_fails(tmp_path: Path) -> None:
    greedy = msgspec.structs.replace(spec.load("decode-kill-greedy"), cluster=SMALL)
    never = SignalStep("decode-0", when=When(tokens={"q": 10_000}, within_s=3.0))
    tame = msgspec.structs.replace(greedy, name="tame", spec=msgspec.structs.replace(greedy.spec, steps=[never]))
    with Runner(tmp_path) as runner:
        result = runner.play(greedy)
        assert result.ok, [check for check in result.checks if not check.ok]
        assert [name for _, name in result.marks] in (["KILL decode-0"], ["KILL decode-1"])
        failed = {check.check for check in runner.play(tame).checks if not check.ok}
    assert "the faults fired" in failed
    assert "tokens, text and logprobs are those of the fault-free run" not in failed


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_drills_hold(tmp_path: Path) -> None:
    picture = tmp_path / "drills.html"
    done = subprocess.run(
        [sys.executable, "-m", "tandem.cli", "drill", "--all", "--json", "--picture", str(picture)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if not line["ok"]] == [], done.stderr[-20_000:]
    assert {line["check"].partition(":")[0] for line in lines} == set(spec.names())
    assert done.returncode == 0
    assert picture.exists()
