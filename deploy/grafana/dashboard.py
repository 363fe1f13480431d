"""Writes dashboard.json, which Grafana imports: `python deploy/grafana/dashboard.py`.

Owns which panels there are and what each asks. Metrics and labels: docs/metrics.md. Those of requests are each router's own and
are added; every router shows every process, so of those one router's word is taken (`max without (instance)`).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)

FILE = Path(__file__).with_name("dashboard.json")
DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
JOB = 'job=~"$job"'
WINDOW = "$__rate_interval"
FAILED = 'outcome="failed"'


class Query(NamedTuple):
    """What is asked, and how its series are called."""

    expr: str
    legend: str = ""


class Graph(NamedTuple):
    """One panel: a time series, or with `is_number` the last value, large."""

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    stacked: bool = False
    is_number: bool = False


def total(name: str, by: str = "", where: str = "") -> str:
    """Per second, of a counter of requests, all routers together."""
    return f"sum{_by(by)} (rate({name}{_where(where)}[{WINDOW}]))"


def quantile(part: float, name: str, by: str = "", where: str = "") -> str:
    """Of a histogram, all routers together."""
    labels = ", ".join(["le", *([by] if by else [])])
    return f"histogram_quantile({part:g}, sum by ({labels}) (rate({name}_bucket{_where(where)}[{WINDOW}])))"


def gauge(name: str, by: str = "", where: str = "") -> str:
    """Of requests, all routers together."""
    return f"sum{_by(by)} ({name}{_where(where)})"


def of_processes(name: str, by: str = "process", where: str = "") -> str:
    """A gauge of processes, as one of the routers shows it."""
    return f"sum by ({by}) (max without (instance) ({name}{_where(where)}))"


def process_rate(name: str, by: str = "process", where: str = "") -> str:
    """Per second, of a total of processes."""
    return f"sum by ({by}) (max without (instance) (rate({name}{_where(where)}[{WINDOW}])))"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def _where(matchers: str) -> str:
    return f"{{{', '.join([JOB, *([matchers] if matchers else [])])}}}"


def percentiles(name: str, by: str = "", where: str = "") -> tuple[Query, ...]:
    prefix = f"{{{{{by}}}}} " if by else ""
    return tuple(Query(quantile(part, name, by, where), f"{prefix}p{part * 100:g}") for part in (0.5, 0.95, 0.99))


def promised(objective: str) -> Query:
    where = _where(f'objective="{objective}"')
    return Query(f"max by (class) (tandem_slo_target_seconds{where})", "{{class}}: promised")


def kept(objective: str) -> Query:
    matchers = f'objective="{objective}"'
    yes = total("tandem_slo_requests_total", "class", f'{matchers}, kept="yes"')
    return Query(f"{yes} / {total('tandem_slo_requests_total', 'class', matchers)}", f"{{{{class}}}} {objective}")


def part_of_prompts(tier: str) -> str:
    hits = total("tandem_prefix_hit_tokens_total", "tier", tier)
    return f"{hits} / scalar({total('tandem_prompt_tokens_total')})"


ROWS: tuple[tuple[str, tuple[Graph, ...]], ...] = (
    (
        "At a glance",
        (
            Graph(
                "Requests", "Ended in a second.", "reqps", (Query(total("tandem_requests_total")),), 4, is_number=True
            ),
            Graph(
                "Tokens",
                "Shown to clients in a second, of ended requests.",
                "none",
                (Query(total("tandem_generated_tokens_total")),),
                4,
                is_number=True,
            ),
            Graph(
                "TTFT, p95",
                "Of interactive requests.",
                "s",
                (Query(quantile(0.95, "tandem_ttft_seconds", where='class="interactive"')),),
                4,
                is_number=True,
            ),
            Graph(
                "TPOT, p95",
                "Of interactive requests.",
                "s",
                (Query(quantile(0.95, "tandem_tpot_seconds", where='class="interactive"')),),
                4,
                is_number=True,
            ),
            Graph(
                "Prompt tokens found",
                "Part of the prompts' tokens whose KV existed before.",
                "percentunit",
                (Query(f"{total('tandem_prefix_hit_tokens_total')} / {total('tandem_prompt_tokens_total')}"),),
                4,
                is_number=True,
            ),
            Graph(
                "Failed",
                "Part of the requests that failed.",
                "percentunit",
                (Query(f"{total('tandem_requests_total', where=FAILED)} / {total('tandem_requests_total')}"),),
                4,
                is_number=True,
            ),
        ),
    ),
    (
        "Latency and promises",
        (
            Graph(
                "Time to first token",
                "Interactive requests. What is promised grows with the uncached part of a prompt.",
                "s",
                (*percentiles("tandem_ttft_seconds", where='class="interactive"'), promised("ttft")),
            ),
            Graph(
                "Time per token after the first",
                "A request's mean, interactive requests.",
                "s",
                (*percentiles("tandem_tpot_seconds", where='class="interactive"'), promised("tpot")),
            ),
            Graph("Between tokens", "As clients see it.", "s", percentiles("tandem_inter_token_seconds")),
            Graph("End to end", "Of completed requests.", "s", percentiles("tandem_e2e_seconds", "class")),
            Graph("Promises kept", "Part of the requests.", "percentunit", (kept("ttft"), kept("tpot"))),
            Graph(
                "Where the time goes, p95",
                "Parts of a request, each by itself.",
                "s",
                (
                    Query(quantile(0.95, "tandem_queue_seconds", "role"), "queue: {{role}}"),
                    Query(quantile(0.95, "tandem_fetch_seconds", "role"), "fetch: {{role}}"),
                    Query(quantile(0.95, "tandem_prefill_seconds", "role"), "prefill: {{role}}"),
                    Query(quantile(0.95, "tandem_handover_seconds"), "hand-over"),
                    Query(quantile(0.95, "tandem_decode_seconds"), "decode"),
                ),
            ),
        ),
    ),
    (
        "Load",
        (
            Graph(
                "Requests",
                "In the routers' lines, and at workers.",
                "none",
                (
                    Query(gauge("tandem_waiting_requests"), "waiting"),
                    Query(gauge("tandem_running_requests"), "running"),
                ),
                stacked=True,
            ),
            Graph(
                "Outcomes",
                "Requests that end in a second, and errors by their code.",
                "reqps",
                (
                    Query(total("tandem_requests_total", "outcome"), "{{outcome}}"),
                    Query(total("tandem_errors_total", "code"), "error: {{code}}"),
                ),
            ),
            Graph(
                "Tokens of workers",
                "Computed of prompts, and drawn, in a second.",
                "none",
                (
                    Query(process_rate("tandem_process_prefill_tokens_total", "role"), "prefill: {{role}}"),
                    Query(process_rate("tandem_process_decode_tokens_total", "role"), "decode: {{role}}"),
                ),
            ),
            Graph(
                "Sequences that run",
                "By worker.",
                "none",
                (Query(of_processes("tandem_process_num_running"), "{{process}}"),),
            ),
            Graph(
                "Sequences that wait",
                "By worker.",
                "none",
                (Query(of_processes("tandem_process_num_waiting"), "{{process}}"),),
            ),
            Graph(
                "KV cache in use",
                "Part of a worker's blocks that can't be allocated.",
                "percentunit",
                (Query(of_processes("tandem_process_kv_cache_usage_ratio"), "{{process}}"),),
            ),
            Graph(
                "A decode step",
                "As measured by each worker.",
                "s",
                (Query(of_processes("tandem_process_decode_step_seconds", where='role="decode"'), "{{process}}"),),
            ),
            Graph(
                "Lengths, p50 and p95",
                "Tokens of prompts and answers.",
                "none",
                (
                    Query(quantile(0.5, "tandem_request_prompt_tokens"), "prompt p50"),
                    Query(quantile(0.95, "tandem_request_prompt_tokens"), "prompt p95"),
                    Query(quantile(0.5, "tandem_request_generated_tokens"), "answer p50"),
                    Query(quantile(0.95, "tandem_request_generated_tokens"), "answer p95"),
                ),
            ),
            Graph(
                "Preemptions and aborts",
                "In a second, all workers.",
                "none",
                (
                    Query(process_rate("tandem_process_preemptions_total", "role"), "preempted: {{role}}"),
                    Query(process_rate("tandem_process_aborted_jobs_total", "phase"), "aborted: {{phase}}"),
                    Query(process_rate("tandem_process_held_back_steps_total", "role"), "held back: {{role}}"),
                ),
            ),
        ),
    ),
    (
        "Cache and transfers",
        (
            Graph(
                "Prompt tokens found, by tier",
                "Part of all prompt tokens. `local` is the worker that computed the rest.",
                "percentunit",
                (Query(part_of_prompts(""), "{{tier}}"),),
                stacked=True,
            ),
            Graph(
                "Bytes moved, by transport",
                "Fetched by workers and pool nodes, in a second.",
                "Bps",
                (Query(process_rate("tandem_process_transferred_bytes_total", "transport"), "{{transport}}"),),
                stacked=True,
            ),
            Graph(
                "Speed of fetching",
                "As measured by each process.",
                "Bps",
                (Query(of_processes("tandem_process_fetch_bytes_per_second"), "{{process}}"),),
            ),
            Graph(
                "Fetches that went wrong",
                "Blocks in a second: missed, damaged; and tokens computed again.",
                "none",
                (
                    Query(process_rate("tandem_process_fetch_misses_total", "role"), "missed: {{role}}"),
                    Query(process_rate("tandem_process_fetch_corrupt_blocks_total", "role"), "corrupt: {{role}}"),
                    Query(process_rate("tandem_process_recomputed_tokens_total", "role"), "recomputed: {{role}}"),
                ),
            ),
            Graph(
                "Leases",
                "Blocks under a lease; leases that ended by time are a sign of lost readers.",
                "none",
                (
                    Query(of_processes("tandem_process_leased_blocks"), "{{process}}"),
                    Query(process_rate("tandem_process_expired_leases_total", "role"), "expired in a second: {{role}}"),
                ),
            ),
            Graph(
                "Evictions",
                "Blocks in a second; dropped ones had no copy anywhere.",
                "none",
                (
                    Query(process_rate("tandem_process_evicted_blocks_total", "role"), "evicted: {{role}}"),
                    Query(process_rate("tandem_process_dropped_blocks_total", "role"), "dropped: {{role}}"),
                ),
            ),
            Graph(
                "HOST tier",
                "Blocks of pool nodes: cached, and all there is room for.",
                "none",
                (
                    Query(of_processes("tandem_process_cached_blocks", where='role="pool"'), "{{process}}"),
                    Query(of_processes("tandem_process_blocks", where='role="pool"'), "{{process}}: room"),
                ),
            ),
            Graph(
                "DISK tier",
                "Blocks of pool nodes: on disk, and all there is room for; directories that failed.",
                "none",
                (
                    Query(of_processes("tandem_process_disk_used_blocks", where='role="pool"'), "{{process}}"),
                    Query(of_processes("tandem_process_disk_blocks", where='role="pool"'), "{{process}}: room"),
                    Query(of_processes("tandem_process_disk_faults", where='role="pool"'), "{{process}}: failed"),
                ),
            ),
            Graph(
                "To and from disk",
                "Blocks in a second.",
                "none",
                (
                    Query(process_rate("tandem_process_stored_blocks_total", "process"), "{{process}}: stored"),
                    Query(process_rate("tandem_process_loaded_blocks_total", "process"), "{{process}}: loaded"),
                    Query(process_rate("tandem_process_not_stored_blocks_total", "process"), "{{process}}: not stored"),
                ),
            ),
        ),
    ),
    (
        "Routing and failover",
        (
            Graph(
                "Error of predicted TTFT",
                "(predicted - actual) / actual.",
                "percentunit",
                (
                    Query(quantile(0.1, "tandem_ttft_prediction_error_ratio"), "p10"),
                    Query(quantile(0.5, "tandem_ttft_prediction_error_ratio"), "p50"),
                    Query(quantile(0.9, "tandem_ttft_prediction_error_ratio"), "p90"),
                ),
            ),
            Graph(
                "Regret of placement",
                "How much later than predicted of the best other worker.",
                "s",
                percentiles("tandem_placement_regret_seconds"),
            ),
            Graph(
                "Decisions",
                "In a second: handed over, or prefilled by the decode worker.",
                "none",
                (Query(total("tandem_placements_total", "form"), "{{form}}"),),
                stacked=True,
            ),
            Graph(
                "Dispatched again",
                "In a second, by role and reason.",
                "none",
                (Query(total("tandem_redispatches_total", "role, reason"), "{{role}}: {{reason}}"),),
            ),
            Graph(
                "Processes",
                "Live ones by role, and those that are leaving.",
                "none",
                (
                    Query(f"max by (role) (tandem_live_processes{_where('')})", "{{role}}"),
                    Query(of_processes("tandem_process_draining", "role"), "leaving: {{role}}"),
                ),
            ),
            Graph(
                "Processes lost",
                "In a second, by role and cause. Each router loses a process by itself.",
                "none",
                (
                    Query(
                        f"max by (role, cause) (rate(tandem_lost_processes_total{_where('')}[{WINDOW}]))",
                        "{{role}}: {{cause}}",
                    ),
                ),
            ),
            Graph(
                "Routers",
                "1: it can serve.",
                "none",
                (Query(f"tandem_ready{_where('')}", "{{instance}}"),),
            ),
            Graph(
                "Answers that went on at another router",
                "In a second.",
                "none",
                (Query(total("tandem_resumed_requests_total"), "resumed"),),
            ),
            Graph(
                "Prefix index",
                "Its memory, and events in a second that meant nothing to it.",
                "bytes",
                (
                    Query(f"tandem_index_bytes{_where('')}", "{{instance}}"),
                    Query(f"rate(tandem_index_rejected_events_total{_where('')}[{WINDOW}])", "rejected: {{instance}}"),
                ),
            ),
        ),
    ),
)


def dashboard() -> model.Dashboard:
    """The whole of it."""
    built = (
        builder.Dashboard("Tandem")
        .uid("tandem")
        .description("A disaggregated prefill/decode cluster: latency, load, caches, transfers, routing and failover.")
        .tags(["tandem", "llm"])
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(builder.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            builder.QueryVariable("job")
            .label("Job")
            .datasource(DATASOURCE)
            .query("label_values(tandem_ready, job)")
            .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
        )
    )
    numbers = itertools.count(1)
    for title, graphs in ROWS:
        built = built.with_row(builder.Row(title).id(next(numbers)))
        for graph in graphs:
            built = built.with_panel(_panel(graph).id(next(numbers)))
    return built.build()


def text() -> str:
    """What dashboard.json holds."""
    return str(JSONEncoder(sort_keys=True, indent=2).encode(dashboard())) + "\n"


def _panel(graph: Graph) -> stat.Panel | timeseries.Panel:
    if graph.is_number:
        last = common.ReduceDataOptions().calcs(["lastNotNull"])
        panel = stat.Panel().height(4).graph_mode(BigValueGraphMode.AREA).reduce_options(last)
    else:
        panel = (
            timeseries.Panel()
            .height(8)
            .line_width(1)
            .fill_opacity(10)
            .show_points(VisibilityMode.NEVER)
            .stacking(common.StackingConfig().mode(StackingMode.NORMAL if graph.stacked else StackingMode.NONE))
            .legend(
                common.VizLegendOptions()
                .display_mode(LegendDisplayMode.LIST)
                .placement(LegendPlacement.BOTTOM)
                .show_legend(True)
            )
            .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        )
    panel = panel.title(graph.title).description(graph.about).unit(graph.unit).span(graph.width).datasource(DATASOURCE)
    for number, query in enumerate(graph.queries):
        ref = chr(ord("A") + number)
        panel = panel.with_target(
            prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref).range()
        )
    return panel


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
