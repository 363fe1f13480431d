"""What OpenAI's paths answer, as types: whole answers, and the pieces of streamed ones.

Owns the shapes, field for field those of OpenAI's API; nothing here decides anything. Pure.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(Struct, frozen=True):
    """`cached_tokens`: prompt tokens whose KV existed before the request."""

    cached_tokens: int


class Usage(Struct, frozen=True):
    """Tokens of all choices together; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(Struct, frozen=True):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(Struct, frozen=True):
    """A drawn token; `token` shows bytes that are no whole character as U+FFFD, `bytes` has them."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Of the tokens of a choice, or of a piece of it."""

    content: list[Logprob]
    refusal: None = None


class FunctionCall(Struct, frozen=True):
    """`arguments`: a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    """A call that the model made."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolCallDelta(Struct, frozen=True):
    """A call in a stream: always whole. `index` is its number in the choice."""

    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class AnswerMessage(Struct, frozen=True):
    """What the model said. `content` is null where it said nothing and called tools."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """One sample."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatReply(Struct, frozen=True, kw_only=True):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | UnsetType = UNSET


class Delta(Struct, frozen=True):
    """What a piece adds to a choice."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatPieceChoice(Struct, frozen=True):
    """A piece of one sample."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatPiece(Struct, frozen=True, kw_only=True):
    """One event of a streamed chat. `usage` is there where it was asked for, and null but in the last one."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatPieceChoice]
    usage: Usage | UnsetType | None = UNSET
    service_tier: str | UnsetType = UNSET


class CompletionLogprobs(Struct, frozen=True):
    """Of the tokens of a choice, or of a piece of it. A token that is no whole character is written `bytes:\\xNN…`.
    `text_offset` is where each begins in the tokens' own text."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(Struct, frozen=True):
    """One sample, or in a stream a piece of one."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: CompletionLogprobs | None = None


class CompletionReply(Struct, frozen=True, kw_only=True):
    """The answer of `/v1/completions`, and each event of a streamed one. `usage` is as in `ChatPiece` there."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    service_tier: str | UnsetType = UNSET
