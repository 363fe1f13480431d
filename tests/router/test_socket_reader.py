"""Everything that comes is handed on, in order and in bursts, until the reader is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest
import zmq

from router.socket_reader import BURST, SocketReader

Socket = zmq.Socket[bytes]
LIMIT_S = 10.0


@pytest.fixture
def pair() -> Iterator[tuple[Socket, Socket]]:
    context: zmq.Context[Socket] = zmq.Context()
    near, far = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    for socket in (near, far):
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
    port = near.bind_to_random_port("tcp://127.0.0.1")
    far.connect(f"tcp://127.0.0.1:{port}")
    yield near, far
    near.close()
    far.close()
    context.term()


async def until(condition: asyncio.Event) -> None:
    async with asyncio.timeout(LIMIT_S):
        await condition.wait()


def test_messages_come_whole_and_in_order_and_others_get_their_turn(pair: tuple[Socket, Socket]) -> None:
    near, far = pair
    num = 10 * BURST
    heard: list[list[bytes]] = []
    turns: list[int] = []

    async def run() -> None:
        done = asyncio.Event()

        def take(frames: list[bytes]) -> None:
            heard.append(frames)
            if len(heard) == num:
                done.set()

        for number in range(num):
            far.send_multipart([b"%d" % number, b"second frame"])
        while near.poll(0) == 0:
            await asyncio.sleep(0)
        reader = SocketReader(near, take)

        async def other() -> None:
            while not done.is_set():
                turns.append(len(heard))
                await asyncio.sleep(0)

        waiting = asyncio.create_task(other())
        await until(done)
        await waiting
        reader.close()

    asyncio.run(run())
    assert heard == [[b"%d" % number, b"second frame"] for number in range(num)]
    assert max(later - earlier for earlier, later in pairwise(turns)) <= 2 * BURST


def test_what_comes_later_is_heard_too_and_nothing_after_the_end(pair: tuple[Socket, Socket]) -> None:
    near, far = pair
    heard: list[bytes] = []

    async def run() -> None:
        came = asyncio.Event()

        def take(frames: list[bytes]) -> None:
            heard.append(frames[0])
            came.set()

        reader = SocketReader(near, take)
        for number in range(20):
            far.send(b"%d" % number)
            await until(came)
            came.clear()
        reader.close()
        far.send(b"too late")
        while near.poll(0) == 0:
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert heard == [b"%d" % number for number in range(20)]


def test_a_socket_that_is_sent_on_too_loses_nothing(pair: tuple[Socket, Socket]) -> None:
    """Sending takes in libzmq's signals: without a look afterwards the answers would wait for the next one."""
    near, far = pair
    heard: list[bytes] = []
    num = 500

    async def run() -> None:
        done = asyncio.Event()

        def echo(frames: list[bytes]) -> None:
            far.send_multipart(frames)
            other.again()

        def take(frames: list[bytes]) -> None:
            heard.append(frames[0])
            if len(heard) == num:
                done.set()
                return
            near.send(b"%d" % len(heard))
            reader.again()

        reader, other = SocketReader(near, take), SocketReader(far, echo)
        near.send(b"0")
        reader.again()
        await until(done)
        reader.close()
        other.close()

    asyncio.run(run())
    assert heard == [b"%d" % number for number in range(num)]


def test_a_handler_may_close_the_socket(pair: tuple[Socket, Socket]) -> None:
    near, far = pair
    heard: list[bytes] = []

    async def run() -> None:
        done = asyncio.Event()

        def take(frames: list[bytes]) -> None:
            heard.append(frames[0])
            reader.close()
            near.close()
            done.set()

        far.send(b"last")
        far.send(b"never heard")
        reader = SocketReader(near, take)
        await until(done)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert heard == [b"last"]
