"""`tandem bench transfer`: blocks from one process's arena into another's, by each transport, beside what the machine can do.

Owns what runs and whose turn it is; `transfer_sink` moves the blocks, `transfer_limits` measures what the machine can do,
`block_peers` the peers, and `transfer_report` says what is compared with what. One batch is so many blocks from random places
of the source's arena to random places of ours, and its rate that of the median batch. What was moved last in each turn is
compared byte for byte.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from kernels.block_copy import copy_blocks
from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.sink import WantedBlock
from kvpool.transport.tcp_stream import TlsFiles
from tandem.bench import transfer_limits as limits
from tandem.bench.block_peers import MOONCAKE, MOVERS, NIXL, RunningPeer, started
from tandem.bench.kv_source import Mapped, SourceProcess, TransportName, fill, wanted
from tandem.bench.report import Metric, Say
from tandem.bench.rounds import Turn, in_rounds
from tandem.bench.transfer_report import (
    MEMCPY,
    NO_CHECKSUM,
    NUMPY,
    PERFTEST,
    SMALL_LOADS,
    SMALL_SLAB,
    SOCKETS,
    Cost,
    Shape,
    SmallLoad,
    cost_metrics,
    metrics,
)
from tandem.bench.transfer_sink import Fetches, Reader
from tandem.errors import ConfigError, TandemError

_WARM_UP = 3
"""Batches of each turn that don't count."""
_SMALL_BLOCKS = 1024
_SMALL_FETCHES = 200
_PERFTEST_BATCHES = 2
"""The test's own start and end take a while: so many times a turn's batches."""


def shape_of(slab_bytes: int, batch_blocks: int, arena_bytes: int, batches: int) -> Shape:
    """Raises ConfigError for arenas that don't hold a batch."""
    num_blocks = arena_bytes // slab_bytes
    if num_blocks < batch_blocks:
        raise ConfigError(f"arenas of {arena_bytes} bytes hold {num_blocks} blocks of {slab_bytes}, not {batch_blocks}")
    return Shape(slab_bytes, batch_blocks, num_blocks, batches)


def run(
    shape: Shape, transports: Sequence[TransportName], against: Sequence[str], *, rounds: int, say: Say
) -> Generator[Metric, None, None]:
    """Measures `rounds` rounds, then yields everything. Raises TandemError for a peer that isn't installed, and for whatever
    can't be opened or moves wrong bytes."""
    with ExitStack() as running:
        bench = _Bench(shape, transports, against, running, say)
        rates, _ = in_rounds(bench.turns(), rounds, say)
        say("small blocks, for the cost of each")
        costs = bench.costs(rounds)
    yield from metrics(shape, transports, rates, bench.labels)
    yield from cost_metrics(transports, costs)


class _Bench:
    """Everything that runs during the measurement; `running` ends it."""

    def __init__(
        self, shape: Shape, transports: Sequence[TransportName], against: Sequence[str], running: ExitStack, say: Say
    ) -> None:
        self._shape = shape
        self._transports = transports
        self._running = running
        self._random = random.Random(7)
        self._tls = make_certificate(running) if "tls" in transports else None
        kinds = [kind for name in (NIXL, MOONCAKE) if name in against for kind in MOVERS[name]]
        self._peers = started(kinds, shape.slab_bytes, shape.batch_blocks, shape.num_blocks, running=running, say=say)
        self.labels = {
            f"{peer.kind.name}_{way}": f"{peer.label}, {way}" for peer in self._peers for way in peer.kind.operations
        }
        say(f"arenas of {shape.num_blocks} blocks of {shape.slab_bytes} bytes")
        self._sources = self._start_sources(shape.num_blocks, shape.slab_bytes)
        self._arena = Arena(shape.num_blocks, shape.slab_bytes)
        running.callback(self._arena.close)
        self._arena.array[:] = 0

    def turns(self) -> list[Turn]:
        """Everything but the small blocks."""
        shape, arena, found = self._shape, self._arena, list[Turn]()
        mapped = {name: source.map_arena() for name, source in self._sources.items()}
        plain = next(iter(mapped.values()))
        ours = np.empty((shape.num_blocks, shape.slab_bytes), dtype=np.uint8)
        fill(ours, 3)
        other = np.zeros_like(ours)
        other[:] = 1
        found += [
            self._turn(MEMCPY, lambda locations, ids: limits.copy_blocks(ours, locations, other, ids), ours, other),
            self._turn(
                NUMPY, lambda locations, ids: limits.copy_blocks(plain.array, locations, arena.array, ids), plain.array
            ),
        ]
        sockets = limits.RawSockets(next(iter(self._sources.values())), arena.array)
        self._running.callback(sockets.close)
        found.append(self._turn(SOCKETS, sockets.read, plain.array))
        if "shm" in self._transports:
            copy = partial(_copy, plain, arena)
            found.append(self._turn(NO_CHECKSUM, copy, plain.array))
        if "ucx" in self._transports:
            perftest = limits.UcxPerftest(shape.slab_bytes, shape.batch_blocks)
            num_blocks = shape.batch_blocks * shape.batches * _PERFTEST_BATCHES
            found.append(lambda: {PERFTEST: perftest.rate(num_blocks)})
        for name in self._transports:
            source, theirs = self._source_of(name), mapped[self._place(name)].array
            reader = Reader(name, arena, source.source, self._tls)
            self._running.callback(reader.close)
            found.append(self._turn(name, reader.read, theirs))
            fetches = Fetches(name, arena, source.source, self._tls)
            self._running.callback(fetches.close)
            found.append(self._turn(f"fetch_{name}", partial(_seconds_of, fetches), theirs))
        return found + [partial(self._peer_turn, peer) for peer in self._peers]

    def costs(self, rounds: int) -> dict[tuple[TransportName, SmallLoad], list[Cost]]:
        """Processor time of fetches of small blocks, the transports in turns."""
        with ExitStack() as running:
            self._running = running
            self._sources = self._start_sources(_SMALL_BLOCKS, SMALL_SLAB)
            arena = Arena(_SMALL_BLOCKS, SMALL_SLAB)
            running.callback(arena.close)
            fetches = {}
            for name in self._transports:
                fetches[name] = Fetches(name, arena, self._source_of(name).source, self._tls)
                running.callback(fetches[name].close)
            costs: dict[tuple[TransportName, SmallLoad], list[Cost]] = {
                (name, load): [] for name in self._transports for load in SMALL_LOADS
            }
            for number in range(rounds + 1):
                for (name, load), found in costs.items():
                    cost = self._cost(fetches[name], self._source_of(name), load.batch, load.in_flight)
                    if number:
                        found.append(cost)
            return costs

    def _cost(self, fetches: Fetches, source: SourceProcess, batch: int, in_flight: int) -> Cost:
        every, batches = range(_SMALL_BLOCKS), list[tuple[WantedBlock, ...]]()
        while len(batches) < _SMALL_FETCHES:
            ids = self._random.sample(every, batch * in_flight)  # what is under way has places of its own
            batches += [
                wanted(self._random.sample(every, batch), ids[first : first + batch])
                for first in range(0, len(ids), batch)
            ]
        before = source.cpu()
        ours = fetches.fetch(batches, in_flight).spent
        theirs = source.cpu() - before
        per_block = 1e6 / (batch * len(batches))
        return Cost(per_block * ours.python_s, per_block * theirs.python_s, per_block * (ours + theirs).process_s)

    def _start_sources(self, num_blocks: int, slab_bytes: int) -> dict[str, SourceProcess]:
        """One process for what is plain, and one for TLS: a process speaks one or the other."""
        plain: list[TransportName] = [name for name in self._transports if name != "tls"]
        started = {"plain": SourceProcess(num_blocks, slab_bytes, plain)}
        self._running.callback(started["plain"].close)
        if self._tls is not None:
            started["tls"] = SourceProcess(num_blocks, slab_bytes, ["tls"], self._tls)
            self._running.callback(started["tls"].close)
        return started

    def _source_of(self, name: TransportName) -> SourceProcess:
        return self._sources[self._place(name)]

    @staticmethod
    def _place(name: TransportName) -> str:
        return "tls" if name == "tls" else "plain"

    def _turn(
        self,
        name: str,
        move: Callable[[Sequence[int], Sequence[int]], float],
        source: np.ndarray,
        target: np.ndarray | None = None,
    ) -> Turn:
        """Batches of random blocks by `move`, in GB/s of the median one."""
        shape, target = self._shape, self._arena.array if target is None else target
        every = range(shape.num_blocks)

        def turn() -> dict[str, float]:
            seconds = []
            for _ in range(_WARM_UP + shape.batches):
                locations = self._random.sample(every, shape.batch_blocks)
                block_ids = self._random.sample(every, shape.batch_blocks)
                seconds.append(move(locations, block_ids))
            if not np.array_equal(source[locations], target[block_ids]):
                raise TandemError("the bytes that were moved differ from those of the source")
            return {name: shape.batch_bytes / median(seconds[_WARM_UP:]) / 1e9}

        return turn

    def _peer_turn(self, peer: RunningPeer) -> dict[str, float]:
        shape = self._shape
        return {
            f"{peer.kind.name}_{way}": peer.rate(way, shape.batch_bytes, shape.batches) for way in peer.kind.operations
        }


def _copy(source: Mapped, target: Arena, locations: Sequence[int], block_ids: Sequence[int]) -> float:
    """Seconds of the product's copy, without checksums."""
    began = time.perf_counter()
    copy_blocks(native(), source.array, locations, target.array, block_ids)
    return time.perf_counter() - began


def _seconds_of(fetches: Fetches, numbers: Sequence[int], block_ids: Sequence[int]) -> float:
    return fetches.fetch([wanted(numbers, block_ids)]).seconds


def make_certificate(running: ExitStack) -> TlsFiles:
    """A certificate that is its own authority, for the time of the run. Raises TandemError without the program openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise TandemError(
            "there is no program openssl, which makes the certificate for TLS; leave tls out of --transports"
        )
    folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-")))
    certificate, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    made = subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=tandem-bench", "-keyout", key, "-out", certificate],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    if made.returncode:
        raise TandemError(f"openssl made no certificate: {made.stderr.strip()[-300:]}")
    return TlsFiles(certificate, key, certificate)
