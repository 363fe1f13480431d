"""When a call is tried again, and with what."""

from __future__ import annotations

import random

import pytest

from protos import tandem_pb2 as pb
from tandem.continuation import FIRST_PAUSE_S, MAX_PAUSE_S, Continuation
from tandem.errors import Draining, InvalidRequest, Overloaded, RouterLost, TandemError, WorkerLost

LOST = RouterLost("gone")


def continuation(
    n: int = 1, deadline_s: float | None = None, patience_s: float = 10.0, retries: int = 0
) -> Continuation:
    request = pb.GenerateRequest(prompt="p", sampling=pb.SamplingParams(n=n, max_tokens=9))
    return Continuation(
        request, deadline_s=deadline_s, patience_s=patience_s, overload_retries=retries, rng=random.Random(1)
    )


def accepted(ticket: bytes = b"t") -> pb.GenerateResponse:
    return pb.GenerateResponse(accepted=pb.Accepted(request_id="r", ticket=ticket))


def chunk(position: int, *tokens: int, index: int = 0, reason: str = "") -> pb.GenerateResponse:
    return pb.GenerateResponse(chunk=pb.Chunk(index=index, position=position, token_ids=tokens, finish_reason=reason))


def after(call: Continuation, error: TandemError, now_s: float, num_targets: int = 2) -> float | None:
    return call.after(error, now_s, num_targets=num_targets, reached=True)


def test_it_goes_on_with_its_ticket_and_what_has_come() -> None:
    call = continuation(n=2)
    assert not call.next_request().HasField("resume")
    assert call.take(accepted(b"one"))
    assert call.take(chunk(0, 5, 6))
    assert call.take(chunk(0, 7, index=1, reason="stop"))
    assert call.take(chunk(2, 8))
    assert after(call, LOST, 0.0) is not None
    request = call.next_request()
    assert request.prompt == "p"
    assert request.resume.ticket == b"one"
    assert [(list(s.token_ids), s.finish_reason) for s in request.resume.samples] == [([5, 6, 8], ""), ([7], "stop")]
    assert not call.take(accepted(b"two"))
    assert call.num_resumes == 1
    assert call.next_request().resume.ticket == b"two"


def test_an_answer_that_goes_on_in_the_wrong_place_is_an_error() -> None:
    call = continuation()
    call.take(accepted())
    call.take(chunk(0, 5))
    with pytest.raises(TandemError, match="goes on at token 0, 1 have come"):
        call.take(chunk(0, 5))
    with pytest.raises(TandemError, match="sample 3 of 1"):
        call.take(chunk(0, 5, index=3))


def test_pauses_grow_up_to_a_limit_and_end_with_the_patience() -> None:
    call = continuation(patience_s=20.0)
    call.take(accepted())
    now_s, pauses = 0.0, []
    while (pause_s := after(call, LOST, now_s, num_targets=1)) is not None:
        pauses.append(pause_s)
        now_s += pause_s
    assert pauses[0] == FIRST_PAUSE_S
    assert pauses[-1] >= MAX_PAUSE_S / 2
    assert max(pauses) <= MAX_PAUSE_S
    assert 19.0 < now_s <= 20.0
    # What comes begins the patience anew.
    call.take(chunk(0, 1))
    assert after(call, LOST, 100.0) is not None


def test_what_a_router_said_is_final() -> None:
    call = continuation()
    call.take(accepted())
    assert after(call, InvalidRequest("no"), 0.0) is None
    assert after(call, WorkerLost("no decode worker"), 0.0) is None
    assert after(call, Draining("the router is stopping"), 0.0) is not None


def test_no_room_is_asked_again_when_the_router_says_but_not_in_the_middle() -> None:
    call = continuation(retries=2, deadline_s=10.0)
    assert after(call, Overloaded("full", 3.0), 0.0) == 3.0
    assert after(call, Overloaded("full", 8.0), 3.0) is None
    call = continuation(retries=2)
    call.take(accepted())
    assert after(call, Overloaded("full", 3.0), 0.0) is None
    assert after(continuation(), Overloaded("full", 3.0), 0.0) is None


def test_a_deadline_is_never_outlived() -> None:
    call = continuation(deadline_s=5.0)
    call.take(accepted())
    assert call.remaining_s(4.0) == 1.0
    assert after(call, LOST, 4.99, num_targets=1) is None


def test_who_never_answered_is_tried_once_at_each_target() -> None:
    call = continuation(patience_s=1000.0)
    assert call.after(LOST, 0.0, num_targets=2, reached=False) is not None
    assert call.after(LOST, 0.0, num_targets=2, reached=False) is None


def test_without_a_ticket_what_began_can_not_go_on() -> None:
    call = continuation()
    call.take(accepted(b""))
    assert after(call, LOST, 0.0) is None


def test_nothing_follows_the_end() -> None:
    call = continuation()
    call.take(accepted())
    call.take(pb.GenerateResponse(completed=pb.Completed()))
    assert after(call, LOST, 0.0) is None
