"""One request to a cluster, over its public API: its tokens, and when each came.

Owns what counts as an answer, and prompts of random text; measures nothing by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from protos import tandem_pb2 as pb
from tandem.client import Client
from tandem.clock import now_s
from tandem.errors import TandemError

_FIRST_TOKEN_ID = 1000
_NUM_TOKEN_IDS = 8000
"""Prompts draw from plain text tokens that every vocabulary we serve has."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A whole answer. `times_s[i]` is when `token_ids[i]` came, on `now_s`'s clock."""

    token_ids: list[int]
    times_s: list[float]
    completed: pb.Completed


def ask(client: Client, prompt: Sequence[int], num_tokens: int, timeout_s: float) -> Answered:
    """Exactly so many tokens after `prompt`. Raises TandemError for anything less."""
    token_ids: list[int] = []
    times_s: list[float] = []
    completed = None
    sampling = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    for event in client.generate(prompt, sampling, timeout_s=timeout_s):
        if event.HasField("chunk"):
            token_ids += event.chunk.token_ids
            times_s += [now_s()] * len(event.chunk.token_ids)
        elif event.HasField("completed"):
            completed = event.completed
    if completed is None or len(token_ids) != num_tokens:
        raise TandemError(f"an answer has {len(token_ids)} of {num_tokens} tokens, ended: {completed is not None}")
    return Answered(token_ids, times_s, completed)


def random_tokens(random: Random, num_tokens: int) -> list[int]:
    """The ids of so many tokens of plain text."""
    return [_FIRST_TOKEN_ID + random.randrange(_NUM_TOKEN_IDS) for _ in range(num_tokens)]
