"""The service that gateways know from vLLM's engines, over a real socket: what it understands, splits, refuses and ends."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import msgspec
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from protos import tandem_pb2
from protos.control import TokenLogprobs, Tokens
from router.gateway.service import TICKET_KEY
from router.gateway.translation import Answers, request_of
from tandem.errors import InvalidRequest
from tests.router.fake_cluster import EOS, LONG, VOCAB, Router, reference, wait_for

PROMPT = list(LONG.encode())


@pytest.fixture
def router(make_router: Callable[..., Router]) -> Router:
    router = make_router()
    router.add("prefill-0", "prefill")
    router.add("decode-0", "decode", step_s=0.002)
    return router


@contextmanager
def engine_of(router: Router) -> Iterator[Any]:
    """The service of a running router."""
    with grpc.insecure_channel(f"127.0.0.1:{router.server.grpc_port}") as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)


@pytest.fixture
def engine(router: Router) -> Iterator[Any]:
    with engine_of(router) as engine:
        yield engine


def asked(*, stream: bool = False, kv: str | None = None, prompt: list[int] = PROMPT, **sampling: Any) -> Any:
    return vllm.GenerateRequest(
        request_id="theirs",
        tokenized=vllm.TokenizedInput(input_ids=prompt),
        sampling_params=vllm.SamplingParams(**{"top_p": 1.0, "n": 1, "temperature": 0.0} | sampling),
        stream=stream,
        kv_transfer_params_json=kv,
    )


def test_a_whole_answer_says_all_at_its_end(engine: Any) -> None:
    (response,) = engine.Generate(asked(max_tokens=7))
    complete = response.complete
    assert bytes(complete.output_ids).decode() == reference(LONG, 7)
    assert (complete.finish_reason, complete.prompt_tokens, complete.completion_tokens) == ("length", len(PROMPT), 7)
    assert not complete.HasField("kv_transfer_params_json")


def test_a_stream_says_each_token_once_and_all_at_its_end(engine: Any) -> None:
    *chunks, last = engine.Generate(asked(stream=True, max_tokens=9, n=2))
    assert {response.WhichOneof("response") for response in chunks} == {"chunk", "complete"}
    samples = [last.complete, chunks.pop().complete]
    assert sorted(sample.index for sample in samples) == [0, 1]
    for sample in samples:
        said = [
            token for response in chunks for token in response.chunk.token_ids if response.chunk.index == sample.index
        ]
        assert said == list(sample.output_ids)
        assert bytes(said).decode() == reference(LONG, 9, sample.index)
    assert max(response.chunk.completion_tokens for response in chunks) == 9


@pytest.mark.parametrize(
    ("token_id", "reason", "matched"), [(EOS, "stop", EOS), (97, "stop", None), (EOS, "length", None)]
)
def test_a_stop_by_a_token_is_told_from_one_by_a_string(token_id: int, reason: str, matched: int | None) -> None:
    answers = Answers(3, 1, frozenset({EOS}))
    answers.chunk(tandem_pb2.Chunk(token_ids=[98, token_id], finish_reason=reason))
    (said,) = answers.complete(0, None)
    assert said.complete.finish_reason == reason
    assert (said.complete.matched_token_id if said.complete.HasField("matched_token_id") else None) == matched


def test_a_split_request_is_one_answer(engine: Any) -> None:
    whole = list(next(iter(engine.Generate(asked(max_tokens=8, seed=11)))).complete.output_ids)
    (first,) = engine.Generate(asked(max_tokens=1, ignore_eos=True))
    ticket = first.complete.kv_transfer_params_json
    assert list(first.complete.output_ids) == whole[:1]
    # A gateway may write the parameters anew, and add its own.
    relayed = json.dumps(json.loads(ticket) | {"do_remote_prefill": True, "remote_host": "10.0.0.1"}, indent=1)
    (rest,) = engine.Generate(asked(max_tokens=8, kv=relayed))
    assert list(rest.complete.output_ids) == whole
    assert not rest.complete.HasField("kv_transfer_params_json")


def test_a_tickets_seed_holds_for_the_second_half(router: Router, engine: Any) -> None:
    (first,) = engine.Generate(asked(max_tokens=1))
    list(engine.Generate(asked(max_tokens=4, kv=first.complete.kv_transfer_params_json)))
    seeds = {dispatch.sampling.seed for worker in router.workers for dispatch in worker.dispatches.values()}
    assert len(seeds) == 1, "both halves were dispatched with one seed"


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        ("{", "kv_transfer_params_json is not JSON"),
        (json.dumps({TICKET_KEY: "?"}), "not base64"),
        (json.dumps({TICKET_KEY: 7}), "not base64"),
        (json.dumps({TICKET_KEY: base64.b64encode(b"x" * 80).decode()}), "not of this cluster"),
        ("[" * 100_000, "characters, the limit is"),
    ],
)
def test_a_ticket_that_is_none_is_refused(engine: Any, kv: str, words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(engine.Generate(asked(max_tokens=4, kv=kv)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.details()


def test_a_ticket_opens_no_other_prompt(engine: Any) -> None:
    (first,) = engine.Generate(asked(max_tokens=1))
    with pytest.raises(grpc.RpcError) as caught:
        list(engine.Generate(asked(max_tokens=4, kv=first.complete.kv_transfer_params_json, prompt=PROMPT[1:])))
    assert "another prompt" in caught.value.details()


def test_an_abort_by_the_gateways_id_ends_the_request(router: Router, engine: Any) -> None:
    call = engine.Generate(asked(stream=True, max_tokens=10_000))
    next(call)
    engine.Abort(vllm.AbortRequest(request_ids=["nobody", "theirs"]))
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    wait_for(lambda: len(router.server.core.journal) == 0)


def test_what_would_change_the_answer_is_refused_by_name() -> None:
    refused: list[dict[str, Any]] = [
        {"prompt_logprobs": 1},
        {"include_stop_str_in_output": True},
        {"truncate_prompt_tokens": 5},
        {"logprobs": -1},
        {"structural_tag": "{}"},
        {"logit_bias": {-1: 1.0}},
    ]
    for fields in refused:
        (name,) = fields
        with pytest.raises(InvalidRequest, match=name):
            request_of(asked(**fields))
    with pytest.raises(InvalidRequest, match="media_refs"):
        request_of(vllm.GenerateRequest(text="x", media_refs=vllm.MediaRefs()))
    with pytest.raises(InvalidRequest, match="the prompt is missing"):
        request_of(vllm.GenerateRequest())


def test_unset_fields_mean_what_they_mean_there() -> None:
    plain = request_of(vllm.GenerateRequest(text="x", sampling_params=vllm.SamplingParams()))
    assert plain.sampling.temperature == 1.0
    assert not any(plain.sampling.HasField(name) for name in ("top_p", "repetition_penalty", "n", "max_tokens", "seed"))


@pytest.mark.parametrize(
    ("constraint", "kind", "text"),
    [
        ({"json_schema": "{}"}, "json_schema", "{}"),
        ({"json_object": True}, "json_schema", '{"type": "object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"choice": vllm.ChoiceConstraint(choices=["a.", "b"])}, "regex", r"(a\.)|(b)"),
    ],
)
def test_constraints_are_grammars(constraint: dict[str, Any], kind: str, text: str) -> None:
    grammar = request_of(asked(**constraint)).sampling.grammar
    assert grammar.WhichOneof("kind") == kind
    assert getattr(grammar, kind) == text


def test_logprobs_are_told_with_their_tokens(make_router: Callable[..., Router]) -> None:
    def with_logprobs(message: Tokens) -> list[Tokens]:
        logprobs = [TokenLogprobs(-0.5, [(97, -0.5), (98, -1.5)]) for _ in message.token_ids]
        return [msgspec.structs.replace(message, logprobs=logprobs)]

    router = make_router()
    router.add("decode-0", "decode", tamper=with_logprobs)
    with engine_of(router) as engine:
        (response,) = engine.Generate(asked(max_tokens=3, logprobs=2))
    logprobs = response.complete.output_logprobs
    assert list(logprobs.token_ids) == list(response.complete.output_ids)
    assert list(logprobs.token_logprobs) == [-0.5] * 3
    assert [(list(top.token_ids), list(top.values)) for top in logprobs.top_logprobs] == [([97, 98], [-0.5, -1.5])] * 3


def test_the_cluster_is_described_as_one_engine(router: Router, engine: Any) -> None:
    assert engine.HealthCheck(vllm.HealthCheckRequest()).healthy
    model = engine.GetModelInfo(vllm.GetModelInfoRequest())
    assert (model.served_model_name, model.vocab_size, list(model.eos_token_ids)) == ("fake", VOCAB, [EOS])
    server = engine.GetServerInfo(vllm.GetServerInfoRequest())
    assert (server.server_type, server.kv_connector, server.block_size) == ("vllm-grpc", "TandemConnector", 4)
    (load,) = engine.GetLoads(vllm.GetLoadsRequest()).loads
    assert 0.0 <= load.token_usage <= 1.0


def test_a_tokenizer_that_is_not_there_is_said(engine: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(engine.GetTokenizer(common_pb2.GetTokenizerRequest()))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
