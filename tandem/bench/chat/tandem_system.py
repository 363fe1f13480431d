"""Tandem as a system under load: its public gRPC API, prompts as token ids.

Owns the calls; the cluster is whoever serves at the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tandem.bench.ask import ask
from tandem.bench.chat.loop import Answer
from tandem.client import Client

_ASK_S = 300.0


class TandemSystem:
    """The cluster whose router is at `target`."""

    def __init__(self, target: str) -> None:
        self.name = "tandem"
        self._target = target

    @contextmanager
    def session(self) -> Iterator[TandemSession]:
        with Client(self._target) as client:
            yield TandemSession(client)


class TandemSession:
    """Requests over one channel."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def ask(self, prompt: tuple[int, ...], num_tokens: int) -> Answer:
        """See `Session`."""
        answered = ask(self._client, prompt, num_tokens, _ASK_S)
        return Answer(tuple(answered.token_ids), tuple(answered.times_s), answered.completed.num_cached_tokens)

    def cancel(self) -> None:
        """See `Session`."""
        self._client.close()
