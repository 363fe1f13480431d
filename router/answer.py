"""One answer on its way to a client: token events in, chunks of text out.

Owns text: one TextStream per sample, and what the client has not taken yet. What waits is merged into one chunk a sample, so a
slow client costs no more than its answer's own size and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from protos import tandem_pb2
from protos.control import TokenLogprobs
from router.actions import CompletedEvent, FailedEvent, TokensEvent
from router.journal import SoFar, Summary
from tandem.errors import TandemError
from tandem.tokenizer.text_stream import TextStream
from tandem.tokenizer.tokenizer import Tokenizer


@dataclass(slots=True)
class _Pending:
    """What a sample's next chunk will hold."""

    position: int
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""


class Answer:
    """The outgoing side of one request. `take` feeds it; exactly one reader iterates `chunks`."""

    def __init__(
        self, request_id: str, tokenizer: Tokenizer, stop: Sequence[str], n: int, *, continues: bool = False
    ) -> None:
        """`continues`: the answer is shown behind its prompt, whose last word its first token may go on (no chat)."""
        self.request_id = request_id
        self._tokenizer = tokenizer
        self._texts = [TextStream(tokenizer, tuple(stop), continues=continues) for _ in range(n)]
        self._num_tokens = [0] * n
        self._finished = [False] * n
        self._pending: dict[int, _Pending] = {}
        self._news = asyncio.Event()
        self._summary: Summary | None = None
        self._error: TandemError | None = None

    def resume(self, index: int, had: SoFar) -> SoFar:
        """The client has the beginning of this sample already: nothing of it is shown again. Returns it as it counts: it ends
        where a stop string was complete. To be called before anything else."""
        delta = self._texts[index].push(list(had.token_ids))
        self._num_tokens[index] = delta.num_tokens_used
        if delta.stopped and had.finish_reason is None:
            self._pending[index] = _Pending(delta.num_tokens_used, finish_reason="stop")
            self._news.set()
        reason = "stop" if delta.stopped else had.finish_reason
        self._finished[index] = reason is not None
        return SoFar(had.token_ids[: delta.num_tokens_used], reason)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens shown, all samples together."""
        return sum(self._num_tokens)

    @property
    def summary(self) -> Summary | None:
        """What the router says of the request once it has completed."""
        return self._summary

    @property
    def ended(self) -> bool:
        """Whether the terminal event has come."""
        return self._summary is not None or self._error is not None

    def take(self, event: TokensEvent | CompletedEvent | FailedEvent) -> int | None:
        """Takes the next event. Returns the sample's number of tokens if these completed a stop string: the caller
        tells the core."""
        self._news.set()
        match event:
            case CompletedEvent(summary=summary):
                self._summary = summary
                return None
            case FailedEvent(error=error):
                self._error = error
                return None
            case TokensEvent():
                return self._take_tokens(event)

    def _take_tokens(self, event: TokensEvent) -> int | None:
        index = event.index
        if self._finished[index]:
            return None
        pending = self._pending.setdefault(index, _Pending(self._num_tokens[index]))
        delta = self._texts[index].push(list(event.token_ids))
        used = delta.num_tokens_used
        pending.token_ids += event.token_ids[:used]
        pending.logprobs += event.logprobs[:used]
        pending.text.append(delta.text)
        self._num_tokens[index] += used
        if delta.stopped:
            pending.finish_reason = "stop"
        elif event.finish_reason is not None:
            pending.text.append(self._texts[index].finish())
            pending.finish_reason = event.finish_reason
        self._finished[index] = bool(pending.finish_reason)
        return self._num_tokens[index] if delta.stopped else None

    async def chunks(self) -> AsyncIterator[tandem_pb2.Chunk]:
        """What there is to show, until the request has completed. Raises the TandemError with which it ended otherwise."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._pending:
                index = next(iter(self._pending))
                pending = self._pending.pop(index)
                chunk = self._chunk(index, pending)
                if chunk.token_ids or chunk.text or chunk.finish_reason:
                    yield chunk
            if self._error is not None:
                raise self._error
            if self._summary is not None and not self._pending:
                return

    def _chunk(self, index: int, pending: _Pending) -> tandem_pb2.Chunk:
        return tandem_pb2.Chunk(
            index=index,
            position=pending.position,
            token_ids=pending.token_ids,
            text="".join(pending.text),
            logprobs=[
                tandem_pb2.TokenLogprob(
                    token_id=token_id,
                    logprob=logprobs.chosen,
                    token=self._text_of(token_id),
                    top=[
                        tandem_pb2.TopLogprob(token_id=top_id, logprob=logprob, token=self._text_of(top_id))
                        for top_id, logprob in logprobs.top
                    ],
                )
                for token_id, logprobs in zip(pending.token_ids, pending.logprobs, strict=False)
            ],
            finish_reason=pending.finish_reason,
        )

    def _text_of(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id, skip_special=False).decode("utf-8", "replace")
