"""What a policy is asked, and what it answers.

A policy is pure: an ask, the prefix hits and the fleet in, a placement out. It reads no clock and no socket, changes nothing,
and draws from no other randomness than the generator it is given. What is made anew with each decision is a named tuple: the
cheapest that can't be changed. One file is one policy; those that other systems publish are in `tandem/sim/policies/`, behind
this same contract.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpool.keys import Key
from protos.control import Tier
from router.admission import ROOM_S
from router.fleet import Fleet
from router.prefix_index import Hits

TIERS: tuple[Tier, Tier, Tier] = ("DEVICE", "HOST", "DISK")


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be placed. `num_tokens` are those whose KV is wanted, `keys` those of their full blocks."""

    num_tokens: int
    block_size: int
    slab_bytes: int
    keys: Sequence[Key] = ()
    answer_tokens: float = 256.0
    """Expected, of all samples together."""
    num_samples: int = 1
    due_s: float = math.inf
    """When its first token is due: its place in a worker's line."""
    tpot_s: float = 0.0
    """The SLO for each token after the first; 0: none."""
    prefill_here_only: bool = False
    """No prefill worker is wanted: there is one already, or the hand-over has failed."""
    may_wait: bool = False
    """It is tried again later if its workers have no room (`full_for_s`): without sources and candidates then."""
    avoid: frozenset[int] = frozenset()
    """Workers that have failed this request: for when nobody else is there."""

    @property
    def num_blocks(self) -> int:
        """That its tokens and the expected answer take."""
        return -int(-(self.num_tokens + self.answer_tokens) // self.block_size)


class SourcePlace(NamedTuple):
    """A process to fetch from, the slowest of its tiers that is needed, and how many leading blocks it holds."""

    number: int
    tier: Tier
    num_blocks: int


class Prediction(NamedTuple):
    """Predicted seconds of one choice, in parts.

    The client waits for the first token for as long as the longer of queue and fetch, which go on at the same time, the
    compute, and `overhead_s`, what messages take. The rest is what the choice costs its own stream and others: `handover_s`
    until decode has the KV, `stream_s` for the answer's tokens, `others_s` that streams and prompts of others wait longer,
    `room_s` until there is room for it.
    """

    hit_tokens: int
    queue_s: float
    fetch_s: float
    compute_s: float
    overhead_s: float
    handover_s: float
    stream_s: float
    others_s: float
    room_s: float

    @property
    def ttft_s(self) -> float:
        """What the client waits for its first token."""
        return max(self.queue_s, self.fetch_s) + self.compute_s + self.overhead_s

    @property
    def total_s(self) -> float:
        """What the choice costs: the order of preference."""
        return self.ttft_s + self.handover_s + self.stream_s + self.others_s + self.room_s


class Candidates(NamedTuple):
    """Every worker that was weighed, one entry each, in seconds: what a prefill at it costs, and what the stream at it does; a
    prefill worker has no stream. Kept to be explained."""

    numbers: NDArray[np.int64]
    queue_s: NDArray[np.float64]
    fetch_s: NDArray[np.float64]
    compute_s: NDArray[np.float64]
    others_s: NDArray[np.float64]
    stream_s: NDArray[np.float64]
    hit_tokens: NDArray[np.float64]

    def ttft_s(self, overhead_s: float) -> NDArray[np.float64]:
        """What the client would wait for its first token at each."""
        return np.maximum(self.queue_s, self.fetch_s) + self.compute_s + overhead_s


class Placement(NamedTuple):
    """The decision. `prefill` is None when the decode worker prefills by itself. Sources are in the order to ask; the prefill
    worker, last for decode, is not among `decode_sources`. `names` says who a number was."""

    prefill: int | None
    decode: int
    prefill_sources: tuple[SourcePlace, ...]
    decode_sources: tuple[SourcePlace, ...]
    chosen: Prediction
    names: tuple[str, ...]
    candidates: Candidates | None = None

    @property
    def hit_tokens(self) -> int:
        return self.chosen.hit_tokens

    @property
    def predicted_ttft_s(self) -> float:
        return self.chosen.ttft_s


class Policy(Protocol):
    """Where requests go."""

    def place(self, ask: Ask, hits: Hits, fleet: Fleet, now_s: float, rng: random.Random) -> Placement | None:
        """Chooses workers and sources. None when the served group has no decode worker."""


def full_for_s(chosen: Prediction) -> float:
    """For how long its workers are predicted to have no room for it; 0: it can go now."""
    return max(chosen.queue_s - ROOM_S, chosen.room_s, 0.0)
