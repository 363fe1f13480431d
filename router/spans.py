"""A request that has ended, as spans: router → prefill → transfer → decode.

Owns their names, times and attributes, by OpenTelemetry's conventions for generative AI where those have a word (`gen_ai.*`),
else ours (`tandem.*`). Never a text, a token or a tenant. Pure; `router/tracing.py` sends them.

    {operation} {model}          the whole request, from its arrival
      queue                      in the router's line, until its workers were chosen
      prefill | decode           one dispatch, until the worker had done its part, was lost, or was called off
        queue, transfer, compute   as the worker reported them: durations, laid so that they end when the report came
        generate                 of a decode role: from the report on
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.control import Sampling
from router.journal import Leg, Run, Summary
from router.reports import num_cached_tokens
from router.trace_context import TraceContext

Value = str | bool | int | float | tuple[str, ...] | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Began:
    """What is known of a request when it begins. `parent` is None where its trace begins here."""

    arrived_s: float
    operation: str
    sampling: Sampling
    n: int
    parent: TraceContext | None


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds are the router's clock. `error` is the code of what went wrong; empty: nothing did."""

    name: str
    start_s: float
    end_s: float
    attributes: dict[str, Value] = field(default_factory=dict)
    error: str = ""
    children: tuple[Span, ...] = ()


def span_of(began: Began, summary: Summary, *, model: str, num_generated_tokens: int) -> Span:
    """The root. No child begins before or ends after its parent."""
    end_s = summary.accepted_at_s + summary.total_s
    placed_s = min((leg.sent_at_s for leg in summary.legs), default=end_s)
    runs = {run.report.fence: run for run in summary.runs}
    return Span(
        f"{began.operation} {model}",
        began.arrived_s,
        end_s,
        _request(began, summary, model, num_generated_tokens),
        summary.error_code if summary.outcome != "completed" else "",
        (
            Span("queue", began.arrived_s, placed_s),
            *(_leg(leg, runs.get(leg.fence), end_s) for leg in summary.legs),
        ),
    )


def _request(began: Began, summary: Summary, model: str, num_generated_tokens: int) -> dict[str, Value]:
    sampling = began.sampling
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": began.operation,
        "gen_ai.provider.name": "tandem",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": summary.request_id,
        "gen_ai.output.type": "text",
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.usage.input_tokens": summary.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": num_cached_tokens(summary),
        "gen_ai.usage.output_tokens": num_generated_tokens,
        "gen_ai.response.finish_reasons": summary.finish_reasons,
        "tandem.outcome": summary.outcome,
        "tandem.exact": summary.exact,
        "tandem.batch": summary.batch,
        "tandem.resume_no": summary.resume_no,
        "tandem.num_dispatches": len(summary.legs),
    }
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = float(sampling.top_k)
    if began.n != 1:
        attributes["gen_ai.request.choice.count"] = began.n
    if summary.ttft_s is not None:
        first_s = summary.accepted_at_s + summary.ttft_s - began.arrived_s
        attributes["gen_ai.response.time_to_first_chunk"] = first_s
    if summary.predicted_ttft_s is not None:
        attributes["tandem.predicted_ttft_s"] = summary.predicted_ttft_s
    return attributes


def _leg(leg: Leg, run: Run | None, end_s: float) -> Span:
    ended_s = min(end_s, max(leg.sent_at_s, leg.ended_at_s))
    attributes: dict[str, Value] = {
        "tandem.process": leg.process,
        "tandem.role": leg.fence.role,
        "tandem.attempt": leg.fence.attempt,
        "tandem.end": leg.end,
    }
    children = () if run is None else _parts(leg, run, ended_s)
    return Span(leg.fence.role, leg.sent_at_s, ended_s, attributes, leg.end if leg.failed else "", children)


def _parts(leg: Leg, run: Run, ended_s: float) -> tuple[Span, ...]:
    """What the report says. It came after the worker wrote it, and its parts are laid against that moment: each is late by
    what the message took."""
    report = run.report
    reported_s = min(ended_s, max(leg.sent_at_s, run.reported_at_s))
    computing_s = max(leg.sent_at_s, reported_s - report.compute_s)
    fetching_s = max(leg.sent_at_s, computing_s - report.fetch_s)
    queued_s = max(leg.sent_at_s, fetching_s - report.queue_s)
    spans = [Span("queue", queued_s, fetching_s)]
    if report.fetched_tokens:
        items = report.fetched
        moved: dict[str, Value] = {
            "tandem.fetched_tokens": report.fetched_tokens,
            "tandem.source.processes": tuple(item.process for item in items),
            "tandem.source.tiers": tuple(item.tier for item in items),
            "tandem.source.transports": tuple(item.transport for item in items),
            "tandem.source.blocks": tuple(item.num_blocks for item in items),
            "tandem.source.bytes": tuple(item.num_bytes for item in items),
        }
        spans.append(Span("transfer", fetching_s, computing_s, moved))
    computed: dict[str, Value] = {
        "tandem.computed_tokens": report.computed_tokens,
        "tandem.local_hit_tokens": report.local_hit_tokens,
    }
    spans.append(Span("compute", computing_s, reported_s, computed))
    if leg.fence.role == "decode":
        spans.append(Span("generate", reported_s, ended_s))
    return tuple(spans)
