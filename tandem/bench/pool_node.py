"""A real pool node as a child process, and the router that it needs, played by this process.

Owns the child's program (`python -m tandem.bench.pool_node`: the product's node, which ends with its stdin) and the few messages
that a node exchanges with a router.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType

import msgspec
import zmq
from msgspec import Struct

from kvpool import node
from protos import control
from protos.control import Hello, Peers, RoutingGroup, Source, Welcome
from tandem.bench.kv_source import BLOCK_SIZE, HOST
from tandem.bench.peers import Peer, Ready, answer
from tandem.config import DiskConfig, PoolConfig, RouterConfig, TransferConfig, load_config
from tandem.errors import TandemError

GROUP = RoutingGroup(b"tandem-bench-mod", "bench", b"tandem-bench-num", BLOCK_SIZE)
"""Of everything that is put into the node."""

_NAME = "pool-bench"
_START_S = 60.0
_HELLO_S = 30.0
_HEARTBEAT_S = 0.25


class Setup(Struct):
    """The child's command line. An empty `directory` means no DISK tier."""

    control_port: int
    host_bytes: int
    directory: str = ""
    disk_bytes: int = 0


class PoolNodeProcess:
    """A running node that knows its group. Raises TandemError if it doesn't start or doesn't say hello."""

    def __init__(self, slab_bytes: int, host_bytes: int, directory: str = "", disk_bytes: int = 0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._peer = b""
        self._slab_bytes = slab_bytes
        self._process: Peer | None = None
        try:
            port = self._router.bind_to_random_port(f"tcp://{HOST}")
            setup = Setup(port, host_bytes, directory, disk_bytes)
            command = [sys.executable, "-m", __name__, msgspec.json.encode(setup).decode()]
            self._process = Peer("a pool node", command, start_s=_START_S, advice="", begins="started")
            self.source = self._serving()
        except BaseException:
            self.close()
            raise

    def follow(self, workers: list[Source]) -> None:
        """These are all the workers that it keeps for."""
        self._say(Peers(workers=workers, group=GROUP, slab_bytes=self._slab_bytes))

    def answer(self) -> None:
        """Takes in what it told its router, which is nothing that we need."""
        while self._router.poll(0):
            self._router.recv_multipart()

    def kill(self) -> None:
        """As a crash would."""
        assert self._process is not None
        self._process.kill()

    def close(self) -> None:
        """Ends it, at once: nothing that it holds is wanted any more."""
        if self._process is not None:
            self._process.kill()
            self._process.close()
        self._router.close()
        self._context.term()

    def __enter__(self) -> PoolNodeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serving(self) -> Source:
        """Where it serves, once it knows for whom."""
        gives_up = time.monotonic() + _HELLO_S
        while True:
            left_s = gives_up - time.monotonic()
            if left_s <= 0 or not self._router.poll(int(left_s * 1000)):
                raise TandemError(f"the pool node did not serve within {_HELLO_S:g} s")
            self._peer, payload = self._router.recv_multipart()
            message = control.decode_to_router(payload)
            if not isinstance(message, Hello):
                continue
            if message.group is not None:
                return Source(message.process, message.epoch, "HOST", message.endpoints)
            self._say(Welcome(control.PROTOCOL_VERSION, "router", b"benchrtr", _HEARTBEAT_S, _HELLO_S))
            self.follow([])

    def _say(self, message: Welcome | Peers) -> None:
        self._router.send_multipart([self._peer, control.encode(message)])


def _child(setup: Setup) -> None:
    """The product's node with what is in `setup`; the rest of its configuration is the user's."""
    disk = DiskConfig(dirs=[setup.directory], bytes=setup.disk_bytes) if setup.directory else DiskConfig()
    config = load_config(None).model_copy(
        update={
            "router": RouterConfig(control_port=setup.control_port, liveness_s=_HELLO_S),
            "pool": PoolConfig(host_bytes=setup.host_bytes, disk=disk),
            "transfer": TransferConfig(transports=["shm"]),
        }
    )
    stop = threading.Event()

    def until_stdin_ends() -> None:
        os.read(sys.stdin.fileno(), 1)
        stop.set()

    threading.Thread(target=until_stdin_ends, daemon=True).start()
    answer(Ready("tandem"))
    node.run(config, _NAME, stop)


if __name__ == "__main__":
    _child(msgspec.json.decode(sys.argv[1], type=Setup))
