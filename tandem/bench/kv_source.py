"""A process that holds an arena full of blocks and serves it, as a worker does but without an engine.

Owns the child's program (`python -m tandem.bench.kv_source`) and the parent's view of it. The child answers requests on stdin
while it serves; it ends with its stdin. Blocks are full of random bytes, and named by their number.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import MAP_SHARED, PROT_READ, mmap
from typing import Literal

import msgspec
import numpy as np
import zmq
from msgspec import Struct
from numpy.typing import NDArray

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.keys import Key
from kvpool.service import KVService
from kvpool.sink import WantedBlock
from kvpool.transport.base import Transport
from kvpool.transport.build import make_transports
from kvpool.transport.tcp_stream import TlsFiles
from protos.control import Source
from tandem.bench.names import named
from tandem.bench.peers import Peer, Ready, answer
from tandem.clock import now_s
from tandem.config import TlsConfig, TransferConfig
from tandem.machine import machine_id

BLOCK_SIZE = 16
HOST = "127.0.0.1"
TransportName = Literal["shm", "ucx", "tcp", "tls"]
TRANSPORTS: tuple[TransportName, ...] = ("shm", "ucx", "tcp", "tls")

_START_S = 60.0
_CHAIN_BLOCKS = 125
"""Blocks of one sequence: 2,000 tokens."""
_SEED = 11
_ROOT = hashlib.sha256(b"tandem bench").digest()[:16]
_LINE_BYTES = 1 << 20


def transports_named(names: Sequence[str]) -> list[TransportName]:
    """Each once. Raises ConfigError for a name that is none, or for none at all."""
    found = named(names, TRANSPORTS, "transport")
    return [known for known in TRANSPORTS if known in found]


def key_of(number: int) -> Key:
    return hashlib.sha256(b"block %d" % number).digest()[:16]


def parent_of(number: int) -> Key:
    return key_of(number - 1) if number % _CHAIN_BLOCKS else _ROOT


def wanted(numbers: Sequence[int], block_ids: Sequence[int]) -> tuple[WantedBlock, ...]:
    """The blocks of these numbers, to be fetched into `block_ids`."""
    return tuple(
        WantedBlock(key_of(number), parent_of(number), BLOCK_SIZE, block_id)
        for number, block_id in zip(numbers, block_ids, strict=True)
    )


def fill(memory: NDArray[np.uint8], seed: int) -> None:
    """Random bytes into all of `[num_blocks, slab_bytes]`, so that every page is there."""
    generator = np.random.default_rng(seed)
    for slab in memory:
        slab[:] = np.frombuffer(generator.bytes(len(slab)), dtype=np.uint8)


def make_transport(name: TransportName, arena: Arena, epoch: bytes, tls: TlsFiles | None) -> Transport:
    """Raises TransportError or ConfigError for what can't be opened."""
    assert name != "tls" or tls is not None, "TLS without files"
    files = TlsConfig(cert=tls.certificate, key=tls.key, ca=tls.authority) if name == "tls" and tls else TlsConfig()
    transfer = TransferConfig(host=HOST, transports=["tcp" if name == "tls" else name], tls=files)
    (made,) = make_transports(transfer, arena, epoch, machine_id=machine_id(), native=native())
    return made


class Setup(Struct):
    """The child's command line. With `tls`, its tcp is TLS."""

    num_blocks: int
    slab_bytes: int
    transports: list[TransportName]
    tls: list[str] = []


class WhoAreYou(Struct, tag="who", tag_field="t"):
    """Parent → child."""


class Iam(Struct, tag="iam", tag_field="t"):
    """Child → parent: what others need to fetch from it, and its arena's descriptor."""

    source: Source
    arena_fd: int


class Spend(Struct, tag="spend", tag_field="t"):
    """Parent → child: how much processor time did you take so far?"""


class Spent(Struct, tag="spent", tag_field="t"):
    """User and system seconds so far, of the thread that runs Python and of all threads. Child → parent, and the parent of
    itself."""

    python_s: float
    process_s: float

    @staticmethod
    def here() -> Spent:
        """Of the calling thread and this process."""
        return Spent(time.thread_time(), time.process_time())

    def __sub__(self, before: Spent) -> Spent:
        return Spent(self.python_s - before.python_s, self.process_s - before.process_s)

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.python_s + other.python_s, self.process_s + other.process_s)


class SendRaw(Struct, tag="send_raw", tag_field="t"):
    """Parent → child: these blocks into the plain socket that you opened to `port`, one after the other. No answer."""

    port: int
    block_ids: list[int]


_Request = WhoAreYou | Spend | SendRaw


@dataclass(frozen=True, slots=True)
class Mapped:
    """A child's arena, mapped read-only: `[num_blocks, slab_bytes]`."""

    memory: mmap
    array: NDArray[np.uint8]


class SourceProcess(Peer):
    """A running child. `tls` are the files of its certificate, key and authority."""

    def __init__(
        self, num_blocks: int, slab_bytes: int, transports: Sequence[TransportName], tls: TlsFiles | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.slab_bytes = slab_bytes
        files = [tls.certificate, tls.key, tls.authority] if tls is not None else []
        setup = Setup(num_blocks, slab_bytes, list(transports), files)
        command = [sys.executable, "-m", __name__, msgspec.json.encode(setup).decode()]
        super().__init__("a source of blocks", command, start_s=_START_S, advice="", begins="started")
        who = self.ask(WhoAreYou(), Iam, "said who it is")
        self.source = who.source
        self._arena_fd = who.arena_fd

    def cpu(self) -> Spent:
        """Processor time that it took so far."""
        return self.ask(Spend(), Spent, "said what it spent")

    def map_arena(self) -> Mapped:
        """Its arena, as whoever has its descriptor can map it: without any transport."""
        fd = os.open(f"/proc/{self.pid}/fd/{self._arena_fd}", os.O_RDONLY)
        try:
            memory = mmap(fd, self.num_blocks * self.slab_bytes, MAP_SHARED, PROT_READ)
        finally:
            os.close(fd)
        return Mapped(memory, np.frombuffer(memory, dtype=np.uint8).reshape(self.num_blocks, self.slab_bytes))


class _Child:
    def __init__(self, setup: Setup) -> None:
        self._arena = Arena(setup.num_blocks, setup.slab_bytes)
        fill(self._arena.array, _SEED)
        epoch = os.urandom(8)
        tls = TlsFiles(*setup.tls) if setup.tls else None
        pool = BlockPool(setup.num_blocks, BLOCK_SIZE, "DEVICE", keep_events=False)
        blocks = pool.allocate(setup.num_blocks)
        assert blocks is not None
        for number in range(setup.num_blocks):
            block_id = blocks[number]
            pool.publish(block_id, key_of(number), parent_of(number), BLOCK_SIZE, self._arena.checksum(block_id))
        self._service = KVService(
            context=zmq.Context(),
            pool=pool,
            arena=self._arena,
            process="source",
            epoch=epoch,
            bind_host=HOST,
            transports=[make_transport(name, self._arena, epoch, tls) for name in setup.transports],
            machine_id=machine_id(),
            lease_s=5.0,
            grace_s=1.0,
            on_blocks=lambda *_: None,
            on_ended=lambda _: None,
        )
        self._source = Source("source", epoch, "DEVICE", self._service.endpoints)
        self._sockets: dict[int, socket.socket] = {}

    def run(self) -> None:
        """Serves until stdin ends."""
        poller = zmq.Poller()
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        self._service.register(poller)
        answer(Ready("tandem"))
        lines, due_s = b"", 0.0
        while True:
            ready = dict(poller.poll(max(0, int((due_s - now_s()) * 1000))))
            if ready.pop(sys.stdin.fileno(), 0):
                part = os.read(sys.stdin.fileno(), _LINE_BYTES)
                if not part:
                    return
                *whole, lines = (lines + part).split(b"\n")
                for line in whole:
                    self._do(msgspec.json.decode(line, type=_Request))
            self._service.handle(ready, now_s())
            due_s = self._service.tick(now_s())

    def _do(self, request: _Request) -> None:
        match request:
            case WhoAreYou():
                answer(Iam(self._source, self._arena.fd))
            case Spend():
                answer(Spent.here())
            case SendRaw(port=port, block_ids=block_ids):
                if port not in self._sockets:
                    self._sockets[port] = socket.create_connection((HOST, port))
                    self._sockets[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for block_id in block_ids:
                    self._sockets[port].sendall(self._arena.slab(block_id))


if __name__ == "__main__":
    _Child(msgspec.json.decode(sys.argv[1], type=Setup)).run()
