"""`tandem bench pool`: the tiers of a pool node beside memory, plain direct I/O and other stores; and its restart.

Owns what is compared with what, the order and the goals. Rates are of all values together, put and got a batch a call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from kvpool.arena import Arena
from tandem.bench.block_peers import DISK_STORES, HOST_STORES, RunningPeer, started
from tandem.bench.kv_source import fill
from tandem.bench.names import named
from tandem.bench.pool_disk import DiskWorld, RawFile, Restart
from tandem.bench.pool_host import HostTier, batches_of
from tandem.bench.report import Metric, Say, metric
from tandem.bench.rounds import Turn, beside, in_rounds, times_a_peer
from tandem.bench.transfer_limits import copy_blocks
from tandem.config import cache_dir
from tandem.errors import ConfigError
from tandem.machine import check_memory

TIERS = ("host", "disk", "restart")
RESTART_LIMIT_S = 2.0
DISK_TO_RAW = 0.75

_MEMCPY = "memcpy"
_GETS = {"host_get": 2, "host_get_alone": 1}
"""How many batches are under way at a time: the next is asked for while one comes, or only after it."""
_TO_PEERS = {
    ("host_put", "lmcache_host_put"): 1.0,
    ("host_get", "lmcache_host_get"): 1.1,
    ("disk_write", "lmcache_disk_put"): 2.5,
    ("disk_read", "lmcache_disk_get"): 2.5,
}
"""How many times the peer's rate is promised."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is put and got: `values` blocks of `slab_bytes`, `batch_blocks` a call."""

    slab_bytes: int = 368_640
    batch_blocks: int = 64
    values: int = 2000
    restart_blocks: int = 100_000

    @property
    def num_bytes(self) -> int:
        return self.slab_bytes * self.values


def tiers_named(names: Sequence[str]) -> list[str]:
    """What of `TIERS` is measured. Raises ConfigError for a name that is none, or for none at all."""
    found = named(names, TIERS, "tier")
    return [tier for tier in TIERS if tier in found]


def run(
    load: Load, tiers: Sequence[str], against: Sequence[str], directory: Path | None, *, rounds: int, say: Say
) -> Generator[Metric, None, None]:
    """Measures the tiers one after the other, `rounds` rounds each, and yields what each reached. Everything on disk is in a new
    folder inside `directory` (the cache's folder by default), which is gone afterwards. Raises ConfigError for a directory that
    isn't there, TandemError for a peer that isn't installed or anything that fails."""
    if directory is not None and not directory.is_dir():
        raise ConfigError(f"--dir {directory}: there is no such folder")
    check_memory("--values", 2 * load.num_bytes)
    parent = directory or cache_dir()
    parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-", dir=parent)))
        arena = Arena(2 * load.values, load.slab_bytes)
        running.callback(arena.close)
        fill(arena.array, 5)
        if "host" in tiers:
            yield from _host(load, arena, against, rounds, say)
        if "disk" in tiers:
            yield from _disk(load, arena, against, folder, rounds, say)
    with ExitStack() as running:
        if "restart" in tiers:
            folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-", dir=parent)))
            restart = Restart(folder / "node", load.restart_blocks, say)
            running.callback(restart.close)
            turns: list[Turn] = [lambda: {"restart": restart.full()}, lambda: {"restart_empty": restart.empty()}]
            times, _ = in_rounds(turns, rounds, say)
            yield restart_metric(load.restart_blocks, times["restart"], times["restart_empty"])


def host_metrics(
    rates: Mapping[str, Sequence[float]], first: Mapping[str, float], labels: Mapping[str, str]
) -> Iterator[Metric]:
    """From the rates round by round, and those of the round that warmed up. `labels` says which version each peer is."""
    memcpy = rates[_MEMCPY]
    yield metric(_MEMCPY, memcpy, "GB/s", reference="the same blocks copied in one process, numpy")
    for name in ("host_put", *_GETS):
        yield beside(name, rates[name], "GB/s", reference="memcpy", reference_values=memcpy)
    # The first blocks of a node's life also bring its memory's pages.
    peer = [first[name] for name in ("lmcache_host_put",) if name in first]
    note = f"{labels['lmcache_host']}, its first" if peer else "into memory that nobody has touched yet"
    yield metric("host_put_first", [first["host_put"]], "GB/s", reference=note, reference_values=peer)
    yield from _peers(rates, labels, ("host_put", "host_get"))


def disk_metrics(rates: Mapping[str, Sequence[float]], labels: Mapping[str, str]) -> Iterator[Metric]:
    """From the rates round by round."""
    for name, raw in (("disk_write", "raw_write"), ("disk_read", "raw_read")):
        note = "plain direct I/O in the same directory, 4 MiB a call"
        yield beside(name, rates[name], "GB/s", reference=note, reference_values=rates[raw], at_least=DISK_TO_RAW)
    yield from _peers(rates, labels, ("disk_write", "disk_read"))


def restart_metric(num_blocks: int, seconds: Sequence[float], empty: Sequence[float]) -> Metric:
    """`seconds` from the start of a node with so many blocks on disk until it served some; `empty`: one with none."""
    return metric(
        "restart",
        seconds,
        "s",
        reference=f"{num_blocks} blocks on disk, until the first come from there; beside it a node without a disk",
        reference_values=empty,
        goal=f"< {RESTART_LIMIT_S:g} s",
        ok=median(seconds) < RESTART_LIMIT_S,
    )


def _peers(rates: Mapping[str, Sequence[float]], labels: Mapping[str, str], ours: tuple[str, str]) -> Iterator[Metric]:
    for peer, label in labels.items():
        for name, way in zip(ours, ("put", "get"), strict=True):
            theirs = f"{peer}_{way}"
            yield metric(theirs, rates[theirs], "GB/s", reference=label)
            yield times_a_peer(f"{name}_to_{peer}", rates[name], label, rates[theirs], _TO_PEERS.get((name, theirs)))


def _host(load: Load, arena: Arena, against: Sequence[str], rounds: int, say: Say) -> Iterator[Metric]:
    with ExitStack() as running:
        kinds = [kind for name in against for kind in HOST_STORES.get(name, ())]
        peers = started(kinds, load.slab_bytes, load.batch_blocks, load.values, running=running, say=say)
        say(f"the HOST tier: {load.values} blocks of {load.slab_bytes} bytes")
        tier = HostTier(arena, load.values, load.batch_blocks)
        running.callback(tier.close)
        batches = batches_of(load.values, load.batch_blocks)

        def memcpy() -> float:
            sources, half = arena.array[: load.values], arena.array[load.values :]
            return _rate(load, sum(copy_blocks(sources, rows, half, rows) for rows in batches))

        def host() -> dict[str, float]:
            rates = {"host_put": _rate(load, tier.put())}
            return rates | {name: _rate(load, tier.get(in_flight)) for name, in_flight in _GETS.items()}

        turns: list[Turn] = [lambda: {_MEMCPY: memcpy()}, host, *(partial(_peer_turn, peer, load) for peer in peers)]
        rates, first = in_rounds(turns, rounds, say)
    yield from host_metrics(rates, first, {peer.kind.name: peer.label for peer in peers})


def _disk(load: Load, arena: Arena, against: Sequence[str], folder: Path, rounds: int, say: Say) -> Iterator[Metric]:
    with ExitStack() as running:
        theirs = folder / "lmcache"
        theirs.mkdir()
        kinds = [kind for name in against for kind in DISK_STORES.get(name, ())]
        peers = started(kinds, load.slab_bytes, load.batch_blocks, load.values, theirs, running=running, say=say)
        say(f"the DISK tier: {load.num_bytes / 1e9:.1f} GB in {folder.parent}")
        world = DiskWorld(arena, load.values, folder / "tier")
        running.callback(world.close)
        if not world.direct:
            say("this file system has no direct I/O: everything goes through the page cache")
        (folder / "raw").mkdir()
        raw = RawFile(folder / "raw" / "file", load.num_bytes, world.direct)
        running.callback(raw.close)

        def plain() -> dict[str, float]:
            return {"raw_write": raw.write(), "raw_read": raw.read()}

        def disk() -> dict[str, float]:
            return {"disk_write": _rate(load, world.write()), "disk_read": _rate(load, world.read())}

        turns: list[Turn] = [plain, disk, *(partial(_peer_turn, peer, load) for peer in peers)]
        rates, _ = in_rounds(turns, rounds, say)
    yield from disk_metrics(rates, {peer.kind.name: peer.label for peer in peers})


def _peer_turn(peer: RunningPeer, load: Load) -> dict[str, float]:
    return {f"{peer.kind.name}_{way}": peer.rate(way, load.num_bytes, 1) for way in peer.kind.operations}


def _rate(load: Load, seconds: float) -> float:
    return load.num_bytes / seconds / 1e9
