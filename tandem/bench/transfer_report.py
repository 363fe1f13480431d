"""What `tandem bench transfer` says of what it measured: which rate is beside which limit or peer, and the goals.

Owns the names of the metrics and the arithmetic; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tandem.bench.kv_source import TransportName
from tandem.bench.report import Metric, metric
from tandem.bench.rounds import beside, times_a_peer

SMALL_SLAB = 4096
"""Of blocks whose bytes cost next to nothing: what is left is the cost of a block."""
MAX_BLOCK_COST = 10.0
"""Microseconds of Python for a block, both sides together."""


@dataclass(frozen=True, slots=True)
class SmallLoad:
    """Fetches of `batch` such blocks, `in_flight` of them at a time: a process that moves many blocks always has several
    under way, one that has a single one sleeps and wakes for each message."""

    name: str
    batch: int
    in_flight: int


SMALL_LOADS = (SmallLoad("16", 16, 8), SmallLoad("64", 64, 8), SmallLoad("16_alone", 16, 1))


MEMCPY, NUMPY, SOCKETS, PERFTEST = "memcpy", "shared_memory_numpy", "raw_sockets", "ucx_perftest"
NO_CHECKSUM = "shm_no_checksum"


@dataclass(frozen=True, slots=True)
class _Compared:
    """One of our rates, the limit that it is held against, and the part of it that is promised."""

    name: str
    limit: str
    note: str = ""
    goal: float | None = None


_COMPARED: dict[TransportName, tuple[_Compared, ...]] = {
    "shm": (_Compared("shm", MEMCPY, goal=0.75), _Compared(NO_CHECKSUM, MEMCPY, goal=0.85)),
    "ucx": (_Compared("ucx", PERFTEST, PERFTEST),),
    "tcp": (_Compared("tcp", SOCKETS, "raw sockets", 0.85),),
    "tls": (_Compared("tls", SOCKETS, "raw sockets, not encrypted"),),
}
_TO_PEERS: tuple[tuple[TransportName, str, str, float], ...] = (
    ("shm", NO_CHECKSUM, "nixl_shm", 1.15),
    ("ucx", "ucx", "nixl_tcp", 1.6),
    ("ucx", "ucx", "mooncake_tcp", 1.6),
)
"""Transport, which of its rates, peer, and how many times its better direction is promised."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is moved: `num_blocks` is how many an arena has, `batches` how many a turn moves."""

    slab_bytes: int = 368_640
    batch_blocks: int = 64
    num_blocks: int = (512 << 20) // 368_640
    batches: int = 20

    @property
    def batch_bytes(self) -> int:
        return self.slab_bytes * self.batch_blocks


def metrics(
    shape: Shape, transports: Sequence[TransportName], rates: Mapping[str, Sequence[float]], labels: Mapping[str, str]
) -> Iterator[Metric]:
    """From the rates of each contender, round by round. `labels` says which version each peer is."""
    unit, memcpy = "GB/s", rates[MEMCPY]
    what = f"scattered copies of {shape.slab_bytes} bytes in one process, numpy"
    yield metric(MEMCPY, memcpy, unit, reference=f"{what}: the limit of what follows")
    yield beside(NUMPY, rates[NUMPY], unit, reference=what, reference_values=memcpy)
    yield metric(SOCKETS, rates[SOCKETS], unit, reference="sendall and recv_into, two processes: the limit of tcp")
    if PERFTEST in rates:
        note = "tagged messages over TCP of one buffer that stays in the cache: the limit of ucx"
        yield metric(PERFTEST, rates[PERFTEST], unit, reference=note)
    for name, label in labels.items():
        yield metric(name, rates[name], unit, reference=label)
    for name in transports:
        for ours in _COMPARED[name]:
            note = ours.note or what
            yield beside(
                ours.name,
                rates[ours.name],
                unit,
                reference=note,
                reference_values=rates[ours.limit],
                at_least=ours.goal,
            )
    yield from _peer_metrics(transports, rates, labels)
    for name in transports:
        note = f"{name} alone, without the fetch's messages and the comparison of checksums"
        yield beside(f"fetch_{name}", rates[f"fetch_{name}"], unit, reference=note, reference_values=rates[name])


def _peer_metrics(
    transports: Sequence[TransportName], rates: Mapping[str, Sequence[float]], labels: Mapping[str, str]
) -> Iterator[Metric]:
    """Ours beside the better direction of each peer."""
    for transport, ours, peer, goal in _TO_PEERS:
        ways = [name for name in labels if name.startswith(f"{peer}_")]
        if ways and transport in transports:
            best = max(ways, key=lambda name: median(rates[name]))
            yield times_a_peer(f"{ours}_to_{peer}", rates[ours], labels[best], rates[best], goal)


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of processor time for each block of a batch: the Python thread of each side, and all threads of both."""

    sink: float
    source: float
    all_threads: float


def cost_metrics(
    transports: Sequence[TransportName], costs: Mapping[tuple[TransportName, SmallLoad], Sequence[Cost]]
) -> Iterator[Metric]:
    """Both sides together, and each alone, of fetches of small blocks."""
    for name in transports:
        for load in SMALL_LOADS:
            found = costs[name, load]
            together = [cost.sink + cost.source for cost in found]
            bounded = name != "tls" and load.in_flight > 1
            what = f"fetches of {load.batch} blocks of {SMALL_SLAB} bytes, {load.in_flight} at a time"
            yield metric(
                f"cpu_{name}_batch_{load.name}",
                together,
                "us a block",
                reference=f"{what}: both Python threads; beside them ZeroMQ's threads too",
                reference_values=[cost.all_threads for cost in found],
                goal=f"<= {MAX_BLOCK_COST:g}" if bounded else None,
                ok=not bounded or median(together) <= MAX_BLOCK_COST,
            )
            yield metric(f"cpu_{name}_batch_{load.name}_sink", [cost.sink for cost in found], "us a block")
            yield metric(f"cpu_{name}_batch_{load.name}_source", [cost.source for cost in found], "us a block")
