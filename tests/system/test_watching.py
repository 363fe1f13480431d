"""A real cluster as those see it who run it: metrics, traces and logs of the same requests, and no word of a prompt in them."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.router.collector import attributes, check_nesting, children, collector
from tests.system.harness import RunningCluster, wait_until

MARKER = "xylophone"
PROMPT = f"The {MARKER} stood in the corner of the room, and nobody had played it since the {MARKER} player left. " * 12


def test_metrics_traces_and_logs_tell_of_requests_and_never_of_texts(tmp_path: Path) -> None:
    with collector() as otel:
        running = RunningCluster(
            tmp_path,
            {
                "tracing": {"endpoint": otel.endpoint},
                "log": {"format": "json", "level": "DEBUG"},
                "router": {"liveness_s": 10.0},
            },
        )
        try:
            running.start()
            answer = running.generate(PROMPT, max_tokens=12)
            again = running.generate(PROMPT, max_tokens=3)
            assert answer.accepted is not None
            assert again.completed is not None
            request_id = answer.accepted.request_id
            wait_until(lambda: sum(not s.parent_span_id for s in otel.spans) == 2, 30, "two traces came")
            url = f"http://127.0.0.1:{running.config.router.admin_port}/metrics"

            def total(name: str, **labels: str) -> float:
                with urllib.request.urlopen(url, timeout=5) as page:
                    families = text_string_to_metric_families(page.read().decode())
                samples = [s for family in families for s in family.samples if s.name == name]
                return sum(s.value for s in samples if labels.items() <= s.labels.items())

            moved = "tandem_process_transferred_bytes_total"
            wait_until(lambda: total(moved, role="decode", transport="shm") > 0, 15, "a heartbeat told of the transfer")
            wait_until(lambda: total("tandem_process_decode_tokens_total", role="decode") >= 11, 15, "and of tokens")
            assert total("tandem_generated_tokens_total") == 15
            assert total("tandem_prefix_hit_tokens_total") == again.completed.num_cached_tokens > 0
            assert total("tandem_requests_total", outcome="completed") == 2
            assert total("tandem_kv_cache_info", block_size="16") == 1
        finally:
            codes = running.stop()
        assert set(codes.values()) == {0}, running.logs()

    spans = otel.spans
    check_nesting(spans)
    root = next(span for span in spans if attributes(span).get("gen_ai.response.id") == request_id)
    legs = {span.name: span for span in children(spans, root)}
    assert set(legs) == {"queue", "prefill", "decode"}
    assert attributes(legs["prefill"])["tandem.process"] == "prefill-0"
    parts = {span.name: span for span in children(spans, legs["decode"])}
    assert attributes(parts["transfer"])["tandem.source.processes"] == ["prefill-0"]
    assert attributes(parts["transfer"])["tandem.source.transports"] == ["shm"]
    compute = children(spans, legs["prefill"])[-1]
    assert (compute.name, attributes(compute)["tandem.computed_tokens"]) == (
        "compute",
        attributes(root)["gen_ai.usage.input_tokens"],
    )

    logs = {file.stem: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.log")}
    assert set(logs) == {"router", "pool-0", "prefill-0", "decode-0"}
    for name, log in logs.items():
        events = [json.loads(line) for line in log.splitlines()]
        assert {(event["process"], event["role"]) for event in events} == {(name, name.partition("-")[0])}
        about = [event for event in events if event.get("request_id") == request_id]
        assert (
            len(about) >= 2 and {event["attempt"] for event in about if "attempt" in event} == {0}
        ) or name == "pool-0"
    everything = "\n".join(logs.values()).encode() + b"".join(otel.bodies)
    tokens = [str(token) for token in answer.tokens[0][:4]]
    for secret in (MARKER, answer.text[0].strip()[:24], ", ".join(tokens)):
        assert secret
        assert secret.encode() not in everything, secret
