"""Requests that may have killed the workers that computed them.

Owns the suspicion, the trials and the quarantine. Pure; it dispatches nothing.

A worker says what it begins to compute before it does (`Started`). When its process dies, the suspects are the requests that it
had begun and of which it had not sent a token yet: what has sent tokens has shown that it can be computed. A suspect that no
worker has died of before is tried again, but only one suspect at a time, and when all others that the dead worker computed have
sent tokens again from elsewhere, so that a second death accuses nobody else. A request
that is the one suspect who was already being computed when another worker died ends with `Quarantined`, and its prompt is
refused for `QUARANTINE_S`. Silence and slow steps of a machine are no such death.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from kvpool.keys import tokens_as_bytes
from router.journal import DispatchRecord, Record
from tandem.errors import Quarantined

QUARANTINE_S = 600.0
MAX_QUARANTINED = 1024


class Poison:
    """Suspicions of one router."""

    def __init__(self) -> None:
        self._suspects: dict[str, None] = {}
        self._returning: set[str] = set()
        """Those that had sent tokens, and have not sent more since their worker died."""
        self._on_trial: str | None = None
        self._quarantined_until_s: OrderedDict[bytes, float] = OrderedDict()
        self.num_quarantined = 0
        """Requests that ended as poison."""

    @property
    def num_suspects(self) -> int:
        """Requests that are tried one at a time."""
        return len(self._suspects)

    def check(self, prompt: Sequence[int], now_s: float) -> None:
        """Raises Quarantined for a prompt that has killed workers."""
        while self._quarantined_until_s and next(iter(self._quarantined_until_s.values())) <= now_s:
            self._quarantined_until_s.popitem(last=False)
        if self._quarantined_until_s and (until_s := self._quarantined_until_s.get(_digest(prompt))) is not None:
            raise Quarantined(
                f"this prompt ended the workers that computed it; it is refused for another {until_s - now_s:.0f} s"
            )

    def on_death(self, held: Sequence[tuple[Record, DispatchRecord]], now_s: float) -> Record | None:
        """A process died that held these dispatches. The request that is to blame, if that is clear: it is quarantined."""
        started = [(record, dispatch) for record, dispatch in held if dispatch.started]
        suspects = {record.request_id: record for record, dispatch in started if not dispatch.generates}
        accused = [record for record in suspects.values() if record.num_deaths > 0]
        for record in {record.request_id: record for record, _ in started}.values():
            record.num_deaths += 1
            # A suspect itself (of another role's death, or of an earlier one) must be let go before it can send anything.
            if record.request_id not in suspects and record.request_id not in self._suspects:
                self._returning.add(record.request_id)
            else:
                self._returning.discard(record.request_id)
        if len(accused) == 1:
            self.num_quarantined += 1
            self._quarantined_until_s[_digest(accused[0].request.prompt)] = now_s + QUARANTINE_S
            if len(self._quarantined_until_s) > MAX_QUARANTINED:
                self._quarantined_until_s.popitem(last=False)
            self.cleared(accused[0].request_id)
            del suspects[accused[0].request_id]
        self._suspects |= dict.fromkeys(suspects)
        if self._on_trial in suspects:
            self._on_trial = None
        return accused[0] if len(accused) == 1 else None

    def may_go(self, request_id: str) -> bool:
        """Whether it may be dispatched now. Of the suspects one may, until it is cleared, when nobody else is to be cleared."""
        if request_id not in self._suspects:
            return True
        if self._returning:
            return self._on_trial == request_id
        if self._on_trial is None:
            self._on_trial = request_id
        return self._on_trial == request_id

    def cleared(self, request_id: str) -> None:
        """It has been computed, or has ended."""
        self._suspects.pop(request_id, None)
        self._returning.discard(request_id)
        if self._on_trial == request_id:
            self._on_trial = None


def _digest(prompt: Sequence[int]) -> bytes:
    return hashlib.sha256(tokens_as_bytes(prompt)).digest()
