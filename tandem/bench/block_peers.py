"""What the transports and the pool are compared with: which peers there are, how each is started, and how it answers.

Owns the list. A peer that moves blocks answers the seconds of each batch, a store those of all its values. The scripts are in
`benchmarks/peers`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

from msgspec import Meta, Struct

from tandem.bench.names import named
from tandem.bench.peers import Peer, installed
from tandem.bench.report import Say

_START_S = 120.0


class Move(Struct, tag="move", tag_field="t"):
    """Parent → child: do `op` so many times."""

    op: str
    times: int


class Moved(Struct, tag="moved", tag_field="t"):
    """Child → parent: the seconds of each."""

    seconds: Annotated[list[Annotated[float, Meta(gt=0)]], Meta(min_length=1, max_length=10_000)]


@dataclass(frozen=True, slots=True)
class BlockPeer:
    """A peer in one of its ways. `operations` are what it is measured in; `spins` if it takes a core while nobody asks it."""

    name: str
    folder: str
    script: str
    way: str
    operations: tuple[str, ...]
    spins: bool = False

    def start(self, slab_bytes: int, batch_blocks: int, num_blocks: int, folder: Path | None = None) -> RunningPeer:
        """Raises TandemError if it isn't installed or doesn't start."""
        command = [
            *installed(self.name, self.folder, self.script), "--slab-bytes", str(slab_bytes),
            "--batch-blocks", str(batch_blocks), "--num-blocks", str(num_blocks), "--way", self.way,
            "--dir", str(folder or ""),
        ]  # fmt: skip
        return RunningPeer(self, Peer(self.name, command, start_s=_START_S, begins="started"))


class RunningPeer:
    """A peer that waits for its turns."""

    def __init__(self, kind: BlockPeer, process: Peer) -> None:
        self.kind = kind
        self.process = process
        self.label = f"{kind.name} {process.version}"
        self._rest()

    def seconds(self, operation: str, times: int) -> list[float]:
        """Those of each time."""
        self.process.resume()
        found = self.process.ask(Move(operation, times), Moved, f"answered {times} x {operation}").seconds
        self._rest()
        return found

    def rate(self, operation: str, num_bytes: int, times: int) -> float:
        """GB/s of the median time."""
        return num_bytes / median(self.seconds(operation, times)) / 1e9

    def _rest(self) -> None:
        if self.kind.spins:
            self.process.pause()


_BOTH = ("read", "write")
_STORE = ("put", "get")
NIXL = "nixl"
MOONCAKE = "mooncake"
LMCACHE = "lmcache"

MOVERS = {
    NIXL: (
        BlockPeer("nixl_shm", "nixl", "nixl_peer.py", "", _BOTH, spins=True),
        BlockPeer("nixl_tcp", "nixl", "nixl_peer.py", "tcp,self", _BOTH, spins=True),
    ),
    MOONCAKE: (BlockPeer("mooncake_tcp", "mooncake", "mooncake_peer.py", "", _BOTH),),
}
"""What `tandem bench transfer --against` takes."""

HOST_STORES = {
    LMCACHE: (BlockPeer("lmcache_host", "lmcache", "lmcache_peer.py", "cpu", _STORE),),
    MOONCAKE: (
        BlockPeer("mooncake_remote", "mooncake", "mooncake_store_peer.py", "remote", _STORE),
        BlockPeer("mooncake_local", "mooncake", "mooncake_store_peer.py", "local", _STORE),
    ),
}
"""What `tandem bench pool --against` takes, and what of it is compared with the HOST tier."""

DISK_STORES = {LMCACHE: (BlockPeer("lmcache_disk", "lmcache", "lmcache_peer.py", "disk", _STORE),)}
"""And with the DISK tier."""


def started(
    kinds: Iterable[BlockPeer], slab_bytes: int, batch_blocks: int, num_blocks: int, folder: Path | None = None,
    *, running: ExitStack, say: Say,
) -> list[RunningPeer]:  # fmt: skip
    """All of them, until `running` ends. Raises as `BlockPeer.start`."""
    peers = []
    for kind in kinds:
        say(f"{kind.name} is starting")
        peers.append(kind.start(slab_bytes, batch_blocks, num_blocks, folder))
        running.callback(peers[-1].process.close)
    return peers


def peers_named(names: Sequence[str], known: Collection[str]) -> list[str]:
    """Raises ConfigError for a name that is none of `known`."""
    return named(names, known, "peer that this can be measured against", optional=True)
