"""The router's Prometheus page.

Owns its registry; reads nothing by itself, the server tells it. `router/http` shows it.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from router.explain import hindsight
from router.journal import Summary
from router.membership import Member
from router.prefix_index import PrefixIndex
from router.reports import num_cached_tokens

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_ERROR_BUCKETS = (-0.9, -0.5, -0.25, -0.15, -0.05, 0.05, 0.15, 0.25, 0.5, 1.0, 2.0)
_GAUGES = {
    "free_blocks": "blocks that can be allocated now",
    "cached_blocks": "blocks cached without a reference",
    "leased_blocks": "blocks under a lease",
    "num_running": "sequences running",
    "num_waiting": "sequences waiting",
    "prefill_tokens_per_s": "measured prefill speed",
    "decode_step_s": "measured seconds of a decode step",
}
_INDEX_GAUGES = {
    "entries": "blocks, counted once for each place that holds them",
    "bytes": "memory of the prefix index, about",
    "rejected": "KV events that meant nothing to it",
}


class Metrics:
    """What the router counts, in `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("tandem_requests", "finished requests", ["outcome"], registry=self.registry)
        self._ttft = Histogram(
            "tandem_ttft_seconds", "time to first token", buckets=_TTFT_BUCKETS, registry=self.registry
        )
        self._tpot = Histogram(
            "tandem_tpot_seconds", "time per token after the first", buckets=_TPOT_BUCKETS, registry=self.registry
        )
        self._error = Histogram(
            "tandem_ttft_prediction_error",
            "predicted less actual time to first token, as a part of the actual one",
            buckets=_ERROR_BUCKETS,
            registry=self.registry,
        )
        self._regret = Histogram(
            "tandem_placement_regret_seconds",
            "by how much the first token came later than predicted of the best other worker",
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self._hits = Counter(
            "tandem_prefix_hit_tokens", "prompt tokens whose KV existed before", registry=self.registry
        )
        self._prompt = Counter("tandem_prompt_tokens", "prompt tokens", registry=self.registry)
        self._generated = Counter("tandem_generated_tokens", "tokens shown to clients", registry=self.registry)
        self._active = Gauge("tandem_active_requests", "accepted and not finished", registry=self.registry)
        self._index = {
            name: Gauge(f"tandem_index_{name}", text, registry=self.registry) for name, text in _INDEX_GAUGES.items()
        }
        self._processes = {
            name: Gauge(f"tandem_process_{name}", text, ["process", "role"], registry=self.registry)
            for name, text in _GAUGES.items()
        }
        self._shown: set[tuple[str, str]] = set()

    def ended(self, summary: Summary, num_generated_tokens: int) -> None:
        """Counts a request that has ended, of which the client was shown `num_generated_tokens`."""
        self._requests.labels(summary.outcome).inc()
        self._prompt.inc(summary.num_prompt_tokens)
        self._generated.inc(num_generated_tokens)
        self._hits.inc(num_cached_tokens(summary))
        if summary.ttft_s is None:
            return
        self._ttft.observe(summary.ttft_s)
        if summary.predicted_ttft_s is not None and summary.ttft_s > 0.0:
            self._error.observe((summary.predicted_ttft_s - summary.ttft_s) / summary.ttft_s)
            self._regret.observe(hindsight(summary)[2])
        if summary.outcome == "completed" and summary.longest > 1:
            self._tpot.observe((summary.total_s - summary.ttft_s) / (summary.longest - 1))

    def refresh(self, members: Iterable[Member], num_active: int, index: PrefixIndex) -> None:
        """Shows the last reports of the live processes; dead ones disappear."""
        self._active.set(num_active)
        for name, gauge in self._index.items():
            gauge.set(getattr(index, f"num_{name}"))
        shown: set[tuple[str, str]] = set()
        for member in members:
            if member.heartbeat is None:
                continue
            labels: tuple[str, str] = (member.name, member.role)
            shown.add(labels)
            for name, gauge in self._processes.items():
                gauge.labels(*labels).set(getattr(member.heartbeat.load, name))
        for gone in self._shown - shown:
            for gauge in self._processes.values():
                gauge.remove(*gone)
        self._shown = shown
