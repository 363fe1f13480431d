"""Whatever moment a client leaves at, everything that its request held is free again, and the others never notice."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from protos import tandem_pb2 as pb
from tandem.errors import Cancelled
from tests.system.harness import RunningCluster, leftovers, wait_until

NUM_REQUESTS = 200
NUM_CLIENTS = 24
NUM_WARM_UP = 40
# The last of them come one at a time and leave during their prefill, which is over too soon to be met by chance.
NUM_IN_PREFILL = 20
# How many must have been met in each phase. Which phase a leaving client meets depends on the machine: while one has been
# met too seldom, another round of requests runs.
NUM_IN_EACH_PHASE = 10
MAX_MORE_ROUNDS = 8


def shmem_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Shmem in /proc/meminfo")


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1000, 40_000) for _ in range(length)]


@pytest.mark.timeout(420)
def test_200_requests_a_third_of_them_cancelled_leave_nothing_behind(tmp_path: Path) -> None:
    shmem_before = shmem_bytes()
    # Small workers, so that requests queue, compete for blocks and are preempted.
    sizes = {
        "prefill": {"arena_bytes": 368_640 * 400, "max_running": 12, "max_step_tokens": 64},
        "decode": {"arena_bytes": 368_640 * 220, "max_running": 12, "max_step_tokens": 64},
        "pool": {"host_bytes": 368_640 * 300},
    }
    running = RunningCluster(tmp_path, sizes)
    try:
        running.start()
        pids = {name: process.pid for name, process in running.processes.items()}
        ends: list[str] = []
        lock = threading.Lock()

        def one(number: int) -> None:
            rng = random.Random(number)
            in_prefill = NUM_REQUESTS - NUM_IN_PREFILL <= number < NUM_REQUESTS
            leaves = number % 3 == 0 or in_prefill
            sampling = pb.SamplingParams(max_tokens=rng.randrange(1, 40), temperature=0.7, seed=number)
            # Some leave soon after the request, some after so many chunks.
            patience_s = rng.uniform(0.0, 2.5) if leaves and rng.random() < 0.75 else 1e9
            num_chunks = rng.randrange(1, 8) if leaves and patience_s > 1e6 else 10**9
            if leaves:
                sampling.max_tokens = 60
                sampling.ignore_eos = True
            prompt = prompt_of(rng, rng.choice([3, 40, 120, 250, 500]))
            if in_prefill:
                prompt = prompt_of(rng, 1500)
                patience_s, num_chunks = rng.uniform(0.1, 0.4), 10**9
            end = "nothing"
            call = running.client.generate(prompt, sampling, timeout_s=180)
            timer = threading.Timer(min(patience_s, 300.0), call.cancel)
            timer.start()
            try:
                seen = 0
                for event in call:
                    assert end == "nothing", "a message after the terminal one"
                    if event.WhichOneof("event") == "completed":
                        end = "completed"
                    elif event.WhichOneof("event") == "chunk":
                        seen += 1
                        if seen >= num_chunks:
                            call.cancel()
            except Cancelled:
                end = "cancelled"
            finally:
                timer.cancel()
            with lock:
                ends.append(end)

        def met() -> dict[str, int]:
            """How many requests were cancelled in each phase."""
            seen = running.client.cluster()
            phases = {"waiting": seen.num_requests_left_waiting, "fetching": 0, "prefill": 0, "decode": 0}
            for process in seen.processes:
                for phase in phases:
                    phases[phase] += process.counters[f"aborted_{phase}"]
            return phases

        # After the first of them every process has made its connections and mappings; from then on nothing may be added.
        num_sent = NUM_REQUESTS
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            list(clients.map(one, range(NUM_WARM_UP)))
            one(NUM_REQUESTS - 1)  # a long prompt starts the router's thread for them
            wait_until(lambda: running.client.audit().ok, 20, f"audit: {running.client.audit()}")
            before = {name: leftovers(pid) for name, pid in pids.items()}
            list(clients.map(one, range(NUM_WARM_UP, NUM_REQUESTS - NUM_IN_PREFILL)))
            for number in range(NUM_REQUESTS - NUM_IN_PREFILL, NUM_REQUESTS - 1):
                one(number)
            for _ in range(MAX_MORE_ROUNDS):
                wait_until(lambda: running.client.audit().ok, 20, f"audit: {running.client.audit()}")
                if min(met().values()) >= NUM_IN_EACH_PHASE:
                    break
                list(clients.map(one, range(num_sent, num_sent + 2 * NUM_CLIENTS)))
                num_sent += 2 * NUM_CLIENTS

        assert len(ends) == num_sent
        assert ends.count("completed") + ends.count("cancelled") == num_sent
        wait_until(lambda: running.client.audit().ok, 20, f"audit: {running.client.audit()}")
        seen = running.client.cluster()
        assert seen.num_requests_finished + seen.num_requests_cancelled == num_sent
        assert seen.num_requests_failed == 0
        assert min(met().values()) >= NUM_IN_EACH_PHASE, met()
        for name in ("prefill-0", "decode-0", "pool-0"):
            status = running.status(name)
            assert (status.free_blocks, status.leased_blocks, status.num_running, status.num_waiting) == (
                status.num_blocks,
                0,
                0,
                0,
            ), f"{name}: {status}"

        def nothing_added() -> bool:
            now = {name: leftovers(pid) for name, pid in pids.items()}
            return all(now[name][what] <= count for name, held in before.items() for what, count in held.items())

        wait_until(nothing_added, 20, f"{before} grew to { ({name: leftovers(pid) for name, pid in pids.items()}) }")
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"
    assert not any(psutil.pid_exists(pid) for pid in pids.values())
    assert not [c for c in psutil.Process(os.getpid()).children(recursive=True) if c.pid in pids.values()]
    wait_until(lambda: shmem_bytes() < shmem_before + 2 * 2**20, 10, "Shmem is given back")
