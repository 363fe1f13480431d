"""Why a request went where it went, what came of it, and what would have been best.

Owns the translation of a remembered request into the public message, and the hindsight. Reads, never changes.
"""

from __future__ import annotations

from protos import tandem_pb2
from router.access import Caller
from router.journal import Journal, Summary
from router.policy.base import Placement
from router.reports import role_run
from tandem.errors import InvalidRequest


def explain(journal: Journal, request_id: str, caller: Caller) -> tandem_pb2.ExplainResponse:
    """Of a request that has ended, one of the last; "" is the very last. Those that the caller may not see are not there for it.
    Raises InvalidRequest for one that isn't remembered."""
    recent = [summary for summary in journal.recent if caller.sees(summary.tenant)]
    if request_id in {record.request_id for record in journal if caller.sees(record.request.tenant)}:
        raise InvalidRequest(f"request {request_id!r} has not ended yet")
    summary = next((s for s in reversed(recent) if request_id in ("", s.request_id)), None)
    if summary is None:
        most = journal.recent.maxlen
        raise InvalidRequest(
            f"request {request_id!r} is not among the last {len(recent)} that ended (of at most {most})"
        )
    response = tandem_pb2.ExplainResponse(
        request_id=summary.request_id,
        outcome=summary.outcome,
        error=summary.error,
        num_prompt_tokens=summary.num_prompt_tokens,
        num_generated_tokens=summary.num_generated_tokens,
        ttft_s=summary.ttft_s,
        predicted_ttft_s=summary.predicted_ttft_s or 0.0,
        decisions=[_decision(*placed) for placed in zip(summary.placed_after_s, summary.placements, strict=True)],
        runs=[role_run(run) for run in summary.runs],
    )
    if summary.placements and summary.ttft_s is not None:
        best, best_s, regret_s = hindsight(summary)
        response.best_process, response.best_ttft_s, response.regret_s = best, best_s, regret_s
    return response


def hindsight(summary: Summary) -> tuple[str, float, float]:
    """Of the first placement: the worker that would have brought the first token soonest, when, and by how much the chosen one
    was later. The chosen one took what it took; the others are taken to take what was predicted of them."""
    placement, after_s = summary.placements[0], summary.placed_after_s[0]
    assert summary.ttft_s is not None
    chosen = _chosen(placement)
    best, best_s = chosen, summary.ttft_s
    candidates = placement.candidates
    if candidates is not None:
        for number, ttft_s in zip(
            candidates.numbers.tolist(), candidates.ttft_s(placement.chosen.overhead_s), strict=True
        ):
            if number != chosen and after_s + ttft_s < best_s:
                best, best_s = number, after_s + float(ttft_s)
    return placement.names[best], best_s, summary.ttft_s - best_s


def _chosen(placement: Placement) -> int:
    return placement.decode if placement.prefill is None else placement.prefill


def _decision(after_s: float, placement: Placement) -> tandem_pb2.Decision:
    chosen, names = placement.chosen, placement.names
    places = placement.decode_sources if placement.prefill is None else placement.prefill_sources
    decision = tandem_pb2.Decision(
        after_s=after_s,
        prefill="" if placement.prefill is None else names[placement.prefill],
        decode=names[placement.decode],
        hit_tokens=chosen.hit_tokens,
        ttft_s=chosen.ttft_s,
        queue_s=chosen.queue_s,
        fetch_s=chosen.fetch_s,
        compute_s=chosen.compute_s,
        overhead_s=chosen.overhead_s,
        handover_s=chosen.handover_s,
        stream_s=chosen.stream_s,
        others_s=chosen.others_s,
        room_s=chosen.room_s,
        sources=[
            tandem_pb2.SourceChoice(process=names[place.number], tier=place.tier, num_blocks=place.num_blocks)
            for place in places
        ],
    )
    candidates = placement.candidates
    if candidates is not None:
        ttft_s = candidates.ttft_s(chosen.overhead_s)
        for at, number in enumerate(candidates.numbers.tolist()):
            decision.candidates.add(
                process=names[number],
                hit_tokens=int(candidates.hit_tokens[at]),
                queue_s=float(candidates.queue_s[at]),
                fetch_s=float(candidates.fetch_s[at]),
                compute_s=float(candidates.compute_s[at]),
                others_s=float(candidates.others_s[at]),
                stream_s=float(candidates.stream_s[at]),
                ttft_s=float(ttft_s[at]),
                chosen=number in (placement.prefill, placement.decode),
            )
    return decision
