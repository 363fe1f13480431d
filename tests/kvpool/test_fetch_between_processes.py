"""Fetches from real processes that die, freeze and lie; what they leave in ours."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import zmq

from kvpool.arena import MEMFD_NAME, Arena
from kvpool.block_pool import BlockPool
from kvpool.service import KVService
from kvpool.sink import FetchedBatch, FetchEnded
from kvpool.transport.shm import ShmTransport
from protos.control import Counters, Source
from tandem.clock import now_s
from tandem.machine import machine_id
from tests.kvpool.child import REPOSITORY
from tests.kvpool.named_blocks import SIZE, bytes_of, key_of, plan
from tests.kvpool.processes import SourceProcess, shm, wait_for

SLAB = 1 << 20
NUM_BLOCKS = 64


class Sink:
    """A worker's side, in this process."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.pool = BlockPool(NUM_BLOCKS, SIZE, "DEVICE")
        self.arena = Arena(NUM_BLOCKS, SLAB)
        self.came: dict[bytes, tuple[str, int]] = {}
        self.ended: FetchEnded | None = None
        epoch = os.urandom(8)
        self.service = KVService(
            context=self.context, pool=self.pool, arena=self.arena, process="sink", epoch=epoch,
            bind_host="127.0.0.1", transports=shm(self.arena, epoch), machine_id=machine_id(), lease_s=5.0, grace_s=1.0,
            on_blocks=self._on_blocks, on_ended=self._on_ended,
        )  # fmt: skip
        self.poller = zmq.Poller()
        self.service.register(self.poller)
        gc.collect()  # arenas of other tests in this process
        self._maps_before = self._count_maps()
        self._memfds_before = self._count_memfds()

    def _on_blocks(self, fetch_id: bytes, batch: FetchedBatch) -> None:
        for block, block_id in zip(batch.blocks, batch.block_ids, strict=True):
            self.came[block.key] = (batch.source.process, block_id)

    def _on_ended(self, ended: FetchEnded) -> None:
        assert self.ended is None
        self.ended = ended

    def start(self, names: Sequence[str], sources: Sequence[Source], *, wait: str = "") -> None:
        self.service.start_fetch(plan(self.pool, names, sources, wait=wait), now_s())

    def step(self) -> None:
        self.service.handle(dict(self.poller.poll(1)), now_s())
        self.service.tick(now_s())

    def finish(self) -> FetchEnded:
        wait_for(lambda: self.ended, step=self.step)
        assert self.ended is not None
        for key, (_, block_id) in self.came.items():
            name = key.decode().strip()
            assert self.arena.slab(block_id).tobytes() == bytes_of(name, SLAB), f"wrong bytes for {name}"
        return self.ended

    def mapped_arenas(self) -> int:
        """Arenas that were mapped since this sink began."""
        return self._count_maps() - self._maps_before

    def open_memfds(self) -> int:
        """Descriptors of arenas that were opened since this sink began. Python keeps one per mapping."""
        return self._count_memfds() - self._memfds_before

    @staticmethod
    def _count_maps() -> int:
        maps = Path("/proc/self/maps").read_text(encoding="ascii")
        return sum(f"memfd:{MEMFD_NAME}" in line for line in maps.splitlines())

    @staticmethod
    def _count_memfds() -> int:
        links = []
        for fd in Path("/proc/self/fd").iterdir():
            try:
                links.append(str(fd.readlink()))
            except FileNotFoundError:
                pass  # the directory's own descriptor
        return sum(f"memfd:{MEMFD_NAME}" in link for link in links)

    def close(self) -> None:
        self.service.close()
        self.context.term()
        self.arena.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.close()


def test_bytes_are_equal_across_processes_and_no_lease_stays(sink: Sink) -> None:
    names = [f"block{i}" for i in range(20)]
    with SourceProcess("p", names, slab_bytes=SLAB) as source:
        sink.start(names, [source.source])
        assert sink.finish().missing == ()
        assert len(sink.came) == 20
        assert (sink.mapped_arenas(), sink.open_memfds()) == (1, 1)
        wait_for(lambda: source.command()["leases"] == 0, step=sink.step)


def test_a_source_killed_in_the_middle_of_a_read_is_replaced_by_the_next_and_leaves_nothing(sink: Sink) -> None:
    names = [f"block{i}" for i in range(48)]  # three polls' worth of bytes
    with (
        SourceProcess("first", names, slab_bytes=SLAB) as first,
        SourceProcess("second", names, slab_bytes=SLAB) as second,
    ):
        sink.start(names, [first.source, second.source])
        wait_for(lambda: sink.arena.array[:, 0].any(), step=sink.step)
        assert sink.ended is None, "the read was over before the source could die"
        first.kill()
        assert sink.finish().missing == ()
        assert {process for process, _ in sink.came.values()} == {"first", "second"}, "what had come whole stays"
        assert sink.mapped_arenas() == 1
        second.kill()
        wait_for(lambda: sink.mapped_arenas() == 0, step=sink.step)
        assert sink.open_memfds() == 0
        assert not sink.service._fetcher._peers


def test_a_source_killed_while_we_wait_ends_the_fetch_at_once(sink: Sink) -> None:
    with SourceProcess("p", ["a"], slab_bytes=SLAB, grace_s=60.0) as source:
        sink.start(["a", "b"], [source.source], wait="p")
        wait_for(lambda: len(sink.came) == 1, step=sink.step)
        killed_s = now_s()
        source.kill()
        assert sink.finish().missing == (key_of("b"),)
        assert now_s() - killed_s < 2.0


def test_a_frozen_source_is_given_up_and_its_late_answer_harmless(sink: Sink) -> None:
    with SourceProcess("p", ["a"], slab_bytes=SLAB) as frozen, SourceProcess("q", ["a"], slab_bytes=SLAB) as other:
        os.kill(frozen.pid, signal.SIGSTOP)
        sink.start(["a"], [frozen.source, other.source])
        assert sink.finish().missing == ()
        assert sink.came[key_of("a")][0] == "q"
        os.kill(frozen.pid, signal.SIGCONT)
        wait_for(lambda: frozen.command()["leases"] == 0, step=sink.step)
        assert sink.service.num_fetches == 0


def test_corrupt_bytes_never_become_visible(sink: Sink) -> None:
    with (
        SourceProcess("liar", ["a", "b"], slab_bytes=SLAB, corrupt=["b"]) as liar,
        SourceProcess("honest", ["a", "b"], slab_bytes=SLAB) as honest,
    ):
        sink.start(["a", "b"], [liar.source, honest.source])
        assert sink.finish().missing == ()
        assert {key.decode().strip(): process for key, (process, _) in sink.came.items()} == {
            "a": "liar",
            "b": "honest",
        }
        assert sink.service.add_counters(Counters()).fetch_corrupt == 1


def test_a_process_with_another_epoch_than_named_is_not_read(sink: Sink) -> None:
    with SourceProcess("p", ["a"], slab_bytes=SLAB) as source:
        sink.start(["a"], [msgspec.structs.replace(source.source, epoch=b"previous")])
        assert sink.finish().missing == (key_of("a"),)
        assert sink.mapped_arenas() == 0


def test_a_process_with_other_slabs_is_not_read(sink: Sink) -> None:
    with SourceProcess("p", ["a"], slab_bytes=SLAB // 2) as source:
        sink.start(["a"], [source.source])
        assert sink.finish().missing == (key_of("a"),)
        assert sink.mapped_arenas() == 0


def test_what_was_mapped_stays_readable_until_we_hear_of_the_peers_death(sink: Sink) -> None:
    with SourceProcess("p", ["a"], slab_bytes=SLAB) as source:
        transport = ShmTransport(sink.arena, os.urandom(8), machine_id(), None)
        channel = transport.connect(source.source)
        wait_for(lambda: transport.poll() or channel._map is not None)
        source.kill()
        assert channel._map is not None
        assert channel._map[:SLAB] == bytes_of("a", SLAB), "a copy in progress must not fault"
        wait_for(lambda: select.select([transport.fileno()], [], [], 0)[0])
        channel.start_read(1, [0], [0])
        (result,) = wait_for(transport.poll)
        assert result.error
        assert channel.closed_because
        transport.close()
        assert sink.mapped_arenas() == 0


DYING_SINK = """
import json, sys, zmq
from protos.control import Fetch, encode
names = json.loads(sys.argv[2])
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
socket.send(encode(Fetch(b"f" * 16, "request", [n.rjust(16).encode() for n in names], True, 60.0)))
print(len(socket.recv()), flush=True)
sys.stdin.read()
"""


def test_a_killed_sinks_leases_expire_and_its_blocks_can_go() -> None:
    with SourceProcess("p", ["a", "b"], slab_bytes=SLAB, lease_s=0.5, grace_s=0.5) as source:
        dying = subprocess.Popen(
            [sys.executable, "-c", DYING_SINK, source.source.endpoints.fetch, '["a", "b", "unknown"]'],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        with dying:
            assert dying.stdout is not None
            assert dying.stdout.readline(), "it holds a lease now"
            dying.kill()
            assert source.command(evict=True)["cached"] == 2, "leased blocks stay"
            after = wait_for(lambda: (state := source.command())["leases"] == 0 and state)
            assert after["expired"] == 1
            assert source.command(evict=True)["free"] == NUM_BLOCKS
