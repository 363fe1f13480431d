"""The control plane's event replays and its handlers, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from protos import kv_events
from protos.control import Capacity, Endpoints, Goodbye, Hello, Refused, decode_from_router, encode
from protos.kv_events import BlockStored, EventBatch
from router import control_plane
from router.actions import Replay
from router.control_plane import ControlPlane, Handlers
from tandem.curve import load_keyring, make_keys
from tandem.zmq_io import bounded_socket, identity

EPOCH = b"1" * 8
BATCH = kv_events.encode_batch(EventBatch(0.0, [BlockStored([b"k" * 16], None, [], 4)], epoch=EPOCH))


@dataclass
class Heard:
    """What the control plane said, in order."""

    ends: list[bool] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)

    def handlers(self) -> Handlers:
        return Handlers(
            on_message=lambda *_: None,
            on_closed=lambda *_: None,
            on_events=lambda *_: None,
            on_replayed=lambda _, __, seq, ___: self.replayed.append(seq),
            on_replay_end=lambda _, __, complete: self.ends.append(complete),
        )


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        await asyncio.sleep(0.005)


def test_a_replay_that_a_newer_one_replaces_says_no_end() -> None:
    async def story() -> None:
        heard = Heard()
        control = ControlPlane("127.0.0.1", 0, heard.handlers())
        context = zmq.asyncio.Context()
        source: Any = context.socket(zmq.ROUTER)
        try:
            port = source.bind_to_random_port("tcp://127.0.0.1")
            endpoints = Endpoints("", "", f"tcp://127.0.0.1:{port}")
            control.replay(Replay("a", EPOCH, endpoints, 0))
            first, *_ = await source.recv_multipart()
            await source.send_multipart([first, b"", kv_events.encode_seq(0), BATCH])
            await until(lambda: heard.replayed == [0])

            control.replay(Replay("a", EPOCH, endpoints, 1))
            second, _, seq = await source.recv_multipart()
            assert kv_events.decode_seq(seq) == 1
            assert heard.ends == [], "the first replay was cancelled, the second runs"
            await source.send_multipart([second, b"", kv_events.encode_seq(1), BATCH])
            await source.send_multipart([second, b"", kv_events.END_OF_REPLAY, b""])
            await until(lambda: bool(heard.ends))
            assert heard.replayed == [0, 1]
            assert heard.ends == [True]
        finally:
            source.close(linger=0)
            await control.close()
            context.term()
        assert heard.ends == [True]

    asyncio.run(story())


def test_a_replay_that_falls_silent_is_said_to_be_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_plane, "REPLAY_TIMEOUT_S", 0.05)

    async def story() -> None:
        heard = Heard()
        control = ControlPlane("127.0.0.1", 0, heard.handlers())
        try:
            control.replay(Replay("a", EPOCH, Endpoints("", "", "tcp://127.0.0.1:9"), 0))
            await until(lambda: heard.ends == [False])
        finally:
            await control.close()

    asyncio.run(story())


def test_what_is_sent_in_one_turn_arrives_in_order_and_an_unreachable_process_is_reported_closed() -> None:
    async def story() -> None:
        closed: list[str] = []
        came: list[str] = []
        handlers = replace(
            Heard().handlers(),
            on_closed=lambda process, _: closed.append(process),
            on_message=lambda process, *_: came.append(process),
        )
        control = ControlPlane("127.0.0.1", 0, handlers)
        port = control.bind()
        control.listen()
        context = zmq.asyncio.Context()
        worker: Any = context.socket(zmq.DEALER)
        worker.setsockopt(zmq.IDENTITY, identity("a", EPOCH))
        try:
            worker.connect(f"tcp://127.0.0.1:{port}")
            await worker.send(encode(Goodbye("a", EPOCH)))
            await until(lambda: came == ["a"])
            for number in range(100):
                control.send("a", EPOCH, Refused(reason=str(number)))
                if number == 50:
                    control.send("nobody", EPOCH, Refused(reason=""))
            assert closed == [], "nothing is reported from within a send"
            async with asyncio.timeout(10.0):
                got = [decode_from_router(await worker.recv()) for _ in range(100)]
            assert got == [Refused(reason=str(number)) for number in range(100)]
            assert closed == ["nobody"]

            control.send("a", EPOCH, Refused(reason="last words"))
            await control.close()
            async with asyncio.timeout(10.0):
                assert decode_from_router(await worker.recv()) == Refused(reason="last words")
        finally:
            worker.close(linger=0)
            await control.close()
            context.term()

    asyncio.run(story())


# --- with keys ---------------------------------------------------------------------------------------------------------


def hello(process: str, role: str, key: str = "") -> Hello:
    endpoints = Endpoints("", "", "", key=key)
    return Hello(1, process, role, EPOCH, 1, endpoints, Capacity(), None)  # type: ignore[arg-type]


def test_each_is_heard_only_as_who_its_key_says_it_is(tmp_path: Path) -> None:
    make_keys(tmp_path)
    make_keys(tmp_path, ["decode-0"])

    async def story() -> None:
        heard: list[tuple[str, str]] = []
        handlers = replace(Heard().handlers(), on_message=lambda who, _, said: heard.append((who, type(said).__name__)))
        control = ControlPlane("127.0.0.1", 0, handlers, load_keyring(str(tmp_path), "router", "router"))
        port = control.bind()
        control.listen()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        lines: list[zmq.Socket[bytes]] = []

        def says(holder: str, process: str, *messages: Hello | Goodbye) -> None:
            keys = load_keyring(str(tmp_path), holder, holder.partition("-")[0])
            assert keys is not None
            line = bounded_socket(context, zmq.DEALER)
            lines.append(line)
            line.setsockopt(zmq.IDENTITY, identity(process, EPOCH))
            keys.dial_router(line)
            line.connect(f"tcp://127.0.0.1:{port}")
            for message in messages:
                line.send(encode(message))

        own = load_keyring(str(tmp_path), "decode-0", "decode")
        shared = load_keyring(str(tmp_path), "decode-1", "decode")
        assert own is not None
        assert shared is not None
        try:
            says("prefill-0", "decode-0", hello("decode-0", "decode"), Goodbye("decode-0", EPOCH))  # its key is another
            says("decode-0", "decode-1", hello("decode-1", "decode"))
            says("pool-0", "decode-3", hello("decode-3", "decode"))  # a pool node's key, a worker's role
            says("decode-1", "pool-0", hello("pool-0", "pool"))
            says("prefill-0", "router", hello("router", "router"))
            says("decode-1", "decode-2", hello("decode-2", "decode", own.public_key))  # would be dialled by another's
            await until(lambda: control.num_undecodable == 7)
            assert heard == []
            says("decode-0", "decode-0", hello("decode-0", "decode", own.public_key))
            says("decode-1", "prefill-1", hello("prefill-1", "prefill", shared.public_key))
            says("pool-0", "pool-0", hello("pool-0", "pool"))
            await until(lambda: len(heard) == 3)
            assert sorted(heard) == [("decode-0", "Hello"), ("pool-0", "Hello"), ("prefill-1", "Hello")]
            assert control.num_undecodable == 7
        finally:
            for line in lines:
                line.close()
            context.term()
            await control.close()

    asyncio.run(story())
