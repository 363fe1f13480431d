"""The pool node as a real process, between a router that we play and workers that are processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from kvpool.arena import MEMFD_NAME, Arena
from kvpool.block_pool import BlockPool
from kvpool.keys import Key
from kvpool.node import run
from kvpool.service import KVService
from kvpool.sink import FetchedBatch, FetchEnded, FetchPlan, WantedBlock
from protos import control
from protos.control import (
    FromRouter,
    Goodbye,
    Heartbeat,
    Hello,
    Peers,
    Refused,
    RoutingGroup,
    Source,
    ToRouter,
    Welcome,
)
from tandem.clock import now_s
from tandem.config import load_config
from tandem.errors import ConfigError
from tandem.machine import machine_id
from tests.kvpool.child import REPOSITORY
from tests.kvpool.named_blocks import ROOT, SIZE, bytes_of, key_of
from tests.kvpool.processes import SourceProcess, shm, wait_for

SLAB = 64 * 1024
HOST_BLOCKS = 32
GROUP = RoutingGroup(b"m" * 16, "format", b"n" * 16, SIZE)


class Router:
    """A router as far as a pool node can tell."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.peer = b""
        self.hello: Hello | None = None
        self.heartbeat: Heartbeat | None = None
        self.num_heartbeats = 0
        self.goodbye: Goodbye | None = None

    def step(self) -> None:
        while self.socket.poll(0):
            self.peer, payload = self.socket.recv_multipart()
            message: ToRouter = control.decode_to_router(payload)
            match message:
                case Hello():
                    self.hello = message
                    self.send(Welcome(control.PROTOCOL_VERSION, "router", b"router-1", 0.05, 60.0))
                case Heartbeat():
                    self.heartbeat = message
                    self.num_heartbeats += 1
                case Goodbye():
                    self.goodbye = message

    def next_heartbeat(self) -> Heartbeat:
        """One that was made after this call: what waited in the socket is older."""
        self.step()
        after = self.num_heartbeats + 1
        wait_for(lambda: self.num_heartbeats > after, step=self.step)
        assert self.heartbeat is not None
        return self.heartbeat

    def send(self, message: FromRouter) -> None:
        self.socket.send_multipart([self.peer, control.encode(message)])

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class NodeProcess:
    def __init__(self, router: Router) -> None:
        environment = {
            **os.environ,
            "TANDEM_ROUTER__CONTROL_PORT": str(router.port),
            "TANDEM_POOL__HOST_BYTES": str(HOST_BLOCKS * SLAB),
            "TANDEM_TRANSFER__LEASE_S": "1.0",
        }
        command = [sys.executable, "-m", "kvpool", "--name", "pool-0"]
        self.popen = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
        self.router = router
        wait_for(lambda: router.hello, step=router.step)
        self.send_peers([])

    def send_peers(self, sources: list[Source]) -> None:
        self.router.send(Peers(workers=sources, group=GROUP, slab_bytes=SLAB))

    @property
    def source(self) -> Source:
        hello = self.router.hello
        assert hello is not None
        return Source(hello.process, hello.epoch, "HOST", hello.endpoints)

    def wait_until_cached(self, num_blocks: int) -> None:
        router = self.router
        wait_for(lambda: router.heartbeat and router.heartbeat.load.cached_blocks == num_blocks, step=router.step)

    def mapped_arenas(self) -> int:
        """Arenas that the process has mapped: its own, and those of workers it reads from."""
        maps = Path(f"/proc/{self.popen.pid}/maps").read_text(encoding="ascii")
        return sum(f"memfd:{MEMFD_NAME}" in line for line in maps.splitlines())

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router()
    yield router
    router.close()


@pytest.fixture
def node(router: Router) -> Iterator[NodeProcess]:
    node = NodeProcess(router)
    yield node
    node.kill()


def fetch(source: Source, names: list[str], parent: Key = ROOT) -> dict[str, bytes]:
    """What a worker would get from `source`: bytes by name."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    pool, arena = BlockPool(len(names), SIZE, "DEVICE"), Arena(len(names), SLAB)
    came: list[FetchedBatch] = []
    ended: list[FetchEnded] = []
    epoch = os.urandom(8)
    service = KVService(
        context=context, pool=pool, arena=arena, process="reader", epoch=epoch,
        bind_host="127.0.0.1", transports=shm(arena, epoch), machine_id=machine_id(), lease_s=1.0, grace_s=1.0,
        on_blocks=lambda _, batch: came.append(batch), on_ended=ended.append,
    )  # fmt: skip
    poller = zmq.Poller()
    service.register(poller)
    blocks = pool.allocate(len(names))
    assert blocks is not None
    parents = [parent, *map(key_of, names)]
    wanted = tuple(WantedBlock(key_of(n), p, SIZE, b) for n, p, b in zip(names, parents, blocks, strict=False))

    def step() -> None:
        service.handle(dict(poller.poll(1)), now_s())
        service.tick(now_s())

    try:
        service.start_fetch(FetchPlan(os.urandom(16), "r", wanted, (source,), "", now_s() + 5), now_s())
        wait_for(lambda: ended, step=step)
        by_key = {key_of(name): name for name in names}
        return {
            by_key[block.key]: arena.slab(block_id).tobytes()
            for batch in came
            for block, block_id in zip(batch.blocks, batch.block_ids, strict=True)
        }
    finally:
        service.close()
        context.term()
        arena.close()


def test_the_node_says_hello_anew_once_it_knows_what_it_holds(router: Router, node: NodeProcess) -> None:
    hello = router.hello
    assert hello is not None
    assert (hello.role, hello.group, hello.capacity.num_blocks) == ("pool", None, 0)
    wait_for(lambda: router.hello and router.hello.group, step=router.step)
    assert router.hello is not None
    assert router.hello.epoch == hello.epoch
    assert router.hello.group == GROUP
    assert (router.hello.capacity.num_blocks, router.hello.capacity.slab_bytes) == (HOST_BLOCKS, SLAB)
    assert router.hello.endpoints.machine_id == machine_id()
    router.hello = None
    node.send_peers([])
    wait_for(lambda: router.hello is not None, step=router.step)  # it doesn't find itself: that hello was lost


def test_what_workers_announce_outlives_them(router: Router, node: NodeProcess) -> None:
    names = [f"b{i}" for i in range(6)]
    with SourceProcess("decode-0", names[:4], slab_bytes=SLAB) as worker:
        wait_for(lambda: router.hello and router.hello.group, step=router.step)
        node.send_peers([worker.source])
        node.wait_until_cached(4)  # from before the node came: by replay
        worker.command(put=names[4:], parent=key_of(names[3]).hex())
        node.wait_until_cached(6)  # live
        assert node.mapped_arenas() == 2
        worker.kill()
    wait_for(lambda: node.mapped_arenas() == 1)  # its socket's end is enough, nobody told the node
    node.send_peers([])
    assert fetch(node.source, names) == {name: bytes_of(name, SLAB) for name in names}
    heartbeat = router.next_heartbeat()
    assert heartbeat.counters.fetched_bytes == 6 * SLAB
    assert heartbeat.counters.served_blocks == 6
    assert heartbeat.events_seq >= 0


def test_a_worker_that_left_the_cluster_is_let_go(router: Router, node: NodeProcess) -> None:
    wait_for(lambda: router.hello and router.hello.group, step=router.step)
    with SourceProcess("decode-0", ["a"], slab_bytes=SLAB) as worker:
        node.send_peers([worker.source])
        node.wait_until_cached(1)
        assert worker.command()["readers"] == 1
        node.send_peers([])
        wait_for(lambda: worker.command()["readers"] == 0, step=router.step)
        wait_for(lambda: node.mapped_arenas() == 1, step=router.step)  # its connection goes a moment before its mapping
        worker.command(put=["later"], parent=ROOT.hex())
        assert router.next_heartbeat().load.cached_blocks == 1


def test_a_new_incarnation_of_a_worker_is_followed_from_its_beginning(router: Router, node: NodeProcess) -> None:
    wait_for(lambda: router.hello and router.hello.group, step=router.step)
    with SourceProcess("decode-0", ["old"], slab_bytes=SLAB) as worker:
        node.send_peers([worker.source])
        node.wait_until_cached(1)
    with SourceProcess("decode-0", ["new"], slab_bytes=SLAB) as worker:
        node.send_peers([worker.source])
        node.wait_until_cached(2)
    assert set(fetch(node.source, ["old"])) == {"old"}
    assert set(fetch(node.source, ["new"])) == {"new"}


def test_corrupt_blocks_are_not_kept(router: Router, node: NodeProcess) -> None:
    wait_for(lambda: router.hello and router.hello.group, step=router.step)
    with SourceProcess("decode-0", ["a", "b", "c"], slab_bytes=SLAB, corrupt=["b"]) as worker:
        node.send_peers([worker.source])
        node.wait_until_cached(2)
        wait_for(lambda: router.heartbeat and router.heartbeat.counters.fetch_corrupt >= 1, step=router.step)
    assert set(fetch(node.source, ["a"])) == {"a"}
    assert fetch(node.source, ["b"]) == {}


def test_the_oldest_blocks_go_when_the_memory_is_full(router: Router, node: NodeProcess) -> None:
    wait_for(lambda: router.hello and router.hello.group, step=router.step)
    names = [f"x{i}" for i in range(HOST_BLOCKS)]
    with SourceProcess("decode-0", names, slab_bytes=SLAB) as worker:
        node.send_peers([worker.source])
        node.wait_until_cached(HOST_BLOCKS)
        worker.command(put=["late0", "late1"], parent=ROOT.hex())
        wait_for(lambda: router.heartbeat and router.heartbeat.counters.evicted_blocks == 2, step=router.step)
        assert set(fetch(node.source, ["late0", "late1"])) == {"late0", "late1"}
        assert fetch(node.source, names[-2:], key_of(names[-3])) == {}, "the chain's tail went first"
        assert len(fetch(node.source, names[:-2])) == HOST_BLOCKS - 2


def test_sigterm_is_a_clean_end(router: Router, node: NodeProcess) -> None:
    node.popen.terminate()
    assert node.popen.wait(10) == 0
    wait_for(lambda: router.goodbye, step=router.step)


def test_a_refused_node_says_so_and_stops(router: Router) -> None:
    config = load_config(None, {"router": {"control_port": router.port}})
    errors: list[Exception] = []

    def serve() -> None:
        try:
            run(config, "pool-0", threading.Event())
        except ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    wait_for(lambda: router.hello, step=router.step)
    router.send(Refused("the name 'pool-0' is taken"))
    thread.join(10)
    assert "pool-0" in str(errors[0])
    assert "is taken" in str(errors[0])


def test_events_that_are_garbage_do_not_stop_the_node(router: Router, node: NodeProcess) -> None:
    wait_for(lambda: router.hello and router.hello.group, step=router.step)
    with SourceProcess("good", ["a"], slab_bytes=SLAB) as worker:
        publisher = router.context.socket(zmq.PUB)
        publisher.linger = 0
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        endpoints = msgspec.structs.replace(worker.source.endpoints, events=f"tcp://127.0.0.1:{port}")
        node.send_peers([Source("liar", b"liarliar", "DEVICE", endpoints), worker.source])
        for frames in ([b"kv"], [b"kv", b"short", b"x"], [b"kv", bytes(8), b"\xc1" * 9]):
            publisher.send_multipart(frames)
        node.wait_until_cached(1)
        publisher.close()
    assert node.popen.poll() is None
