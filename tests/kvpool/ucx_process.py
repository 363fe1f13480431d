"""A source that serves an arena of known bytes over UCX, for tests that kill or stop it: `python -m tests.kvpool.ucx_process`."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.transport.ucx import UcxTransport
from protos.control import Endpoints, Source
from tests.kvpool.processes import REPOSITORY

EPOCH = b"far-away"


def bytes_served(num_blocks: int, slab_bytes: int) -> NDArray[np.uint8]:
    """`[num_blocks, slab_bytes]`; none of them is 0."""
    return np.random.default_rng(3).integers(1, 256, (num_blocks, slab_bytes), dtype=np.uint8)


class UcxProcess:
    """The process; it ends with its standard input."""

    def __init__(self, num_blocks: int, slab_bytes: int) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.kvpool.ucx_process", json.dumps([num_blocks, slab_bytes])],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.source = Source("far", EPOCH, "DEVICE", Endpoints("", "", "", ucx=self.popen.stdout.readline().strip()))

    def stop(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def __enter__(self) -> UcxProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()


def _serve(num_blocks: int, slab_bytes: int) -> None:
    arena = Arena(num_blocks, slab_bytes)
    arena.array[:] = bytes_served(num_blocks, slab_bytes)
    transport = UcxTransport(arena, EPOCH, "127.0.0.1", native())
    print(transport.endpoint, flush=True)
    poller = select.poll()
    poller.register(transport.fileno(), select.POLLIN)
    poller.register(sys.stdin.fileno(), select.POLLIN)
    while True:
        ready = [] if transport.busy else [fd for fd, _ in poller.poll()]
        if sys.stdin.fileno() in ready:
            return
        transport.poll()


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
