"""What the scaler looks at, made of what routers say in GetCluster.

Owns the translation, and who the typical worker of a role is. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from protos import tandem_pb2 as pb
from protos.control import StepPrices
from tandem.scaling.scaler import Look, Name
from tandem.scaling.sizing import WorkerKind
from tandem.scaling.traffic import Totals


def look_of(clusters: Sequence[pb.GetClusterResponse]) -> Look:
    """Of all routers that answered, at least one. Requests are each router's own; workers report to all of them."""
    workers = {process.name: process for cluster in clusters for process in cluster.processes}
    answers = [cluster.traffic.answer_tokens for cluster in clusters if cluster.traffic.answer_tokens]
    prefills = [process for process in workers.values() if process.role == "prefill"]
    block_size = max(cluster.block_size for cluster in clusters)
    return Look(
        totals={cluster.router_epoch: _totals(cluster.traffic) for cluster in clusters},
        answer_tokens=sum(answers) / len(answers) if answers else 0.0,
        prefill=_kind(list(workers.values()), "prefill", block_size),
        decode=_kind(list(workers.values()), "decode", block_size),
        waiting_requests=sum(cluster.num_waiting_requests for cluster in clusters),
        waiting_tokens=sum(process.waiting_tokens for process in prefills),
        waiting_pairs=sum(process.waiting_pairs for process in prefills),
    )


def _totals(traffic: pb.Traffic) -> Totals:
    return Totals(
        num_requests=traffic.num_requests,
        num_samples=traffic.num_samples,
        prompt_tokens=traffic.prompt_tokens,
        uncached_tokens=traffic.uncached_tokens,
        uncached_pairs=traffic.uncached_pairs,
        uncached_squares=traffic.uncached_squares,
        here_tokens=traffic.here_tokens,
        here_pairs=traffic.here_pairs,
    )


def _kind(workers: Sequence[pb.ProcessStatus], role: Name, block_size: int) -> WorkerKind | None:
    """The median worker of a role, among those that know what its work costs; where none of the role does, among all: the other
    role computes with the same weights. A worker that has just begun has few steps behind it, and is one of many here."""
    kinds = [(process.role, _kind_of(process, block_size)) for process in workers if process.role != "pool"]
    known = [(its, kind) for its, kind in kinds if (kind.knows_prefill if role == "prefill" else kind.knows_decode)]
    chosen = [kind for its, kind in known if its == role] or [kind for _, kind in known]
    if not chosen:
        return None
    prices = [kind.prices for kind in chosen]
    return WorkerKind(
        StepPrices(
            *(median(getattr(price, name) for price in prices) for name in StepPrices.__struct_fields__),
        ),
        step_tokens=median(kind.step_tokens for kind in chosen),
        max_running=median(kind.max_running for kind in chosen),
        kv_tokens=median(kind.kv_tokens for kind in chosen),
    )


def _kind_of(process: pb.ProcessStatus, block_size: int) -> WorkerKind:
    said = process.prices
    return WorkerKind(
        StepPrices(said.base_s, said.token_s, said.pair_s, said.sequence_s, said.context_s),
        step_tokens=process.max_step_tokens or 512.0,
        max_running=process.max_running,
        kv_tokens=process.num_blocks * block_size,
    )
