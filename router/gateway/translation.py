"""Between `vllm.grpc.engine`, which gateways speak, and `tandem.v1`: requests there become ours, our chunks become theirs. Pure.

Owns what of the foreign service is understood, and the refusals of the rest: whatever would change the answer and can't be
kept is InvalidRequest, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from smg_grpc_proto import vllm_engine_pb2 as vllm

from protos import tandem_pb2
from tandem.errors import InvalidRequest

DEFAULT_TEMPERATURE = 1.0
"""Of the foreign service where a request names none; ours is greedy then."""
_ANY_OBJECT = json.dumps({"type": "object"})


def request_of(request: vllm.GenerateRequest) -> tandem_pb2.GenerateRequest:
    """Our request for it. Raises InvalidRequest naming what is not understood."""
    for name in ("mm_inputs", "media_refs"):
        if request.HasField(name):
            raise InvalidRequest(f"{name} is given, the model reads text alone")
    if request.extra_mm_inputs:
        raise InvalidRequest("extra_mm_inputs is given, the model reads text alone")
    asked = tandem_pb2.GenerateRequest(sampling=_sampling(request.sampling_params))
    match request.WhichOneof("input"):
        case "tokenized":
            asked.token_ids.ids.extend(request.tokenized.input_ids)
        case "text":
            asked.prompt = request.text
        case _:
            raise InvalidRequest("the prompt is missing: give tokenized or text")
    return asked


def _sampling(given: vllm.SamplingParams) -> tandem_pb2.SamplingParams:
    if given.HasField("prompt_logprobs"):
        raise InvalidRequest(f"prompt_logprobs is {given.prompt_logprobs}, and prompts have none here")
    if given.include_stop_str_in_output:
        raise InvalidRequest("include_stop_str_in_output is true, must be false")
    if given.HasField("truncate_prompt_tokens"):
        raise InvalidRequest(
            f"truncate_prompt_tokens is {given.truncate_prompt_tokens}, and prompts are never cut here"
        )
    if given.HasField("logprobs") and given.logprobs < 0:
        raise InvalidRequest(f"logprobs is {given.logprobs}, must be at least 0")
    sampling = tandem_pb2.SamplingParams(
        temperature=given.temperature if given.HasField("temperature") else DEFAULT_TEMPERATURE,
        top_k=given.top_k,
        min_p=given.min_p,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        stop=given.stop,
        stop_token_ids=given.stop_token_ids,
        ignore_eos=given.ignore_eos,
        min_tokens=given.min_tokens,
    )
    # proto3's zero is "not given" in these three, where zero means nothing.
    if given.top_p:
        sampling.top_p = given.top_p
    if given.repetition_penalty:
        sampling.repetition_penalty = given.repetition_penalty
    if given.n:
        sampling.n = given.n
    if given.HasField("max_tokens"):
        sampling.max_tokens = given.max_tokens
    if given.HasField("logprobs"):
        sampling.num_logprobs = given.logprobs
    if given.HasField("seed"):
        sampling.seed = given.seed & 0x7FFF_FFFF
    for token_id, bias in given.logit_bias.items():
        if token_id < 0:
            raise InvalidRequest(f"logit_bias has the token id {token_id}, must be at least 0")
        sampling.logit_bias[token_id] = bias
    _constrain(sampling, given)
    return sampling


def _constrain(sampling: tandem_pb2.SamplingParams, given: vllm.SamplingParams) -> None:
    match given.WhichOneof("constraint"):
        case None:
            return
        case "json_schema":
            sampling.grammar.json_schema = given.json_schema
        case "json_object":
            if given.json_object:
                sampling.grammar.json_schema = _ANY_OBJECT
        case "regex":
            sampling.grammar.regex = given.regex
        case "grammar":
            sampling.grammar.lark = given.grammar
        case "choice":
            sampling.grammar.regex = "|".join(f"({re.escape(choice)})" for choice in given.choice.choices)
        case other:
            raise InvalidRequest(f"{other} is given, must be json_schema, json_object, regex, grammar or choice")


@dataclass(slots=True)
class _Sample:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tandem_pb2.TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""


class Answers:
    """One request's samples, as the foreign service tells them: `chunk` for each of ours, `complete` for each sample at the end.

    `stop_token_ids` are what ends a sample as a token, so that a stop by one is told from a stop by a string.
    """

    def __init__(self, num_prompt_tokens: int, n: int, stop_token_ids: frozenset[int]) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._stop_token_ids = stop_token_ids
        self._samples = [_Sample() for _ in range(n)]

    def chunk(self, chunk: tandem_pb2.Chunk) -> vllm.GenerateResponse | None:
        """Takes the chunk in; what to say of it to one who streams, if anything."""
        sample = self._samples[chunk.index]
        sample.token_ids += chunk.token_ids
        sample.logprobs += chunk.logprobs
        sample.finish_reason = chunk.finish_reason or sample.finish_reason
        if not chunk.token_ids:
            return None
        return vllm.GenerateResponse(
            chunk=vllm.GenerateStreamChunk(
                token_ids=chunk.token_ids,
                prompt_tokens=self._num_prompt_tokens,
                completion_tokens=len(sample.token_ids),
                output_logprobs=_logprobs(chunk.logprobs),
                index=chunk.index,
            )
        )

    def complete(self, num_cached_tokens: int, kv_transfer_params_json: str | None) -> list[vllm.GenerateResponse]:
        """What to say at the end: one message a sample."""
        return [
            vllm.GenerateResponse(complete=self._complete(index, num_cached_tokens, kv_transfer_params_json))
            for index in range(len(self._samples))
        ]

    def _complete(self, index: int, num_cached_tokens: int, ticket: str | None) -> vllm.GenerateComplete:
        sample = self._samples[index]
        complete = vllm.GenerateComplete(
            output_ids=sample.token_ids,
            finish_reason=sample.finish_reason,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=len(sample.token_ids),
            cached_tokens=num_cached_tokens,
            output_logprobs=_logprobs(sample.logprobs),
            index=index,
            kv_transfer_params_json=ticket,
        )
        if sample.finish_reason == "stop" and sample.token_ids and sample.token_ids[-1] in self._stop_token_ids:
            complete.matched_token_id = sample.token_ids[-1]
        return complete


def _logprobs(logprobs: Sequence[tandem_pb2.TokenLogprob]) -> vllm.OutputLogProbs | None:
    if not logprobs:
        return None
    return vllm.OutputLogProbs(
        token_logprobs=[item.logprob for item in logprobs],
        token_ids=[item.token_id for item in logprobs],
        top_logprobs=[
            vllm.TopLogProbs(values=[top.logprob for top in item.top], token_ids=[top.token_id for top in item.top])
            for item in logprobs
        ],
    )
