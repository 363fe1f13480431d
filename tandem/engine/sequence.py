"""A sequence: tokens, the blocks that hold their KV, and how far that KV has come.

Owns the bookkeeping of one sample's tokens on one worker and of the dispatch (`Job`) it belongs to; allocates nothing and
decides nothing. "Prefill" only means that `num_computed_tokens` is behind `num_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from kvpool.block_pool import BlockId
from kvpool.keys import KeyChain
from kvpool.sink import FetchedBatch
from protos.control import Dispatch, FetchedFrom, ReadyBlock
from tandem.errors import TandemError
from tandem.grammar.matcher import Matcher


class State(Enum):
    """Where a sequence is. Only RUNNING ones are given tokens; all but WAITING and FINISHED hold blocks.

    WAITING → FETCHING → RUNNING → PARKED → RUNNING → FINISHED is the longest way; each arrow may be skipped, any state may end
    in FINISHED, and a preempted sequence goes back to WAITING.
    """

    WAITING = auto()
    FETCHING = auto()
    RUNNING = auto()
    PARKED = auto()
    """Its KV is complete, its first token has not come yet (decode role without `prefill_here`)."""
    HELD = auto()
    """Its tokens are drawn, its blocks wait to be fetched (prefill role)."""
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Job:
    """One dispatch on this worker: what was asked, by which router, and its sequences by sample index.

    Until the prompt's KV is complete a job has one sequence, its trunk; then that is forked into `n` samples.
    """

    dispatch: Dispatch
    router: int
    arrival: int
    received_s: float
    deadline_s: float
    due_s: float
    """When its first token is due: its place in line."""
    samples: dict[int, Sequence] = field(default_factory=dict)
    aborting: bool = False
    """It ends as soon as its fetches are over."""
    error: TandemError | None = None
    """It ends with this, not because somebody asked for its end."""
    aborted_in: str = ""
    """The counter of what it was doing when the abort came."""
    first_tokens: list[int] | None = None
    forked: bool = False
    started: bool = False
    """Its router was told that it begins to be computed."""
    stopped: set[int] = field(default_factory=set)
    """Samples that the router ended before their fork, or in a fetch."""
    admitted_s: float | None = None
    fetched_s: float | None = None
    reported: bool = False
    local_hit_tokens: int = 0
    fetched_tokens: int = 0
    computed_tokens: int = 0
    fetched: list[FetchedFrom] = field(default_factory=list)
    hold_until_s: float = 0.0

    @property
    def fetch_ids(self) -> list[bytes]:
        """The fetches of its sequences that are not over."""
        return [sequence.fetch_id for sequence in self.samples.values() if sequence.fetch_id is not None]

    @property
    def trunk(self) -> Sequence:
        """The job's only sequence before the fork, afterwards the first sample that is still there."""
        return next(iter(self.samples.values()))


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample's tokens and blocks.

    `block_table[i]` holds tokens `i * block_size …`; blocks before `num_published_blocks` are immutable and findable by key.
    `draws` says whether the sequence draws its next token when its KV has caught up.
    """

    job: Job
    index: int
    tokens: list[int]
    chain: KeyChain
    draws: bool
    state: State = State.WAITING
    block_table: list[BlockId] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_published_blocks: int = 0
    num_kept_blocks: int = 0
    """Leading blocks of which a pool node has a copy, as far as it said so."""
    kept_at_loss: int = 0
    """How many times copies had gone when those blocks were counted."""
    fetch_id: bytes | None = None
    """Its own fetch, if one is running."""
    fetching_since_s: float = 0.0
    """When it last began to fetch, or to wait for others' fetches."""
    shared_fetch_ids: set[bytes] = field(default_factory=set)
    """Other sequences' fetches that it waits for."""
    arrived: dict[BlockId, tuple[ReadyBlock, FetchedBatch]] = field(default_factory=dict)
    """What ended fetches brought for it."""
    preempted: bool = False
    """It had KV here once, some of which may be elsewhere by now."""
    held_back: bool = False
    """It sits this step out, until the pool has what it generated."""
    unprotected: bool = False
    """It goes on although the pool doesn't."""
    matcher: Matcher | None = None
    """Its place in the request's grammar, if it has one; it follows the tokens when it is asked."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def is_waiting_for_blocks(self) -> bool:
        """Whether a fetch that has not ended is to bring it something."""
        return self.fetch_id is not None or bool(self.shared_fetch_ids)

    @property
    def may_fetch(self) -> bool:
        """Whether somebody may hold what it lacks."""
        return bool(self.job.dispatch.sources) or self.preempted

    @property
    def num_missing_tokens(self) -> int:
        """Tokens whose KV does not exist yet."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def num_missing_pairs(self) -> int:
        """Pairs of such a token and one that it attends to."""
        missing = self.num_missing_tokens
        return missing * self.num_computed_tokens + missing * (missing + 1) // 2

    @property
    def num_generated_tokens(self) -> int:
        return len(self.tokens) - self.job.dispatch.num_prompt_tokens

    @property
    def order(self) -> tuple[float, int, int]:
        """The total order of sequences, by when their first token is due: the first in it is never preempted."""
        return (self.job.due_s, self.job.arrival, self.index)

    @property
    def num_future(self) -> int:
        """How many sequences this one stands for: its job's `n` before the fork, itself afterwards."""
        return 1 if self.job.forked else self.job.dispatch.n

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.chain.extend((token,))
