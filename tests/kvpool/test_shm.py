"""What is particular to shared memory: the handshake, what it refuses, and bounded polls."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvpool.arena import ARENA_SEALS, Arena
from kvpool.transport import shm
from kvpool.transport.base import BlockRead
from kvpool.transport.shm import COPY_BYTES_PER_POLL, ShmChannel, ShmListener, ShmTransport
from protos.control import Endpoints, Source
from tandem.errors import TransportError
from tests.kvpool.processes import wait_for

SLAB = 1 << 20
EPOCH = b"epoch-01"


def source_at(endpoint: str) -> Source:
    return Source("p", EPOCH, "DEVICE", Endpoints("", "", "", endpoint, "here"))


class Liar:
    """A source that sends what it likes."""

    def __init__(self) -> None:
        self.endpoint = shm.ENDPOINT_PREFIX + secrets.token_hex(8)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind("\0" + self.endpoint[1:])
        self.listener.listen()

    def meet(self) -> tuple[ShmChannel, socket.socket]:
        channel = ShmChannel(source_at(self.endpoint), SLAB)
        return channel, self.listener.accept()[0]


@pytest.fixture
def liar() -> Iterator[Liar]:
    liar = Liar()
    yield liar
    liar.listener.close()


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
    channel.poll()
    assert channel.closed
    assert why in channel.closed_because
    os.close(fd)
    peer.close()


def test_a_descriptor_that_is_no_memfd_or_missing_is_refused(liar: Liar) -> None:
    channel, peer = liar.meet()
    with Path("/dev/zero").open("rb") as zero:
        socket.send_fds(peer, [header()], [zero.fileno()])
    channel.poll()
    assert "not a memfd" in channel.closed_because
    peer.close()
    channel, peer = liar.meet()
    peer.send(header())
    channel.poll()
    assert "0 descriptors" in channel.closed_because
    peer.close()


def test_superfluous_descriptors_do_not_leak(liar: Liar) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    channel, peer = liar.meet()
    fds = [memfd(4 * SLAB, ARENA_SEALS) for _ in range(5)]
    socket.send_fds(peer, [header()], fds)
    for fd in fds:
        os.close(fd)
    channel.poll()
    assert channel.closed
    peer.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_anything_after_the_header_closes_the_channel_and_drops_the_mapping(liar: Liar) -> None:
    channel, peer = liar.meet()
    fd = memfd(4 * SLAB, ARENA_SEALS)
    socket.send_fds(peer, [header()], [fd])
    channel.poll()
    assert not channel.closed
    peer.send(b"more")
    channel.poll()
    assert "more than its header" in channel.closed_because
    os.close(fd)
    peer.close()


def test_a_source_of_another_user_is_refused(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TransportError, match="runs under user"):
        ShmChannel(source_at(liar.endpoint), SLAB)


def test_a_reader_of_another_user_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(4, SLAB)
    listener = ShmListener(arena, EPOCH)
    channel = ShmChannel(source_at(listener.endpoint), SLAB)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    listener.handle()
    channel.poll()
    assert channel.closed
    assert (listener.num_refused, listener.num_connections) == (1, 0)
    listener.close()
    arena.close()


@pytest.mark.parametrize("endpoint", ["", "/run/socket", "@other", "tcp://127.0.0.1:1", "@tandem-" + "x" * 300])
def test_an_endpoint_of_another_kind_is_refused(endpoint: str) -> None:
    with pytest.raises(TransportError):
        ShmChannel(source_at(endpoint), SLAB)


def test_a_reader_that_talks_or_leaves_is_forgotten() -> None:
    arena = Arena(4, SLAB)
    listener = ShmListener(arena, EPOCH)
    talker, leaver, stays = (ShmChannel(source_at(listener.endpoint), SLAB) for _ in range(3))
    wait_for(lambda: listener.num_connections == 3, step=listener.handle)
    talker._socket.send(b"hello?")
    leaver.close()
    wait_for(lambda: listener.num_connections == 1, step=listener.handle)
    talker.poll()
    stays.poll()
    assert talker.closed
    assert not stays.closed
    stays.close()
    listener.close()
    arena.close()


def test_one_poll_copies_a_bounded_amount() -> None:
    num = 3 * COPY_BYTES_PER_POLL // SLAB
    theirs, ours = Arena(num, SLAB), Arena(num, SLAB)
    listener = ShmListener(theirs, EPOCH)
    theirs.array[:] = 5
    channel = ShmTransport("here", SLAB).connect(source_at(listener.endpoint))
    channel.start_read(1, [BlockRead(i, ours.slab(i)) for i in range(num)])
    assert not channel.busy, "nothing can be copied before the handshake"
    listener.handle()
    copied = []
    while not (results := channel.poll()):
        copied.append(int(ours.array[:, 0].astype(bool).sum()) * SLAB)
    assert copied == [COPY_BYTES_PER_POLL, 2 * COPY_BYTES_PER_POLL]
    assert results[0].checksums is not None
    assert np.array_equal(ours.array, theirs.array)
    channel.close()
    listener.close()
    theirs.close()
    ours.close()


def test_only_sources_on_this_machine_are_within_reach() -> None:
    transport = ShmTransport("here", SLAB)
    assert transport.reaches(source_at("@tandem-x"))
    assert not transport.reaches(Source("p", EPOCH, "DEVICE", Endpoints("", "", "", "@tandem-x", "elsewhere")))
    assert not transport.reaches(Source("p", EPOCH, "DEVICE", Endpoints("", "", "", "", "here")))
