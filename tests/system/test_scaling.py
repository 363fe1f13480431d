"""Workers that come, go and change their role in Ray, under load: no request fails, and no token is another."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tandem.drills.ray_cluster import RayCluster
from tests.system.harness import Answer, wait_until

PROMPTS = [f"Chapter {number}. The lighthouse keeper wrote in the book that" for number in range(4)]
TOKENS = 40
ALL_S = 120.0


@pytest.mark.slow
def test_scaling_out_moving_and_scaling_in_under_load_changes_no_token_and_fails_no_request(tmp_path: Path) -> None:
    small = {"arena_bytes": 192 * 2**20, "drain_s": 2.0}
    cluster = RayCluster(tmp_path, {"prefill": small, "decode": small, "pool": {"host_bytes": 256 * 2**20}})
    stop = threading.Event()
    errors: list[BaseException] = []
    right: list[str] = []

    def ask(prompt: str) -> list[int]:
        return Answer(cluster.client, prompt, {"max_tokens": TOKENS, "ignore_eos": True}).tokens[0]

    def go_on(prompt: str, truth: list[int]) -> None:
        while not stop.is_set():
            try:
                assert ask(prompt) == truth
                right.append(prompt)
            except BaseException as error:
                errors.append(error)
                return

    def workers() -> set[str]:
        listed = cluster.listed() or {}
        return {name for name, status in listed.items() if status.role in ("prefill", "decode") and not status.draining}

    try:
        cluster.start(("node-0", "node-1", "router", "pool-0", "prefill-0", "decode-0"))
        truths = [ask(prompt) for prompt in PROMPTS]
        load = [threading.Thread(target=go_on, args=each) for each in zip(PROMPTS, truths, strict=True)]
        for thread in load:
            thread.start()
        for counts, expected in (
            ({"decode": 2}, {"prefill-0", "decode-0", "decode-1"}),
            ({"prefill": 2, "decode": 1}, {"prefill-0", "prefill-1"}),
            ({"prefill": 1, "decode": 1}, set[str]()),
        ):
            cluster.client.set_replicas(**counts)
            num = sum({"prefill": 1, "decode": 1, **counts}.values())
            wait_until(lambda e=expected, n=num: e <= workers() and len(workers()) == n, ALL_S, f"{counts} run")
            done = len(right)
            wait_until(lambda d=done: errors or len(right) >= d + 8, ALL_S, "requests go on")
        stop.set()
        for thread in load:
            thread.join(ALL_S)
        assert errors == []
        status = cluster.client.cluster()
        assert (status.num_requests_failed, status.num_active_requests) == (0, 0)
    finally:
        stop.set()
        cluster.stop()
