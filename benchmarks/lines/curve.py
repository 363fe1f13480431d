"""What CURVE costs a control line: messages a second from one process to another, plain and with keys, in turns.

    python benchmarks/lines/curve.py [--rounds 5] [--seconds 1] [--bytes 200]

One process sends acknowledgements' worth of bytes over a DEALER as fast as it can; the other receives on a ROUTER, as the router
does: with keys it also learns who sent each message. Prints a line a round and the medians.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import zmq

from tandem.curve import Keyring, load_keyring, make_keys
from tandem.zap import Zap
from tandem.zmq_io import bounded_socket, identity, receive_signed


def _send(port: int, folder: str, num_bytes: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = bounded_socket(context, zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity("decode-0", bytes(8)))
    if (keys := load_keyring(folder, "decode-0", "decode")) is not None:
        keys.dial_router(socket)
    socket.connect(f"tcp://127.0.0.1:{port}")
    data = bytes(num_bytes)
    while True:
        socket.send(data)


def _received(socket: zmq.Socket[bytes], keys: Keyring | None, seconds: float) -> float:
    """Messages a second."""
    end_s, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end_s:
        try:
            for _ in range(1000):
                if keys is None:
                    socket.recv_multipart(zmq.NOBLOCK)
                else:
                    assert keys.allowed.speaker(receive_signed(socket)[0].decode(), "decode-0") is not None
                count += 1
        except zmq.Again:
            socket.poll(1)
    return count / seconds


def measured(folder: str, seconds: float, num_bytes: int) -> float:
    """Messages a second of one line; plain if there is no `folder`."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    keys = load_keyring(folder, "router", "router")
    zap = Zap(context, keys.allowed) if keys is not None else None
    socket = bounded_socket(context, zmq.ROUTER)
    if keys is not None:
        keys.guard(socket, "control")
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    sender = multiprocessing.get_context("spawn").Process(target=_send, args=(port, folder, num_bytes))
    sender.start()
    try:
        while not socket.poll(5):
            if zap is not None:
                zap.handle()
        return _received(socket, keys, seconds)
    finally:
        sender.kill()
        sender.join()
        context.destroy(linger=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--bytes", type=int, default=200)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_keys(Path(folder))
        plain, keyed = [], []
        for _ in range(asked.rounds):
            plain.append(measured("", asked.seconds, asked.bytes))
            keyed.append(measured(folder, asked.seconds, asked.bytes))
            print(f"plain {plain[-1]:9,.0f}/s   with keys {keyed[-1]:9,.0f}/s")
    print(
        f"median of {asked.bytes} bytes: plain {statistics.median(plain):,.0f}/s, with keys {statistics.median(keyed):,.0f}/s"
    )


if __name__ == "__main__":
    main()
