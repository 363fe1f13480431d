"""A worker that is told to leave by a router, under load: no request fails, and no token is another."""

from __future__ import annotations

from pathlib import Path

from tests.system.harness import RunningCluster, wait_until

PROMPTS = [f"Chapter {number}. The lighthouse keeper wrote in the book that" for number in range(6)]


def test_a_drained_decode_worker_ends_by_itself_and_its_streams_go_on(tmp_path: Path) -> None:
    cluster = RunningCluster(tmp_path, {"decode": {"drain_s": 1.0, "arena_bytes": 256 * 2**20}})
    try:
        cluster.start(("router", "pool-0", "prefill-0", "decode-0", "decode-1"))
        truth = [cluster.generate(prompt, max_tokens=60, ignore_eos=True).tokens[0] for prompt in PROMPTS]
        streams = [cluster.watch(prompt, max_tokens=60, ignore_eos=True) for prompt in PROMPTS]
        wait_until(lambda: any(len(stream.tokens) > 3 for stream in streams), 60, "streams run")
        busiest = max(("decode-0", "decode-1"), key=lambda name: cluster.status(name).num_running)
        cluster.client.drain(busiest)
        assert [stream.result(120) for stream in streams] == truth
        assert cluster.processes[busiest].wait(60) == 0
        left = {process.name for process in cluster.client.cluster().processes}
        assert busiest not in left
        assert cluster.generate(PROMPTS[0], max_tokens=60, ignore_eos=True).tokens[0] == truth[0]
    finally:
        cluster.stop()
