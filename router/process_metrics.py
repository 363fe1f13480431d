"""Workers and pool nodes on the router's Prometheus page: what their heartbeats say.

Owns the names, and the totals that outlast a process's restarts. A gauge is of the last heartbeat and goes with its process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protos.control import Counters, Heartbeat, Load
from router.membership import Member
from router.totals import Key, Totals


class _Counted(NamedTuple):
    """A total of the page, and the fields of `Counters` that go into it, by their value of its label `phase`."""

    name: str
    text: str
    fields: dict[str, str]


_COUNTED = (
    _Counted("steps", "steps of the engine", {"": "steps"}),
    _Counted("prefill_tokens", "tokens computed of prompts", {"": "prefill_tokens"}),
    _Counted("decode_tokens", "tokens drawn", {"": "decode_tokens"}),
    _Counted("prefix_hit_tokens", "prompt tokens whose KV the process had itself", {"": "prefix_hit_tokens"}),
    _Counted("recomputed_tokens", "tokens computed again whose KV had existed", {"": "recomputed_tokens"}),
    _Counted("fetched_blocks", "blocks fetched from others", {"": "fetched_blocks"}),
    _Counted("fetched_bytes", "KV in the blocks fetched from others", {"": "fetched_bytes"}),
    _Counted("fetch_misses", "blocks that a source did not have", {"": "fetch_misses"}),
    _Counted("fetch_corrupt_blocks", "fetched blocks that failed their checksum", {"": "fetch_corrupt"}),
    _Counted("served_blocks", "blocks offered to others that fetch", {"": "served_blocks"}),
    _Counted("shared_blocks", "blocks that one fetch brought for several sequences", {"": "shared_blocks"}),
    _Counted("evicted_blocks", "cached blocks whose room was needed", {"": "evicted_blocks"}),
    _Counted("dropped_blocks", "evicted blocks of which no pool node had a copy", {"": "dropped_blocks"}),
    _Counted("leases", "leases given to others that read", {"": "granted_leases"}),
    _Counted("expired_leases", "leases that ended by time", {"": "expired_leases"}),
    _Counted("preemptions", "sequences that gave up their blocks for others", {"": "preemptions"}),
    _Counted("finished_jobs", "dispatches of which every sample came to its end", {"": "finished"}),
    _Counted("released_holds", "prefill dispatches that ended with their hold", {"": "released_holds"}),
    _Counted(
        "aborted_jobs",
        "aborted dispatches, by what they were doing",
        {phase: f"aborted_{phase}" for phase in ("waiting", "fetching", "prefill", "decode")},
    ),
    _Counted("held_back_steps", "steps that streams sat out until the pool had their blocks", {"": "held_back_steps"}),
    _Counted("unprotected_streams", "streams that went on without the pool", {"": "unprotected_streams"}),
    _Counted("stored_blocks", "blocks written to DISK", {"": "stored_blocks"}),
    _Counted("loaded_blocks", "blocks read from DISK", {"": "loaded_blocks"}),
    _Counted("not_stored_blocks", "blocks that should be on DISK and are not", {"": "not_stored_blocks"}),
    _Counted("corrupt_blocks", "blocks on DISK with wrong bytes", {"": "corrupt_blocks"}),
)
_NOT_COUNTED = frozenset({"disk_faults"})
"""Fields of `Counters` that are no totals."""
_MOVED = "transferred_bytes"

_GAUGES = {
    "free_blocks": ("free_blocks", "blocks that can be allocated now"),
    "cached_blocks": ("cached_blocks", "blocks cached without a reference"),
    "leased_blocks": ("leased_blocks", "blocks under a lease"),
    "disk_blocks": ("disk_blocks", "blocks that fit on DISK"),
    "disk_used_blocks": ("disk_used_blocks", "blocks on DISK"),
    "num_running": ("num_running", "sequences running"),
    "num_waiting": ("num_waiting", "sequences waiting"),
    "prefill_tokens_per_second": ("prefill_tokens_per_s", "measured speed of prefill"),
    "decode_step_seconds": ("decode_step_s", "measured time of a decode step"),
    "fetch_bytes_per_second": ("fetch_bytes_per_s", "measured speed of fetching"),
    "disk_bytes_per_second": ("disk_bytes_per_s", "measured speed of reading DISK"),
}
"""The names of those that `Load` has under other names, and their texts."""


class ProcessMetrics(Collector):
    """What `refresh` was told last."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._members: list[tuple[Member, Heartbeat]] = []
        self._now_s = 0.0

    def refresh(self, members: list[Member], now_s: float) -> None:
        """Takes the last heartbeats of the live processes."""
        self._members = [(member, beat) for member in members if (beat := member.heartbeat) is not None]
        self._now_s = now_s
        for member, beat in self._members:
            self._totals.take(member.name, member.role, beat.epoch, member.hello.former_epochs, _counts(beat), now_s)
        self._totals.forget_silent(now_s)

    def collect(self) -> Iterator[Metric]:
        """Every family is there, with samples or without."""
        yield from self._collect_gauges()
        yield from self._collect_totals()

    def _collect_gauges(self) -> Iterator[Metric]:
        for name, (field, text) in _GAUGES.items():
            family = _gauge(name, text)
            for member, beat in self._members:
                family.add_metric([member.name, member.role], getattr(beat.load, field))
            yield family
        blocks = _gauge("blocks", "blocks of its arena")
        usage = _gauge("kv_cache_usage_ratio", "part of its arena that can't be allocated now")
        step = _gauge("step_age_seconds", "since the running step began; 0 when there is none")
        heard = _gauge("heartbeat_age_seconds", "since its last heartbeat")
        draining = _gauge("draining", "1 while it takes no more dispatches and is about to leave")
        faults = _gauge("disk_faults", "directories of DISK that failed and are disabled")
        for member, beat in self._members:
            labels = [member.name, member.role]
            num_blocks = member.hello.capacity.num_blocks
            blocks.add_metric(labels, num_blocks)
            usage.add_metric(labels, kv_cache_usage(num_blocks, beat.load))
            step.add_metric(labels, beat.step_age_s)
            heard.add_metric(labels, max(0.0, self._now_s - member.heard_at_s))
            draining.add_metric(labels, float(beat.draining))
            faults.add_metric(labels, beat.counters.disk_faults)
        yield from (blocks, usage, step, heard, draining, faults)

    def _collect_totals(self) -> Iterator[Metric]:
        for counted in _COUNTED:
            phases = [] if "" in counted.fields else ["phase"]
            family = _counter(counted.name, counted.text, phases)
            for process, role, totals in self._totals:
                for phase in counted.fields:
                    labels = [process, role, *([phase] if phases else [])]
                    family.add_metric(labels, totals.get((counted.name, phase), 0))
            yield family
        moved = _counter(_MOVED, "bytes fetched from others, by transport", ["transport"])
        for process, role, totals in self._totals:
            for (name, transport), total in totals.items():
                if name == _MOVED:
                    moved.add_metric([process, role, transport], total)
        yield moved


def kv_cache_usage(num_blocks: int, load: Load) -> float:
    """Part of an arena that can't be allocated now: referenced, leased or retired. What is merely cached can be."""
    return 1.0 - min(1.0, load.free_blocks / num_blocks) if num_blocks else 0.0


def _counts(beat: Heartbeat) -> dict[Key, int]:
    counts: dict[Key, int] = {
        (counted.name, phase): getattr(beat.counters, field)
        for counted in _COUNTED
        for phase, field in counted.fields.items()
    }
    for link in beat.links:
        counts[_MOVED, link.transport, link.process] = link.num_bytes
    return counts


def _gauge(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tandem_process_{name}", text, labels=["process", "role"])


def _counter(name: str, text: str, labels: list[str]) -> CounterMetricFamily:
    return CounterMetricFamily(f"tandem_process_{name}", text, labels=["process", "role", *labels])


_LEFT_OUT = (
    set(Counters.__struct_fields__) - _NOT_COUNTED - {f for counted in _COUNTED for f in counted.fields.values()}
)
assert not _LEFT_OUT, f"counters that no metric shows: {_LEFT_OUT}"
