"""The engine of one worker: schedule → run → postprocess (design §7).

Puts the parts of a worker's engine together and owns the order of a step. Synchronous, called from one thread, given the
time: it touches no socket and no clock. What the world must be told or asked comes back as `Output`; fetched blocks and
messages come in through the `on_*` methods. Prefill and decode workers differ by the dispatches they get, not by code.

    Jobs          which dispatches are known, and how each of them ends
    Scheduler     who has blocks, who gets how many tokens in a step
    Onboarding    gets a waiting sequence its KV: hits, fetches, or the decision to compute
    Fetches       the fetches that are running, and who waits for which
    BlockTables   makes blocks findable, shares them, takes them out of use
    Streams       draws tokens, forks, hands over
    Durability    which streams wait until the pool has their blocks
    Meter         speeds and totals
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import torch

from kvpool.block_pool import BlockPool
from kvpool.sink import FetchedBatch, FetchEnded
from protos.control import NOBODY, Counters, Dispatch, Failed, Fence, Load, Source, Started
from tandem.engine.block_tables import BlockTables
from tandem.engine.durability import Durability
from tandem.engine.fetching import Fetches
from tandem.engine.jobs import Jobs
from tandem.engine.limits import EngineLimits
from tandem.engine.memory import Memory
from tandem.engine.meter import Meter
from tandem.engine.onboarding import Onboarding
from tandem.engine.output import Outbox, Output
from tandem.engine.runner import Chunk
from tandem.engine.sampler import Sampler, sample
from tandem.engine.scheduler import Scheduler, StepPlan
from tandem.engine.sequence import Sequence as Seq
from tandem.engine.sequence import State
from tandem.engine.streams import Streams
from tandem.errors import WorkerLost
from tandem.grammar.matcher import MatcherSource


class Runner(Protocol):
    """Computes KV and logits of chunks (`tandem.engine.runner.Runner`)."""

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """fp32 logits `[num_chunks_that_want_logits, vocab_size]`, in order."""


class Engine:
    """Turns dispatches into tokens.

    Every dispatch ends in exactly one of: `Tokens` with a finish reason for each sample, `Failed`, `Aborted`. `Started` is said
    of it before the step that first computes something of it runs. With
    `has_work` False a `step` computes nothing, but it looks after deadlines and admits what there is room for: call it some
    times a second. `writer` is the epoch of this process: blocks that it computes carry it. Without `matchers` it refuses
    requests that have a grammar.
    """

    def __init__(
        self,
        *,
        pool: BlockPool,
        memory: Memory,
        runner: Runner,
        limits: EngineLimits,
        new_fetch_id: Callable[[], bytes],
        writer: bytes = NOBODY,
        sampler: Sampler = sample,
        matchers: MatcherSource | None = None,
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._runner = runner
        self._block_size = limits.block_size
        self.on_output: Callable[[Output], None] | None = None
        """Takes what has to be said before a step computes, so that nobody waits for the step to hear it."""
        self.on_published: Callable[[], None] = lambda: None
        """Called when a step has published blocks, before it draws: whoever waits for them need not wait for that."""
        self.meter = Meter(limits.block_size, limits.slab_bytes)
        self._outbox = Outbox()
        self._fetches = Fetches(limits.block_size, self._outbox, new_fetch_id)
        self.scheduler = Scheduler(
            pool,
            block_size=limits.block_size,
            max_running=limits.max_running,
            max_step_tokens=limits.max_step_tokens,
            cancel_fetch=self._fetches.preempt,
            prices=lambda: self.meter.prices,
        )
        self._tables = BlockTables(pool, memory, block_size=limits.block_size, writer=writer)
        self._durability = Durability(pool, limits.block_size)
        self._jobs = Jobs(limits, self.scheduler, self._fetches, self._outbox, matchers)
        self._streams = Streams(
            vocab_size=limits.vocab_size,
            jobs=self._jobs,
            scheduler=self.scheduler,
            tables=self._tables,
            durability=self._durability,
            outbox=self._outbox,
            sampler=sampler,
        )
        self._onboarding = Onboarding(
            limits=limits,
            scheduler=self.scheduler,
            fetches=self._fetches,
            tables=self._tables,
            meter=self.meter,
            jobs=self._jobs,
            streams=self._streams,
        )

    # --- what comes in ---------------------------------------------------------------------------------------------

    def on_dispatch(self, router: int, dispatch: Dispatch, now_s: float) -> None:
        """Takes on a dispatch, or answers `Failed` if it can never run here. A fence that is or was known is ignored."""
        self._jobs.start(router, dispatch, now_s)

    def on_first_tokens(self, router: int, fence: Fence, token_ids: list[int], now_s: float) -> None:
        """The tokens that prefill drew for this decode dispatch; only the first such message counts."""
        job = self._jobs.get(router, fence)
        if job is not None:
            self._streams.take_first_tokens(job, token_ids)

    def on_abort(self, router: int, fence: Fence, reason: str) -> None:
        """Drops a dispatch; `Aborted` follows when nothing of it is held any more (at once for an unknown fence)."""
        self._jobs.abort(router, fence, reason)

    def on_probe(self, router: int, fence: Fence) -> None:
        """The router asks after a dispatch that shows no sign of life: one that never arrived here, or is over, has failed."""
        if self._jobs.get(router, fence) is None:
            self._jobs.refuse(router, fence)
            self._outbox.reply(router, Failed(fence, WorkerLost.code, "this worker knows no such dispatch"))

    def on_audit(self, router: int, number: int) -> None:
        """Says what it owns, as far as the engine knows: whoever sends it fills in the rest."""
        num_stray = abs(self._pool.stats().referenced - len(self._jobs.block_ids()))
        self._outbox.reply(
            router, msgspec.structs.replace(self._jobs.account(router, number), num_stray_blocks=num_stray)
        )

    def on_stop_sample(self, router: int, fence: Fence, index: int) -> None:
        """Ends one sample of a decode role without a further message: the router has all it wants of it."""
        self._jobs.stop_sample(router, fence, index)

    def on_router_lost(self, router: int) -> None:
        """Drops everything that this router dispatched."""
        self._jobs.drop_router(router)

    def fence(self, writer: bytes) -> None:
        """This process is another incarnation from now on, `writer`: drops every dispatch. The blocks stay."""
        for router in list(self._jobs.num_dispatches):
            self._jobs.drop_router(router)
        self._tables.writer = writer

    def leave(self) -> None:
        """Refuses dispatches from now on, with `Failed` `draining`; those that are known go on."""
        self._jobs.leaving = True

    def give_back(self) -> None:
        """Ends every dispatch with `Failed` `draining`; the blocks stay findable."""
        self._jobs.give_back_all()

    def on_blocks(self, fetch_id: bytes, batch: FetchedBatch) -> None:
        """Verified blocks have been written where the plan said. They are used when the fetch has ended."""
        self._fetches.arrive(fetch_id, batch)

    def on_pools(self, pools: Sequence[Source]) -> None:
        """These pool nodes keep blocks of this group: a preempted sequence asks them for what it lost here."""
        self._onboarding.pools = tuple(pools)

    def on_fetch_ended(self, ended: FetchEnded, now_s: float) -> None:
        """A fetch is over: whoever waited for it goes on with what it brought, fetches the rest of what another one was to
        fetch, or ends if too little came."""
        self._onboarding.end_fetch(ended, now_s)

    # --- the step --------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something right now. Without, something new has to happen first: a message, the end
        of a fetch, a deadline, or room that another thread frees."""
        return self.scheduler.has_work

    @property
    def is_idle(self) -> bool:
        """Whether no dispatch is known at all."""
        return self._jobs.is_empty

    def step(self, now_s: float, clock: Callable[[], float]) -> Output:
        """One iteration: expire, admit, compute, postprocess. `clock` only measures how long the computation took."""
        self._jobs.expire(now_s)
        self._jobs.line_up()
        self._onboarding.admit(now_s)
        self._durability.update(self._decoding(), now_s)
        plan = self.scheduler.plan()
        if plan is None:
            return self.take_output()
        self._say_started(plan)
        if self.on_output is not None and not self._outbox.is_empty:
            self.on_output(self.take_output())
        logits = self._run(plan, clock)
        self._postprocess(plan, logits, clock())
        return self._outbox.take(computed=True)

    def take_output(self) -> Output:
        """What has to be said since the last call."""
        return self._outbox.take()

    def _say_started(self, plan: StepPlan) -> None:
        """Should the step be the last one of this process, its routers know what it computed."""
        for item in plan.scheduled:
            job = item.sequence.job
            if not job.started:
                job.started = True
                self._outbox.reply(job.router, Started(job.dispatch.fence))

    def _run(self, plan: StepPlan, clock: Callable[[], float]) -> torch.Tensor:
        for copy in plan.copies:
            self._memory.copy(copy.source, copy.target)
        chunks = []
        for item in plan.scheduled:
            sequence = item.sequence
            start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_tokens
            num_blocks = -(-end // self._block_size)
            chunks.append(
                Chunk(
                    token_ids=sequence.tokens[start:end],
                    start=start,
                    block_table=sequence.block_table[:num_blocks],
                    want_logits=sequence.draws and end == sequence.num_tokens,
                )
            )
        began_s = clock()
        logits = self._runner.run(chunks)
        self.meter.on_step(plan.scheduled, clock() - began_s)
        return logits

    def _postprocess(self, plan: StepPlan, logits: torch.Tensor, now_s: float) -> None:
        drawing: list[Seq] = []
        num_published = 0
        for item in plan.scheduled:
            sequence = item.sequence
            if not sequence.job.reported:
                sequence.job.computed_tokens += item.num_tokens
            sequence.num_computed_tokens += item.num_tokens
            num_published += self._tables.publish_computed(sequence)
            if sequence.num_missing_tokens:
                continue
            if sequence.draws:
                drawing.append(sequence)
            else:
                self._streams.caught_up(sequence, now_s)
        if num_published:
            self.on_published()
        if drawing:
            self._streams.draw(drawing, logits, now_s)

    def _decoding(self) -> list[Seq]:
        return [
            sequence
            for sequence in self.scheduler.holding
            if sequence.state is State.RUNNING and sequence.num_generated_tokens > 0
        ]

    # --- what is said of the engine ----------------------------------------------------------------------------------

    def loads(self) -> dict[int, Load]:
        """This worker's load by router: the same for all but for the number of dispatches taken in from each."""
        stats = self._pool.stats()
        to_compute = self._to_compute()
        generating = [
            sequence
            for sequence in (*self.scheduler.waiting, *self.scheduler.holding)
            if sequence.job.dispatch.fence.role == "decode"
        ]
        load = Load(
            num_waiting=len(self.scheduler.waiting),
            num_running=self.scheduler.num_running,
            waiting_tokens=sum(sequence.num_missing_tokens for sequence in to_compute),
            waiting_pairs=sum(sequence.num_missing_pairs for sequence in to_compute),
            num_generating=sum(sequence.num_future for sequence in generating),
            context_tokens=sum(sequence.num_future * sequence.num_tokens for sequence in generating),
            free_blocks=stats.allocatable,
            cached_blocks=stats.cached,
            leased_blocks=stats.leased,
            prefill_tokens_per_s=self.meter.prefill_tokens_per_s,
            decode_step_s=self.meter.decode_step_s,
            fetch_bytes_per_s=self.meter.fetch_bytes_per_s,
            prices=self.meter.prices,
        )
        return {
            router: msgspec.structs.replace(load, num_dispatches=count)
            for router, count in self._jobs.num_dispatches.items()
        }

    def counters(self) -> Counters:
        """Totals of the engine and its pool; the transfer thread adds what it counts itself."""
        stats = self._pool.stats()
        return Counters(
            steps=self.meter.num_steps,
            prefill_tokens=self.meter.num_prefill_tokens,
            decode_tokens=self.meter.num_decode_tokens,
            prefix_hit_tokens=self._onboarding.num_prefix_hit_tokens,
            recomputed_tokens=self._onboarding.num_recomputed_tokens,
            shared_blocks=self._onboarding.num_shared_blocks,
            preemptions=self.scheduler.num_preemptions,
            unprotected_streams=self._durability.num_unprotected,
            held_back_steps=self._durability.num_held_back,
            evicted_blocks=stats.evicted_total,
            expired_leases=stats.expired_leases_total,
            **self._jobs.num_ended,
        )

    def _to_compute(self) -> list[Seq]:
        """The sequences whose missing tokens this worker is going to compute, as far as it knows: not those of a hand-over, which
        come, nor the last token of one that is held."""
        return [
            *(sequence for sequence in self.scheduler.waiting if sequence.draws),
            *(
                sequence
                for sequence in self.scheduler.holding
                if sequence.state is State.RUNNING or (sequence.draws and sequence.state is State.FETCHING)
            ),
        ]
