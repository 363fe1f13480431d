"""Lines that can be hurt: each state, each direction, between real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import zmq

from tandem.clock import now_s
from tandem.drills.processes import wait_until
from tandem.drills.proxy import EventRelay, Line, Proxy


class Echo:
    """Answers each byte with itself."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.heard = bytearray()
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while data := connection.recv(65536):
                self.heard += data
                connection.sendall(data)
        except OSError:
            pass  # as some of these tests want it
        connection.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            connection.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.close()


@pytest.fixture
def dialled(line: Line, echo: Echo) -> Iterator[socket.socket]:
    proxy = Proxy(line, "127.0.0.1", 0, echo.address)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection:
        connection.sendall(b"hello")
        assert received(connection, 5) == b"hello"
        yield connection


def received(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (piece := connection.recv(num_bytes - len(data))):
        data += piece
    return data


def is_refused(port: int) -> bool:
    """Whether a new connection is reset: while it is dialled, if the proxy is quick."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as again:
            again.recv(1)
    except ConnectionResetError:
        return True
    return False


def test_bytes_pass_both_ways_and_an_end_is_passed_on(line: Line, dialled: socket.socket) -> None:
    data = bytes(range(256)) * 4000
    threading.Thread(target=dialled.sendall, args=(data,), daemon=True).start()
    assert received(dialled, len(data)) == data
    dialled.shutdown(socket.SHUT_WR)
    assert dialled.recv(1) == b""
    assert line.num_bytes >= 2 * len(data)


def test_a_cut_line_ends_what_is_connected_and_refuses_what_comes(line: Line, dialled: socket.socket) -> None:
    line.set("cut")
    assert dialled.recv(1) == b""
    assert is_refused(line.proxies[0].port)
    assert line.num_ended == 2
    line.set("open")
    with socket.create_connection(("127.0.0.1", line.proxies[0].port), timeout=5) as again:
        again.sendall(b"x")
        assert again.recv(1) == b"x"


def test_a_reset_is_a_reset(line: Line, dialled: socket.socket) -> None:
    line.set("reset")
    with pytest.raises(ConnectionResetError):
        dialled.recv(1)


def test_a_blackhole_holds_everything_and_lets_it_go_unchanged(line: Line, dialled: socket.socket, echo: Echo) -> None:
    line.set("blackhole")
    dialled.sendall(b"abc")
    wait_until(lambda: line.num_held > 0, 5, "the proxy holds something")
    assert echo.heard == b"hello"
    line.set("open")
    assert received(dialled, 3) == b"abc"


def test_one_direction_alone_is_hurt(line: Line, dialled: socket.socket, echo: Echo) -> None:
    line.set("blackhole", "dialler")
    dialled.sendall(b"abc")
    wait_until(lambda: echo.heard == b"helloabc", 5, "what goes to the listener passes")
    wait_until(lambda: line.num_held > 0, 5, "its answer is held")
    line.set("open")
    assert received(dialled, 3) == b"abc"


def test_a_slow_line_takes_as_long_as_it_says(line: Line, dialled: socket.socket) -> None:
    line.set("slow", "dialler", bytes_per_s=100_000)
    began_s = now_s()
    data = bytes(40_000)
    dialled.sendall(data)
    assert received(dialled, len(data)) == data
    assert now_s() - began_s > 0.3
    assert line.num_held > 0


def test_a_connection_that_is_held_ends_with_its_line(line: Line, dialled: socket.socket) -> None:
    line.set("blackhole")
    dialled.sendall(b"abc")
    wait_until(lambda: line.num_held > 0, 5, "the proxy holds something")
    line.set("cut")
    assert dialled.recv(1) == b""


def test_a_relay_passes_drops_and_swaps_events() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher, follower = context.socket(zmq.PUB), context.socket(zmq.SUB)
    source = f"tcp://127.0.0.1:{publisher.bind_to_random_port('tcp://127.0.0.1')}"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    relay = EventRelay(source, endpoint)
    try:
        follower.subscribe(b"")
        follower.connect(endpoint)

        def passes() -> bool:
            publisher.send(b"probe")
            return bool(follower.poll(20))

        wait_until(passes, 5, "events pass")
        publisher.send(b"begin")
        while follower.recv() != b"begin":
            pass  # what is left of the probes
        relay.drop, relay.swap = 4, 3
        sent = [b"%d" % number for number in range(24)]
        for one in sent:
            publisher.send(one)
        publisher.send(b"end")
        publisher.send(b"end")
        got: list[bytes] = []
        while follower.poll(500):
            got.append(follower.recv())
        assert got != sent
        kept = [int(one) for one in got if one != b"end"]
        assert relay.num_dropped >= 6
        assert 24 - relay.num_dropped - 1 <= len(kept) <= 24 - relay.num_dropped + 1
        assert relay.num_swapped > 0
        assert kept != sorted(kept)
    finally:
        relay.close()
        context.destroy(linger=0)
