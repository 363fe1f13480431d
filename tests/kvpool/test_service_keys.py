"""Services that know each other by keys: blocks go from one to the other, and nobody says what its key may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from kvpool.followed import FollowedWorker
from protos import control
from protos.control import Endpoints, Kept, Source, ToSource
from tandem.clock import now_s
from tandem.curve import Keyring, load_keyring, make_keys
from tandem.errors import ProtocolError
from tandem.zap import Zap
from tandem.zmq_io import bounded_socket, identity
from tests.kvpool.named_blocks import key_of
from tests.kvpool.processes import wait_for
from tests.kvpool.test_service import Node


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    make_keys(tmp_path / "keys", ["decode-7"])
    return tmp_path / "keys"


class KeyedNode(Node):
    """A node with keys, in a context of its own."""

    def __init__(self, folder: Path, process: str, role: str) -> None:
        self.keys = load_keyring(str(folder), process, role)
        assert self.keys is not None
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.zap = Zap(self.context, self.keys.allowed)
        super().__init__(self.context, process, keys=self.keys)
        self.poller.register(self.zap.socket, zmq.POLLIN)

    def step(self) -> None:
        self.zap.handle()
        super().step()

    def close(self) -> None:
        super().close()
        self.zap.close()
        self.context.term()


@pytest.fixture
def make(folder: Path) -> Iterator[Callable[[str, str], KeyedNode]]:
    nodes: list[KeyedNode] = []

    def build(process: str, role: str) -> KeyedNode:
        nodes.append(KeyedNode(folder, process, role))
        return nodes[-1]

    yield build
    for node in nodes:
        node.close()


Make = Callable[[str, str], KeyedNode]


def run_until(nodes: list[KeyedNode], done: Callable[[], object]) -> None:
    wait_for(done, 20.0, lambda: [node.step() for node in nodes])


def test_blocks_go_between_those_that_know_each_other(make: Make) -> None:
    source, sink = make("decode-7", "decode"), make("pool-0", "pool")
    source.pool.release(source.put("abc"))
    plan = sink.fetch("abc", [source.source])
    run_until([source, sink], lambda: plan.fetch_id in sink.ended)
    assert [came.key for came in sink.blocks[plan.fetch_id]] == [key_of(name) for name in "abc"]
    assert source.service.num_undecodable == 0


def test_a_source_with_another_key_than_the_list_gives_it_is_not_asked(make: Make) -> None:
    source, sink = make("decode-7", "decode"), make("decode-1", "decode")
    source.pool.release(source.put("abc"))
    for key in ("", sink.keys.public_key if sink.keys else ""):
        told = source.service.endpoints
        endpoints = Endpoints(told.fetch, told.events, told.replay, told.shm, told.machine_id, key=key)
        plan = sink.fetch("abc", [Source("decode-7", source.epoch, "DEVICE", endpoints)])
        run_until([source, sink], lambda plan=plan: plan.fetch_id in sink.ended)  # type: ignore[misc]
        assert plan.fetch_id not in sink.blocks
        with pytest.raises(ProtocolError, match="doesn't give it"):
            FollowedWorker(sink.context, plan.sources[0], lambda key: False, sink.keys)


@pytest.mark.parametrize(
    ("process", "role", "says_it_is", "is_heard"),
    [
        ("pool-0", "pool", "pool-0", True),
        ("decode-1", "decode", "decode-1", False),  # workers keep nothing for others
        ("pool-0", "pool", "decode-7", False),  # that name has a key of its own
        ("decode-7", "decode", "pool-0", False),
    ],
)
def test_only_a_pool_node_says_that_it_keeps_blocks(
    make: Make, folder: Path, process: str, role: str, says_it_is: str, is_heard: bool
) -> None:
    worker = make("decode-0", "decode")
    worker.pool.release(worker.put("abc"))
    keys = load_keyring(str(folder), process, role)
    assert keys is not None
    with zmq.Context[zmq.Socket[bytes]]() as context, bounded_socket(context, zmq.DEALER) as line:
        say(line, keys, worker, says_it_is, Kept([key_of("a")]))
        if is_heard:
            run_until([worker], lambda: worker.pool.has_keepers)
        else:
            run_until([worker], lambda: worker.service.num_undecodable == 1)
            assert not worker.pool.has_keepers


def say(line: zmq.Socket[bytes], keys: Keyring, worker: Node, process: str, message: ToSource) -> None:
    line.setsockopt(zmq.IDENTITY, identity(process, b"12345678"))
    keys.dial(line, worker.process, worker.service.endpoints.key)
    line.connect(worker.service.endpoints.fetch)
    line.send(control.encode(message))


def test_nobody_without_a_key_reads_events_asks_for_them_or_for_blocks(make: Make) -> None:
    worker = make("decode-0", "decode")
    worker.pool.release(worker.put("abc"))
    told = worker.service.endpoints
    with zmq.Context[zmq.Socket[bytes]]() as context:
        events, replay = bounded_socket(context, zmq.SUB), bounded_socket(context, zmq.DEALER)
        fetch = bounded_socket(context, zmq.DEALER)
        with events, replay, fetch:
            events.subscribe(b"")
            for socket, endpoint in ((events, told.events), (replay, told.replay), (fetch, told.fetch)):
                socket.connect(endpoint)
            replay.send_multipart([b"", (0).to_bytes(8, "big")], zmq.NOBLOCK)
            end_s = now_s() + 0.5
            while now_s() < end_s:
                worker.step()
                assert not events.poll(0)
                assert not replay.poll(0)
            assert worker.service.num_undecodable == 0
