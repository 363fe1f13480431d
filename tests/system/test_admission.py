"""Who waits and who doesn't when more comes than a real cluster can compute."""

from __future__ import annotations

import random
import re
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from protos import tandem_pb2 as pb
from tandem.drills.model import shallow
from tandem.errors import Overloaded
from tests.system.harness import RunningCluster, wait_until

NUM_FLOOD = 30
PROMPT_TOKENS = 300


def shallow_model() -> dict[str, Any]:
    """Who waits doesn't depend on how long the others compute."""
    return {"model": {"path": str(shallow("smollm2-135m", 6)), "name": "smollm2-135m"}}


def prompt() -> list[int]:
    """Nobody had it before."""
    return [random.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]


def ttft_s(cluster: RunningCluster, tenant: str = "", batch: bool = False) -> float:
    sampling = pb.SamplingParams(max_tokens=2, ignore_eos=True)
    for event in cluster.client.generate(prompt(), sampling, timeout_s=120.0, tenant=tenant, batch=batch):
        if event.HasField("completed"):
            return event.completed.ttft_s
    raise AssertionError("no end came")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    running = RunningCluster(tmp_path_factory.mktemp("admission"), shallow_model())
    try:
        yield running.start(["router", "decode-0"])
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"


def flooded(
    cluster: RunningCluster, pool: ThreadPoolExecutor, tenant: str = "", batch: bool = False
) -> list[Future[float]]:
    """More than is computed at once, all of it in line."""
    flood = [pool.submit(ttft_s, cluster, tenant, batch) for _ in range(NUM_FLOOD)]
    wait_until(lambda: cluster.client.cluster().num_waiting_requests > NUM_FLOOD // 2, 20.0, "a line")
    return flood


def test_a_tenant_that_floods_the_cluster_waits_behind_itself(cluster: RunningCluster) -> None:
    with ThreadPoolExecutor(NUM_FLOOD + 1) as pool:
        flood = flooded(cluster, pool, tenant="flood")
        quiet_s = ttft_s(cluster, tenant="quiet")
        longest_s = max(future.result() for future in flood)
    assert quiet_s < 0.4 * longest_s


def test_who_comes_last_of_one_tenant_waits_longest(cluster: RunningCluster) -> None:
    with ThreadPoolExecutor(NUM_FLOOD + 1) as pool:
        flood = flooded(cluster, pool)
        last_s = ttft_s(cluster)
        longest_s = max(future.result() for future in flood)
    assert last_s > 0.6 * longest_s, "which is what shares are for"


def test_an_interactive_request_goes_before_the_batch_class(cluster: RunningCluster) -> None:
    with ThreadPoolExecutor(NUM_FLOOD + 1) as pool:
        flood = flooded(cluster, pool, batch=True)
        interactive_s = ttft_s(cluster)
        longest_s = max(future.result() for future in flood)
    assert interactive_s < 0.4 * longest_s


def test_what_would_come_too_late_is_refused_with_the_time_after_which_it_would_not(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    slo_s = 5.0 * statistics.median(ttft_s(cluster) for _ in range(5))  # for this machine: a sixth of what all take
    promised = {"interactive": {"ttft_s": slo_s, "ttft_per_1k_tokens_s": 0.0}, "reject_late": True}
    running = RunningCluster(tmp_path, {"router": promised, **shallow_model()})
    try:
        running.start(["router", "decode-0"])
        for _ in range(8):
            ttft_s(running)  # what a prompt costs is learned
        refused: list[str] = []
        served: list[float] = []
        lock = threading.Lock()

        def one() -> None:
            try:
                seconds = ttft_s(running)
            except Overloaded as error:
                with lock:
                    refused.append(str(error))
            else:
                with lock:
                    served.append(seconds)

        with ThreadPoolExecutor(NUM_FLOOD) as pool:
            for _ in range(NUM_FLOOD):
                pool.submit(one)
                time.sleep(0.02)  # the arrivals' pace, not a wait for anything
        assert served, refused
        assert refused, served
        assert max(served) < 2.5 * slo_s, "predictions err on a busy machine; all thirty would take six times the SLO"
        retry_s = [float(match.group(1)) for text in refused if (match := re.search(r"retry in ([\d.]+) s", text))]
        assert len(retry_s) == len(refused), refused
        assert min(retry_s) > 0.0
        time.sleep(max(retry_s))
        assert ttft_s(running) < 2.5 * slo_s
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"
