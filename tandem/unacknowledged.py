"""Tokens that a router has not acknowledged yet (design §4, step 5).

Owns the worker's half of exactly-once delivery: what was sent stays here until it is acknowledged, is sent again when the
router asks or stays silent, and goes when the dispatch ends. Pure: it sends nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.control import Fence, Tokens

RESEND_AFTER_S = 1.0
"""An unacknowledged token is sent again after this long; the router ignores what it has."""

StreamKey = tuple[int, Fence, int]
"""`(router, fence, sample index)`."""


@dataclass(slots=True)
class _Stream:
    sent: list[Tokens] = field(default_factory=list)
    since_s: float = 0.0


class Unacknowledged:
    """Every stream's tokens past its acknowledged position, in order."""

    def __init__(self) -> None:
        self._streams: dict[StreamKey, _Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, router: int, tokens: Tokens, now_s: float) -> None:
        """Remembers a message that is being sent."""
        stream = self._streams.setdefault((router, tokens.fence, tokens.index), _Stream())
        if not stream.sent:
            stream.since_s = now_s
        stream.sent.append(tokens)

    def acknowledge(self, router: int, fence: Fence, index: int, position: int, final: bool, now_s: float) -> None:
        """Everything before `position` has arrived; with `final` all that will ever matter has. The message that ends a
        stream stays until `final`, since it may hold no token of its own."""
        key = (router, fence, index)
        stream = self._streams.get(key)
        if stream is None:
            return
        stream.sent = [
            tokens
            for tokens in stream.sent
            if not final and (tokens.finish_reason is not None or tokens.position + len(tokens.token_ids) > position)
        ]
        stream.since_s = now_s
        if not stream.sent:
            del self._streams[key]

    def from_position(self, router: int, fence: Fence, index: int, position: int) -> list[Tokens]:
        """What to send again for a router that misses `position`."""
        stream = self._streams.get((router, fence, index))
        if stream is None:
            return []
        return [t for t in stream.sent if t.finish_reason is not None or t.position + len(t.token_ids) > position]

    def due(self, now_s: float) -> list[tuple[int, Tokens]]:
        """What has waited for its acknowledgement for `RESEND_AFTER_S`, as `(router, message)`."""
        again: list[tuple[int, Tokens]] = []
        for (router, _, _), stream in self._streams.items():
            if now_s - stream.since_s >= RESEND_AFTER_S:
                stream.since_s = now_s
                again.extend((router, tokens) for tokens in stream.sent)
        return again

    def next_due_s(self) -> float | None:
        """When `due` has something to say if no acknowledgement comes; None when nothing is outstanding."""
        return min((stream.since_s + RESEND_AFTER_S for stream in self._streams.values()), default=None)

    def fences(self, router: int) -> set[Fence]:
        """The dispatches of that router of which something is outstanding."""
        return {fence for owner, fence, _ in self._streams if owner == router}

    def drop(self, router: int, fence: Fence) -> None:
        """The dispatch ended otherwise: nobody wants its tokens."""
        for key in [key for key in self._streams if key[0] == router and key[1] == fence]:
            del self._streams[key]

    def drop_router(self, router: int) -> None:
        """The router is lost, and what it asked for with it."""
        for key in [key for key in self._streams if key[0] == router]:
            del self._streams[key]
