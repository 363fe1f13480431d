"""What the router says about itself: the end of a request, the cluster, the audit.

Owns the translation from the core's state to the public messages. Reads, never changes.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import msgspec

from protos import tandem_pb2
from protos.control import Load
from router.auditor import Finding
from router.journal import Run, Summary
from router.membership import Member
from router.router import RouterCore


def num_cached_tokens(summary: Summary) -> int:
    """Prompt tokens whose KV existed before the request: what the role that computed the prompt found, or fetched."""
    return sum(hit_tokens_by_tier(summary).values())


def hit_tokens_by_tier(summary: Summary) -> dict[str, int]:
    """Those tokens by where their KV was: `local` is the worker that computed the rest, the others are tiers of its sources."""
    runs = [run.report for run in summary.runs]
    first = next((r for r in runs if r.fence.role == "prefill"), next(iter(runs), None))
    if first is None:
        return {}
    local = min(first.local_hit_tokens, summary.num_prompt_tokens)
    fetched = min(first.fetched_tokens, summary.num_prompt_tokens - local)
    hits = {"local": local}
    num_blocks, blocks_before, tokens_before = sum(item.num_blocks for item in first.fetched), 0, 0
    for item in first.fetched:
        blocks_before += item.num_blocks
        tokens_until = fetched * blocks_before // num_blocks if num_blocks else 0
        hits[item.tier] = hits.get(item.tier, 0) + tokens_until - tokens_before
        tokens_before = tokens_until
    return hits


def completed(summary: Summary, num_generated_tokens: int) -> tandem_pb2.Completed:
    """The last message of an answer; `num_generated_tokens` is what the client was shown."""
    return tandem_pb2.Completed(
        request_id=summary.request_id,
        num_prompt_tokens=summary.num_prompt_tokens,
        num_generated_tokens=num_generated_tokens,
        num_cached_tokens=num_cached_tokens(summary),
        ttft_s=summary.ttft_s or 0.0,
        total_s=summary.total_s,
        runs=[role_run(run) for run in summary.runs],
        exposed_transfer_s=exposed_transfer_s(summary.runs),
        exact=summary.exact,
        resume_no=summary.resume_no,
    )


def exposed_transfer_s(runs: Sequence[Run]) -> float | None:
    """How long after prefill's first token the KV of the last hand-over was complete; None without one. Both are told to one
    clock, the router's, over lines of the same length."""
    handed = [
        (prefill, decode)
        for prefill in runs
        for decode in runs
        if prefill.report.fence.role == "prefill"
        and decode.report.fence.role == "decode"
        and any(item.process == prefill.process for item in decode.report.fetched)
    ]
    if not handed:
        return None
    prefill, decode = handed[-1]
    return max(0.0, decode.reported_at_s - prefill.reported_at_s)


def role_run(run: Run) -> tandem_pb2.RoleRun:
    """What one role did."""
    report = run.report
    return tandem_pb2.RoleRun(
        role=report.fence.role,
        process=run.process,
        attempt=report.fence.attempt,
        local_hit_tokens=report.local_hit_tokens,
        fetched_tokens=report.fetched_tokens,
        computed_tokens=report.computed_tokens,
        fetched=[
            tandem_pb2.FetchedFrom(
                process=item.process,
                tier=item.tier,
                transport=item.transport,
                num_blocks=item.num_blocks,
                num_bytes=item.num_bytes,
            )
            for item in report.fetched
        ],
        queue_s=report.queue_s,
        fetch_s=report.fetch_s,
        compute_s=report.compute_s,
        predicted_ttft_s=run.predicted_ttft_s,
    )


def cluster(core: RouterCore, model: str, now_s: float) -> tandem_pb2.GetClusterResponse:
    """What runs where."""
    group = core.membership.served_group
    outcomes = core.journal.num_outcomes
    return tandem_pb2.GetClusterResponse(
        router=core.settings.router,
        model=model,
        max_model_len=core.max_model_len(),
        block_size=group.block_size if group else 0,
        model_fingerprint=group.model_fingerprint.hex() if group else "",
        numerics_class=group.numerics_class.hex() if group else "",
        kv_format=group.kv_format if group else "",
        processes=[_process(core, member, now_s) for member in core.membership],
        num_active_requests=len(core.journal),
        num_requests_finished=outcomes["completed"],
        num_requests_failed=outcomes["failed"],
        num_requests_cancelled=outcomes["cancelled"],
        ready=core.ready,
        num_waiting_requests=core.num_waiting,
        num_requests_left_waiting=core.num_left_waiting,
        router_epoch=core.settings.epoch.hex(),
        traffic=_traffic(core),
        wanted=core.wanted.as_message(),
    )


def _traffic(core: RouterCore) -> tandem_pb2.Traffic:
    traffic = core.fleet.traffic
    return tandem_pb2.Traffic(
        num_requests=traffic.num_requests,
        num_samples=traffic.num_samples,
        prompt_tokens=traffic.prompt_tokens,
        uncached_tokens=traffic.uncached_tokens,
        uncached_pairs=traffic.uncached_pairs,
        uncached_squares=traffic.uncached_squares,
        here_tokens=traffic.here_tokens,
        here_pairs=traffic.here_pairs,
        answer_tokens=core.fleet.answer_tokens,
    )


def _process(core: RouterCore, member: Member, now_s: float) -> tandem_pb2.ProcessStatus:
    status = tandem_pb2.ProcessStatus(
        name=member.name,
        role=member.role,
        epoch=member.epoch.hex(),
        pid=member.hello.pid,
        heartbeat_age_s=now_s - member.heard_at_s,
        num_blocks=member.hello.capacity.num_blocks,
        slab_bytes=member.hello.capacity.slab_bytes,
        indexed_blocks=core.index.num_blocks_of(member.name),
        fetch_endpoint=member.hello.endpoints.fetch,
        shm_endpoint=member.hello.endpoints.shm,
        events_endpoint=member.hello.endpoints.events,
        max_running=member.hello.capacity.max_running,
        max_step_tokens=member.hello.capacity.max_step_tokens,
    )
    if member.heartbeat is not None:
        load, counters = member.heartbeat.load, member.heartbeat.counters
        status.step_age_s = member.heartbeat.step_age_s
        status.draining = member.heartbeat.draining
        status.waiting_tokens = load.waiting_tokens
        status.waiting_pairs = load.waiting_pairs
        prices = load.prices
        status.prices.base_s, status.prices.token_s, status.prices.pair_s = prices.base_s, prices.token_s, prices.pair_s
        status.prices.sequence_s, status.prices.context_s = prices.sequence_s, prices.context_s
        status.free_blocks = load.free_blocks
        status.cached_blocks = load.cached_blocks
        status.leased_blocks = load.leased_blocks
        status.num_running = load.num_running
        status.num_waiting = load.num_waiting
        status.prefill_tokens_per_s = load.prefill_tokens_per_s
        status.decode_step_s = load.decode_step_s
        status.prefill_tokens = counters.prefill_tokens
        status.decode_tokens = counters.decode_tokens
        status.prefix_hit_tokens = counters.prefix_hit_tokens
        status.fetched_blocks = counters.fetched_blocks
        status.fetched_bytes = counters.fetched_bytes
        status.preemptions = counters.preemptions
        status.recomputed_tokens = counters.recomputed_tokens
        status.served_blocks = counters.served_blocks
        for link in member.heartbeat.links:
            status.links.add(
                source=link.process,
                transport=link.transport,
                num_bytes=link.num_bytes,
                bytes_per_s=link.bytes_per_s,
            )
        for name, total in msgspec.structs.asdict(counters).items():
            status.counters[name] = total
    return status


def audit(
    core: RouterCore, answering: Set[str], now_s: float, findings: Sequence[Finding] = ()
) -> tandem_pb2.AuditResponse:
    """Cross-checks, after the `findings` of all processes. `answering` are the requests whose clients are being served. Checks
    that only hold when the cluster is idle say so while requests are active."""
    checks = [tandem_pb2.AuditCheck(check=f.check, ok=f.ok, evidence=f.evidence) for f in findings]

    def check(name: str, ok: bool, evidence: str) -> None:
        checks.append(tandem_pb2.AuditCheck(check=name, ok=ok, evidence=evidence))

    active = {record.request_id for record in core.journal}
    orphans = active - answering
    check("every active request has a client", not orphans, f"{len(active)} active, {len(orphans)} without a client")
    stale = [m.name for m in core.membership if now_s - m.heard_at_s > core.settings.liveness_s]
    check("every process' heartbeat is fresh", not stale, f"{len(core.membership)} processes, silent: {stale}")
    members = {member.name for member in core.membership}
    dead = sorted(core.index.processes() - members)
    check("the index holds nothing of dead processes", not dead, f"{len(core.index)} keys, dead holders: {dead}")
    dead = sorted(core.fleet.processes() - members)
    check("the fleet has no account of a dead process", not dead, f"dead accounts: {dead}")
    misplaced = [
        dispatch.process
        for record in core.journal
        for dispatch in record.dispatches.values()
        if not core.membership.is_member(dispatch.process, dispatch.epoch)
    ]
    check("every dispatch is held by a live process", not misplaced, f"dispatches at dead processes: {misplaced}")
    if active:
        check("an idle cluster holds nothing", True, f"not idle: {len(active)} requests are active")
        return tandem_pb2.AuditResponse(ok=all(item.ok for item in checks), checks=checks)
    dispatched, closing = core.fleet.num_dispatched(), core.num_closing
    check("an idle fleet has no dispatches", dispatched == 0, f"{dispatched} dispatches that have not ended")
    check("every abort is confirmed", closing == 0, f"{closing} aborts are not confirmed yet")
    loads = {m.name: m.heartbeat.load if m.heartbeat is not None else Load() for m in core.membership}
    busy = {name: load.num_running + load.num_waiting for name, load in loads.items()}
    busy = {name: num for name, num in busy.items() if num}
    check("idle workers run nothing", not busy, f"sequences: {busy}")
    leased = {name: load.leased_blocks for name, load in loads.items() if load.leased_blocks}
    check("an idle cluster leases nothing", not leased, f"leased blocks: {leased}")
    return tandem_pb2.AuditResponse(ok=all(item.ok for item in checks), checks=checks)
