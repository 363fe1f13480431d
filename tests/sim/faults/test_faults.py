"""The simulation of failures: what must hold does, and it notices what is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tandem.sim.faults.run import run_seed
from tandem.sim.faults.shape import Shape
from tests.sim.faults.mutants import MUTANTS

STORMY = Shape(requests_per_fault=8)
"""Many faults, so that few requests show much."""
MUTANT_SEEDS = range(2, 40)


@pytest.mark.parametrize("seed", range(101, 111))
def test_whatever_fails_every_stream_is_true_and_nothing_is_left(seed: int) -> None:
    result = run_seed(seed, 100)
    assert result.violation == "", "\n".join(run_seed(seed, 100, keep_story=True).story[-40:])
    assert result.totals.num_tokens > 1000
    assert sum(result.faults.values()) == 2


def test_a_seed_is_a_run() -> None:
    first, again, other = run_seed(1, 60), run_seed(1, 60), run_seed(2, 60)
    assert first.digest == again.digest
    assert first.digest != other.digest


@pytest.mark.parametrize("breaks", MUTANTS.values(), ids=MUTANTS)
def test_what_is_broken_on_purpose_is_noticed(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = 0
    for seed in MUTANT_SEEDS:
        with monkeypatch.context() as patch:
            breaks(patch)
            if run_seed(seed, 80, STORMY).violation:
                break
    else:
        pytest.fail(f"no violation in {len(MUTANT_SEEDS)} seeds")
    # The same run of what isn't broken holds: it was the breakage that was noticed.
    assert run_seed(seed, 80, STORMY).violation == ""
