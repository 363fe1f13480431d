"""What is particular to tcp: who is let in, what a peer that lies, floods, stalls, freezes or dies does to us, and TLS."""

from __future__ import annotations

import select
import signal
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.transport import tcp, tcp_channel, tcp_listener
from kvpool.transport.base import ReadResult
from kvpool.transport.tcp import TcpTransport
from kvpool.transport.tcp_channel import TcpChannel
from kvpool.transport.tcp_frames import MAX_LOCATIONS, MAX_REQUESTS, OK, OUTSIDE, Answer, Hello, Welcome, pack_request
from kvpool.transport.tcp_stream import TlsFiles, prepare
from protos.control import Endpoints, Source
from tandem.errors import ConfigError, TransportError
from tests.kvpool.processes import no_descriptor_left, wait_for
from tests.kvpool.transport_process import TransportProcess
from tests.kvpool.transport_worlds import EPOCH, OTHER_EPOCH, SINK_EPOCH, bytes_served

SLAB = 4096
NUM_BLOCKS = 16


def source_at(endpoint: str, epoch: bytes = EPOCH) -> Source:
    return Source("p", epoch, "DEVICE", Endpoints("", "", "", tcp=endpoint))


class Pair:
    """A source and a sink. `drive` polls them as their owners do: only when their descriptor says so, or while they are busy; a
    wakeup that gets lost fails it."""

    def __init__(
        self, slab_bytes: int = SLAB, num_blocks: int = NUM_BLOCKS, *, host: str = "127.0.0.1",
        theirs_tls: TlsFiles | None = None, ours_tls: TlsFiles | None = None, with_native: bool = True,
    ) -> None:  # fmt: skip
        self.theirs, self.ours = Arena(num_blocks, slab_bytes), Arena(num_blocks, slab_bytes)
        self.theirs.array[:] = bytes_served(num_blocks, slab_bytes)
        library = native() if with_native else None
        self.far = TcpTransport(self.theirs, EPOCH, host, library, tls=theirs_tls)
        self.near = TcpTransport(self.ours, SINK_EPOCH, host, library, tls=ours_tls)

    @property
    def source(self) -> Source:
        return source_at(self.far.endpoint)

    def drive(self, num: int) -> list[ReadResult]:
        results: list[ReadResult] = []
        while len(results) < num:
            if self.far.busy or self.near.busy:
                ready = [transport.fileno() for transport in (self.far, self.near) if transport.busy]
            else:
                ready = select.select([self.far.fileno(), self.near.fileno()], [], [], 5)[0]
            assert ready, f"{len(results)} results of {num}, and nobody is woken"
            if self.far.fileno() in ready:
                assert self.far.poll() == []
            if self.near.fileno() in ready:
                results.extend(self.near.poll())
        assert len(results) == num
        return results

    def is_right(self, result: ReadResult, locations: list[int], block_ids: list[int]) -> bool:
        expected = [xxhash.xxh3_64_intdigest(self.theirs.array[i].data) for i in locations]
        return (
            result.checksums is not None
            and result.checksums.tolist() == expected
            and np.array_equal(self.ours.array[block_ids], self.theirs.array[locations])
        )

    def close(self) -> None:
        for part in (self.near, self.far, self.theirs, self.ours):
            part.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def address_of(transport: TcpTransport) -> tuple[str, int]:
    host, _, port = transport.endpoint.split("/")[2].rpartition(":")
    return host, int(port)


def hello_to(transport: TcpTransport, **changes: object) -> bytes:
    fields: dict[str, object] = {"secret": bytes.fromhex(transport.endpoint[-32:]), "epoch": EPOCH, "slab_bytes": SLAB}
    return Hello(**(fields | changes)).pack()  # type: ignore[arg-type]


def stranger(transport: TcpTransport, *said: bytes) -> socket.socket:
    """Somebody who speaks to our port by himself."""
    connection = socket.create_connection(address_of(transport), timeout=5)
    for data in said:
        connection.sendall(data)
    return connection


def hears(connection: socket.socket, transport: TcpTransport, num_bytes: int) -> bytes:
    """What the stranger hears: so many bytes, or all up to the end."""
    heard = bytearray()
    connection.setblocking(False)

    def ended() -> bool:
        try:
            data = connection.recv(num_bytes - len(heard))
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        heard.extend(data)
        return not data or len(heard) == num_bytes

    wait_for(ended, step=transport.poll)
    return bytes(heard)


# --- who is let in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_an_endpoint_names_an_address_and_a_fresh_secret(host: str) -> None:
    pair = Pair(host=host)
    assert pair.far.endpoint[-32:] != pair.near.endpoint[-32:]
    assert pair.far.endpoint.startswith(("tcp://127.0.0.1:", "tcp://[::1]:"))
    assert pair.near.reaches(pair.source)
    assert not pair.near.reaches(source_at(""))
    channel = pair.near.connect(pair.source)
    channel.start_read(1, [3], [4])
    assert pair.is_right(pair.drive(1)[0], [3], [4])
    assert (pair.far.num_readers, pair.far.num_refused, pair.near.num_readers) == (1, 0, 0)
    pair.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_others_could_not_reach_is_refused(host: str) -> None:
    arena = Arena(1, SLAB)
    with pytest.raises(ConfigError, match=host.replace(".", r"\.")):
        TcpTransport(arena, EPOCH, host, None)
    arena.close()


@pytest.mark.parametrize(
    "endpoint",
    ["", "127.0.0.1:1", "tcp://127.0.0.1:1/", "tcp://127.0.0.1:1/" + "0" * 31, "tcp://127.0.0.1:99999/" + "0" * 32,
     "tcp://localhost:1/" + "0" * 32, "tcp://::1:1/" + "0" * 32, "tcp://1.2.3.4.5:1/" + "0" * 32,
     "tls://127.0.0.1:1/" + "0" * 32, "tcp://127.0.0.1:1/" + "0" * 32 + "\n"],
)  # fmt: skip
def test_an_endpoint_that_is_none_is_an_error_at_once(pair: Pair, endpoint: str) -> None:
    with pytest.raises(
        TransportError, match=r"is not tcp://|speaks tls, we speak tcp|can't connect to 1\.2\.3\.4\.5 port"
    ):
        pair.near.connect(source_at(endpoint))


def test_nobody_is_let_in_without_the_secret(pair: Pair) -> None:
    channel = pair.near.connect(source_at(pair.far.endpoint[:-32] + "0" * 32))
    channel.start_read(1, [0], [0])
    (result,) = pair.drive(1)
    assert "another secret" in result.error
    assert result.error == channel.closed_because
    assert (pair.far.num_readers, pair.far.num_refused) == (0, 1)


@pytest.mark.parametrize(
    ("epoch", "slab_bytes", "because"),
    [
        (OTHER_EPOCH, SLAB, f"epoch {EPOCH.hex()}, expected {OTHER_EPOCH.hex()}"),
        (EPOCH, 2048, "slabs of 4096 bytes, ours have 2048"),
    ],
)
def test_what_differs_is_named_on_the_sinks_side(pair: Pair, epoch: bytes, slab_bytes: int, because: str) -> None:
    arena = Arena(NUM_BLOCKS, slab_bytes)
    sink = TcpTransport(arena, SINK_EPOCH, "127.0.0.1", native())
    channel = sink.connect(source_at(pair.far.endpoint, epoch))
    channel.start_read(1, [0], [0])
    results: list[ReadResult] = []

    def step() -> None:
        pair.far.poll()
        results.extend(sink.poll())

    wait_for(lambda: results, step=step)
    assert results == [ReadResult(1, None, because)]
    assert channel.closed_because == because
    assert (pair.far.num_readers, pair.far.num_refused) == (0, 1)
    sink.close()
    arena.close()


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n" + b" " * 20, b"TKVT\x00\x02" + b"0" * 40, b"\x16\x03\x01" + b"0" * 60],
)
def test_who_speaks_something_else_hears_nothing(pair: Pair, said: bytes) -> None:
    with stranger(pair.far, said) as connection:
        assert hears(connection, pair.far, 1) == b""
    assert (pair.far.num_readers, pair.far.num_refused) == (0, 1)


def test_who_says_nothing_is_closed_at_the_deadline(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_listener, "HANDSHAKE_S", 0.1)
    with stranger(pair.far, hello_to(pair.far)) as welcome, stranger(pair.far, b"TKV") as silent:
        assert len(hears(welcome, pair.far, 30)) == 30
        wait_for(lambda: not select.select([pair.far.fileno()], [], [], 0)[0], step=pair.far.poll)
        wait_for(lambda: pair.far.busy)
        assert hears(silent, pair.far, 1) == b""
        assert (pair.far.num_readers, pair.far.num_refused) == (1, 1)


def test_more_readers_than_the_limit_are_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_listener, "MAX_READERS", 1)
    with stranger(pair.far, hello_to(pair.far)) as first, stranger(pair.far, hello_to(pair.far)) as second:
        assert hears(second, pair.far, 1) == b""
        assert hears(first, pair.far, 30) == Welcome(EPOCH, NUM_BLOCKS, SLAB).pack()


def test_no_descriptor_left_pauses_the_listener_instead_of_spinning(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_listener, "ACCEPT_AGAIN_S", 0.1)
    connection = stranger(pair.far, hello_to(pair.far))
    wait_for(lambda: select.select([pair.far.fileno()], [], [], 0)[0])
    with no_descriptor_left():
        pair.far.poll()
        assert not select.select([pair.far.fileno()], [], [], 0)[0], "it would be polled for ever"
    wait_for(lambda: pair.far.busy)
    assert hears(connection, pair.far, 30) == Welcome(EPOCH, NUM_BLOCKS, SLAB).pack()
    connection.close()


def test_the_kernel_too_watches_for_peers_that_are_gone() -> None:
    with socket.socket() as connection:
        prepare(connection)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert 0 < connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 60_000
        assert not connection.getblocking()


# --- what moves --------------------------------------------------------------------------------------------------------


class Relay:
    """Between a sink and a source: passes bytes on in pieces of the given sizes, over and over, both ways."""

    def __init__(self, far: TcpTransport, sizes: list[int]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}/{far.endpoint[-32:]}"
        self.far = socket.create_connection(address_of(far))
        self.near: socket.socket | None = None
        self.sizes = sizes
        self.turn = 0

    def step(self) -> None:
        if self.near is None:
            self.near = self.listener.accept()[0]
        for one, other in ((self.near, self.far), (self.far, self.near)):
            one.setblocking(False)
            self.turn += 1
            try:
                data = one.recv(self.sizes[self.turn % len(self.sizes)])
            except BlockingIOError:
                continue
            other.setblocking(True)
            other.sendall(data)

    def close(self) -> None:
        for part in (self.listener, self.far, self.near):
            if part is not None:
                part.close()


@settings(max_examples=40)
@given(
    slab_bytes=st.sampled_from([1, 97, 240, 241, 1000]),
    with_native=st.booleans(),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    reads=st.lists(st.lists(st.integers(0, NUM_BLOCKS), max_size=6), min_size=1, max_size=6),
    aborted=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=3),
)
def test_any_split_of_the_stream_and_any_abort_delivers_the_right_bytes(
    slab_bytes: int, with_native: bool, sizes: list[int], reads: list[list[int]], aborted: set[tuple[int, int]]
) -> None:
    pair = Pair(slab_bytes, with_native=with_native)
    ids = [list(range(NUM_BLOCKS))[i * 2 : i * 2 + 2] * 3 for i in range(len(reads))]
    into = [ids[i][: len(locations)] for i, locations in enumerate(reads)]
    relay = Relay(pair.far, sizes)
    channel = pair.near.connect(source_at(relay.endpoint))
    results: dict[int, ReadResult] = {}
    gone: set[int] = set()
    for read_id, locations in enumerate(reads):
        channel.start_read(read_id, locations, into[read_id])
    turn = 0

    def step() -> None:
        nonlocal turn
        pair.far.poll()
        relay.step()
        results.update((result.read_id, result) for result in pair.near.poll())
        for read_id, when in aborted:
            if when == turn and read_id < len(reads) and read_id not in results:
                assert channel.abort(read_id)
                gone.add(read_id)
                pair.ours.array[list({*into[read_id]})] = 0
        turn += 1

    wait_for(lambda: len(results) + len(gone) >= len(reads) and turn > 30, step=step)
    assert not gone & results.keys()
    channel.start_read(99, [7], [NUM_BLOCKS - 1])
    wait_for(lambda: 99 in results, step=step)
    assert pair.is_right(results[99], [7], [NUM_BLOCKS - 1]), "what follows an aborted read is whole"
    for read_id, locations in enumerate(reads):
        if read_id in gone:
            assert not pair.ours.array[into[read_id]].any(), "an aborted read writes nothing any more"
        elif NUM_BLOCKS in locations:
            assert results[read_id].error == f"location {NUM_BLOCKS} is not in an arena of {NUM_BLOCKS} blocks"
            assert not pair.ours.array[into[read_id]].any()
        else:
            last = dict(zip(into[read_id], locations, strict=True))
            checksums = results[read_id].checksums
            assert checksums is not None
            assert checksums.tolist() == [xxhash.xxh3_64_intdigest(pair.theirs.array[i].data) for i in locations]
            assert np.array_equal(pair.ours.array[list(last)], pair.theirs.array[list(last.values())])
    relay.close()
    pair.close()


@pytest.mark.parametrize("with_native", [True, False])
def test_scattered_blocks_of_a_real_size_arrive_whole(with_native: bool) -> None:
    pair = Pair(368_640, 64, with_native=with_native)
    channel = pair.near.connect(pair.source)
    rng = np.random.default_rng(3)
    reads = {i: (rng.integers(0, 64, 20).tolist(), list(range(20 * i, 20 * i + 20))) for i in range(3)}
    for read_id, (locations, block_ids) in reads.items():
        channel.start_read(read_id, locations, block_ids)
    for result in pair.drive(3):
        assert pair.is_right(result, *reads[result.read_id])
    pair.close()


def test_more_reads_than_may_be_asked_for_at_once_all_end() -> None:
    pair = Pair(8, NUM_BLOCKS)
    channel = pair.near.connect(pair.source)
    for i in range(3 * MAX_REQUESTS):
        channel.start_read(i, [i % NUM_BLOCKS], [i % NUM_BLOCKS])
    assert {result.read_id for result in pair.drive(3 * MAX_REQUESTS)} == set(range(3 * MAX_REQUESTS))
    many = [i % NUM_BLOCKS for i in range(MAX_LOCATIONS)]
    channel.start_read(1, many, many)
    channel.start_read(2, many[:40_000], many[:40_000])
    channel.start_read(3, many[:40_000], many[:40_000])
    channel.start_read(4, [*many, 0], [*many, 0])
    by_id = {result.read_id: result for result in pair.drive(4)}
    assert [pair.is_right(by_id[i], many[:n], many[:n]) for i, n in ((1, MAX_LOCATIONS), (2, 40_000), (3, 40_000))]
    assert all(by_id[i].error == "" for i in (1, 2, 3))
    assert by_id[4].error == f"a read of {MAX_LOCATIONS + 1} blocks, the limit is {MAX_LOCATIONS}"
    assert not channel.closed_because
    pair.close()


@pytest.mark.parametrize(
    ("num", "ask_ahead_bytes", "asked_at_once"),
    [(1, 10**9, MAX_REQUESTS), (1, 10 * 8, 10), (MAX_LOCATIONS // 3, 10**9, 3), (MAX_LOCATIONS, 1, 1)],
    ids=["requests", "bytes", "locations", "one at least"],
)
def test_a_channel_asks_ahead_as_far_as_it_may(
    monkeypatch: pytest.MonkeyPatch, num: int, ask_ahead_bytes: int, asked_at_once: int
) -> None:
    monkeypatch.setattr(tcp_channel, "ASK_AHEAD_BYTES", ask_ahead_bytes)
    pair = Pair(8)
    with socket.create_server(("127.0.0.1", 0)) as liar:
        channel = pair.near.connect(source_at(f"tcp://127.0.0.1:{liar.getsockname()[1]}/" + "0" * 32))
        for i in range(asked_at_once + 2):
            channel.start_read(i, [0] * num, [0] * num)
        connection, _ = liar.accept()
        with connection:
            connection.sendall(Welcome(EPOCH, NUM_BLOCKS, 8).pack())
            request = len(pack_request(0, np.zeros(num, dtype=np.uint64)))
            asked = len(hello_to(pair.far)) + asked_at_once * request
            assert len(hears(connection, pair.near, asked)) == asked
            pair.near.poll()
            with pytest.raises(BlockingIOError):
                connection.recv(1)
            connection.setblocking(True)
            connection.sendall(Answer(0, OK, num).pack() + bytes(8 * num))
            assert len(hears(connection, pair.near, request)) == request
            with pytest.raises(BlockingIOError):
                connection.recv(1)
    pair.close()


@pytest.mark.parametrize("location", [-1, 2**64])
def test_a_location_that_can_not_be_written_down_fails_its_read_alone(pair: Pair, location: int) -> None:
    channel = pair.near.connect(pair.source)
    channel.start_read(1, [0, location], [0, 1])
    channel.start_read(2, [0], [2])
    assert {result.read_id: bool(result.error) for result in pair.drive(2)} == {1: True, 2: False}


def test_blocks_outside_our_own_arena_are_never_read_into(pair: Pair) -> None:
    channel = pair.near.connect(pair.source)
    for block_id in (-1, NUM_BLOCKS):
        with pytest.raises(IndexError):
            channel.start_read(1, [0], [block_id])


def test_a_poll_moves_a_bounded_number_of_bytes_and_a_small_read_does_not_wait_for_a_large_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp, "POLL_BYTES", 64 * 1024)
    pair = Pair(64 * 1024, 64)
    large, small = pair.near.connect(pair.source), pair.near.connect(pair.source)
    large.start_read(1, range(63), range(63))
    wait_for(lambda: pair.ours.array[0].any(), step=lambda: (pair.far.poll(), pair.near.poll()))
    small.start_read(2, [63], [63])
    written = int(pair.ours.array[:63].any(axis=1).sum())
    order: list[int] = []
    while len(order) < 2:
        pair.far.poll()
        order += [result.read_id for result in pair.near.poll()]
        now_written = int(pair.ours.array[:63].any(axis=1).sum())
        assert now_written - written <= 2
        written = now_written
    assert order == [2, 1]
    pair.close()


# --- peers that break the protocol, or don't go on ----------------------------------------------------------------------


@settings(max_examples=80)
@given(
    let_in=st.booleans(),
    said=st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.builds(
                lambda serial, num, body: struct.pack(">QI", serial, num) + body,
                st.integers(0, 3), st.sampled_from([0, 1, 2, 70_000, 2**32 - 1]), st.binary(max_size=32),
            ),
        ),
        max_size=6,
    ),
)  # fmt: skip
def test_garbage_from_a_reader_never_leaves_poll_and_hurts_nobody_else(let_in: bool, said: list[bytes]) -> None:
    pair = Pair(64)
    channel = pair.near.connect(pair.source)
    with stranger(pair.far, *([hello_to(pair.far, slab_bytes=64)] if let_in else []), *said):
        for i in range(3):
            channel.start_read(i, [i], [i])
            assert pair.is_right(pair.drive(1)[0], [i], [i])
    pair.close()


@settings(max_examples=80)
@given(
    said=st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.just(Welcome(EPOCH, NUM_BLOCKS, 64).pack()),
            st.builds(
                lambda *fields: Answer(*fields).pack(),
                st.integers(0, 2), st.integers(0, 3), st.sampled_from([0, 1, 2, 2**32 - 1]), st.integers(0, 2**64 - 1),
            ),
        ),
        max_size=6,
    )
)  # fmt: skip
def test_garbage_from_a_source_never_leaves_poll_and_ends_every_read_at_most_once(said: list[bytes]) -> None:
    pair = Pair(64)
    with socket.create_server(("127.0.0.1", 0)) as liar:
        channel = pair.near.connect(source_at(f"tcp://127.0.0.1:{liar.getsockname()[1]}/" + "0" * 32))
        channel.start_read(0, [0], [0])
        channel.start_read(1, [1, 2], [1, 2])
        connection, _ = liar.accept()
        connection.sendall(Welcome(EPOCH, NUM_BLOCKS, 64).pack())
        for data in said:
            connection.sendall(data)
        connection.close()
        results: list[ReadResult] = []
        wait_for(lambda: channel.closed_because, step=lambda: results.extend(pair.near.poll()))
        results += pair.near.poll()
        assert sorted(result.read_id for result in results) == [0, 1]
    assert not pair.ours.array[3:].any()
    pair.close()


@pytest.mark.parametrize(
    ("said", "because"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 9, "magic b'HTTP' version 12081, ours is b'TKVT' version 1"),
        (Welcome(EPOCH, NUM_BLOCKS, SLAB).pack()[:-1], "the peer closed the connection on our hello"),
        (Welcome(OTHER_EPOCH, NUM_BLOCKS, SLAB).pack(), f"epoch {OTHER_EPOCH.hex()}, expected {EPOCH.hex()}"),
        (Welcome(EPOCH, NUM_BLOCKS, SLAB + 1).pack(), "slabs of 4097 bytes, ours have 4096"),
        (Welcome(EPOCH, 9, SLAB).pack() + Answer(1, OK, 2).pack(), "an answer to request 1, expected 0 of 1"),
        (Welcome(EPOCH, 9, SLAB).pack() + Answer(0, OK, 3).pack(), "status 0 with 3 blocks, expected 2"),
        (Welcome(EPOCH, 9, SLAB).pack() + Answer(0, 7, 2).pack(), "status 7 with 2 blocks, expected 2"),
        (Welcome(EPOCH, 9, SLAB).pack() + Answer(0, OUTSIDE, 0, 1).pack() * 2, "an answer to request 0, expected 1"),
        (Welcome(EPOCH, 9, SLAB).pack() + Answer(0, OK, 2).pack() + b"x" * SLAB, "the peer is gone"),
    ],
)
def test_a_source_that_breaks_the_protocol_closes_its_channel_with_what_was_wrong(
    pair: Pair, said: bytes, because: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as liar:
        channel = pair.near.connect(source_at(f"tcp://127.0.0.1:{liar.getsockname()[1]}/" + "0" * 32))
        channel.start_read(1, [0, 1], [0, 1])
        connection, _ = liar.accept()
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: channel.closed_because, step=pair.near.poll)
        assert because in channel.closed_because
        connection.close()


@pytest.mark.parametrize(
    "said",
    [
        pack_request(1, np.zeros(1, dtype=np.uint64)),
        struct.pack(">QI", 0, MAX_LOCATIONS + 1),
        b"".join(pack_request(i, np.full(40_000, i, dtype=np.uint64)) for i in range(2)),
        b"".join(pack_request(i, np.zeros(1, dtype=np.uint64)) for i in range(MAX_REQUESTS + 1)),
    ],
    ids=["serial", "too large", "too many locations", "too many requests"],
)
def test_a_reader_that_asks_for_more_than_it_may_is_closed(said: bytes) -> None:
    pair = Pair(SLAB * 1024)
    with stranger(pair.far, hello_to(pair.far, slab_bytes=SLAB * 1024), said):
        wait_for(lambda: pair.far.num_readers == 1, step=pair.far.poll)
        wait_for(lambda: pair.far.num_readers == 0, step=pair.far.poll)
    pair.close()


def test_a_reader_that_does_not_take_its_answers_costs_no_time_and_holds_nobody_up() -> None:
    pair = Pair(1024 * 1024)
    asked = b"".join(pack_request(i, np.arange(NUM_BLOCKS, dtype=np.uint64)) for i in range(MAX_REQUESTS))
    with stranger(pair.far, hello_to(pair.far, slab_bytes=1024 * 1024), asked):
        wait_for(lambda: pair.far.num_readers == 1, step=pair.far.poll)

        def idle() -> bool:
            pair.far.poll()
            return not pair.far.busy and not select.select([pair.far.fileno()], [], [], 0.05)[0]

        wait_for(idle)
        channel = pair.near.connect(pair.source)
        channel.start_read(1, [5], [6])
        assert pair.is_right(pair.drive(1)[0], [5], [6])
    wait_for(lambda: pair.far.num_readers == 1, step=pair.far.poll)
    pair.close()


# --- peers that die or freeze -------------------------------------------------------------------------------------------


@pytest.fixture
def process() -> Iterator[TransportProcess]:
    with TransportProcess("tcp", 40, 1024 * 1024) as process:
        yield process


@pytest.fixture
def sink() -> Iterator[tuple[Arena, TcpTransport]]:
    arena = Arena(40, 1024 * 1024)
    transport = TcpTransport(arena, SINK_EPOCH, "127.0.0.1", native())
    yield arena, transport
    transport.close()
    arena.close()


def read_a_bit(process: TransportProcess, arena: Arena, transport: TcpTransport) -> TcpChannel:
    """A channel in the middle of a read of 40 MiB, and with another one to come."""
    channel = transport.connect(process.source)
    channel.start_read(1, [0], [0])
    results: list[ReadResult] = []
    wait_for(lambda: results, step=lambda: results.extend(transport.poll()))
    assert results[0].error == ""
    arena.array[0] = 0
    channel.start_read(2, range(40), range(40))
    channel.start_read(3, range(40), range(40))
    wait_for(lambda: arena.array[0].any(), step=lambda: results.extend(transport.poll()) if len(results) < 2 else None)
    assert len(results) == 1
    return channel


def test_a_source_that_is_killed_closes_the_channel_and_ends_every_read(
    process: TransportProcess, sink: tuple[Arena, TcpTransport]
) -> None:
    arena, transport = sink
    channel = read_a_bit(process, arena, transport)
    process.popen.send_signal(signal.SIGKILL)
    assert process.popen.wait(10) == -signal.SIGKILL
    results: list[ReadResult] = []
    wait_for(lambda: channel.closed_because, step=lambda: results.extend(transport.poll()))
    assert [(result.read_id, result.checksums) for result in results] == [(2, None), (3, None)]
    assert all(result.error == channel.closed_because for result in results)
    with pytest.raises(TransportError, match="refused"):
        transport.connect(process.source)


def test_a_source_that_is_stopped_lets_reads_wait_be_aborted_and_the_channel_close(
    process: TransportProcess, sink: tuple[Arena, TcpTransport]
) -> None:
    arena, transport = sink
    channel = read_a_bit(process, arena, transport)
    other = transport.connect(process.source)
    process.stop()

    def dry() -> bool:
        assert transport.poll() == []
        return not transport.busy and not select.select([transport.fileno()], [], [], 0.05)[0]

    wait_for(dry)
    assert channel.abort(2) is True
    arena.array[:] = 0
    late = transport.connect(process.source)  # the kernel takes the connection, nobody welcomes it
    late.start_read(4, [1], [1])
    assert not select.select([], [], [], 0.05)[0]
    assert transport.poll() == []
    assert late.closed_because == ""
    late.close()
    assert [(result.read_id, result.error) for result in transport.poll()] == [(4, "closed by us")]
    process.go_on()
    results: list[ReadResult] = []
    wait_for(lambda: results, step=lambda: results.extend(transport.poll()))
    assert [(result.read_id, result.error) for result in results] == [(3, "")]
    assert np.array_equal(arena.array, bytes_served(40, 1024 * 1024)), (
        "the aborted read's bytes went elsewhere, and the next one is whole"
    )
    assert other.closed_because == ""


# --- TLS ---------------------------------------------------------------------------------------------------------------


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsFiles]:
    """For each of two authorities a certificate that it signed."""
    folder = tmp_path_factory.mktemp("tls")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    found = {}
    for name in ("cluster", "foreign"):
        ca, own = folder / f"{name}-ca", folder / name
        openssl("req", "-x509", *key, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN={name}", "-days", "2")
        openssl("req", *key, "-keyout", f"{own}.key", "-out", f"{own}.csr", "-subj", "/CN=worker")
        openssl("x509", "-req", "-in", f"{own}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
                "-out", f"{own}.pem", "-days", "2")  # fmt: skip
        found[name] = TlsFiles(f"{own}.pem", f"{own}.key", f"{ca}.pem")
    return found


def test_over_tls_the_right_bytes_arrive_and_no_wakeup_is_lost(certificates: dict[str, TlsFiles]) -> None:
    pair = Pair(100_003, 64, theirs_tls=certificates["cluster"], ours_tls=certificates["cluster"])
    assert pair.far.endpoint.startswith("tls://127.0.0.1:")
    channel = pair.near.connect(pair.source)
    reads = {i: (list(range(64))[:: i + 1], list(range(64))[:: i + 1]) for i in range(5)}
    for read_id, (locations, block_ids) in reads.items():
        channel.start_read(read_id, locations, block_ids)
    channel.start_read(9, [64], [0])
    for result in pair.drive(6):
        assert result.error if result.read_id == 9 else pair.is_right(result, *reads[result.read_id])
    channel.start_read(1, range(64), range(64))
    assert channel.abort(1)
    channel.start_read(2, [1], [3])
    assert pair.is_right(pair.drive(1)[0], [1], [3])
    pair.far.close()
    wait_for(lambda: channel.closed_because, step=pair.near.poll)
    pair.close()


@pytest.mark.parametrize("poll_bytes", [1, 1000, 20_000])
def test_over_tls_polls_of_any_size_go_on_where_the_last_one_stopped(
    certificates: dict[str, TlsFiles], monkeypatch: pytest.MonkeyPatch, poll_bytes: int
) -> None:
    monkeypatch.setattr(tcp, "POLL_BYTES", poll_bytes)
    pair = Pair(100_003, 4, theirs_tls=certificates["cluster"], ours_tls=certificates["cluster"])
    channel = pair.near.connect(pair.source)
    channel.start_read(1, [0, 1, 2, 3], [3, 2, 1, 0])
    assert pair.is_right(pair.drive(1)[0], [0, 1, 2, 3], [3, 2, 1, 0])
    pair.close()


def test_over_tls_a_refused_write_goes_on_in_a_poll_of_another_size(
    certificates: dict[str, TlsFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(4 * 1024 * 1024, 4, theirs_tls=certificates["cluster"], ours_tls=certificates["cluster"])
    channel = pair.near.connect(pair.source)
    channel.start_read(1, [0], [0])
    assert pair.is_right(pair.drive(1)[0], [0], [0])
    channel.start_read(2, [0, 1, 2, 3], [3, 2, 1, 0])
    assert pair.near.poll() == []
    wait_for(lambda: not pair.far.busy and not select.select([pair.far.fileno()], [], [], 0.05)[0], step=pair.far.poll)
    monkeypatch.setattr(tcp, "POLL_BYTES", 1000)
    assert pair.is_right(pair.drive(1)[0], [0, 1, 2, 3], [3, 2, 1, 0])
    pair.close()


@pytest.mark.parametrize(("theirs", "ours"), [("cluster", "foreign"), ("foreign", "cluster")])
def test_a_certificate_of_another_authority_is_refused(
    certificates: dict[str, TlsFiles], theirs: str, ours: str
) -> None:
    pair = Pair(theirs_tls=certificates[theirs], ours_tls=certificates[ours])
    channel = pair.near.connect(pair.source)
    channel.start_read(1, [0], [0])
    (result,) = pair.drive(1)
    assert "certificate" in result.error.lower()
    wait_for(lambda: pair.far.num_refused == 1, step=pair.far.poll)
    pair.close()


def test_each_side_asks_for_the_others_certificate(certificates: dict[str, TlsFiles]) -> None:
    files = certificates["cluster"]
    mixed = TlsFiles(certificates["foreign"].certificate, certificates["foreign"].key, files.authority)
    pair = Pair(theirs_tls=files, ours_tls=mixed)  # the sink trusts the source, but can't show what the source wants
    channel = pair.near.connect(pair.source)
    channel.start_read(1, [0], [0])
    (result,) = pair.drive(1)
    assert result.error
    assert (pair.far.num_readers, pair.far.num_refused) == (0, 1)
    pair.close()


class TlsStranger:
    """Somebody who speaks TLS to our port by himself."""

    def __init__(self, transport: TcpTransport, files: TlsFiles, *, shows: bool = True) -> None:
        self.transport = transport
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(files.authority)
        if shows:
            context.load_cert_chain(files.certificate, files.key)
        self.context = context

    def talk(self, said: bytes, num_bytes: int) -> bytes | None:
        """Says `said` in one record and returns so many bytes of what it hears; None if it was refused."""
        bare = socket.create_connection(address_of(self.transport))
        bare.setblocking(False)
        heard = bytearray()
        with self.context.wrap_socket(bare, do_handshake_on_connect=False) as client:
            to_do: list[Callable[[], object]] = [client.do_handshake, lambda: client.send(said)]

            def ended() -> bool:
                try:
                    while to_do:
                        to_do[0]()
                        del to_do[0]
                    data = client.recv(num_bytes - len(heard))
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    return False
                except OSError:
                    data = b""
                heard.extend(data)
                return not data or len(heard) == num_bytes

            wait_for(ended, step=self._poll_if_woken)
        return bytes(heard) or None

    def _poll_if_woken(self) -> None:
        if self.transport.busy or select.select([self.transport.fileno()], [], [], 0)[0]:
            self.transport.poll()


def test_who_shows_no_certificate_is_refused(certificates: dict[str, TlsFiles]) -> None:
    pair = Pair(theirs_tls=certificates["cluster"])
    assert TlsStranger(pair.far, certificates["cluster"], shows=False).talk(hello_to(pair.far), 1) is None
    assert (pair.far.num_readers, pair.far.num_refused) == (0, 1)
    pair.close()


def test_older_tls_is_refused(certificates: dict[str, TlsFiles]) -> None:
    pair = Pair(theirs_tls=certificates["cluster"])
    old = TlsStranger(pair.far, certificates["cluster"])
    old.context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert old.talk(hello_to(pair.far), 1) is None
    assert TlsStranger(pair.far, certificates["cluster"]).talk(hello_to(pair.far), 1) == b"T"
    pair.close()


def test_what_tls_has_taken_from_the_socket_already_is_not_forgotten(certificates: dict[str, TlsFiles]) -> None:
    pair = Pair(theirs_tls=certificates["cluster"])
    said = hello_to(pair.far) + pack_request(0, np.array([3], dtype=np.uint64))
    heard = Welcome(EPOCH, NUM_BLOCKS, SLAB).pack() + Answer(0, OK, 1).pack() + pair.theirs.slab(3).tobytes()
    assert TlsStranger(pair.far, certificates["cluster"]).talk(said, len(heard)) == heard
    pair.close()


def test_plain_and_tls_do_not_meet(certificates: dict[str, TlsFiles]) -> None:
    pair = Pair(theirs_tls=certificates["cluster"])
    with pytest.raises(TransportError, match="speaks tls, we speak tcp"):
        pair.near.connect(pair.source)
    channel = pair.near.connect(source_at(pair.far.endpoint.replace("tls", "tcp")))
    channel.start_read(1, [0], [0])
    assert pair.drive(1)[0].error
    assert (pair.far.num_readers, pair.far.num_refused) == (0, 1)
    pair.close()


@pytest.mark.parametrize("with_tls", [False, True])
def test_who_resets_the_connection_at_once_leaves_nothing_behind(
    certificates: dict[str, TlsFiles], with_tls: bool
) -> None:
    files = certificates["cluster"] if with_tls else None
    pair = Pair(theirs_tls=files, ours_tls=files)
    channel = pair.near.connect(pair.source)
    for i in range(5):
        gone = stranger(pair.far)
        if i % 2:
            pair.far.poll()
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
        channel.start_read(i, [i], [i])
        assert pair.is_right(pair.drive(1)[0], [i], [i])
    wait_for(lambda: not select.select([pair.far.fileno()], [], [], 0)[0], step=pair.far.poll)
    assert pair.far.num_readers == 1
    pair.close()


def test_tls_files_that_are_none_are_an_error_of_the_configuration(tmp_path: Path) -> None:
    arena = Arena(1, SLAB)
    missing = str(tmp_path / "missing.pem")
    with pytest.raises(ConfigError, match="missing.pem"):
        TcpTransport(arena, EPOCH, "127.0.0.1", None, tls=TlsFiles(missing, missing, missing))
    arena.close()
