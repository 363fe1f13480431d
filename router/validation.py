"""What a client may ask for: a GenerateRequest becomes sampling parameters and tokens, or an InvalidRequest.

Owns the limits' messages: each names the value and the limit. Runs no model and touches no socket; the caller decides on which
thread `tokenize` and `check_grammar` run.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from protos import tandem_pb2
from protos.control import FinishReason, Grammar, Sampling
from router.journal import SoFar
from tandem.config import LimitsConfig
from tandem.errors import InvalidRequest
from tandem.grammar.trial import Trials
from tandem.tokenizer.chat_template import Message, ToolCall
from tandem.tokenizer.tokenizer import Tokenizer

MAX_LISTED_IDS = 1024
MAX_PENALTY = 2.0
_FINISH_REASONS: dict[str, FinishReason | None] = {"": None, "stop": "stop", "length": "length"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A validated request, but for its tokens."""

    sampling: Sampling
    n: int
    stop: tuple[str, ...]


def _bounded(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    inside = low < value <= high if open_low else low <= value <= high
    if not math.isfinite(value) or not inside:
        bracket = "(" if open_low else "["
        raise InvalidRequest(f"{name} is {value:g}, must be in {bracket}{low:g}, {high:g}]", name.split()[0])
    return value


class Validator:
    """Checks requests against `limits` and the vocabulary of the served model."""

    def __init__(self, limits: LimitsConfig, tokenizer: Tokenizer, model: str) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._model = model
        self._trials = Trials(tokenizer)

    def check(self, request: tandem_pb2.GenerateRequest) -> Asked:
        """Everything that can be said before the prompt is tokenised. Raises InvalidRequest."""
        if request.model and request.model != self._model:
            raise InvalidRequest(f"model {request.model!r} is not served here, {self._model!r} is", "model")
        given = request.sampling
        limits = self._limits
        max_tokens = given.max_tokens if given.HasField("max_tokens") else limits.default_max_tokens
        if not 1 <= max_tokens <= limits.max_tokens:
            raise InvalidRequest(f"max_tokens is {max_tokens}, must be in [1, {limits.max_tokens}]", "max_tokens")
        n = given.n if given.HasField("n") else 1
        if not 1 <= n <= limits.max_samples:
            raise InvalidRequest(f"n is {n}, must be in [1, {limits.max_samples}]", "n")
        if given.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {given.min_tokens}, must be at most max_tokens, {max_tokens}", "min_tokens"
            )
        if given.HasField("num_logprobs") and given.num_logprobs > limits.max_logprobs:
            raise InvalidRequest(
                f"num_logprobs is {given.num_logprobs}, the limit is {limits.max_logprobs}", "num_logprobs"
            )
        if given.HasField("seed") and given.seed >= 2**63:
            raise InvalidRequest(f"seed is {given.seed}, must be below 2**63", "seed")
        self._check_stop(given)
        stop_token_ids = set(self._ids("stop_token_ids", list(given.stop_token_ids)))
        if not given.ignore_eos:
            stop_token_ids |= self._tokenizer.eos_token_ids
        bias = given.logit_bias
        self._ids("logit_bias", list(bias))
        for token_id, value in bias.items():
            _bounded(f"logit_bias of token {token_id}", value, -100.0, 100.0)
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=_bounded("temperature", given.temperature, 0.0, 100.0),
            top_k=given.top_k,
            top_p=_bounded("top_p", given.top_p, 0.0, 1.0, open_low=True) if given.HasField("top_p") else 1.0,
            min_p=_bounded("min_p", given.min_p, 0.0, 1.0),
            repetition_penalty=_bounded("repetition_penalty", given.repetition_penalty, 0.0, 100.0, open_low=True)
            if given.HasField("repetition_penalty")
            else 1.0,
            presence_penalty=_bounded("presence_penalty", given.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
            frequency_penalty=_bounded("frequency_penalty", given.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
            logit_bias=sorted(bias.items()),
            num_logprobs=given.num_logprobs if given.HasField("num_logprobs") else -1,
            seed=given.seed if given.HasField("seed") else secrets.randbits(63),
            stop_token_ids=sorted(stop_token_ids),
            min_tokens=given.min_tokens,
            grammar=self._grammar(given),
        )
        self._check_prompt_size(request)
        return Asked(sampling, n, tuple(given.stop))

    def so_far(self, resume: tandem_pb2.Resume, asked: Asked) -> list[SoFar]:
        """What the client of a resumed request has of each sample. Raises InvalidRequest if it can't be of this request."""
        if len(resume.samples) != asked.n:
            raise InvalidRequest(f"resume has {len(resume.samples)} samples, the request has {asked.n}")
        found = []
        for index, sample in enumerate(resume.samples):
            token_ids = tuple(sample.token_ids)
            if len(token_ids) > asked.sampling.max_tokens:
                raise InvalidRequest(
                    f"resume has {len(token_ids)} tokens of sample {index}, max_tokens is {asked.sampling.max_tokens}"
                )
            self._check_vocabulary(f"sample {index} of resume", list(token_ids), "resume")
            if sample.finish_reason not in _FINISH_REASONS:
                raise InvalidRequest(
                    f"resume has the finish reason {sample.finish_reason!r}, must be '', 'stop' or 'length'"
                )
            found.append(SoFar(token_ids, _FINISH_REASONS[sample.finish_reason]))
        return found

    def check_grammar(self, grammar: Grammar) -> None:
        """Tries a request's grammar, in a process of its own. Raises InvalidRequest with the reason if no answer can be held to
        it. For one thread."""
        self._trials.check(grammar)

    def _grammar(self, given: tandem_pb2.SamplingParams) -> Grammar | UnsetType:
        if not given.HasField("grammar"):
            return UNSET
        kind = given.grammar.WhichOneof("kind")
        if kind is None:
            raise InvalidRequest("grammar is empty: give a json_schema, a regex or lark", "grammar")
        text: str = getattr(given.grammar, kind)
        size = len(text.encode())
        if not 1 <= size <= self._limits.max_grammar_bytes:
            raise InvalidRequest(
                f"the {kind} has {size} bytes, must be in [1, {self._limits.max_grammar_bytes}]", "grammar"
            )
        return Grammar(kind, text)

    def _check_stop(self, given: tandem_pb2.SamplingParams) -> None:
        limits = self._limits
        if len(given.stop) > limits.max_stop_strings:
            raise InvalidRequest(
                f"there are {len(given.stop)} stop strings, the limit is {limits.max_stop_strings}", "stop"
            )
        for number, stop in enumerate(given.stop):
            size = len(stop.encode())
            if not 1 <= size <= limits.max_stop_bytes:
                raise InvalidRequest(
                    f"stop string {number} has {size} bytes, must be in [1, {limits.max_stop_bytes}]", "stop"
                )

    def _ids(self, name: str, token_ids: list[int]) -> list[int]:
        if len(token_ids) > MAX_LISTED_IDS:
            raise InvalidRequest(f"{name} has {len(token_ids)} entries, the limit is {MAX_LISTED_IDS}", name)
        self._check_vocabulary(name, token_ids, name)
        return token_ids

    def _check_vocabulary(self, name: str, token_ids: list[int], param: str) -> None:
        size = self._tokenizer.vocab_size
        if token_ids and max(token_ids) >= size:
            raise InvalidRequest(f"{name} has token id {max(token_ids)}, the vocabulary has {size} tokens", param)

    def _check_prompt_size(self, request: tandem_pb2.GenerateRequest) -> None:
        size = prompt_bytes(request)
        if size == 0:
            raise InvalidRequest("the prompt is empty: give a prompt, a chat with messages or token ids")
        if size > self._limits.max_prompt_bytes:
            raise InvalidRequest(f"the prompt has {size} bytes, the limit is {self._limits.max_prompt_bytes}")

    def tokenize(self, request: tandem_pb2.GenerateRequest, max_model_len: int) -> tuple[int, ...]:
        """The prompt's tokens. `max_model_len` 0 is unknown. Raises InvalidRequest if it is empty, outside the vocabulary,
        inexpressible, or so long that no tokenisation of it could fit."""
        size = prompt_bytes(request)
        at_least = -(-size // self._tokenizer.max_token_bytes)
        match request.WhichOneof("input"):
            case "token_ids":
                token_ids = list(request.token_ids.ids)
                self._check_vocabulary("the prompt", token_ids, "prompt")
            case _ if max_model_len and at_least > max_model_len:
                raise InvalidRequest(
                    f"the prompt has {size} bytes, at least {at_least} tokens; the model's context is {max_model_len}"
                )
            case "chat":
                text = self._tokenizer.render_chat(messages_of(request.chat), request.chat.tools_json)
                token_ids = self._tokenizer.encode(text)
            case _:
                token_ids = self._tokenizer.encode_prompt(request.prompt)
        if not token_ids:
            raise InvalidRequest("the prompt has no tokens")
        return tuple(token_ids)


def messages_of(chat: tandem_pb2.Chat) -> list[Message]:
    """A conversation as the chat template takes it."""
    return [
        Message(
            role=message.role,
            content=message.content,
            name=message.name,
            tool_calls=tuple(ToolCall(call.name, call.arguments, call.id) for call in message.tool_calls),
            tool_call_id=message.tool_call_id,
        )
        for message in chat.messages
    ]


def prompt_bytes(request: tandem_pb2.GenerateRequest) -> int:
    """The size of a prompt: UTF-8 bytes of text, four bytes a token id; a chat's message counts at least one byte, and so does
    each call in it."""
    match request.WhichOneof("input"):
        case "prompt":
            return len(request.prompt.encode())
        case "chat":
            return len(request.chat.tools_json.encode()) + sum(map(_message_bytes, request.chat.messages))
        case "token_ids":
            return 4 * len(request.token_ids.ids)
        case _:
            return 0


def _message_bytes(message: tandem_pb2.ChatMessage) -> int:
    said = (message.role, message.content, message.name, message.tool_call_id)
    calls = (max(1, sum(len(text.encode()) for text in (c.id, c.name, c.arguments))) for c in message.tool_calls)
    return max(1, sum(len(text.encode()) for text in said)) + sum(calls)
