"""Steps that end their process, and steps that don't end: workers of which the test replaced the computation."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from tandem.errors import Quarantined
from tests.system.harness import RunningCluster, wait_until
from tests.system.quick_worker import Fault

KILLS, LONG, ENDLESS = 40_001, 40_002, 40_003
"""Tokens that no other prompt has."""
LIVENESS_S = 1.5
PROGRESS_S = 4.0
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
        Fault(LONG, sleep_s=LIVENESS_S + 1.0, once=str(folder / "long")),
        Fault(ENDLESS, sleep_s=PROGRESS_S + LIVENESS_S + 2.0, once=str(folder / "endless")),
    ]
    running = RunningCluster(
        folder,
        {
            "router": {"liveness_s": LIVENESS_S, "progress_s": PROGRESS_S},
            "decode": {"arena_bytes": 128 * 2**20},
        },
        faults,
    )
    try:
        yield running.start(["router", *WORKERS])
    finally:
        codes = running.stop()
    assert sorted(codes.values()) == [-9, -9, 0, 0], f"{codes}\n{running.logs()}"


def test_a_step_longer_than_the_liveness_deadline_is_no_death(cluster: RunningCluster) -> None:
    epochs = {name: cluster.status(name).epoch for name in WORKERS}
    answer = cluster.generate(prompt_of(40, LONG), max_tokens=4, ignore_eos=True)
    assert answer.completed is not None
    assert answer.completed.ttft_s > LIVENESS_S + 1.0, "it did take so long"
    assert [run.attempt for run in answer.completed.runs] == [0]
    assert {name: cluster.status(name).epoch for name in WORKERS} == epochs


def test_a_step_longer_than_the_progress_deadline_is_a_death_and_its_worker_comes_back_as_another(
    cluster: RunningCluster,
) -> None:
    epochs = {name: cluster.status(name).epoch for name in WORKERS}
    prompt = prompt_of(40, ENDLESS)
    began_s = time.monotonic()
    answer = cluster.generate(prompt, max_tokens=8, ignore_eos=True)
    took_s = time.monotonic() - began_s
    assert PROGRESS_S < took_s < PROGRESS_S + 1.5, "the deadline, its notice, and the computation elsewhere"
    (run,) = answer.completed.runs if answer.completed is not None else ()
    assert run.attempt == 1
    (stuck,) = {
        name for name in WORKERS if name not in {process.name for process in cluster.client.cluster().processes}
    }
    assert stuck != run.process

    wait_until(
        lambda: stuck in {process.name for process in cluster.client.cluster().processes}, 20.0, f"{stuck} is back"
    )
    assert cluster.status(stuck).epoch != epochs[stuck]
    assert cluster.generate(prompt, max_tokens=8, ignore_eos=True).tokens == answer.tokens
    wait_until(lambda: cluster.client.audit().ok, 10.0, f"{cluster.client.audit()}")


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
