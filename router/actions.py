"""What the router's core asks its shell to do.

Owns the vocabulary between `router/router.py` and `router/server.py`; values only.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos.control import Endpoints, FinishReason, FromRouter, TokenLogprobs
from router.journal import Summary
from tandem.errors import TandemError


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """The next tokens of a sample, exactly once and in order; with `finish_reason` its last."""

    index: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class CompletedEvent:
    """Terminal: every sample has finished."""

    summary: Summary


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """Terminal: the request ended otherwise."""

    error: TandemError


RequestEvent = TokensEvent | CompletedEvent | FailedEvent


@dataclass(frozen=True, slots=True)
class Emit:
    """Show this to the request's client."""

    request_id: str
    event: RequestEvent


@dataclass(frozen=True, slots=True)
class Send:
    """Send this to a process."""

    process: str
    epoch: bytes
    message: FromRouter


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Follow this process' KV events."""

    process: str
    epoch: bytes
    endpoints: Endpoints


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """This process is gone, for `reason`: stop following it."""

    process: str
    epoch: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Replay:
    """Ask this process for its KV events from `from_seq` on."""

    process: str
    epoch: bytes
    endpoints: Endpoints
    from_seq: int


Action = Emit | Send | Subscribe | Unsubscribe | Replay
