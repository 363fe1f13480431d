"""A fake cluster to which everything has happened that its router counts, and its /metrics page."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from protos import tandem_pb2
from protos.control import Counters, FetchedFrom, Link, Load
from tests.router.fake_cluster import LONG, Router, collect, wait_for
from tests.system.harness import free_port

NUM_TOKENS = 5
PATIENCE_S = 60.0


def page_of(router: Router) -> dict[str, Metric]:
    """What its admin port shows, by family."""
    url = f"http://127.0.0.1:{router.server._config.router.admin_port}/metrics"
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def value(page: dict[str, Metric], name: str, **labels: str) -> float:
    """Of one sample; KeyError if there is none with exactly these labels."""
    for family in page.values():
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    raise KeyError(f"{name} {labels}")


@contextmanager
def watched_cluster() -> Iterator[Router]:
    """One hand-over whose prefill found blocks in HOST and on DISK, one request of class batch, one refused, one whose decode
    worker was killed; heartbeats that count something."""
    slo = {"interactive": {"tpot_s": 5.0}}
    router = Router(router={"admin_port": free_port(), "liveness_s": 30.0} | slo)
    try:
        prefill = router.add("prefill-0", "prefill")
        decodes = [router.add(name, "decode", step_s=0.02) for name in ("decode-0", "decode-1")]
        pool = router.add("pool-0", "pool")
        pool.load = Load(free_blocks=400, cached_blocks=600, disk_blocks=2000, disk_used_blocks=500)
        prefill.fetched = [FetchedFrom("pool-0", "HOST", "shm", 8, 8000), FetchedFrom("pool-0", "DISK", "tcp", 4, 4000)]
        wait_for(lambda: page_of(router)["tandem_live_processes"].samples != [], PATIENCE_S)
        wait_for(lambda: value(page_of(router), "tandem_live_processes", role="pool") == 1, PATIENCE_S)
        collect(router.ask(LONG, PATIENCE_S, max_tokens=NUM_TOKENS))
        prefill.fetched = []
        request = tandem_pb2.GenerateRequest(
            prompt="short", batch=True, sampling=tandem_pb2.SamplingParams(max_tokens=2)
        )
        collect(router.stub.Generate(request, timeout=PATIENCE_S))
        with suppress(grpc.RpcError):
            list(router.ask(max_tokens=10**9))
        call = router.ask("another prompt " * 30, PATIENCE_S, max_tokens=30)
        for _ in range(6):
            next(call)
        held = next(worker for worker in decodes if worker.streams)
        held.kill()
        router.workers.remove(held)
        list(call)
        for worker in router.workers:
            worker.counters = Counters(*(number for number in range(len(Counters.__struct_fields__))))
            worker.links = [Link("prefill-0", "shm", 4096, 1e9), Link("pool-0", "tcp", 1024, 1e8)]
        wait_for(
            lambda: value(page_of(router), "tandem_process_leases_total", process="pool-0", role="pool") > 0, PATIENCE_S
        )
        wait_for(lambda: value(page_of(router), "tandem_active_requests") == 0, PATIENCE_S)
        yield router
    finally:
        router.close()
