"""Malformed and oversized input of many kinds to every port of a real cluster: it serves on, answers the same, and doesn't grow.

The cluster is one without keys: what is sent reaches the decoders. With keys, tests/system/test_curve.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import zmq

from kvpool.transport import tcp_frames
from protos import control, tandem_pb2
from protos.control import Capacity, Done, Endpoints, Fence, Fetch, Hello, Kept, Tokens
from tandem.drills.faults import resident_bytes
from tandem.drills.model import shallow
from tandem.zmq_io import identity
from tests.system.harness import RunningCluster, free_port, wait_until
from tests.system.test_handover import prompt_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NAMES = ("router", "pool-0", "prefill-0", "decode-0")
START_S = 300.0
ROUNDS = 3
MAX_GROWTH_BYTES = 16 * 2**20
"""Of a process, over `ROUNDS` rounds after a first one. A connection that left its input behind would add more in one."""
PATIENCE_S = 0.1
"""How long each visitor listens before it goes."""

EPOCH = b"intruder"
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01"
NULL = GREETING + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
CURVE = GREETING + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x29\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
H2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MiB = 2**20


def _noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def _reset(stream: int) -> bytes:
    """A request over HTTP/2 that is called off at once."""
    number = struct.pack(">I", stream)
    return b"\x00\x00\x01\x01\x04" + number + b"\x82" + b"\x00\x00\x04\x03\x00" + number + b"\x00\x00\x00\x08"


RAW: dict[str, bytes] = {
    "nothing": b"",
    "a zero": b"\0",
    "many zeros": bytes(64 * 1024),
    "many ones": b"\xff" * 64 * 1024,
    "noise": _noise(MiB),
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP with a huge header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * MiB,
    "HTTP with a million headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200_000,
    "HTTP with a path without end": b"GET /" + b"a" * MiB,
    "HTTP that promises too much": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4611686018427387904\r\n\r\n{",
    "HTTP with a negative length": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{}",
    "HTTP with chunks of nonsense": CHUNKED + b"ZZZZ\r\n" + b"x" * 9999,
    "HTTP, two lengths": CHUNKED.replace(b"Host: x", b"Content-Length: 3") + b"0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
    "HTTP/2 that says no more": H2,
    "HTTP/2 with a frame of 16 MB": H2 + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(MiB),
    "HTTP/2 settings without end": H2 + b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64" * 20_000,
    "HTTP/2 resets without end": H2 + b"".join(map(_reset, range(1, 10_001, 2))),
    "TLS": b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03" + _noise(20_000),
    "ZMTP that says no more": NULL,
    "ZMTP with a command of 2**63 bytes": NULL + b"\x06" + b"\x7f" + b"\xff" * 7 + bytes(1000),
    "ZMTP with a frame of 2**63 bytes": NULL + READY + b"\x02" + b"\x7f" + b"\xff" * 7 + bytes(MiB),
    "ZMTP with parts without end": NULL + READY + b"\x01\x01x" * 100_000,
    "ZMTP with keys that are noise": CURVE + b"\x04\xc8\x05HELLO\x01\x00" + _noise(193),
    "ZMTP of the future": b"\xff" + bytes(8) + b"\x7f\x7f\x00" + bytes(52),
    "a hello with the wrong secret": tcp_frames.Hello(b"s" * 16, EPOCH, 4096).pack(),
    "half a hello": tcp_frames.Hello(b"s" * 16, EPOCH, 4096).pack()[:9],
    "a hello and a request for all": tcp_frames.Hello(b"s" * 16, EPOCH, 4096).pack() + b"\x00" * 8 + b"\xff" * 4 + bytes(MiB),
    "a pickle": b"\x80\x04\x95" + b"cposix\nsystem\n(S'touch /tmp/tandem-was-here'\ntR." * 10,
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n" + _noise(2000),
    "commands of a database": b"*1\r\n$8\r\nFLUSHALL\r\n" * 5000,
}  # fmt: skip
"""What a TCP connection is sent. All of it to every port."""


def _endpoints() -> Endpoints:
    return Endpoints("tcp://127.0.0.1:9", "tcp://127.0.0.1:9", "tcp://127.0.0.1:9")


def _hello(process: str, version: int = 1) -> bytes:
    return control.encode(Hello(version, process, "decode", EPOCH, 1, _endpoints(), Capacity(num_blocks=9), None))


MESSAGES: dict[str, list[bytes]] = {
    "an empty frame": [b""],
    "noise": [_noise(1000)],
    "16 MiB of noise": [_noise(16 * MiB)],
    "17 MiB": [bytes(17 * MiB)],
    "a thousand frames": [b"x"] * 1000,
    "a pickle": [RAW["a pickle"]],
    "nested a million deep": [b"\x91" * MiB],
    "an array of 2**32": [b"\xdd\xff\xff\xff\xff"],
    "another version's hello": [_hello("x", 99)],
    "a hello of a router": [_hello("router").replace(b"decode", b"router")],
    "tokens of nobody": [control.encode(Tokens(Fence("r", 0, "decode", 1), 0, 0, [1]))],
    "a fetch of what is nowhere, again and again": [
        control.encode(Fetch(b"f" * 16, "r", [os.urandom(16) for _ in range(1000)], wait=True, deadline_s=1e9))
    ],
    "the end of a fetch that was none": [control.encode(Done(b"g" * 16, 7))],
    "blocks that somebody keeps": [control.encode(Kept([b"k" * 16] * 1000))],
    "events from before the beginning": [b"", b"\x80" + bytes(7)],
    "events from the far future": [b"", b"\x3f" + b"\xff" * 7],
}
"""What is said in whole messages, with an identity like ours, by whoever speaks ZeroMQ."""


class Ports:
    """What the cluster listens on."""

    def __init__(self, cluster: RunningCluster) -> None:
        router = cluster.config.router
        self.grpc = router.grpc_port
        self.http = [router.http_port, router.admin_port]
        listed = {status.name: status for status in cluster.client.cluster().processes}
        self.shm = [status.shm_endpoint for status in listed.values()]
        self.tcp = [self.grpc, router.control_port, *self.http]
        for status in listed.values():
            self.tcp += [
                connection.laddr.port
                for connection in psutil.Process(status.pid).net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
        self.zmq = [port for port in self.tcp if port not in (self.grpc, *self.http)]
        assert all(self.shm)
        assert len(self.tcp) == len(set(self.tcp)) == 4 + 3 * 4, "fetch, events, replay and tcp of three processes"


def visit(port: int, data: bytes) -> None:
    """Says it, listens for a moment, and leaves."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5.0) as connection:
        connection.settimeout(PATIENCE_S)
        connection.sendall(data)
        connection.recv(4096)


def say(context: zmq.Context[zmq.Socket[bytes]], port: int, frames: list[bytes]) -> None:
    with context.socket(zmq.DEALER) as line, contextlib.suppress(zmq.Again):  # who broke the connection takes no more
        line.linger = 0
        line.setsockopt(zmq.IDENTITY, identity("stranger", EPOCH))
        line.sndhwm = 0  # who doesn't speak ZeroMQ takes nothing, and holds us up no more than others
        line.connect(f"tcp://127.0.0.1:{port}")
        for _ in range(5):
            line.send_multipart(frames, zmq.NOBLOCK)
        line.poll(int(PATIENCE_S * 1000))


def call(port: int) -> Iterator[Callable[[], object]]:
    """What a gRPC client may do that none should."""
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)])
    identity_of = {"request_serializer": None, "response_deserializer": None}
    generate = channel.unary_stream("/tandem.v1.Tandem/Generate", **identity_of)
    huge = tandem_pb2.GenerateRequest(prompt="x" * (40 * MiB)).SerializeToString()
    yield lambda: list(generate(_noise(10_000), timeout=5))
    yield lambda: list(generate(huge, timeout=20))
    yield lambda: list(generate(b"", metadata=[("x", "y" * 100_000)], timeout=5))
    yield lambda: list(generate(b"", metadata=[("tandem-tenant", "t" * 5000)], timeout=5))
    yield lambda: list(channel.unary_stream("/tandem.v1.Nothing/At", **identity_of)(b"", timeout=5))
    yield lambda: channel.unary_unary("/tandem.v1.Tandem/Explain", **identity_of)(b"\x0a\xff\xff\xff\x7f", timeout=5)
    yield channel.close


def slowly(ports: Ports) -> list[socket.socket]:
    """Connections that say a little, and never more, as long as they are held."""
    begun = [b"", b"G", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{", H2, NULL, NULL[:11]]
    held = []
    for port in ports.tcp:
        for data in begun:
            held.append(socket.create_connection(("127.0.0.1", port), 60.0))
            held[-1].sendall(data)
    for endpoint in ports.shm:
        for _ in range(8):
            held.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            held[-1].connect("\0" + endpoint[1:])
            held[-1].sendall(b"an arena, please")
    return held


def attack(ports: Ports) -> None:
    """One round of everything."""
    held = slowly(ports)
    try:
        with ThreadPoolExecutor(8) as pool, zmq.Context[zmq.Socket[bytes]]() as context:
            visits = [pool.submit(visit, port, data) for data in RAW.values() for port in ports.tcp]
            visits += [pool.submit(say, context, port, frames) for frames in MESSAGES.values() for port in ports.zmq]
            for done in visits:
                done.result(240)
        for attempt in call(ports.grpc):
            with contextlib.suppress(grpc.RpcError):
                attempt()
        for connection in held:  # a byte more, now and then, is no more than that
            with contextlib.suppress(OSError):
                connection.sendall(b"x")
    finally:
        for connection in held:
            connection.close()


def test_hostile_input_of_every_kind_leaves_the_cluster_serving(tmp_path: Path) -> None:
    assert len(RAW) >= 24
    memory = 64 * MiB
    overrides = {
        "model": {"path": str(shallow("smollm2-135m", 2)), "name": "shallow"},
        # Who attacks computes on the same cores: how soon a router answers then is not what this is about.
        "router": {"http_port": free_port(), "liveness_s": 60},
        "prefill": {"arena_bytes": memory},
        "decode": {"arena_bytes": memory},
        "pool": {"host_bytes": memory},
    }
    cluster = RunningCluster(tmp_path, overrides, faults=[])
    mark = Path("/tmp/tandem-was-here")
    assert not mark.exists()
    try:
        cluster.launch(NAMES)
        cluster.wait_ready(NAMES, START_S)
        prompt = prompt_of(300, 5)

        def answer() -> list[int]:
            return cluster.generate(prompt, max_tokens=12).tokens[0]

        def sizes() -> dict[str, int]:
            return {name: resident_bytes(process.pid) for name, process in cluster.processes.items()}

        truth = answer()
        pids = {name: process.pid for name, process in cluster.processes.items()}
        ports = Ports(cluster)
        attack(ports)
        assert answer() == truth
        before = sizes()
        for _ in range(ROUNDS):
            attack(ports)
            assert answer() == truth, "the same request has the same answer"
        began_s = time.monotonic()
        wait_until(lambda: cluster.client.audit().ok, 60, "the router believes what its processes report")
        more = {name: num_bytes - before[name] for name, num_bytes in sizes().items()}
        print(f"growth over {ROUNDS} rounds: {more}; audit after {time.monotonic() - began_s:.1f} s")
        assert max(more.values()) < MAX_GROWTH_BYTES, more
        assert all(process.poll() is None for process in cluster.processes.values())
        listed = {status.name: status.pid for status in cluster.client.cluster().processes}
        assert listed == {name: pid for name, pid in pids.items() if name != "router"}, "nobody died, nobody joined"
        assert not mark.exists(), "a pickle was unpickled"
    finally:
        codes = cluster.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{cluster.logs()}"
