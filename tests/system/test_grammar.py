"""Answers that are held to a grammar, by real workers: they match, through the hand-over and through a worker's death."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from protos import tandem_pb2 as pb
from tandem.errors import InvalidRequest
from tests.system.harness import RunningCluster, Watched, wait_until

pytestmark = pytest.mark.timeout(400)

PROMPT = "A file of people that live in the old town, one JSON object each.\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "languages": {"type": "array", "items": {"enum": ["en", "fr", "de"]}, "minItems": 12, "maxItems": 30},
        "married": {"type": "boolean"},
    },
    "required": ["name", "age", "languages", "married"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
SAMPLING: dict[str, Any] = {
    "max_tokens": 300,
    "temperature": 1.0,
    "grammar": pb.Grammar(json_schema=json.dumps(SCHEMA)),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """A prefill worker and two decode workers: the first token is drawn elsewhere than the others."""
    worker = {"arena_bytes": 256 * 2**20}
    running = RunningCluster(
        tmp_path_factory.mktemp("grammar"),
        {"prefill": worker, "decode": worker, "pool": {"host_bytes": 256 * 2**20}},
    )
    try:
        yield running.start(["router", "pool-0", "prefill-0", "decode-0", "decode-1"])
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"


def assert_valid(text: str) -> None:
    person = json.loads(text)
    assert set(person) == set(SCHEMA["required"])  # type: ignore[call-overload]
    assert 3 <= len(person["name"]) <= 40
    assert type(person["age"]) is int
    assert 0 <= person["age"] <= 130
    assert 12 <= len(person["languages"]) <= 30
    assert set(person["languages"]) <= {"en", "fr", "de"}
    assert type(person["married"]) is bool


def test_answers_match_their_schema(cluster: RunningCluster) -> None:
    answer = cluster.generate(PROMPT, n=3, seed=1, num_logprobs=3, **SAMPLING)
    assert answer.reasons == {0: "stop", 1: "stop", 2: "stop"}
    for text in answer.text.values():
        assert_valid(text)
    assert answer.completed is not None
    assert len(answer.logprobs) == sum(map(len, answer.tokens.values()))
    assert all(token.logprob <= 0 for token in answer.logprobs)


def test_answers_match_a_regular_expression_and_a_lark_grammar(cluster: RunningCluster) -> None:
    date = cluster.generate("Today is ", grammar=pb.Grammar(regex=r"20\d\d-[01]\d-[0-3]\d"), max_tokens=30)
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", date.text[0])
    assert date.reasons == {0: "stop"}
    sum_of = pb.Grammar(lark='start: term ("+" term){2}\nterm: /[1-9][0-9]?/')
    assert re.fullmatch(r"[1-9]\d?(\+[1-9]\d?){2}", cluster.generate("2+3+", grammar=sum_of, max_tokens=30).text[0])


def test_a_bad_grammar_is_refused_and_the_cluster_goes_on(cluster: RunningCluster) -> None:
    with pytest.raises(InvalidRequest, match="unclosed group"):
        cluster.generate("x", grammar=pb.Grammar(regex="("))
    with pytest.raises(InvalidRequest, match="too many"):
        cluster.generate("x", grammar=pb.Grammar(regex="(a{1,1000}){1,1000}"), max_tokens=2000)
    assert cluster.generate("x", max_tokens=3).tokens


def test_a_killed_decode_worker_changes_no_token(cluster: RunningCluster) -> None:
    """Killed last: the others need it no more."""
    wanted = [SAMPLING | {"seed": seed} for seed in range(4)]
    truth = [cluster.watch(PROMPT, **sampling).result() for sampling in wanted]
    streams: list[Watched] = [cluster.watch(PROMPT, **sampling) for sampling in wanted]
    wait_until(lambda: all(len(stream.tokens) >= 12 for stream in streams), 60.0, "every stream is under way")
    victim = max(("decode-0", "decode-1"), key=lambda name: cluster.status(name).num_running)
    cluster.kill(victim, signal.SIGKILL)
    assert cluster.processes[victim].wait(10.0) == -signal.SIGKILL
    assert [stream.result() for stream in streams] == truth
    moved = [stream for stream in streams if len(stream.processes("decode")) > 1]
    assert moved
    for stream in moved:
        assert stream.processes("decode")[0] == victim
        assert stream.completed is not None
        assert stream.completed.exact
    cluster.spawn(victim)
    cluster.wait_ready([victim])
