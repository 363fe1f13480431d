"""Grammars at the front door: what can't be held to is refused with the reason, what can travels to the workers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from protos import tandem_pb2
from protos.control import Dispatch, Grammar
from tandem.grammar.trial import Trials
from tests.router.fake_cluster import Router, collect, reference

SHORT = "x" * 40


def refusal(router: Router, **grammar: str) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        list(router.ask(SHORT, grammar=tandem_pb2.Grammar(**grammar)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    return str(caught.value.details())


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ({}, "grammar is empty"),
        ({"regex": ""}, "the regex has 0 bytes, must be in [1, 2000]"),
        ({"regex": "ä" * 1001}, "the regex has 2002 bytes, must be in [1, 2000]"),
        ({"regex": "("}, "unclosed group"),
        ({"json_schema": "{"}, "no JSON"),
        ({"json_schema": '{"type": "nothing"}'}, "nothing"),
        ({"lark": "start: nowhere"}, "nowhere"),
        ({"lark": "start: s\ns: s"}, "no token can follow"),
    ],
)
def test_a_bad_grammar_is_refused_with_its_reason(
    make_router: Callable[..., Router], grammar: dict[str, str], words: str
) -> None:
    router = make_router(limits={"max_grammar_bytes": 2000})
    worker = router.add("decode-0", "decode")
    assert words in refusal(router, **grammar)
    assert not worker.seen(Dispatch)


def test_a_good_grammar_travels_with_every_dispatch_and_is_tried_once(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Grammar] = []
    real = Trials._try
    monkeypatch.setattr(Trials, "_try", lambda self, grammar: tried.append(grammar) or real(self, grammar))
    prefill, decode = router.add("prefill-0", "prefill"), router.add("decode-0", "decode")
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "string"}}})
    for _ in range(2):
        answer = collect(router.ask(max_tokens=5, grammar=tandem_pb2.Grammar(json_schema=schema)))
        assert len(answer.token_ids()) == 5
    seen = [*prefill.seen(Dispatch), *decode.seen(Dispatch)]
    assert {role for dispatch in seen for role in [dispatch.fence.role]} == {"prefill", "decode"}
    assert {dispatch.sampling.grammar for dispatch in seen} == {Grammar("json_schema", schema)}
    assert len(tried) == 1


def test_others_are_answered_while_a_grammar_is_tried(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    router.add("decode-0", "decode")
    begun, may_end = threading.Event(), threading.Event()

    def slow(trials: Trials, grammar: Grammar) -> str:
        begun.set()
        assert may_end.wait(20)
        return ""

    monkeypatch.setattr(Trials, "_try", slow)
    answers: list[Any] = []
    held = threading.Thread(
        target=lambda: answers.append(collect(router.ask(max_tokens=5, grammar=tandem_pb2.Grammar(regex="a+"))))
    )
    held.start()
    try:
        assert begun.wait(20)
        assert collect(router.ask(SHORT, max_tokens=5)).text() == reference(SHORT, 5)
        assert not answers
    finally:
        may_end.set()
        held.join(20)
    assert len(answers) == 1
