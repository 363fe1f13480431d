"""The router's Prometheus page.

Owns its registry, and what is counted of requests; `router/process_metrics.py` has what processes report. Reads nothing by
itself, the server tells it. `router/http` shows it. Names, labels and their meaning: docs/metrics.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from protos.control import RoleReport
from router.actions import Emit, TokensEvent
from router.explain import hindsight
from router.journal import Summary
from router.membership import Member
from router.process_metrics import ProcessMetrics
from router.reports import exposed_transfer_s, hit_tokens_by_tier
from router.router import RouterCore

disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Of what a whole request or a part of it takes; the default SLO of interactive requests is one of them."""
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
_ERROR_BUCKETS = (-0.9, -0.5, -0.25, -0.15, -0.05, 0.05, 0.15, 0.25, 0.5, 1.0, 2.0)
_CLASSES = ("interactive", "batch")


class Metrics:
    """What the router counts, in `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._processes = ProcessMetrics()
        self._gaps = _Gaps()
        self._core_totals = _CoreTotals()
        for collector in (self._processes, self._gaps, self._core_totals):
            self.registry.register(collector)
        self._info = self._gauge("router_info", "1, with what this router is", "router", "model")
        self._requests = self._counter("requests", "requests that have ended", "class", "outcome")
        self._errors = self._counter("errors", "requests refused or failed, by the code of their error", "code")
        self._resumes = self._counter("resumed_requests", "ended requests that had begun at another router")
        self._placements = self._counter("placements", "decisions where a request goes", "form")
        self._slo = self._counter(
            "slo_requests", "ended requests by whether a promise was kept", "class", "objective", "kept"
        )
        self._slo_target = self._gauge(
            "slo_target_seconds", "what is promised, to a prompt of which all is held", "class", "objective"
        )
        self._ttft = self._seconds("ttft_seconds", "time to first token", "class")
        self._tpot = self._seconds(
            "tpot_seconds", "time per token after the first, of a request", "class", buckets=_TOKEN_SECONDS
        )
        self._e2e = self._seconds("e2e_seconds", "from the arrival to the end, of completed requests", "class")
        self._queue = self._seconds("queue_seconds", "waiting: in the router's line, or at a worker for room", "role")
        self._fetch = self._seconds("fetch_seconds", "until a role had the KV that others hold", "role")
        self._prefill = self._seconds("prefill_seconds", "computing what nobody had of a prompt", "role")
        self._decode = self._seconds("decode_seconds", "from the first token to the last, of completed requests")
        self._handover = self._seconds("handover_seconds", "from prefill's first token until decode had the KV")
        self._error = self._histogram(
            "ttft_prediction_error_ratio", "(predicted - actual) / actual time to first token", _ERROR_BUCKETS
        )
        self._regret = self._seconds(
            "placement_regret_seconds", "how much later the first token came than predicted of the best other worker"
        )
        self._request_prompt = self._histogram("request_prompt_tokens", "tokens of a request's prompt", _TOKENS)
        self._request_generated = self._histogram("request_generated_tokens", "tokens shown of a request", _TOKENS)
        self._prompt = self._counter("prompt_tokens", "prompt tokens of ended requests")
        self._generated = self._counter("generated_tokens", "tokens shown to clients")
        self._hits = self._counter(
            "prefix_hit_tokens", "prompt tokens whose KV existed before, by where it was", "tier"
        )
        self._active = self._gauge("active_requests", "accepted and not finished")
        self._waiting = self._gauge("waiting_requests", "of them those that wait in the router's line")
        self._running = self._gauge("running_requests", "of them those that workers have")
        self._ready = self._gauge("ready", "1 if a request can be served")
        self._live = self._gauge("live_processes", "workers and pool nodes that are connected", "role")
        self._usage = self._gauge(
            "kv_cache_usage_ratio", "part of all decode workers' blocks that can't be allocated now"
        )
        self._cache = self._gauge(
            "kv_cache_info",
            "1, with the size of a block and how many all decode workers have",
            "block_size",
            "num_blocks",
        )
        self._index_entries = self._gauge("index_entries", "blocks, counted once for each place that holds them")
        self._index_bytes = self._gauge("index_bytes", "memory of the prefix index, about")
        for name in _CLASSES:
            for outcome in ("completed", "failed", "cancelled"):
                self._requests.labels(name, outcome)
        for tier in ("local", "DEVICE", "HOST", "DISK"):
            self._hits.labels(tier)

    def identify(self, router: str, model: str, slo_s: Mapping[tuple[str, str], float]) -> None:
        """Who this is, and what it promises by `(class, objective)`; objectives are `ttft` and `tpot`."""
        self._info.labels(router, model).set(1)
        for labels, seconds in slo_s.items():
            self._slo_target.labels(*labels).set(seconds)

    # --- requests ------------------------------------------------------------------------------------------------------

    def emitted(self, emit: Emit, now_s: float) -> None:
        """Takes note of what a request's clients are shown now."""
        if isinstance(emit.event, TokensEvent):
            self._gaps.tokens(emit.request_id, emit.event.index, len(emit.event.token_ids), now_s)
        else:
            self._gaps.ended(emit.request_id)

    def failed(self, code: str) -> None:
        """A request was refused, or failed; `code` is a TandemError's."""
        self._errors.labels(code).inc()

    def ended(self, summary: Summary, num_generated_tokens: int) -> None:
        """Counts a request that has ended, of which the client was shown `num_generated_tokens`."""
        name = "batch" if summary.batch else "interactive"
        self._requests.labels(name, summary.outcome).inc()
        self._prompt.inc(summary.num_prompt_tokens)
        self._request_prompt.observe(summary.num_prompt_tokens)
        self._generated.inc(num_generated_tokens)
        self._request_generated.observe(num_generated_tokens)
        self._resumes.inc(summary.resume_no > 0)
        for tier, num_tokens in hit_tokens_by_tier(summary).items():
            self._hits.labels(tier).inc(num_tokens)
        self._took(summary, name)
        self._kept(summary, name)
        for placement in summary.placements:
            self._placements.labels("prefill_here" if placement.prefill is None else "handover").inc()
        for run in summary.runs:
            self._reported(run.report)
        if (handover_s := exposed_transfer_s(summary.runs)) is not None:
            self._handover.observe(handover_s)

    def _took(self, summary: Summary, name: str) -> None:
        if summary.placed_after_s:
            self._queue.labels("router").observe(summary.placed_after_s[0])
        if summary.ttft_s is not None:
            self._ttft.labels(name).observe(summary.ttft_s)
            if summary.predicted_ttft_s is not None and summary.ttft_s > 0.0:
                self._error.observe((summary.predicted_ttft_s - summary.ttft_s) / summary.ttft_s)
                self._regret.observe(hindsight(summary)[2])
        if summary.outcome == "completed":
            self._e2e.labels(name).observe(summary.total_s)
            if summary.tpot_s is not None:
                self._tpot.labels(name).observe(summary.tpot_s)
            if summary.ttft_s is not None:
                self._decode.observe(summary.total_s - summary.ttft_s)

    def _kept(self, summary: Summary, name: str) -> None:
        """A cancelled request without a first token says nothing of a promise; a failed one broke it."""
        if summary.promised_ttft_s and (summary.ttft_s is not None or summary.outcome == "failed"):
            kept = summary.ttft_s is not None and summary.ttft_s <= summary.promised_ttft_s
            self._slo.labels(name, "ttft", "yes" if kept else "no").inc()
        if summary.promised_tpot_s and summary.tpot_s is not None and summary.outcome == "completed":
            self._slo.labels(name, "tpot", "yes" if summary.tpot_s <= summary.promised_tpot_s else "no").inc()

    def _reported(self, report: RoleReport) -> None:
        role = report.fence.role
        self._queue.labels(role).observe(report.queue_s)
        if report.fetched_tokens:
            self._fetch.labels(role).observe(report.fetch_s)
        if report.computed_tokens:
            self._prefill.labels(role).observe(report.compute_s)

    # --- the state of the router ---------------------------------------------------------------------------------------

    def refresh(self, core: RouterCore, now_s: float, traced: Mapping[str, int] | None = None) -> None:
        """Shows the last reports of the live processes, what the core counted, and what became of traces (`Tracing.counts`)."""
        members = list(core.membership)
        self._processes.refresh(members, now_s)
        self._core_totals.refresh(core, traced or {})
        self._active.set(len(core.journal))
        self._waiting.set(core.num_waiting)
        self._running.set(max(0, len(core.journal) - core.num_waiting))
        self._ready.set(core.ready)
        self._index_entries.set(core.index.num_entries)
        self._index_bytes.set(core.index.num_bytes)
        for role in ("prefill", "decode", "pool"):
            self._live.labels(role).set(sum(member.role == role for member in members))
        self._show_cache([member for member in members if member.role == "decode"])

    def _show_cache(self, decodes: Iterable[Member]) -> None:
        heard = [(member, member.heartbeat.load) for member in decodes if member.heartbeat is not None]
        num_blocks = sum(member.hello.capacity.num_blocks for member, _ in heard)
        free = sum(load.free_blocks for _, load in heard)
        groups = [member.hello.group for member, _ in heard if member.hello.group is not None]
        self._usage.set(1.0 - min(1.0, free / num_blocks) if num_blocks else 0.0)
        self._cache.clear()
        if groups:
            self._cache.labels(str(groups[0].block_size), str(num_blocks)).set(1)

    # --- families ------------------------------------------------------------------------------------------------------

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tandem_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"tandem_{name}", text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"tandem_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tandem_{name}", text, buckets=buckets, registry=self.registry)


class _Gaps(Collector):
    """Times between the tokens of a sample as they are shown: of a frame with several, each took its part. Counted by hand: it is
    done for every frame, where prometheus_client's histogram would take a lock for each token."""

    def __init__(self) -> None:
        self._last_s: dict[str, dict[int, float]] = {}
        self._counts = [0] * (len(_TOKEN_SECONDS) + 1)
        self._sum_s = 0.0

    def tokens(self, request_id: str, index: int, num_tokens: int, now_s: float) -> None:
        if not num_tokens:
            return
        samples = self._last_s.setdefault(request_id, {})
        last_s = samples.get(index)
        samples[index] = now_s
        if last_s is not None:
            gap_s = now_s - last_s
            self._counts[bisect_left(_TOKEN_SECONDS, gap_s / num_tokens)] += num_tokens
            self._sum_s += gap_s

    def ended(self, request_id: str) -> None:
        self._last_s.pop(request_id, None)

    def collect(self) -> Iterator[Metric]:
        buckets, total = [], 0
        for bound, count in zip((*map(str, _TOKEN_SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family = HistogramMetricFamily("tandem_inter_token_seconds", "time between two tokens of a sample")
        family.add_metric([], buckets, self._sum_s)
        yield family


class _CoreTotals(Collector):
    """What the core itself counts."""

    def __init__(self) -> None:
        self._redispatches: dict[tuple[str, str], int] = {}
        self._lost: dict[tuple[str, str], int] = {}
        self._traced = dict.fromkeys(("exported", "failed", "dropped"), 0)
        self._rejected = 0
        self._left_waiting = 0

    def refresh(self, core: RouterCore, traced: Mapping[str, int]) -> None:
        self._traced.update(traced)
        self._redispatches, self._lost = core.num_redispatches, core.num_lost
        self._rejected, self._left_waiting = core.index.num_rejected, core.num_left_waiting

    def collect(self) -> Iterator[Metric]:
        again = CounterMetricFamily(
            "tandem_redispatches", "dispatches that had to be made again", labels=["role", "reason"]
        )
        lost = CounterMetricFamily("tandem_lost_processes", "processes that were lost", labels=["role", "cause"])
        traced = CounterMetricFamily(
            "tandem_traced_requests", "sampled requests, by what became of their trace", labels=["outcome"]
        )
        for outcome, total in self._traced.items():
            traced.add_metric([outcome], total)
        yield traced
        for family, totals in ((again, self._redispatches), (lost, self._lost)):
            for labels, total in totals.items():
                family.add_metric(list(labels), total)
            yield family
        yield CounterMetricFamily(
            "tandem_index_rejected_events", "KV events that meant nothing to the index", value=self._rejected
        )
        yield CounterMetricFamily(
            "tandem_left_waiting_requests", "requests that ended in the line", value=self._left_waiting
        )
