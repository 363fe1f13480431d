"""Clusters that several tests share; each is stopped, and must stop cleanly, when its module is done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.harness import RunningCluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """1 router, 1 prefill worker, 1 decode worker, 1 pool node, the real model in bf16."""
    running = RunningCluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield running.start()
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"
