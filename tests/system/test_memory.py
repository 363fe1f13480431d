"""Memory stays flat over thousands of requests, and the way that this is judged notices one kilobyte a request."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protos import tandem_pb2 as pb
from tandem.drills.faults import resident_bytes
from tandem.drills.model import shallow
from tandem.drills.processes import role_of
from tests.system import leaky
from tests.system.harness import RunningCluster

KiB = 1024
PROCESSES = ["router", "pool-0", "prefill-0", "decode-0"]
WARM_UP, MEASURED, DISTINCT, AT_ONCE = 2500, 2500, 400, 8
LIMIT_BYTES = 1900 * KiB
"""What 2,500 requests may add to any process; leaking 1 kB each, they would add 2,500 KiB."""


class Leaky(RunningCluster):
    """Its router and decode worker leak."""

    def module_of(self, name: str) -> str:
        return leaky.__name__ if role_of(name) in ("router", "decode") else super().module_of(name)


def grown(cluster: RunningCluster) -> dict[str, int]:
    """By how much each process grew over the measured requests."""

    def ask(number: int) -> None:
        rng = random.Random(number % DISTINCT)
        prompt = [rng.randrange(1000, 40_000) for _ in range(rng.randrange(8, 90))]
        sampling = pb.SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.5 * (number % 2), seed=number)
        for _ in cluster.client.generate(prompt, sampling, timeout_s=60.0):
            pass

    def measured() -> dict[str, int]:
        return {name: resident_bytes(process.pid) for name, process in cluster.processes.items()}

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(ask, range(WARM_UP)))
        before = measured()
        list(pool.map(ask, range(WARM_UP, WARM_UP + MEASURED)))
    return {name: num_bytes - before[name] for name, num_bytes in measured().items()}


def overrides() -> dict[str, object]:
    memory = 32 * 1024 * KiB
    return {
        "model": {"path": str(shallow("smollm2-135m", 2)), "name": "shallow"},
        "prefill": {"arena_bytes": memory},
        "decode": {"arena_bytes": memory},
        "pool": {"host_bytes": memory},
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [RunningCluster, Leaky])
def test_memory_is_flat_and_a_kilobyte_a_request_would_be_noticed(kind: type[RunningCluster], tmp_path: Path) -> None:
    cluster = kind(tmp_path, overrides())
    try:
        cluster.start(PROCESSES)
        more = grown(cluster)
    finally:
        cluster.stop()
    too_much = {name for name, num_bytes in more.items() if num_bytes > LIMIT_BYTES}
    assert too_much == ({"router", "decode-0"} if kind is Leaky else set()), more
