"""Steps that end their process: workers of which the test replaced the computation."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from tandem.errors import Quarantined
from tests.system.harness import RunningCluster, wait_until
from tests.system.quick_worker import Fault

KILLS = 40_001
"""A token that no other prompt has."""
WORKERS = ("decode-0", "decode-1", "decode-2")


def prompt_of(length: int, *tokens: int) -> list[int]:
    """Nobody had it before; it ends with `tokens`."""
    return [*(random.randrange(1000, 40_000) for _ in range(length)), *tokens]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """3 decode workers, of which one is left at the end."""
    folder = tmp_path_factory.mktemp("faulty")
    faults = [
        Fault(KILLS),
    ]
    running = RunningCluster(
        folder,
        {
            "decode": {"arena_bytes": 128 * 2**20},
        },
        faults,
    )
    try:
        yield running.start(["router", *WORKERS])
    finally:
        codes = running.stop()
    assert sorted(codes.values()) == [-9, -9, 0, 0], f"{codes}\n{running.logs()}"


def test_a_prompt_that_kills_two_workers_is_refused_and_the_others_go_on(cluster: RunningCluster) -> None:
    prompts = [prompt_of(30) for _ in range(4)]
    sampling = {"max_tokens": 60, "ignore_eos": True}
    alone = [cluster.watch(prompt, **sampling) for prompt in prompts]
    truth = [stream.result() for stream in alone]

    streams = [cluster.watch(prompt, **sampling) for prompt in prompts]
    wait_until(lambda: all(stream.tokens for stream in streams), 30.0, "every stream has begun")
    poison = prompt_of(50, KILLS)
    with pytest.raises(Quarantined, match="2 workers died while they computed this request") as caught:
        cluster.generate(poison, max_tokens=4)
    assert caught.value.grpc_status == "INTERNAL"
    assert [stream.result() for stream in streams] == truth
    killed = [name for name in WORKERS if cluster.processes[name].poll() is not None]
    assert len(killed) == 2

    began_s = time.monotonic()
    with pytest.raises(Quarantined, match="this prompt ended the workers that computed it"):
        cluster.generate(poison, max_tokens=4)
    assert time.monotonic() - began_s < 1.0
    (survivor,) = set(WORKERS) - set(killed)
    assert cluster.processes[survivor].poll() is None
    assert cluster.generate(prompts[0], **sampling).tokens[0] == truth[0]
    wait_until(lambda: cluster.client.audit().ok, 10.0, f"{cluster.client.audit()}")
