"""Which sequences get how many tokens in a step (design §7).

Owns the queue of waiting sequences and the set of those that hold blocks; takes blocks from the `BlockPool` and gives them
back. Pure: no clock, no sockets, no tensors. It knows no phases: a step gives sequences tokens until
`num_computed_tokens` catches up (ORCA, OSDI '22; chunked prefill after Sarathi-Serve, OSDI '24). Where a step's seconds are known
to be those of its tokens, a prompt gets a step of its own: put together, the first would wait for the second to no one's gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvpool.block_pool import BlockId, BlockPool
from protos.control import StepPrices
from tandem.engine.sequence import Sequence, State

MAX_AHEAD = 4
"""So many sequences more than may run get their blocks, if these have to be fetched: they are here when their turn comes."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`num_tokens` of `sequence`, from its `num_computed_tokens` on, are computed in this step."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Copy-on-write: the slab of `source` has to be copied to `target` before the step runs."""

    source: BlockId
    target: BlockId


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what to compute, and the copies to make first."""

    scheduled: list[Scheduled]
    copies: list[CopyBlock]


class Scheduler:
    """Admits sequences in their order, plans steps, preempts the youngest when blocks run out.

    Duties of the owner: `add` each new sequence once; `admit` until it answers None; run every `StepPlan` it asked for; call
    `finish` exactly once for each sequence that ends, whatever the reason. Sequences in FETCHING can't be preempted at once:
    `cancel_fetch` is called and the owner calls `requeue` when the fetch is over.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_running: int,
        max_step_tokens: int,
        cancel_fetch: Callable[[Sequence], None],
        prices: Callable[[], StepPrices] = StepPrices,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._cancel_fetch = cancel_fetch
        self._prices = prices
        self._waiting: list[Sequence] = []
        self._holding: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences without blocks, in order."""
        return self._waiting

    @property
    def holding(self) -> list[Sequence]:
        """Sequences with blocks, in order."""
        return self._holding

    @property
    def has_work(self) -> bool:
        """Whether a step could compute something."""
        return any(sequence.state is State.RUNNING and not sequence.held_back for sequence in self._holding)

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence; it must be in WAITING and hold no blocks."""
        self._insert(self._waiting, sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Takes in a sequence that already holds blocks (a fork)."""
        self._insert(self._holding, sequence)

    def admit(self) -> Sequence | None:
        """The next waiting sequence, with every block up to its last token reserved and its local prefix hit taken.

        Sets `block_table`, `num_computed_tokens` and `num_published_blocks`; the caller sets the state. A sequence that
        draws keeps at least its last token to compute. None when nothing waits or there is no room for the first in line:
        nobody overtakes who is not due before it, so nobody starves. Without anything to fetch it waits until a step has room for
        it: till then blocks would lie reserved for nothing, and a prefix that is being computed just now would be missed. With
        something to fetch it is admitted ahead of its turn.
        """
        if not self._waiting:
            return None
        sequence = self._waiting[0]
        limit = self._max_running + (MAX_AHEAD if sequence.may_fetch else 0)
        if self._holding and self.num_running + sequence.num_future > limit:
            return None
        if not sequence.may_fetch and not self._has_room_in_step(sequence):
            return None
        num_full = (sequence.num_tokens - sequence.draws) // self._block_size
        hits = self._pool.match(sequence.chain.keys[:num_full])
        num_blocks = -(-sequence.num_tokens // self._block_size)
        num_fresh = num_blocks - len(hits)
        # Whoever runs must be able to grow by a block, or the newcomer would be preempted at once, again and again.
        has_room = not self._holding or self._pool.stats().allocatable >= num_fresh + self.num_running
        fresh = self._pool.allocate(num_fresh) if has_room else None
        if fresh is None:
            self._pool.release(hits[::-1])
            return None
        del self._waiting[0]
        sequence.block_table = hits + fresh
        sequence.num_computed_tokens = len(hits) * self._block_size
        sequence.num_published_blocks = len(hits)
        self._insert(self._holding, sequence)
        return sequence

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks for work still to do here, forks to come included."""
        return sum(sequence.num_future for sequence in self._holding if sequence.state is not State.HELD)

    def _has_room_in_step(self, newcomer: Sequence) -> bool:
        """Whether the next step would compute any of it, as far as running sequences that are due before it go."""
        missing = [
            sequence.num_missing_tokens
            for sequence in self._holding
            if sequence.state is State.RUNNING and sequence.order < newcomer.order
        ]
        budget = self._max_step_tokens - sum(missing)
        num_prompts = sum(num_tokens > 1 for num_tokens in missing)
        return budget > 0 and self._joins(newcomer, min(newcomer.num_missing_tokens, budget), num_prompts, 1)

    def _joins(self, sequence: Sequence, num_tokens: int, num_prompts: int, num_later: int) -> bool:
        """Whether so many tokens of a prompt are computed in a step with `num_prompts` that are due before it: they wait for its
        compute, and it and all later ones, `num_later`, are spared the base of another step."""
        prices = self._prices()
        before = sequence.num_computed_tokens
        compute_s = prices.prefill_s(num_tokens, before) - prices.base_s
        return num_tokens == 1 or num_prompts * compute_s <= num_later * prices.base_s or not prices.token_s

    def _running(self) -> list[Sequence]:
        """The sequences that may run, the oldest up to the limit."""
        running: list[Sequence] = []
        num_rows = 0
        for sequence in self._holding:
            if sequence.state is State.RUNNING:
                num_rows += sequence.num_future
                if num_rows > self._max_running and running:
                    break
                if not sequence.held_back:
                    running.append(sequence)
        return running

    def plan(self) -> StepPlan | None:
        """What the next step computes; None if nothing can run. May preempt."""
        scheduled: list[Scheduled] = []
        copies: list[CopyBlock] = []
        budget = self._max_step_tokens
        running = self._running()
        running.sort(key=lambda sequence: (sequence.num_missing_tokens > 1, sequence.order))
        num_prompts = 0
        for at, sequence in enumerate(running):
            if budget == 0:
                break
            if sequence.state is not State.RUNNING:
                continue
            num_tokens = min(sequence.num_missing_tokens, budget)
            num_later = len(running) - at + len(self._waiting)
            if not self._joins(sequence, num_tokens, num_prompts, num_later):
                break
            if not self._make_room(sequence, num_tokens, copies, scheduled):
                continue
            scheduled.append(Scheduled(sequence, num_tokens))
            budget -= num_tokens
            num_prompts += num_tokens > 1
        scheduled = [item for item in scheduled if item.sequence.state is State.RUNNING]
        if not scheduled:
            return None
        kept = {block for item in scheduled for block in item.sequence.block_table}
        return StepPlan(scheduled, [copy for copy in copies if copy.target in kept])

    def finish(self, sequence: Sequence) -> None:
        """Gives back everything the sequence holds and forgets it."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._holding:
            self._holding.remove(sequence)
        self._release(sequence)
        sequence.state = State.FINISHED

    def requeue(self, sequence: Sequence) -> None:
        """Puts a sequence that holds blocks back in the queue; its KV is recomputed or found again later."""
        self._holding.remove(sequence)
        self._release(sequence)
        sequence.state = State.WAITING
        sequence.preempted = True
        self._insert(self._waiting, sequence)
        self.num_preemptions += 1

    def _make_room(
        self, sequence: Sequence, num_tokens: int, copies: list[CopyBlock], scheduled: list[Scheduled]
    ) -> bool:
        """Makes the blocks that the next `num_tokens` of `sequence` are written to exist and belong to it alone."""
        first = sequence.num_computed_tokens // self._block_size
        last = (sequence.num_computed_tokens + num_tokens - 1) // self._block_size
        while True:
            table = sequence.block_table
            shared = [i for i in range(first, min(last + 1, len(table))) if self._pool.is_shared(table[i])]
            num_new = max(0, last + 1 - len(table))
            fresh = self._pool.allocate(len(shared) + num_new) if shared or num_new else []
            if fresh is not None:
                for i, block in zip(shared, fresh, strict=False):
                    copies.append(CopyBlock(table[i], block))
                    self._pool.release([table[i]])
                    table[i] = block
                table.extend(fresh[len(shared) :])
                return True
            if not self._preempt_after(sequence):
                return False

    def _preempt_after(self, sequence: Sequence) -> bool:
        """Takes the blocks of the youngest sequence that may be preempted for `sequence`, never its own. False if there is
        none, or if the room comes later: from a fetch that is being cancelled or a hold that is running out."""
        for victim in reversed(self._holding):
            if victim is sequence or victim.order < sequence.order:
                return False
            if victim.is_waiting_for_blocks:
                if victim.state is State.FETCHING and victim.fetch_id is not None:
                    self._cancel_fetch(victim)
                return False
            if victim.state in (State.RUNNING, State.PARKED):
                self.requeue(victim)
                return True
        return False

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_table[::-1])
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0
        sequence.num_kept_blocks = 0
        sequence.held_back = False

    @staticmethod
    def _insert(line: list[Sequence], sequence: Sequence) -> None:
        position = len(line)
        while position and line[position - 1].order > sequence.order:
            position -= 1
        line.insert(position, sequence)
