"""A source and a sink that talk TCP: inside one process for the contract test, and a source in a process of its own: run as
`python -m tests.kvpool.tcp_world`."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path

import numpy as np

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.transport.tcp import TcpTransport
from protos.control import Endpoints, Source
from tests.kvpool.transport_worlds import EPOCH, RealWorld

REPOSITORY = Path(__file__).parents[2]


def source_at(endpoint: str, epoch: bytes = EPOCH) -> Source:
    return Source("p", epoch, "DEVICE", Endpoints("", "", "", tcp=endpoint))


def fill(arena: Arena) -> None:
    arena.array[:] = np.random.default_rng(7).integers(0, 256, arena.array.shape, dtype=np.uint8)


class TcpWorld(RealWorld):
    def __init__(self) -> None:
        super().__init__(
            lambda arena, epoch: TcpTransport(arena, epoch, "127.0.0.1", native()), "tcp://127.0.0.1:9/" + "0" * 32
        )


class TcpProcess:
    """A process that serves an arena of `num_blocks` slabs, filled by `fill`, until it is killed or its standard input ends."""

    def __init__(self, num_blocks: int, slab_bytes: int) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.kvpool.tcp_world", json.dumps([num_blocks, slab_bytes])],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.source = source_at(json.loads(self.popen.stdout.readline()))

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait(10)
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()


def _serve(num_blocks: int, slab_bytes: int) -> None:
    arena = Arena(num_blocks, slab_bytes)
    fill(arena)
    transport = TcpTransport(arena, EPOCH, "127.0.0.1", native())
    print(json.dumps(transport.endpoint), flush=True)
    poller = select.poll()
    poller.register(transport.fileno(), select.POLLIN)
    poller.register(sys.stdin.fileno(), select.POLLIN)
    while sys.stdin.fileno() not in dict(poller.poll(0 if transport.busy else 1000)):
        transport.poll()


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
