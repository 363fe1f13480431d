"""The audit of real processes: clean while they work, and after it."""

from __future__ import annotations

import threading

from tests.system.harness import RunningCluster, wait_until


def test_an_audit_agrees_while_requests_run_and_after_them(cluster: RunningCluster) -> None:
    prompts = [f"Chapter {number}. " + "The ship left the harbour at dawn. " * 10 for number in range(4)]
    streams = [
        threading.Thread(target=cluster.generate, args=(prompt,), kwargs={"max_tokens": 48, "ignore_eos": True})
        for prompt in prompts
    ]
    for stream in streams:
        stream.start()
    wait_until(lambda: cluster.client.cluster().num_active_requests == len(prompts), 30, "all are active")
    num_busy = 0
    while any(stream.is_alive() for stream in streams):
        answer = cluster.client.audit()
        assert answer.ok, answer
        num_busy += any("not idle" in check.evidence for check in answer.checks)
    assert num_busy > 0
    wait_until(lambda: cluster.client.audit().ok, 20, "clean when idle")
    evidence = {check.check: check.evidence for check in cluster.client.audit().checks}
    assert evidence["every process says what it owns"] == "3 answers"
    assert int(evidence["the index holds what is held"].split()[0]) > 0
