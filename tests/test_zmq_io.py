"""RouterLink against a real ROUTER socket: who says what when routers come, fall silent, restart and refuse."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from protos import control
from protos.control import (
    Abort,
    Capacity,
    Endpoints,
    Fence,
    FromRouter,
    Heartbeat,
    Hello,
    Load,
    Refused,
    ToRouter,
    Welcome,
)
from tandem.zmq_io import RouterLink, identity

FENCE = Fence("r", 0, "decode", 0)


class Side:
    """A link, the router it talks to, and a clock that the test turns."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.endpoint = f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}"
        self.now_s = 1000.0
        self.heard: list[FromRouter] = []
        self.refused: list[str] = []
        self.lost: list[int] = []
        self.name = identity("decode-0", b"e" * 8)
        self.link = RouterLink(
            self.context,
            [self.endpoint],
            identity=self.name,
            make_hello=lambda: Hello(1, "decode-0", "decode", b"e" * 8, 1, Endpoints("", "", ""), Capacity(), None),
            make_heartbeat=lambda router: Heartbeat(
                "decode-0", b"e" * 8, 1, 0.0, -1, Load(num_dispatches=router), control.Counters()
            ),
            on_message=lambda router, message: self.heard.append(message),
            on_refused=self.refused.append,
            on_lost=self.lost.append,
        )

    def close(self) -> None:
        self.link.close()
        self.router.close()
        self.context.term()

    def answer(self, message: FromRouter | bytes) -> None:
        self.router.send_multipart([self.name, message if isinstance(message, bytes) else control.encode(message)])

    def welcome(self, epoch: bytes = b"1" * 8, answers: int | None = None) -> None:
        self.answer(Welcome(1, "router", epoch, heartbeat_s=0.25, liveness_s=3.0, answers=answers))

    def step(self, seconds: float = 0.0) -> list[ToRouter]:
        """Turns the clock, lets the link act, and returns what reached the router within a moment."""
        self.now_s += seconds
        if self.link.sockets()[0].poll(50):
            self.link.handle(self.link.sockets()[0], self.now_s)
        self.link.tick(self.now_s)
        got = []
        while self.router.poll(50):
            got.append(control.decode_to_router(self.router.recv_multipart()[1]))
        return got

    def until(self, kind: type, seconds: float = 0.0) -> ToRouter:
        end = time.monotonic() + 5.0
        while time.monotonic() < end:
            for message in self.step(seconds):
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__}")


@pytest.fixture
def side() -> Iterator[Side]:
    made = Side()
    yield made
    made.close()


def wait(condition: Callable[[], object], side: Side) -> None:
    end = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < end
        side.step()


def test_what_a_router_says_before_it_has_heard_that_it_was_lost_is_not_taken_in(side: Side) -> None:
    hello = side.until(Hello)
    assert isinstance(hello, Hello)
    side.welcome(answers=hello.number)
    side.until(Heartbeat, 0.25)
    side.step(3.5)
    assert side.lost == [0]
    side.welcome(answers=hello.number)  # its heartbeat, on its way since before our new hello
    side.answer(Abort(FENCE))
    side.step()
    side.step()
    assert not side.link.welcomed
    assert side.heard == []
    again = side.until(Hello, 1.0)
    assert isinstance(again, Hello)
    assert again.number > hello.number
    side.welcome(answers=again.number)
    side.answer(Abort(FENCE))
    side.step()
    side.step()
    assert side.link.welcomed
    assert side.heard == [Abort(FENCE)]


def test_a_hello_is_repeated_until_the_welcome_and_heartbeats_follow(side: Side) -> None:
    assert isinstance(side.until(Hello), Hello)
    assert isinstance(side.until(Hello, seconds=1.1), Hello)
    assert not side.link.welcomed
    side.welcome()
    heartbeat = side.until(Heartbeat)
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.load.num_dispatches == 0
    assert side.link.welcomed
    assert side.step(0.1) == []
    assert [type(m) for m in side.step(0.2)] == [Heartbeat]


def test_a_silent_router_is_lost_once_and_greeted_anew(side: Side) -> None:
    side.until(Hello)
    side.welcome()
    side.until(Heartbeat)
    side.step(2.9)
    assert side.lost == []
    assert isinstance(side.until(Hello, seconds=0.2), Hello)
    side.step(5.0)
    assert side.lost == [0]


def test_a_new_epoch_of_a_router_is_a_loss_and_gets_a_hello_at_once(side: Side) -> None:
    side.until(Hello)
    side.welcome()
    side.until(Heartbeat)
    side.welcome(b"2" * 8)
    assert isinstance(side.until(Hello), Hello)
    assert side.lost == [0]
    side.welcome(b"2" * 8)
    side.until(Heartbeat, seconds=0.1)
    assert side.lost == [0]


def test_a_refusal_is_told_and_rubbish_is_counted_and_dropped(side: Side) -> None:
    side.until(Hello)
    side.answer(Refused("protocol version 7"))
    wait(lambda: side.refused, side)
    assert side.refused == ["protocol version 7"]
    side.welcome()
    side.answer(b"\xc1 rubbish")
    side.answer(Abort(FENCE, "x"))
    wait(lambda: side.heard, side)
    assert side.heard == [Abort(FENCE, "x")]
    assert side.link.num_undecodable == 1


def test_a_process_that_did_not_run_for_longer_than_its_liveness_finds_out_before_it_takes_anything_in(
    side: Side,
) -> None:
    side.step()
    assert side.link.silent_s(side.now_s + 100.0) == 0.0, "nobody knows it yet"
    side.welcome()
    side.step()
    side.step(2.0)
    assert side.link.silent_s(side.now_s + 3.0) == 0.0
    assert side.link.silent_s(side.now_s + 3.5) == 3.5
