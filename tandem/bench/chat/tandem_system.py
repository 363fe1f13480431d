"""Tandem as a system under load: its public gRPC API, prompts as token ids.

Owns the calls; the cluster is whoever serves at the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from protos import tandem_pb2 as pb
from tandem.bench.chat.loop import Answer
from tandem.client import Client
from tandem.clock import now_s
from tandem.errors import TandemError

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
        sampling = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        token_ids: list[int] = []
        times_s: list[float] = []
        completed = None
        for event in self._client.generate(prompt, sampling, timeout_s=_ASK_S):
            if event.HasField("chunk"):
                token_ids += event.chunk.token_ids
                times_s += [now_s()] * len(event.chunk.token_ids)
            elif event.HasField("completed"):
                completed = event.completed
        if completed is None or len(token_ids) != num_tokens:
            raise TandemError(f"an answer has {len(token_ids)} of {num_tokens} tokens, ended: {completed is not None}")
        return Answer(tuple(token_ids), tuple(times_s), completed.num_cached_tokens)

    def cancel(self) -> None:
        """See `Session`."""
        self._client.close()
