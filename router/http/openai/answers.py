"""Events of `tandem.v1` become OpenAI's answers: pieces of a stream, and the whole at its end.

Owns what has come of each choice. Pieces and whole are made of the same steps, so a stream adds up to what the whole answer
would have been. Never waits and sends nothing: `router/http/openai/exchange.py` does. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

from msgspec import UNSET, Struct, UnsetType

from protos import tandem_pb2 as pb
from router.http.openai.replies import (
    AnswerMessage,
    ChatChoice,
    ChatLogprobs,
    ChatPiece,
    ChatPieceChoice,
    ChatReply,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    Delta,
    FinishReason,
    FunctionCall,
    Logprob,
    PromptDetails,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from router.http.openai.requests import Asked
from router.http.openai.tools import Read
from tandem.tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""What stands for a probability of zero, whose logarithm JSON can't write."""
CALL_ID_CHARS = 9
"""Mistral's templates want exactly so many letters and digits."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What every piece of an answer begins with."""

    request_id: str
    created_s: int
    model: str
    service_tier: str | UnsetType = UNSET


class Answered(Protocol):
    """One answer as it comes."""

    def take(self, number: int, chunk: pb.Chunk) -> Sequence[Struct]:
        """Text and tokens of prompt `number`: what a stream shows of it."""

    def complete(self, completed: pb.Completed) -> None:
        """A prompt's answers are complete."""

    def usage_piece(self) -> Struct:
        """The last piece of a stream that shows usage."""

    def reply(self) -> Struct:
        """The whole answer, once every prompt's is complete."""


@dataclass(slots=True)
class _Counts:
    """Tokens of all prompts that are complete."""

    prompt: int = 0
    generated: int = 0
    cached: int = 0

    def add(self, completed: pb.Completed) -> None:
        self.prompt += completed.num_prompt_tokens
        self.generated += completed.num_generated_tokens
        self.cached += completed.num_cached_tokens

    def usage(self) -> Usage:
        return Usage(self.prompt, self.generated, self.prompt + self.generated, PromptDetails(self.cached))


# --- chat --------------------------------------------------------------------------------------------------------------------


class ChatAnswer:
    """Of `/v1/chat/completions`."""

    def __init__(self, asked: Asked, heading: Heading, tokenizer: Tokenizer) -> None:
        self._heading = heading
        self._tokenizer = tokenizer
        self._counts = _Counts()
        self._offer = asked.offer
        self._with_logprobs = asked.logprobs
        self._with_usage = asked.include_usage
        self._choices = [_ChatChoice(self, index) for index in range(asked.n)]

    def take(self, number: int, chunk: pb.Chunk) -> Sequence[Struct]:
        return [self._piece([choice]) for choice in self._choices[chunk.index].take(chunk)]

    def complete(self, completed: pb.Completed) -> None:
        self._counts.add(completed)

    def usage_piece(self) -> Struct:
        return self._piece([], self._counts.usage())

    def reply(self) -> Struct:
        heading = self._heading
        return ChatReply(
            id=f"chatcmpl-{heading.request_id}",
            created=heading.created_s,
            model=heading.model,
            choices=[choice.whole() for choice in self._choices],
            usage=self._counts.usage(),
            service_tier=heading.service_tier,
        )

    def _piece(self, choices: list[ChatPieceChoice], usage: Usage | None = None) -> ChatPiece:
        heading = self._heading
        return ChatPiece(
            id=f"chatcmpl-{heading.request_id}",
            created=heading.created_s,
            model=heading.model,
            choices=choices,
            usage=usage if self._with_usage else UNSET,
            service_tier=heading.service_tier,
        )


class _ChatChoice:
    """One sample of a chat."""

    def __init__(self, answer: ChatAnswer, index: int) -> None:
        self._answer = answer
        self._index = index
        self._offer = answer._offer
        self._reader = self._offer.reader() if self._offer is not None else None
        self._has_begun = False
        self._text: list[str] = []
        self._calls: list[ToolCall] = []
        self._logprobs: list[Logprob] = []
        self._reason: FinishReason = "stop"

    def take(self, chunk: pb.Chunk) -> list[ChatPieceChoice]:
        read = self._read(chunk)
        logprobs = [_chat_logprob(self._answer._tokenizer, item) for item in chunk.logprobs]
        pieces: list[ChatPieceChoice] = []
        if not self._has_begun:
            self._has_begun = True
            pieces.append(self._piece(Delta(role="assistant", content="")))
        if read.text or logprobs:
            self._text.append(read.text)
            self._logprobs += logprobs
            shown = ChatLogprobs(logprobs) if self._answer._with_logprobs else None
            pieces.append(self._piece(Delta(content=read.text), logprobs=shown))
        for call in read.calls:
            number = len(self._calls)
            if number and self._offer is not None and not self._offer.several:
                break
            made = ToolCall(self._call_id(number), FunctionCall(call.name, call.arguments))
            self._calls.append(made)
            pieces.append(self._piece(Delta(tool_calls=[ToolCallDelta(number, made.id, made.function)])))
        if chunk.finish_reason:
            self._reason = "tool_calls" if self._calls else _reason(chunk.finish_reason)
            pieces.append(self._piece(Delta(), self._reason))
        return pieces

    def _read(self, chunk: pb.Chunk) -> Read:
        if self._reader is None:
            return Read(chunk.text)
        read = self._reader.push(chunk.text)
        if not chunk.finish_reason:
            return read
        rest = self._reader.finish()
        return Read(read.text + rest.text, read.calls + rest.calls)

    def _piece(
        self, delta: Delta, reason: FinishReason | None = None, logprobs: ChatLogprobs | None = None
    ) -> ChatPieceChoice:
        return ChatPieceChoice(self._index, delta, reason, logprobs)

    def _call_id(self, number: int) -> str:
        named = f"{self._answer._heading.request_id}/{self._index}/{number}"
        return hashlib.sha256(named.encode()).hexdigest()[:CALL_ID_CHARS]

    def whole(self) -> ChatChoice:
        text = "".join(self._text)
        message = AnswerMessage(
            content=None if self._calls and not text else text, tool_calls=self._calls if self._calls else UNSET
        )
        logprobs = ChatLogprobs(self._logprobs) if self._answer._with_logprobs else None
        return ChatChoice(self._index, message, self._reason, logprobs)


def _chat_logprob(tokenizer: Tokenizer, item: pb.TokenLogprob) -> Logprob:
    return Logprob(
        item.token,
        _written(item.logprob),
        _bytes(tokenizer, item.token_id),
        [TopLogprob(top.token, _written(top.logprob), _bytes(tokenizer, top.token_id)) for top in item.top],
    )


def _bytes(tokenizer: Tokenizer, token_id: int) -> list[int]:
    return list(tokenizer.token_bytes(token_id, skip_special=False))


def _written(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _reason(reason: str) -> Literal["stop", "length"]:
    assert reason in ("stop", "length"), reason
    return cast(Literal["stop", "length"], reason)


# --- completions -------------------------------------------------------------------------------------------------------------


class CompletionAnswer:
    """Of `/v1/completions`: the choices of the first prompt, then those of the second one, and so on."""

    def __init__(self, asked: Asked, heading: Heading, tokenizer: Tokenizer) -> None:
        self._heading = heading
        self._tokenizer = tokenizer
        self._counts = _Counts()
        self._n = asked.n
        self._with_logprobs = asked.logprobs
        self._with_usage = asked.include_usage
        echoes = [echo if isinstance(echo, str) else tokenizer.decode(echo) for echo in asked.echoes]
        self._choices = [
            _CompletionChoice(echo=echoes[number] if echoes else "")
            for number in range(len(asked.requests))
            for _ in range(asked.n)
        ]

    def take(self, number: int, chunk: pb.Chunk) -> Sequence[Struct]:
        index = number * self._n + chunk.index
        choice = self._choices[index]
        text = choice.echo + chunk.text if not choice.texts else chunk.text
        logprobs = self._logprobs(choice, chunk) if self._with_logprobs else None
        choice.texts.append(text)
        reason = _reason(chunk.finish_reason) if chunk.finish_reason else None
        choice.reason = reason
        return [self._reply([CompletionChoice(index, text, reason, logprobs)], None if self._with_usage else UNSET)]

    def complete(self, completed: pb.Completed) -> None:
        self._counts.add(completed)

    def usage_piece(self) -> Struct:
        return self._reply([], self._counts.usage())

    def reply(self) -> Struct:
        choices = [
            CompletionChoice(
                index, "".join(choice.texts), choice.reason, choice.logprobs if self._with_logprobs else None
            )
            for index, choice in enumerate(self._choices)
        ]
        return self._reply(choices, self._counts.usage())

    def _reply(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> CompletionReply:
        heading = self._heading
        return CompletionReply(
            id=f"cmpl-{heading.request_id}",
            created=heading.created_s,
            model=heading.model,
            choices=choices,
            usage=usage,
            service_tier=heading.service_tier,
        )

    def _logprobs(self, choice: _CompletionChoice, chunk: pb.Chunk) -> CompletionLogprobs:
        """Those of a chunk, which are added to those of its choice too."""
        new = CompletionLogprobs([], [], [], [])
        for item in chunk.logprobs:
            token = self._token(item.token_id)
            new.text_offset.append(choice.offset)
            new.token_logprobs.append(_written(item.logprob))
            new.tokens.append(token)
            likeliest = {self._token(top.token_id): _written(top.logprob) for top in item.top}
            new.top_logprobs.append(likeliest | {token: _written(item.logprob)})
            choice.offset += len(item.token)
        whole = choice.logprobs
        whole.text_offset.extend(new.text_offset)
        whole.token_logprobs.extend(new.token_logprobs)
        whole.tokens.extend(new.tokens)
        whole.top_logprobs.extend(new.top_logprobs)
        return new

    def _token(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id, skip_special=False)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(slots=True)
class _CompletionChoice:
    """One sample of one prompt."""

    echo: str
    texts: list[str] = field(default_factory=list)
    reason: FinishReason | None = None
    offset: int = 0
    logprobs: CompletionLogprobs = field(default_factory=lambda: CompletionLogprobs([], [], [], []))
