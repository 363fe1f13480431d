"""A KV source for tests that need real processes: run as `python -m tests.kvpool.processes`; and what those tests share."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import zmq

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.service import KVService
from kvpool.transport.base import Transport
from kvpool.transport.build import make_transports
from protos.control import Source
from tandem.clock import now_s
from tandem.config import TransferConfig
from tandem.machine import machine_id
from tests.kvpool.child import Child, say
from tests.kvpool.named_blocks import ROOT, SIZE, put


def shm(arena: Arena, epoch: bytes) -> list[Transport]:
    """Shared memory alone."""
    return make_transports(TransferConfig(transports=["shm"]), arena, epoch, machine_id=machine_id(), native=native())


def wait_for(condition: Callable[[], Any], seconds: float = 15.0, step: Callable[[], object] = lambda: None) -> Any:
    """Calls `step` until `condition` is true; what it returned."""
    deadline = now_s() + seconds
    poller = zmq.Poller()
    while not (value := condition()):
        assert now_s() < deadline, "the condition did not come true in time"
        step()
        poller.poll(1)
    return value


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """This process can open nothing more meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as plugs:
        for _ in range(3):  # below the limit there may be gaps
            plugs.enter_context(Path("/dev/null").open("rb"))
        highest = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
        with ExitStack() as gaps:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            try:
                while True:
                    try:
                        gaps.callback(os.close, os.open("/dev/null", os.O_RDONLY))
                    except OSError:
                        break
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class SourceProcess(Child):
    """A process that serves the chain `names` and then, on SIGTERM or with its standard input's end, stops. With `corrupt`
    the bytes of those blocks don't fit their checksums; with `lease_s` it grants such leases."""

    def __init__(
        self, process: str, names: list[str], *, slab_bytes: int, num_blocks: int = 64, **options: Any
    ) -> None:
        arguments = {"process": process, "names": names, "slab_bytes": slab_bytes, "num_blocks": num_blocks, **options}
        super().__init__("tests.kvpool.processes", arguments)
        self.source: Source = self.hear(Source)

    def command(self, **what: Any) -> dict[str, Any]:
        """Does something inside the process and returns its answer."""
        self.tell(what)
        answer: dict[str, Any] = self.hear()
        return answer


def _serve(arguments: dict[str, Any]) -> None:
    slab_bytes, num_blocks = arguments["slab_bytes"], arguments["num_blocks"]
    pool, arena, epoch = BlockPool(num_blocks, SIZE, "DEVICE"), Arena(num_blocks, slab_bytes), os.urandom(8)
    service = KVService(
        context=zmq.Context(), pool=pool, arena=arena, process=arguments["process"], epoch=epoch,
        bind_host="127.0.0.1", transports=shm(arena, epoch), machine_id=machine_id(), lease_s=arguments.get("lease_s", 5.0),
        grace_s=arguments.get("grace_s", 1.0), on_blocks=lambda *_: None, on_ended=lambda _: None,
    )  # fmt: skip

    def publish(names: list[str], parent: bytes) -> None:
        pool.release(put(pool, arena, names, parent, arguments.get("corrupt", [])))

    publish(arguments["names"], ROOT)
    service.publish_pool_events(now_s())
    say(Source(arguments["process"], epoch, "DEVICE", service.endpoints))
    poller = zmq.Poller()
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    service.register(poller)
    due_s = 0.0
    while True:
        ready = dict(poller.poll(max(0, min(20, int((due_s - now_s()) * 1000)))))
        if ready.pop(sys.stdin.fileno(), 0):
            line = sys.stdin.readline()
            if not line:
                return
            command = json.loads(line)
            if "put" in command:
                publish(command["put"], bytes.fromhex(command["parent"]))
            if command.get("evict"):
                pool.clear_cached()
            stats = pool.stats()
            say(
                {
                    "leases": stats.num_leases,
                    "expired": stats.expired_leases_total,
                    "free": stats.free,
                    "cached": stats.cached,
                    "readers": service.num_readers,
                }
            )
        service.handle(ready, now_s())
        service.publish_pool_events(now_s())
        due_s = service.tick(now_s())


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
