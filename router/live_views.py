"""The messages of a live view: their shape, and what they say of one process, one link, one request.

Owns the translation from the core's state to them. Reads, never changes; never a prompt, a text or a token.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import msgspec

from protos.control import Role, Tier
from router.journal import Record, Summary
from router.membership import Member, own_tier
from router.phases import Span, spans
from router.reports import num_cached_tokens

MAX_PROCESSES = 64
MAX_LINKS = 256


class TierView(msgspec.Struct, frozen=True):
    """A tier's blocks: what is used now, what is cached; the rest is empty. `num_leased` counts blocks of either kind."""

    tier: Tier
    num_blocks: int
    num_used: int
    num_cached: int
    num_leased: int


class ProcessView(msgspec.Struct, frozen=True):
    """A worker or pool node. `num_dispatches` are this router's own, that have not ended."""

    name: str
    role: Role
    served: bool
    draining: bool
    heard_s: float
    step_s: float
    num_running: int
    num_waiting: int
    num_dispatches: int
    tiers: list[TierView]


class LinkView(msgspec.Struct, frozen=True):
    """What `sink` has fetched from `source` since its epoch began."""

    source: str
    sink: str
    transport: str
    num_bytes: int


class ClusterView(msgspec.Struct, frozen=True):
    """What runs where; `num_processes` counts also those that are left out."""

    router: str
    model: str
    ready: bool
    block_tokens: int
    slab_bytes: int
    num_active: int
    num_waiting: int
    num_completed: int
    num_failed: int
    num_cancelled: int
    num_processes: int
    processes: list[ProcessView]
    links: list[LinkView]


class TotalsView(msgspec.Struct, frozen=True):
    """Of `num_requests` that ended within the last minute; None where there is nothing to say."""

    num_requests: int
    num_failed: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    found: float | None
    """The part of their prompts' tokens whose KV existed before."""
    tokens_per_s: float | None


class RequestView(msgspec.Struct, frozen=True):
    """A request. `outcome` is empty while it is active."""

    id: str
    accepted_at_s: float
    num_prompt_tokens: int
    num_generated_tokens: int
    num_samples: int
    num_cached_tokens: int | None
    ttft_s: float | None
    predicted_ttft_s: float | None
    total_s: float | None
    outcome: str
    error: str
    prefill: str
    decode: str
    num_failures: int
    resume_no: int
    exact: bool
    spans: tuple[Span, ...]


class PrefixView(msgspec.Struct, frozen=True):
    """A stretch of the prefix tree (`router/prefixes.py`), and who holds its last block now."""

    name: str
    parent: int | None
    begin: int
    end: int
    num_requests: int
    found: float
    holders: list[str]


class Message(msgspec.Struct, frozen=True):
    """One message. `lost` are ids of active requests that were told of and are neither active nor remembered; `prefixes` are None
    if they have not been looked at again."""

    number: int
    epoch: str
    now_s: float
    whole: bool
    admin: bool
    cluster: ClusterView
    totals: TotalsView
    requests: list[RequestView]
    lost: list[str]
    prefixes: list[PrefixView] | None


def for_clients(message: Message) -> Message:
    """What may be shown to any client: ids and numbers. What an error says and what prefixes are called is left out."""
    return msgspec.structs.replace(
        message,
        admin=False,
        requests=[msgspec.structs.replace(request, error="") for request in message.requests],
        prefixes=message.prefixes
        and [msgspec.structs.replace(prefix, name="", holders=[]) for prefix in message.prefixes],
    )


ORDER: dict[Role, int] = {"prefill": 0, "decode": 1, "pool": 2, "router": 3}


def by_number(name: str) -> tuple[str, int, str]:
    """`decode-2` before `decode-10`."""
    base, _, number = name.rpartition("-")
    return base, int(number) if number.isdecimal() and len(number) < 10 else -1, name


def shown_of(members: Sequence[Member]) -> list[Member]:
    """At most `MAX_PROCESSES`, of each role its share."""
    if len(members) <= MAX_PROCESSES:
        return list(members)
    shown: list[Member] = []
    for role in ORDER:
        ours = [member for member in members if member.role == role]
        shown += ours[: MAX_PROCESSES * len(ours) // len(members)]
    return shown


def process_view(member: Member, served: bool, num_dispatches: int, now_s: float) -> ProcessView:
    heartbeat = member.heartbeat
    return ProcessView(
        name=member.name,
        role=member.role,
        served=served,
        draining=heartbeat is not None and heartbeat.draining,
        heard_s=round(now_s - member.heard_at_s, 3),
        step_s=round(heartbeat.step_age_s, 3) if heartbeat is not None else 0.0,
        num_running=heartbeat.load.num_running if heartbeat is not None else 0,
        num_waiting=heartbeat.load.num_waiting if heartbeat is not None else 0,
        num_dispatches=num_dispatches,
        tiers=_tiers(member),
    )


def _tiers(member: Member) -> list[TierView]:
    if member.heartbeat is None:
        return []
    load, num_blocks = member.heartbeat.load, member.hello.capacity.num_blocks
    cached = min(load.cached_blocks, num_blocks)
    used = max(0, num_blocks - cached - load.empty_blocks)
    tiers = [TierView(own_tier(member.role), num_blocks, used, cached, load.leased_blocks)] if num_blocks else []
    if load.disk_blocks:
        tiers.append(TierView("DISK", load.disk_blocks, 0, min(load.disk_used_blocks, load.disk_blocks), 0))
    return tiers


def link_views(members: Sequence[Member]) -> list[LinkView]:
    """Those between these processes, the ones that brought most if there are too many."""
    names = {member.name for member in members}
    links = [
        LinkView(link.process, member.name, link.transport, link.num_bytes)
        for member in members
        if member.heartbeat is not None
        for link in member.heartbeat.links
        if link.process in names and link.num_bytes
    ]
    return heapq.nlargest(MAX_LINKS, links, key=lambda link: link.num_bytes)


def active_view(record: Record) -> RequestView:
    begun = [
        dispatch.started_at_s
        for dispatch in record.dispatches.values()
        if dispatch.started_at_s is not None and not dispatch.waits
    ]
    first_s = record.first_token_at_s
    prefill, decode = _workers(record)
    return RequestView(
        id=record.request_id,
        accepted_at_s=round(record.accepted_at_s, 5),
        num_prompt_tokens=len(record.request.prompt),
        num_generated_tokens=sum(len(sample.tokens) for sample in record.samples),
        num_samples=record.request.n,
        num_cached_tokens=None,
        ttft_s=None if first_s is None else round(first_s - record.accepted_at_s, 5),
        predicted_ttft_s=(
            round(record.placed_after_s[0] + record.placements[0].predicted_ttft_s, 5) if record.placements else None
        ),
        total_s=None,
        outcome="",
        error="",
        prefill=prefill,
        decode=decode,
        num_failures=sum(record.failures.values()),
        resume_no=0 if record.request.resumed is None else record.request.resumed.resume_no,
        exact=record.exact,
        spans=spans(record.accepted_at_s, record.placed_after_s, record.runs, min(begun, default=None), None),
    )


def ended_view(summary: Summary) -> RequestView:
    predicted_s = summary.predicted_ttft_s
    prefill, decode = _workers(summary)
    return RequestView(
        id=summary.request_id,
        accepted_at_s=round(summary.accepted_at_s, 5),
        num_prompt_tokens=summary.num_prompt_tokens,
        num_generated_tokens=summary.num_generated_tokens,
        num_samples=summary.num_samples,
        num_cached_tokens=num_cached_tokens(summary),
        ttft_s=None if summary.ttft_s is None else round(summary.ttft_s, 5),
        predicted_ttft_s=None if predicted_s is None else round(predicted_s, 5),
        total_s=round(summary.total_s, 5),
        outcome=summary.outcome,
        error=summary.error[:500],
        prefill=prefill,
        decode=decode,
        num_failures=sum(summary.failures),
        resume_no=summary.resume_no,
        exact=summary.exact,
        spans=spans(summary.accepted_at_s, summary.placed_after_s, summary.runs, None, summary.ended_at_s),
    )


def _workers(one: Record | Summary) -> tuple[str, str]:
    """Who prefills and who decodes it, as last placed; "" for a prefill worker that there is none of."""
    if not one.placements:
        return "", ""
    placement = one.placements[-1]
    return "" if placement.prefill is None else placement.names[placement.prefill], placement.names[placement.decode]
