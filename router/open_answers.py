"""The answers that are on their way: who reads each, and who may come again for one.

Owns the open requests by id, with their readers, and what an idempotent request has been answered so far: whoever asks the same
again reads along from its beginning, for `KEEP_S` after its end too. Decides nothing about requests. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from protos import tandem_pb2
from router.actions import RequestEvent, TokensEvent
from router.answer import Answer
from tandem.errors import InvalidRequest

KEEP_S = 60.0
MAX_KEPT = 256
MAX_KEY_CHARS = 128

Key = tuple[str, str]
"""A tenant and a key of its choice."""


@dataclass(slots=True)
class Open:
    """One request that is answered. `asked` tells it from another one of the same key."""

    accepted: tandem_pb2.Accepted
    asked: tuple[bytes, int | None] = (b"", None)
    readers: list[Answer] = field(default_factory=list)
    key: Key | None = None
    events: list[RequestEvent] = field(default_factory=list)
    """All there were, of one with a key."""
    ended_at_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.accepted.request_id


class OpenAnswers:
    """Every request with its readers. A request is open until `close`; one with a key is remembered for a while after that."""

    def __init__(self) -> None:
        self._open: dict[str, Open] = {}
        self._by_key: OrderedDict[Key, Open] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def ids(self) -> set[str]:
        """Of the requests that somebody reads."""
        return set(self._open)

    def get(self, request_id: str) -> Open | None:
        return self._open.get(request_id)

    def add(self, opened: Open) -> None:
        """A new request, before it is submitted."""
        self._open[opened.request_id] = opened
        if opened.key is not None:
            self._by_key[opened.key] = opened
            self._by_key.move_to_end(opened.key)

    def find(self, key: Key, asked: tuple[bytes, int | None], now_s: float) -> Open | None:
        """The request of this key that is open or ended a while ago. Raises InvalidRequest if another one was asked with it."""
        self._forget_old(now_s)
        found = self._by_key.get(key)
        if found is not None and found.asked != asked:
            raise InvalidRequest(f"idempotency_key {key[1]!r} was used for another request, {found.request_id}")
        return found

    def join(self, opened: Open, answer: Answer) -> None:
        """One more reader, who gets everything from the beginning."""
        for event in opened.events:
            answer.take(event)
        if opened.ended_at_s is None:
            opened.readers.append(answer)

    def emit(self, request_id: str, event: RequestEvent, now_s: float) -> int | None:
        """Gives an event to all who read it. The sample's number of tokens if it completed a stop string."""
        opened = self._open.get(request_id)
        if opened is None:
            return None
        if opened.key is not None:
            opened.events.append(event)
        num_tokens = None
        for answer in opened.readers:
            stopped = answer.take(event)
            num_tokens = stopped if num_tokens is None else num_tokens
        if not isinstance(event, TokensEvent):
            opened.ended_at_s = now_s
            opened.readers.clear()
        return num_tokens

    def leave(self, opened: Open, answer: Answer) -> bool:
        """A reader goes. Whether the request is still going on and nobody reads it any more."""
        if answer in opened.readers:
            opened.readers.remove(answer)
        return self._open.get(opened.request_id) is opened and opened.ended_at_s is None and not opened.readers

    def close(self, opened: Open, *, remember: bool) -> bool:
        """A reader has gone: with the last one the request is open no more, which is said once. What did not end well is not
        remembered: asked again, it begins anew."""
        if opened.readers or self._open.get(opened.request_id) is not opened:
            return False
        del self._open[opened.request_id]
        if opened.key is not None and not remember and self._by_key.get(opened.key) is opened:
            del self._by_key[opened.key]
        return True

    def _forget_old(self, now_s: float) -> None:
        for key, opened in list(self._by_key.items()):
            old = opened.ended_at_s is not None and now_s - opened.ended_at_s > KEEP_S
            if old or (len(self._by_key) > MAX_KEPT and opened.ended_at_s is not None):
                del self._by_key[key]
