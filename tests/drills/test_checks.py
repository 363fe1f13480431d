"""A drill that can't fail shows nothing: each way to fail is seen, and alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from protos import tandem_pb2 as pb
from tandem.drills.checks import Played, judge
from tandem.drills.faults import Fired, Scene
from tandem.drills.load import Asked, Asking, Got
from tandem.drills.spec import Expect, RequestSpec
from tandem.errors import DeadlineExceeded, WorkerLost

TOKENS = [5, 6, 7, 8]
TRUTH_COMPLETED = pb.Completed(num_prompt_tokens=9, num_generated_tokens=4, exact=True)


def completed(**changes: Any) -> pb.Completed:
    runs = [pb.RoleRun(role="decode", process="decode-1", attempt=1, fetched=[{"process": "pool-0", "num_blocks": 2}])]
    fields = {"num_prompt_tokens": 9, "num_generated_tokens": 4, "exact": True, "runs": runs}
    return pb.Completed(**(fields | changes))


def got(**changes: Any) -> Got:
    answer = Got(
        tokens={0: list(TOKENS)},
        text={0: "text"},
        reasons={0: "length"},
        logprobs={0: [(token, -0.5) for token in TOKENS]},
        times_s=[1.0, 1.1, 1.2, 1.3],
        began_s=0.5,
        accepted_s=0.6,
        ended_s=1.4,
        num_ends=1,
        completed=completed(),
    )
    for name, value in changes.items():
        setattr(answer, name, value)
    return answer


def failed(
    change: Callable[[Got], None] = lambda answer: None,
    expect: Expect | None = None,
    *,
    fired: bool = True,
    error: str = "",
    counters: dict[str, int] | None = None,
    **spec: Any,
) -> set[str]:
    """The checks that don't hold, of a drill with one request whose answer was changed."""
    asking = Asking("127.0.0.1:1", Asked(RequestSpec(**spec), 0, "a prompt"))
    asking.got = got()
    change(asking.got)
    truth = got(completed=TRUTH_COMPLETED)
    status = pb.ProcessStatus(name="decode-0", counters=counters or {})
    stage: Any = SimpleNamespace(cluster=SimpleNamespace(listed=lambda: {"decode-0": status}), lines={})
    steps = [Fired("KILL decode-0", 1.0, "ended with -9")] if fired else [Fired("", 1.0, "waited")]
    played = Played([asking], {"q-0": truth}, steps, error)
    return {check.check for check in judge(played, expect or Expect(), Scene(stage)) if not check.ok}


def test_a_right_answer_passes() -> None:
    assert failed() == set()


def test_a_fault_that_did_not_fire_fails_the_drill() -> None:
    assert failed(fired=False) == {"the faults fired"}
    assert failed(error="not within 30 s") == {"the faults fired"}


TOKENS_CHECK = "tokens, text and logprobs are those of the fault-free run"


def _set(name: str, value: Any) -> Callable[[Got], None]:
    return lambda answer: setattr(answer, name, value)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_set("tokens", {0: [5, 6, 9, 8]}), TOKENS_CHECK),
        (_set("text", {0: "texT"}), TOKENS_CHECK),
        (_set("reasons", {0: "stop"}), TOKENS_CHECK),
        (_set("logprobs", {0: [(5, -0.5), (6, -0.5), (7, -0.500001), (8, -0.5)]}), TOKENS_CHECK),
        (_set("faults", ["sample 0 goes on at 3, 2 tokens have come"]), "chunks are gap-free, one end each"),
        (_set("num_ends", 2), "chunks are gap-free, one end each"),
        (_set("completed", completed(num_prompt_tokens=8)), "usage is right"),
        (_set("completed", completed(num_generated_tokens=5)), "usage is right"),
        (_set("completed", completed(num_cached_tokens=10)), "usage is right"),
        (_set("completed", completed(exact=False)), "every answer is exact"),
        (_set("times_s", [1.0, 1.1, 7.0, 7.1]), "recovery is within its bound"),
        (_set("ended_s", 40.0), "recovery is within its bound"),
    ],
)
def test_each_broken_promise_is_seen_alone(change: Callable[[Got], None], check: str) -> None:
    assert failed(change) == {check}


def test_too_few_tokens_are_seen() -> None:
    def shorten(answer: Got) -> None:
        answer.tokens, answer.logprobs = {0: TOKENS[:3]}, {0: [(token, -0.5) for token in TOKENS[:3]]}
        answer.completed = completed(num_generated_tokens=3)

    assert failed(shorten) == {TOKENS_CHECK}


def _end_with_error(answer: Got) -> None:
    answer.completed, answer.error = None, WorkerLost("gone")


ENDS_CHECK = "every request ends once, as it must"


def test_errors_are_exactly_those_that_were_expected() -> None:
    assert failed(_end_with_error) == {ENDS_CHECK}
    assert failed(_end_with_error, Expect(errors={"q.worker_lost": 1})) == set()
    assert failed(_end_with_error, Expect(errors={"q.worker_lost": 2})) == {ENDS_CHECK}
    assert failed(_end_with_error, Expect(errors={"q.internal": 1})) == {ENDS_CHECK}
    assert failed(expect=Expect(errors={"q.worker_lost": 1})) == {ENDS_CHECK}
    assert failed(_end_with_error, Expect(may_fail={"q": ["worker_lost"]})) == set()

    def late(answer: Got) -> None:
        answer.completed, answer.error = None, DeadlineExceeded("late")

    assert failed(late, Expect(may_fail={"q": ["worker_lost"]})) == {ENDS_CHECK}


def test_a_client_that_should_have_left_and_did_not_is_seen() -> None:
    assert failed(leaves_at=2) == {ENDS_CHECK}


def test_what_an_interrupted_answer_had_must_be_the_beginning_of_the_truth() -> None:
    def broken(answer: Got) -> None:
        _end_with_error(answer)
        answer.tokens, answer.logprobs = {0: [5, 7]}, {0: [(5, -0.5), (7, -0.5)]}

    assert failed(broken, Expect(errors={"q.worker_lost": 1})) == {TOKENS_CHECK}


@pytest.mark.parametrize(
    ("expect", "counters", "holds"),
    [
        (Expect(more={"decode.steps": 5}), {"steps": 5}, True),
        (Expect(more={"decode-0.steps": 5}), {"steps": 4}, False),
        (Expect(at_most={"decode.steps": 5}), {"steps": 6}, False),
        (Expect(again={"decode": 1}), {}, True),
        (Expect(again={"prefill": 1}), {}, False),
        (Expect(never_again=True), {}, False),
        (Expect(resumed=1), {}, False),
        (Expect(ends={"q.completed": 1}), {}, True),
        (Expect(ends={"q.overloaded": 1}), {}, False),
        (Expect(fetched_from={"q": ["pool-0"]}), {}, True),
        (Expect(fetched_from={"q": ["prefill-0"]}), {}, False),
    ],
)
def test_what_a_file_expects_is_looked_at(expect: Expect, counters: dict[str, int], holds: bool) -> None:
    assert (failed(expect=expect, counters=counters) == set()) == holds


def test_an_answer_that_goes_on_in_the_wrong_place_or_after_its_end_breaks_a_rule() -> None:
    answer = Got()
    answer.take(pb.GenerateResponse(accepted=pb.Accepted()))
    answer.take(pb.GenerateResponse(chunk=pb.Chunk(position=0, token_ids=[1, 2])))
    assert answer.faults == []
    answer.take(pb.GenerateResponse(chunk=pb.Chunk(position=3, token_ids=[4], finish_reason="length")))
    answer.take(pb.GenerateResponse(chunk=pb.Chunk(position=3, token_ids=[4])))
    answer.take(pb.GenerateResponse(accepted=pb.Accepted()))
    answer.take(pb.GenerateResponse(completed=pb.Completed()))
    answer.take(pb.GenerateResponse(completed=pb.Completed()))
    assert len(answer.faults) == 4
    assert answer.num_ends == 2
