"""What is particular to shared memory: the handshake, what it refuses, and bounded polls."""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kernels.cpu import native
from kvpool.arena import ARENA_SEALS, Arena
from kvpool.transport import shm
from kvpool.transport.base import POLL_BYTES
from kvpool.transport.shm import ShmChannel, ShmTransport
from protos.control import Endpoints, Source
from tandem.errors import TransportError
from tests.kvpool.processes import no_descriptor_left, wait_for

SLAB = 1 << 20
EPOCH = b"epoch-01"


def source_at(endpoint: str) -> Source:
    return Source("p", EPOCH, "DEVICE", Endpoints("", "", "", endpoint, "here"))


def transport_of(arena: Arena) -> ShmTransport:
    return ShmTransport(arena, EPOCH, "here", native())


class Liar:
    """A source that sends what it likes."""

    def __init__(self) -> None:
        self.endpoint = shm.ENDPOINT_PREFIX + secrets.token_hex(8)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind("\0" + self.endpoint[1:])
        self.listener.listen()

        self.arena = Arena(4, SLAB)
        self.transport = transport_of(self.arena)

    def meet(self) -> tuple[ShmChannel, socket.socket]:
        channel = self.transport.connect(source_at(self.endpoint))
        return channel, self.listener.accept()[0]

    def close(self) -> None:
        self.listener.close()
        self.transport.close()
        self.arena.close()


@pytest.fixture
def liar() -> Iterator[Liar]:
    liar = Liar()
    yield liar
    liar.close()


def memfd(num_bytes: int, seals: int) -> int:
    fd = os.memfd_create("tandem-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def header(
    *, magic: bytes = b"TKVA", version: int = 1, epoch: bytes = EPOCH, blocks: int = 4, slab: int = SLAB
) -> bytes:
    return shm._HEADER.pack(magic, version, epoch, blocks, slab)


@pytest.mark.parametrize(
    ("data", "num_bytes", "seals", "why"),
    [
        (header(magic=b"HTTP"), 4 * SLAB, ARENA_SEALS, "magic"),
        (header(version=2), 4 * SLAB, ARENA_SEALS, "version 2"),
        (header(epoch=b"another1"), 4 * SLAB, ARENA_SEALS, "epoch"),
        (header(slab=SLAB // 2), 4 * SLAB, ARENA_SEALS, "slabs of"),
        (header(blocks=5), 4 * SLAB, ARENA_SEALS, "a memfd of"),
        (header(blocks=0), 4 * SLAB, ARENA_SEALS, "an arena of 0 bytes"),
        (header(blocks=2**60), 4 * SLAB, ARENA_SEALS, "the limit is"),
        (header(), 4 * SLAB, 0, "seals 0x0 lack"),
        (header(), 4 * SLAB, ARENA_SEALS & ~shm.F_SEAL_SHRINK, "lack"),
        (header(), 4 * SLAB, ARENA_SEALS & ~shm.F_SEAL_FUTURE_WRITE, "lack"),
        (header()[:-1], 4 * SLAB, ARENA_SEALS, "header of 29 bytes"),
        (header() + b"x", 4 * SLAB, ARENA_SEALS, "header of 31 bytes"),
    ],
)
def test_a_handshake_that_does_not_hold_is_refused(
    liar: Liar, data: bytes, num_bytes: int, seals: int, why: str
) -> None:
    channel, peer = liar.meet()
    fd = memfd(num_bytes, seals)
    socket.send_fds(peer, [data], [fd])
    liar.transport.poll()
    assert channel.closed_because
    assert why in channel.closed_because
    os.close(fd)
    peer.close()


def test_a_descriptor_that_is_no_memfd_or_missing_is_refused(liar: Liar) -> None:
    channel, peer = liar.meet()
    with Path("/dev/zero").open("rb") as zero:
        socket.send_fds(peer, [header()], [zero.fileno()])
    liar.transport.poll()
    assert "not a memfd" in channel.closed_because
    peer.close()
    channel, peer = liar.meet()
    peer.send(header())
    liar.transport.poll()
    assert "0 descriptors" in channel.closed_because
    peer.close()


def test_superfluous_descriptors_do_not_leak(liar: Liar) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    channel, peer = liar.meet()
    fds = [memfd(4 * SLAB, ARENA_SEALS) for _ in range(5)]
    socket.send_fds(peer, [header()], fds)
    for fd in fds:
        os.close(fd)
    liar.transport.poll()
    assert channel.closed_because
    peer.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_anything_after_the_header_closes_the_channel_and_drops_the_mapping(liar: Liar) -> None:
    channel, peer = liar.meet()
    fd = memfd(4 * SLAB, ARENA_SEALS)
    socket.send_fds(peer, [header()], [fd])
    liar.transport.poll()
    assert not channel.closed_because
    peer.send(b"more")
    liar.transport.poll()
    assert "more than its header" in channel.closed_because
    os.close(fd)
    peer.close()


def test_a_source_of_another_user_is_refused(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TransportError, match="runs under user"):
        liar.transport.connect(source_at(liar.endpoint))


@pytest.fixture
def pair() -> Iterator[tuple[ShmTransport, ShmTransport]]:
    """A source and a sink of 48 blocks."""
    arenas = Arena(48, SLAB), Arena(48, SLAB)
    transports = transport_of(arenas[0]), transport_of(arenas[1])
    yield transports
    for transport, arena in zip(transports, arenas, strict=True):
        transport.close()
        arena.close()


Pair = tuple[ShmTransport, ShmTransport]


def test_a_reader_of_another_user_gets_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink = pair
    channel = sink.connect(source_at(source.endpoint))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    source.poll()
    sink.poll()
    assert channel.closed_because
    assert (source.num_refused, source.num_readers) == (1, 0)


@pytest.mark.parametrize("endpoint", ["", "/run/socket", "@other", "tcp://127.0.0.1:1", "@tandem-" + "x" * 300])
def test_an_endpoint_of_another_kind_is_refused(pair: Pair, endpoint: str) -> None:
    with pytest.raises(TransportError):
        pair[1].connect(source_at(endpoint))


def test_a_reader_that_talks_or_leaves_is_forgotten(pair: Pair) -> None:
    source, sink = pair
    talker, leaver, stays = (sink.connect(source_at(source.endpoint)) for _ in range(3))
    wait_for(lambda: source.num_readers == 3, step=source.poll)
    talker._socket.send(b"hello?")
    leaver.close()
    wait_for(lambda: source.num_readers == 1, step=source.poll)
    sink.poll()
    assert talker.closed_because
    assert not stays.closed_because


def test_one_poll_copies_a_bounded_amount_and_takes_turns(pair: Pair) -> None:
    source, sink = pair
    source._arena.array[:] = 5
    ours = sink._arena.array
    one, other = (sink.connect(source_at(source.endpoint)) for _ in range(2))
    for i in range(24):
        one.start_read(i, [i], [i])
        other.start_read(24 + i, [24 + i], [24 + i])
    assert not sink.busy, "nothing can be copied before the handshake"
    wait_for(lambda: source.num_readers == 2, step=source.poll)
    first = [result.read_id for result in sink.poll()]
    assert len(first) == POLL_BYTES // SLAB
    assert int(ours[:, 0].astype(bool).sum()) == len(first)
    second = [result.read_id for result in sink.poll()]
    assert {read_id < 24 for read_id in first} != {read_id < 24 for read_id in second}, "each has its turn"
    assert len(first) + len(second) + len(sink.poll()) == 48
    assert np.array_equal(ours, source._arena.array)


def test_only_sources_on_this_machine_are_within_reach(pair: Pair) -> None:
    transport = pair[1]
    assert transport.reaches(source_at("@tandem-x"))
    assert not transport.reaches(Source("p", EPOCH, "DEVICE", Endpoints("", "", "", "@tandem-x", "elsewhere")))
    assert not transport.reaches(Source("p", EPOCH, "DEVICE", Endpoints("", "", "", "", "here")))


def test_no_descriptor_left_pauses_the_listener_which_lets_readers_in_again_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shm, "ACCEPT_AGAIN_S", 0.1)
    theirs, ours = Arena(4, SLAB), Arena(4, SLAB)
    source, sink = transport_of(theirs), transport_of(ours)
    channel = sink.connect(source_at(source.endpoint))
    wait_for(lambda: select.select([source.fileno()], [], [], 0)[0])
    with no_descriptor_left():
        source.poll()
        assert not select.select([source.fileno()], [], [], 0)[0], "it would be polled for ever"
    assert source.num_readers == 0
    wait_for(lambda: source.busy)
    wait_for(lambda: source.num_readers, step=source.poll)
    channel.start_read(1, [0], [0])
    wait_for(lambda: channel.can_copy, step=channel.hear)
    assert [result.read_id for result in sink.poll()] == [1]
    for closing in (sink, source):
        closing.close()
    for arena in (ours, theirs):
        arena.close()
