"""Workers that leave, die or freeze while they serve: what clients see of it is a pause, and the same tokens."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.system.harness import RunningCluster, Watched, wait_until

pytestmark = pytest.mark.timeout(400)

NUM_STREAMS = 8
NUM_TOKENS = 120
DRAIN_S = 1.5
LIVENESS_S = 2.0
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
SAMPLING: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0.8, "seed": 3}


def prompt_of(length: int) -> list[int]:
    """Nobody had it before."""
    return [random.randrange(1000, 40_000) for _ in range(length)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Two workers of each role, and a pool node with a disk."""
    folder = tmp_path_factory.mktemp("failover")
    (folder / "disk").mkdir()
    worker = {"arena_bytes": 256 * 2**20, "drain_s": DRAIN_S}
    disk = {"dirs": [str(folder / "disk")], "bytes": 256 * 2**20, "policy": "write-back"}
    running = RunningCluster(
        folder,
        {
            "prefill": worker | {"max_step_tokens": 64},
            "decode": worker,
            "pool": {"host_bytes": 256 * 2**20, "disk": disk},
        },
        faults=(),
    )
    try:
        yield running.start(["router", "pool-0", *WORKERS])
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [prompt_of(40) for _ in range(NUM_STREAMS)]


@pytest.fixture(scope="module")
def truth(cluster: RunningCluster, prompts: list[list[int]]) -> list[list[int]]:
    """What the streams are without any fault."""
    return [stream.result() for stream in started(cluster, prompts)]


def started(cluster: RunningCluster, prompts: Sequence[list[int]]) -> list[Watched]:
    """Streams that all have begun to generate."""
    streams = [cluster.watch(prompt, **SAMPLING) for prompt in prompts]
    wait_until(lambda: all(stream.tokens for stream in streams), 30.0, "every stream has begun")
    return streams


def computing(cluster: RunningCluster, streams: list[Watched], sampling: dict[str, Any]) -> str:
    """A prefill worker that is in the midst of a prompt; `streams` takes in what was asked to make it so."""

    def busy() -> str:
        if len(streams) < 16:
            streams.append(cluster.watch(prompt_of(400), **sampling))
        statuses = [process for process in cluster.client.cluster().processes if process.role == "prefill"]
        return next((status.name for status in statuses if status.num_running), "")

    found: str = wait_until(busy, 20.0, "a prefill worker computes")
    return found


def names(cluster: RunningCluster) -> set[str]:
    """Of the processes that the router knows."""
    return {process.name for process in cluster.client.cluster().processes}


def leave(cluster: RunningCluster, name: str, deadline_s: float) -> float:
    """Tells a process to end, which it does well and in time; how long it took."""
    began_s = time.monotonic()
    cluster.kill(name, signal.SIGTERM)
    assert cluster.processes[name].wait(deadline_s) == 0, cluster.logs()
    return time.monotonic() - began_s


def back(cluster: RunningCluster, *names: str) -> None:
    for name in names:
        cluster.spawn(name)
    cluster.wait_ready(names)


def has_failed_none(cluster: RunningCluster) -> None:
    seen = cluster.client.cluster()
    assert seen.num_requests_failed == 0
    wait_until(lambda: cluster.client.audit().ok, 10.0, f"audit: {cluster.client.audit()}")


def test_a_decode_worker_that_is_told_to_end_finishes_some_streams_and_hands_over_the_others(
    cluster: RunningCluster, prompts: list[list[int]], truth: list[list[int]]
) -> None:
    streams = started(cluster, prompts)
    wait_until(lambda: cluster.status("decode-1").num_running, 10.0, "decode-1 generates")
    took_s = leave(cluster, "decode-1", DRAIN_S + 10.0)
    assert [stream.result() for stream in streams] == truth
    moved = [stream for stream in streams if stream.processes("decode") == ["decode-1", "decode-0"]]
    assert moved
    assert took_s > DRAIN_S
    has_failed_none(cluster)
    back(cluster, "decode-1")


def test_a_prefill_worker_that_is_told_to_end_loses_no_prompt(cluster: RunningCluster) -> None:
    sampling = SAMPLING | {"max_tokens": 4}
    streams: list[Watched] = []
    busy = computing(cluster, streams, sampling)
    leave(cluster, busy, DRAIN_S + 10.0)
    tokens = [stream.result() for stream in streams]
    has_failed_none(cluster)
    assert [cluster.generate(stream.prompt, **sampling).tokens[0] for stream in streams] == tokens
    back(cluster, busy)


def test_a_decode_worker_that_freezes_is_fenced_and_comes_back_as_another_with_its_blocks(
    cluster: RunningCluster, prompts: list[list[int]], truth: list[list[int]]
) -> None:
    long = prompt_of(320)
    answer = cluster.generate(long, **SAMPLING | {"max_tokens": 2})
    computed = answer.run("decode").process
    epoch = cluster.status(computed).epoch
    streams = started(cluster, prompts)
    wait_until(lambda: cluster.status(computed).num_running, 10.0, f"{computed} generates")
    cluster.kill(computed, signal.SIGSTOP)
    frozen_s = time.monotonic()
    try:
        assert [stream.result() for stream in streams] == truth
        moved = [stream for stream in streams if stream.processes("decode")[0] == computed]
        assert moved
        wait_until(lambda: computed not in names(cluster), 10.0, f"{computed} is lost")
        wait_until(lambda: time.monotonic() > frozen_s + 2 * LIVENESS_S, 60.0, "it is frozen for long enough")
    finally:
        cluster.kill(computed, signal.SIGCONT)
    wait_until(lambda: computed in names(cluster), 10.0, f"{computed} is back")
    assert cluster.status(computed).epoch != epoch
    assert cluster.status(computed).pid == cluster.processes[computed].pid
    wait_until(lambda: cluster.status(computed).indexed_blocks >= 20, 10.0, "its blocks are known again")
    has_failed_none(cluster)
    assert cluster.status(computed).num_running == 0

    other = next(name for name in ("decode-0", "decode-1") if name != computed)
    leave(cluster, "pool-0", 40.0)
    leave(cluster, other, DRAIN_S + 10.0)
    for name in ("prefill-0", "prefill-1"):
        leave(cluster, name, DRAIN_S + 10.0)
    again = cluster.generate(long, **SAMPLING | {"max_tokens": 2})
    assert again.tokens == answer.tokens
    assert again.run("decode").process == computed
    assert again.run("decode").local_hit_tokens >= 304, "what it computed as its former self"
    back(cluster, "pool-0", other, "prefill-0", "prefill-1")
    has_failed_none(cluster)


def test_every_worker_and_pool_node_is_replaced_under_load_and_no_request_fails(
    cluster: RunningCluster, prompts: list[list[int]], truth: list[list[int]]
) -> None:
    over = threading.Event()
    wrong: list[str] = []
    num_answers = [0] * 4

    def load(number: int) -> None:
        rng = random.Random(number)
        while not over.is_set():
            which = rng.randrange(NUM_STREAMS)
            num_tokens = rng.randrange(8, 60)
            tokens = cluster.watch(prompts[which], **SAMPLING | {"max_tokens": num_tokens}).result()
            if tokens != truth[which][:num_tokens]:
                wrong.append(f"prompt {which}, {num_tokens} tokens")
            fresh = cluster.watch(prompt_of(200), **SAMPLING | {"max_tokens": 4}).result()
            if len(fresh) != 4:
                wrong.append(f"{len(fresh)} tokens")
            num_answers[number] += 2

    threads = [threading.Thread(target=load, args=[number]) for number in range(len(num_answers))]
    for thread in threads:
        thread.start()
    try:
        for name in ("decode-0", "prefill-0", "pool-0", "decode-1", "prefill-1"):
            leave(cluster, name, DRAIN_S + 30.0)
            back(cluster, name)
    finally:
        over.set()
        for thread in threads:
            thread.join(60.0)
    assert not wrong
    assert min(num_answers) > 0
    has_failed_none(cluster)
