"""The router between fake workers and clients: what the fakes do, what is said of what was found, and a short run of it all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import zmq

from protos import control
from protos.control import (
    PROTOCOL_VERSION,
    Abort,
    Aborted,
    Ack,
    Dispatch,
    Failed,
    Fence,
    FirstTokens,
    Heartbeat,
    Hello,
    Resend,
    RoleReport,
    Sampling,
    Tokens,
    Welcome,
)
from tandem.bench.router.children import TICK_S, Answered, Heard, Pace, Tokenized, delays_s, sent_at
from tandem.bench.router.end_to_end import EndToEnd, Round, metrics
from tandem.bench.router.fake_workers import FakeWorker
from tandem.bench.router.texts import NUM_TEXTS, TEXT_BYTES, texts
from tandem.clock import now_s
from tandem.config import load_config
from tandem.errors import TandemError
from tandem.model_files import cached_path

LIMIT_S = 10.0
MODEL = cached_path("smollm2-135m")
"""Before the tests get a cache of their own: of it only the tokenizer is read."""


class Pair:
    """A fake decode worker, and the socket of the router that it talks to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.router = context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.worker = FakeWorker(context, "decode-0", self.router.bind_to_random_port("tcp://127.0.0.1"))
        self.worker.set_pace(Pace(3, 0.0), 0.0)
        hello = self.hear(Hello)
        self.say(Welcome(PROTOCOL_VERSION, "router", b"8 bytes.", 0.05, 5.0))
        assert (hello.process, hello.role) == ("decode-0", "decode")
        assert self.hear(Heartbeat).process == "decode-0"

    def say(self, message: Any) -> None:
        self.router.send_multipart([self._peer, control.encode(message)])

    def hear(self, kind: type[Any]) -> Any:
        """The next message that is no heartbeat; its own loop goes on meanwhile."""
        ends_s = now_s() + LIMIT_S
        while now_s() < ends_s:
            self.worker.tick(now_s())
            self.worker.link.handle(self.worker.socket, now_s())
            if self.router.poll(5):
                self._peer, data = self.router.recv_multipart()
                message = control.decode_to_router(data)
                if kind is Heartbeat or not isinstance(message, Heartbeat):
                    assert isinstance(message, kind), message
                    return message
        raise AssertionError(f"no {kind.__name__} for {LIMIT_S} s")


@pytest.fixture
def pair() -> Iterator[Pair]:
    context = zmq.Context[zmq.Socket[bytes]]()
    made = Pair(context)
    yield made
    made.worker.link.close()
    made.router.close()
    context.term()


def dispatch(fence: Fence, max_tokens: int, prefill_here: bool) -> Dispatch:
    return Dispatch(
        fence=fence, root=bytes(16), token_ids=bytes(8), num_prompt_tokens=2, sampling=Sampling(max_tokens=max_tokens), n=1,
        sources=[], deadline_s=10.0, prefill_here=prefill_here,
    )  # fmt: skip


def test_a_fake_worker_keeps_tokens_until_they_are_acknowledged_and_ends_a_stream(pair: Pair) -> None:
    fence = Fence("q", 0, "decode", 0)
    pair.say(dispatch(fence, 5, prefill_here=True))
    assert pair.hear(RoleReport).computed_tokens == 2
    first: Tokens = pair.hear(Tokens)
    assert (first.position, len(first.token_ids), first.finish_reason) == (0, 3, None)
    pair.say(Resend(fence=fence, index=0, position=0))
    assert pair.hear(Tokens) == first
    pair.say(Ack(fence=fence, index=0, position=3))
    last: Tokens = pair.hear(Tokens)
    assert (last.position, len(last.token_ids), last.finish_reason) == (3, 2, "length")
    pair.say(Ack(fence=fence, index=0, position=5, final=True))
    pair.say(Resend(fence=fence, index=0, position=0))
    assert pair.hear(Failed).code == "worker_lost", "it holds nothing of a stream whose end is acknowledged"


def test_a_fake_worker_goes_on_after_first_tokens_and_drops_what_is_aborted(pair: Pair) -> None:
    fence = Fence("q", 0, "decode", 0)
    pair.say(dispatch(fence, 1000, prefill_here=False))
    pair.say(FirstTokens(fence=fence, token_ids=[7]))
    pair.hear(RoleReport)
    assert pair.hear(Tokens).position == 1
    pair.say(FirstTokens(fence=fence, token_ids=[7]))  # which may be sent twice
    pair.say(Abort(fence=fence))
    assert pair.hear(Aborted).fence == fence
    pair.say(Resend(fence=fence, index=0, position=0))
    assert pair.hear(Failed).code == "worker_lost"


def test_a_fake_worker_steps_at_its_pace(pair: Pair) -> None:
    pair.worker.set_pace(Pace(4, 0.02), now_s() + 0.02)
    pair.say(dispatch(Fence("q", 0, "decode", 0), 1000, prefill_here=True))
    pair.hear(RoleReport)
    assert pair.hear(Tokens).position == 0
    began_s = now_s()
    assert [pair.hear(Tokens).position for _ in range(5)] == [4, 8, 12, 16, 20]
    assert now_s() - began_s >= 0.07, "no frame waits for an acknowledgement, each for its step"


def test_a_token_tells_when_it_was_sent() -> None:
    times_s = np.array([0.0, 1.0, 123_456.7])
    ids = np.array([sent_at(time_s, 32_000) for time_s in times_s])
    assert ids.max() < 32_000
    assert delays_s(ids, times_s + 0.025, 32_000) == pytest.approx(0.025, abs=2 * TICK_S)


def test_texts_are_of_one_size_and_share_no_beginning() -> None:
    made = texts(3)
    assert len(made) == NUM_TEXTS
    assert {len(text.encode()) for text in made} == {TEXT_BYTES}
    assert all(one[:8] != other[:8] for one, other in combinations(made, 2))
    assert made == texts(3)
    assert made != texts(4)


GOOD = Round(
    tokenized=Tokenized(1000.0, 0.001),
    many=Answered(450.0, 0.02, 900, []),
    many_use=0.7,
    alone=Answered(400.0, 0.0024, 400, []),
    most=Heard(50_001.0, 0.1, 0.2, 8.0, []),
    most_use=1.0,
    single=Heard(20_000.0, 0.1, 0.2, 2.0, []),
    single_use=1.0,
    steady=Heard(49_999.0, 0.025, 0.08, 8.0, []),
    steady_use=0.5,
)


def failed(found: Round) -> set[str]:
    results = metrics([found], clients=32, streams=256, frame_tokens=8)
    return {result.metric for result in results if not result.ok}


def test_each_promise_is_held_against_what_was_found() -> None:
    assert failed(GOOD) == set()
    assert failed(replace(GOOD, many_use=0.8)) == {"e2e_requests"}, "the rate is that of a whole core"
    assert failed(replace(GOOD, alone=Answered(400.0, 0.0026, 400, []))) == {"e2e_added"}
    assert failed(replace(GOOD, most=Heard(49_999.0, 0.1, 0.2, 8.0, []))) == {"e2e_tokens"}
    assert failed(replace(GOOD, steady=Heard(49_999.0, 0.026, 0.08, 8.0, []))) == {"e2e_delay_p50"}
    assert failed(replace(GOOD, many=Answered(450.0, 0.02, 900, ["why"]))) == {"e2e_errors"}


def test_requests_and_streams_go_through_a_router_in_a_process_of_its_own() -> None:
    config = load_config(None, {"model": {"path": str(MODEL)}})
    with EndToEnd(config, prefills=1, decodes=2) as bench:
        assert bench.tokenize(1).texts_per_s > 0
        answered, use = bench.ask(4, 0.5, 1)
        assert answered.errors == []
        assert answered.num_requests > 4
        assert 0 < use < 1.5
        heard, _ = bench.listen(16, 1.0, 4, 3200.0)
        assert heard.errors == []
        assert heard.tokens_per_s == pytest.approx(3200, rel=0.5)
        assert 0 < heard.delay_p50_s < 1.0


def test_a_router_without_its_model_says_so() -> None:
    with pytest.raises(TandemError, match="no-such-model"):
        EndToEnd(load_config(None, {"model": {"path": "no-such-model"}}))
