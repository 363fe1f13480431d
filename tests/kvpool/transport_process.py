"""A source that serves an arena of known bytes by one transport, for tests that kill or stop it: run as
`python -m tests.kvpool.transport_process`."""

from __future__ import annotations

import json
import select
import sys
from typing import Literal

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.transport.build import make_transports
from protos.control import Endpoints, Source
from tandem.config import TransferConfig
from tests.kvpool.child import Child, say
from tests.kvpool.transport_worlds import EPOCH, bytes_served

Name = Literal["tcp", "ucx"]


class TransportProcess(Child):
    """The process; it ends with its standard input. Its arena holds `bytes_served`."""

    def __init__(self, transport: Name, num_blocks: int, slab_bytes: int) -> None:
        super().__init__("tests.kvpool.transport_process", [transport, num_blocks, slab_bytes])
        self.source: Source = self.hear(Source)


def _serve(name: Name, num_blocks: int, slab_bytes: int) -> None:
    arena = Arena(num_blocks, slab_bytes)
    arena.array[:] = bytes_served(num_blocks, slab_bytes)
    (transport,) = make_transports(TransferConfig(transports=[name]), arena, EPOCH, machine_id="", native=native())
    say(Source("far", EPOCH, "DEVICE", Endpoints("", "", "", **{name: transport.endpoint})))
    poller = select.poll()
    poller.register(transport.fileno(), select.POLLIN)
    poller.register(sys.stdin.fileno(), select.POLLIN)
    while sys.stdin.fileno() not in dict(poller.poll(0 if transport.busy else None)):
        transport.poll()


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
