"""What checkpoints cost, measured on a real cluster whose pool node is stopped and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tandem.bench.tiers import checkpoint_cost
from tandem.config import Config, load_config
from tests.system.harness import RunningCluster


@pytest.mark.slow
def test_checkpoints_are_measured_while_the_pool_node_works_and_while_it_stands_still(tmp_path: Path) -> None:
    running: list[RunningCluster] = []

    @contextmanager
    def cluster(config: Config) -> Iterator[str]:
        assert (config.prefill.replicas, config.decode.replicas, config.pool.replicas) == (0, 1, 1)
        running.append(RunningCluster(tmp_path))
        try:
            running[0].start(["router", "pool-0", "decode-0"])
            yield running[0].client.target
            pool = running[0].processes["pool-0"]
            assert psutil.Process(pool.pid).status() != psutil.STATUS_STOPPED
            assert running[0].status("pool-0").fetched_blocks >= 3 * 256 // 16
        finally:
            running[0].stop()

    said: list[str] = []
    (cost,) = checkpoint_cost(load_config(None), cluster, said.append, num_turns=1)
    assert said == ["turn 1 of 1, without the pool node", "turn 1 of 1, with the pool node"]
    assert 0 < cost.value < 1
    assert cost.reference_value is not None
    assert cost.ok == (cost.value <= 1.02 * cost.reference_value)
