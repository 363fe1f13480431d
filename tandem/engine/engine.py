"""The engine of one worker: schedule → run → postprocess (design §7).

Owns the jobs of this worker from dispatch to their end. Synchronous, called from one thread, given the time: it touches no
socket and no clock. What the world must be told or asked comes back as `Output`; fetched blocks and messages come in
through the `on_*` methods. Prefill and decode workers differ by the dispatches they get, not by code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch

from kvpool.block_pool import BlockPool
from kvpool.keys import Key, KeyChain, owner_of, tokens_from_bytes
from kvpool.sink import FetchedBatch, FetchEnded, FetchPlan, WantedBlock
from protos.control import (
    NOBODY,
    Aborted,
    Counters,
    Dispatch,
    Failed,
    Fence,
    FetchedFrom,
    FinishReason,
    Load,
    RoleReport,
    Source,
    Tokens,
)
from tandem.engine.durability import Durability
from tandem.engine.fetching import Fetches
from tandem.engine.runner import Chunk
from tandem.engine.sampler import Sampled, SampleRequest, sample
from tandem.engine.scheduler import Scheduler, StepPlan
from tandem.engine.sequence import Job, State
from tandem.engine.sequence import Sequence as Seq
from tandem.errors import DeadlineExceeded, FetchFailed, InvalidRequest, TandemError, WorkerLost

log = logging.getLogger(__name__)

FETCH_SETUP_S = 0.001
_SMOOTHING = 0.2
"""Weight of the newest measurement in the smoothed speeds of `Load`."""


class Memory(Protocol):
    """What the engine does to slabs itself; the runner writes KV, the sink writes what it fetches."""

    def checksum(self, block_id: int) -> bytes:
        """8 bytes over the whole slab."""

    def copy(self, source: int, target: int) -> None:
        """Copies a slab."""

    def zero_unused(self, block_id: int, num_tokens: int) -> None:
        """Zeroes the slots of a slab from `num_tokens` on."""


class Runner(Protocol):
    """Computes KV and logits of chunks (`tandem.engine.runner.Runner`)."""

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """fp32 logits `[num_chunks_that_want_logits, vocab_size]`, in order."""


Reply = Tokens | RoleReport | Failed | Aborted


@dataclass(slots=True)
class Output:
    """What the transfer thread is to do, in this order: cancels, promises, fetches, withdrawals, replies."""

    computed: bool = False
    """Whether the step ran the model: then blocks may have been published."""

    replies: list[tuple[int, Reply]] = field(default_factory=list)
    """`(router, message)`."""
    fetches: list[FetchPlan] = field(default_factory=list)
    cancels: list[bytes] = field(default_factory=list)
    promises: list[tuple[int, tuple[Key, ...]]] = field(default_factory=list)
    """`(job's arrival, keys)`: what that job is going to publish; fetches for it wait until the promise is withdrawn."""
    withdrawals: list[int] = field(default_factory=list)
    """Jobs that are over."""

    @property
    def is_empty(self) -> bool:
        return not (self.computed or self.replies or self.fetches or self.cancels or self.promises or self.withdrawals)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What a worker takes on. `max_model_len` counts prompt and answer."""

    max_model_len: int
    vocab_size: int
    max_running: int
    max_step_tokens: int
    recompute_limit_tokens: int
    fetch_timeout_s: float
    block_size: int
    slab_bytes: int


class Engine:
    """Turns dispatches into tokens.

    Every dispatch ends in exactly one of: `Tokens` with a finish reason for each sample, `Failed`, `Aborted`. With
    `has_work` False a `step` computes nothing, but it looks after deadlines and admits what there is room for: call it some
    times a second. `writer` is the epoch of this process: blocks that it computes carry it.
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
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._runner = runner
        self._limits = limits
        self._new_fetch_id = new_fetch_id
        self._writer = writer
        self._jobs: dict[tuple[int, Fence], Job] = {}
        self._fetches = Fetches()
        self._durability = Durability(pool, limits.block_size)
        self._pools: tuple[Source, ...] = ()
        self.on_output: Callable[[Output], None] | None = None
        """Takes what has to be said before a step computes, so that nobody waits for the step to hear it."""
        self.on_published: Callable[[], None] = lambda: None
        """Called when a step has published blocks, before it draws: whoever waits for them need not wait for that."""
        self._num_arrivals = 0
        self._num_dispatches: dict[int, int] = {}
        self._out = Output()
        self._count = dict.fromkeys(Counters.__struct_fields__, 0)
        self._prefill_tokens_per_s = 0.0
        self._decode_step_s = 0.0
        self._fetch_bytes_per_s = 0.0
        self.scheduler = Scheduler(
            pool,
            block_size=limits.block_size,
            max_running=limits.max_running,
            max_step_tokens=limits.max_step_tokens,
            cancel_fetch=self._cancel_fetch,
        )

    # --- what comes in ---------------------------------------------------------------------------------------------

    def on_dispatch(self, router: int, dispatch: Dispatch, now_s: float) -> None:
        """Takes on a dispatch, or answers `Failed` if it can never run here. A fence that is known already is ignored."""
        if (router, dispatch.fence) in self._jobs:
            return
        self._num_dispatches[router] = self._num_dispatches.get(router, 0) + 1
        try:
            tokens = self._checked_tokens(dispatch)
        except InvalidRequest as error:
            self._out.replies.append((router, Failed(dispatch.fence, error.code, str(error))))
            return
        job = Job(dispatch, router, self._num_arrivals, now_s, now_s + dispatch.deadline_s)
        self._num_arrivals += 1
        draws = dispatch.fence.role == "prefill" or dispatch.prefill_here
        chain = KeyChain(dispatch.root, self._limits.block_size, tokens)
        job.samples[dispatch.index] = Seq(job, dispatch.index, tokens, chain, draws)
        self._jobs[router, dispatch.fence] = job
        self.scheduler.add(job.trunk)
        if dispatch.fence.role == "prefill":
            self._out.promises.append((job.arrival, self._keys(job.trunk)))

    def on_first_tokens(self, router: int, fence: Fence, token_ids: list[int], now_s: float) -> None:
        """The tokens that prefill drew for this decode dispatch; only the first such message counts."""
        job = self._jobs.get((router, fence))
        if job is None or job.first_tokens is not None or job.trunk.draws:
            return
        if len(token_ids) != job.dispatch.n or max(token_ids) >= self._limits.vocab_size:
            log.error("%s: first tokens %s for %d samples are ignored", fence, token_ids, job.dispatch.n)
            return
        job.first_tokens = token_ids
        if job.trunk.state is State.PARKED:
            self._start_decoding(job)

    def on_abort(self, router: int, fence: Fence, reason: str) -> None:
        """Drops a dispatch; `Aborted` follows when nothing of it is held any more (at once for an unknown fence)."""
        job = self._jobs.get((router, fence))
        if job is None:
            self._out.replies.append((router, Aborted(fence)))
            return
        if job.aborting:
            return
        job.aborting = True
        job.aborted_in = _abort_counter(job)
        log.debug("%s is aborted: %s", fence, reason)
        self._out.cancels.extend(job.fetch_ids)
        if not job.fetch_ids:
            self._abort(job)

    def on_probe(self, router: int, fence: Fence) -> None:
        """The router asks after a dispatch that shows no sign of life: one that never arrived here, or is over, has failed."""
        if (router, fence) not in self._jobs:
            self._out.replies.append((router, Failed(fence, WorkerLost.code, "this worker knows no such dispatch")))

    def on_stop_sample(self, router: int, fence: Fence, index: int) -> None:
        """Ends one sample of a decode role without a further message: the router has all it wants of it."""
        job = self._jobs.get((router, fence))
        if job is None or fence.role == "prefill":
            return
        sequence = job.samples.get(index)
        if not job.forked:
            job.stopped.add(index)
        elif sequence is not None and sequence.fetch_id is not None:
            job.stopped.add(index)
            self._out.cancels.append(sequence.fetch_id)
        elif sequence is not None:
            self._finish_sample(job, sequence)

    def on_router_lost(self, router: int) -> None:
        """Drops everything that this router dispatched."""
        for owner, fence in list(self._jobs):
            if owner == router:
                self.on_abort(owner, fence, "its router is lost")
        self._num_dispatches.pop(router, None)

    def on_blocks(self, fetch_id: bytes, batch: FetchedBatch) -> None:
        """Verified blocks have been written where the plan said. They are used when the fetch has ended."""
        self._fetches.arrive(fetch_id, batch)

    def on_pools(self, pools: Sequence[Source]) -> None:
        """These pool nodes keep blocks of this group: a preempted sequence asks them for what it lost here."""
        self._pools = tuple(pools)

    def on_fetch_ended(self, ended: FetchEnded, now_s: float) -> None:
        """A fetch is over: whoever waited for it goes on with what it brought, fetches the rest of what another one was to
        fetch, or ends if too little came."""
        waiting = self._fetches.end(ended.fetch_id)
        if not waiting:
            return
        owner, *sharers = waiting
        if ended.tainted:
            for sequence in sharers:
                self._let_go(sequence, set(ended.tainted))
                self._start_over(sequence)
            sharers = []
            self._retire(owner, set(ended.tainted))
        goes_on = owner.state is State.FETCHING and not owner.job.aborting and not ended.tainted
        if not (goes_on and owner.is_waiting_for_blocks):
            self._take_arrived(owner, now_s)
        if owner.job.aborting:
            if not owner.job.fetch_ids:
                self._abort(owner.job)
        elif owner.job.forked and owner.index in owner.job.stopped:
            self._finish_sample(owner.job, owner)
        elif owner.state is State.WAITING or ended.tainted:
            self._start_over(owner)
        elif not owner.is_waiting_for_blocks:
            self._after_fetch(owner, now_s)
        for sequence in sharers:
            if not sequence.is_waiting_for_blocks and sequence.state is State.FETCHING:
                self._after_sharing(sequence, now_s)

    # --- the step --------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something right now. Without, something new has to happen first: a message, the end
        of a fetch, a deadline, or room that another thread frees."""
        return self.scheduler.has_work

    @property
    def is_idle(self) -> bool:
        """Whether no dispatch is known at all."""
        return not self._jobs

    def step(self, now_s: float, clock: Callable[[], float]) -> Output:
        """One iteration: expire, admit, compute, postprocess. `clock` only measures how long the computation took."""
        self._expire(now_s)
        self._admit(now_s)
        self._durability.update(self._decoding(), now_s)
        plan = self.scheduler.plan()
        if plan is not None:
            if self.on_output is not None and not self._out.is_empty:
                self.on_output(self.take_output())
            logits = self._run(plan, clock)
            self._postprocess(plan, logits, clock())
            self._out.computed = True
        return self.take_output()

    def take_output(self) -> Output:
        """What has to be said since the last call."""
        out, self._out = self._out, Output()
        return out

    def loads(self) -> dict[int, Load]:
        """This worker's load by router: the same for all but for the number of dispatches taken in from each."""
        stats = self._pool.stats()
        scheduler = self.scheduler
        load = Load(
            num_waiting=len(scheduler.waiting),
            num_running=scheduler.num_running,
            waiting_tokens=sum(seq.num_missing_tokens for seq in self._to_compute()),
            free_blocks=stats.allocatable,
            cached_blocks=stats.cached,
            leased_blocks=stats.leased,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            decode_step_s=self._decode_step_s,
            fetch_bytes_per_s=self._fetch_bytes_per_s,
        )
        return {
            router: msgspec.structs.replace(load, num_dispatches=count)
            for router, count in self._num_dispatches.items()
        }

    def counters(self) -> Counters:
        """Totals of the engine and its pool; the transfer thread adds what it counts itself."""
        stats = self._pool.stats()
        totals = self._count | {
            "preemptions": self.scheduler.num_preemptions,
            "unprotected_streams": self._durability.num_unprotected,
            "held_back_steps": self._durability.num_held_back,
            "evicted_blocks": stats.evicted_total,
            "expired_leases": stats.expired_leases_total,
        }
        return Counters(**totals)

    # --- admission -------------------------------------------------------------------------------------------------

    def _checked_tokens(self, dispatch: Dispatch) -> list[int]:
        try:
            tokens = tokens_from_bytes(dispatch.token_ids)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        limits = self._limits
        if not tokens or dispatch.num_prompt_tokens > len(tokens):
            raise InvalidRequest(f"{len(tokens)} tokens with a prompt of {dispatch.num_prompt_tokens}")
        if max(tokens) >= limits.vocab_size:
            raise InvalidRequest(f"token id {max(tokens)} is not below the vocabulary's {limits.vocab_size}")
        num_tokens = dispatch.num_prompt_tokens + dispatch.sampling.max_tokens
        if num_tokens > limits.max_model_len:
            raise InvalidRequest(
                f"prompt and answer are {num_tokens} tokens, this worker holds at most {limits.max_model_len}"
            )
        if len(tokens) >= num_tokens:
            raise InvalidRequest(f"{len(tokens)} tokens leave nothing of {num_tokens} to generate")
        if dispatch.n > limits.max_running:
            raise InvalidRequest(f"{dispatch.n} samples, this worker runs at most {limits.max_running} sequences")
        return tokens

    def _admit(self, now_s: float) -> None:
        while (sequence := self.scheduler.admit()) is not None:
            job = sequence.job
            if job.admitted_s is None:
                job.admitted_s = now_s
            if not job.reported:
                job.local_hit_tokens = sequence.num_computed_tokens
                job.fetched_tokens = 0
            self._fetch_or_compute(sequence, now_s)

    def _fetch_or_compute(self, sequence: Seq, now_s: float) -> None:
        """Gets what the sequence lacks from others, where there are any and that is the faster way."""
        wanted = self._wanted(sequence)
        sources = self._sources(sequence)
        if wanted and sources and self._worth_fetching(sequence, len(wanted)):
            self._fetch(sequence, wanted, sources, now_s)
        else:
            self._after_fetch(sequence, now_s)

    def _sources(self, sequence: Seq) -> tuple[Source, ...]:
        """Whom to ask: those that the router named, and the pool for what was lost here."""
        named = sequence.job.dispatch.sources
        if not sequence.preempted:
            return tuple(named)
        known = {(source.process, source.epoch) for source in named}
        return (*named, *(pool for pool in self._pools if (pool.process, pool.epoch) not in known))

    def _worth_fetching(self, sequence: Seq, num_blocks: int) -> bool:
        """By predicted seconds. A hand-over is fetched in any case: its computation is somebody else's."""
        if not sequence.draws or not self._fetch_bytes_per_s or not self._prefill_tokens_per_s:
            return True
        fetch_s = FETCH_SETUP_S + num_blocks * self._limits.slab_bytes / self._fetch_bytes_per_s
        return fetch_s < num_blocks * self._limits.block_size / self._prefill_tokens_per_s

    def _wanted(self, sequence: Seq) -> tuple[WantedBlock, ...]:
        """The blocks to fetch: all that are not computed, but those that have to be computed to draw a token."""
        size = self._limits.block_size
        chain = sequence.chain
        first = sequence.num_computed_tokens // size
        last = (sequence.num_tokens - sequence.draws) // size
        dispatch = sequence.job.dispatch
        if dispatch.held_blocks and not dispatch.wait_source and not sequence.preempted:
            last = min(last, max(dispatch.held_blocks))  # nobody has more
        wanted = [
            WantedBlock(chain.keys[i], chain.parent_of(i), size, sequence.block_table[i]) for i in range(first, last)
        ]
        partial = chain.partial_key()
        if partial is not None and not sequence.draws:
            i = len(chain.keys)
            wanted.append(
                WantedBlock(partial, chain.parent_of(i), sequence.num_tokens - i * size, sequence.block_table[i])
            )
        return tuple(wanted)

    def _fetch(
        self,
        sequence: Seq,
        wanted: Sequence[WantedBlock],
        sources: tuple[Source, ...],
        now_s: float,
        share: bool = True,
    ) -> None:
        """Starts to fetch what nobody else here is fetching, and waits for the rest with whoever does."""
        job = sequence.job
        # Who waits for a prefill waits as long as the request may; the source says so when that prefill is over.
        waits = bool(job.dispatch.wait_source) and not job.reported
        wait_source = job.dispatch.wait_source if waits else ""
        sequence.state = State.FETCHING
        own: list[WantedBlock] = []
        for block in wanted:
            found = self._fetches.under_way(block.key, wait_source) if share else None
            if found is None:
                own.append(block)
            else:
                self._share(sequence, block, *found)
        if not own:
            return
        held = job.dispatch.held_blocks
        fetch_id = self._new_fetch_id()
        self._fetches.start(fetch_id, sequence, own, wait_source, self._limits.block_size)
        self._out.fetches.append(
            FetchPlan(
                fetch_id=fetch_id,
                request_id=job.dispatch.fence.request_id,
                wanted=tuple(own),
                sources=sources,
                wait_source=wait_source,
                deadline_s=job.deadline_s if waits else min(job.deadline_s, now_s + self._limits.fetch_timeout_s),
                order=job.arrival,
                first_block=sequence.num_computed_tokens // self._limits.block_size,
                held=tuple(held) if len(held) == len(sources) and len(own) == len(wanted) else (),
            )
        )

    def _share(self, sequence: Seq, block: WantedBlock, their_block: int, fetch_id: bytes) -> None:
        """Puts the block that another sequence's fetch is filling in the place of its own."""
        self._pool.retain([their_block])
        sequence.block_table[sequence.block_table.index(block.block_id)] = their_block
        self._pool.release([block.block_id])
        self._fetches.share(fetch_id, sequence)
        self._count["shared_blocks"] += 1

    def _after_sharing(self, sequence: Seq, now_s: float) -> None:
        """What others fetched is here, or did not come: then this one fetches the rest for itself, once."""
        self._take_arrived(sequence, now_s)
        wanted = self._wanted(sequence)
        sources = self._sources(sequence)
        if wanted and sources and self._make_private(sequence, wanted):
            self._fetch(sequence, self._wanted(sequence), sources, now_s, share=False)
        else:
            self._after_fetch(sequence, now_s)

    def _make_private(self, sequence: Seq, wanted: Sequence[WantedBlock]) -> bool:
        """Puts blocks of its own in the place of those that another sequence owns too, into which nothing can be fetched. False
        if there is no room for them; computing makes it."""
        shared = [block.block_id for block in wanted if self._pool.is_shared(block.block_id)]
        fresh = self._pool.allocate(len(shared))
        if fresh is None:
            return False
        for old, new in zip(shared, fresh, strict=True):
            sequence.block_table[sequence.block_table.index(old)] = new
            self._pool.release([old])
        return True

    def _to_compute(self) -> list[Seq]:
        """The sequences whose missing tokens this worker is going to compute, as far as it knows: not those of a hand-over, which
        come, nor the last token of one that is held."""
        scheduler = self.scheduler
        return [
            *(sequence for sequence in scheduler.waiting if sequence.draws),
            *(
                sequence
                for sequence in scheduler.holding
                if sequence.state is State.RUNNING or (sequence.draws and sequence.state is State.FETCHING)
            ),
        ]

    def _decoding(self) -> list[Seq]:
        return [
            sequence
            for sequence in self.scheduler.holding
            if sequence.state is State.RUNNING and sequence.num_generated_tokens > 0
        ]

    def _let_go(self, sequence: Seq, tainted: set[int]) -> None:
        """Its owner retires these blocks; a sequence that is about to start over needs no table without holes."""
        shared = [block for block in sequence.block_table if block in tainted]
        sequence.block_table = [block for block in sequence.block_table if block not in tainted]
        self._pool.release(shared)

    def _start_over(self, sequence: Seq) -> None:
        """Gives its blocks back and waits in line again; as soon as nothing is written into them any more."""
        self._fetches.leave(sequence)
        sequence.arrived = {}
        if sequence.fetch_id is None:
            self.scheduler.requeue(sequence)
        elif sequence.state is State.FETCHING:
            self._cancel_fetch(sequence)

    def _cancel_fetch(self, sequence: Seq) -> None:
        """Preemption of a fetch: it gives its blocks back when the sink has let go of them."""
        assert sequence.fetch_id is not None
        sequence.state = State.WAITING
        self._out.cancels.append(sequence.fetch_id)

    def _retire(self, sequence: Seq, tainted: set[int]) -> None:
        """Takes blocks that a transport may still write to out of the table, and out of use."""
        bad = [block for block in sequence.block_table if block in tainted]
        first = min(sequence.block_table.index(block) for block in bad)
        kept, dropped = sequence.block_table[:first], sequence.block_table[first:]
        self._pool.retire(bad)
        self._pool.release([block for block in dropped if block not in tainted])
        sequence.block_table = kept

    def _take_arrived(self, sequence: Seq, now_s: float) -> None:
        """Counts the blocks that came as computed and makes them findable here, as far as they follow one another without
        a hole: what lies behind one is computed again, into the same memory."""
        job = sequence.job
        size = self._limits.block_size
        arrived, sequence.arrived = sequence.arrived, {}
        num_fetched_tokens = 0
        totals: dict[tuple[str, str, str], int] = {}
        for block in list(sequence.block_table[sequence.num_computed_tokens // size :]):
            if block not in arrived:
                break
            found, batch = arrived[block]
            sequence.num_computed_tokens += found.num_tokens
            if found.num_tokens == size:
                self._publish(
                    sequence, block, found.key, found.parent, found.checksum, writer=found.writer, owner=found.owner
                )
                sequence.num_published_blocks += 1
            num_fetched_tokens += found.num_tokens
            origin = (batch.source.process, batch.source.tier, batch.transport)
            totals[origin] = totals.get(origin, 0) + 1
        slab_bytes = self._limits.slab_bytes
        fetched = [FetchedFrom(*origin, num, num * slab_bytes) for origin, num in totals.items()]  # type: ignore[arg-type]
        if not job.reported:
            job.fetched_s = now_s
            job.fetched_tokens = num_fetched_tokens
            job.fetched = fetched
        num_bytes = sum(item.num_bytes for item in fetched)
        if num_bytes and not job.dispatch.wait_source and job.admitted_s is not None and now_s > job.admitted_s:
            self._fetch_bytes_per_s = _smoothed(self._fetch_bytes_per_s, num_bytes / (now_s - job.admitted_s))

    def _after_fetch(self, sequence: Seq, now_s: float) -> None:
        """The sequence has what it could find; the rest is computed, or is too much for this worker to decide."""
        job = sequence.job
        missing = sequence.num_missing_tokens
        if job.fetched_s is None:
            job.fetched_s = now_s
        if not job.reported:
            self._count["prefix_hit_tokens"] += job.local_hit_tokens
        if not sequence.draws and not job.reported and missing > self._limits.recompute_limit_tokens:
            self._fail(
                job,
                FetchFailed(
                    f"{missing} of {sequence.num_tokens} tokens could not be fetched; at most "
                    f"{self._limits.recompute_limit_tokens} are recomputed without asking"
                ),
            )
            return
        if job.reported or not sequence.draws:  # KV that existed: the hand-over's, or a preempted sequence's own
            self._count["recomputed_tokens"] += missing
        if missing:
            sequence.state = State.RUNNING
        else:
            self._caught_up_without_drawing(sequence, now_s)

    # --- computing -------------------------------------------------------------------------------------------------

    def _run(self, plan: StepPlan, clock: Callable[[], float]) -> torch.Tensor:
        for copy in plan.copies:
            self._memory.copy(copy.source, copy.target)
        chunks = []
        for item in plan.scheduled:
            sequence = item.sequence
            start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_tokens
            num_blocks = -(-end // self._limits.block_size)
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
        self._measure(plan, clock() - began_s)
        return logits

    def _measure(self, plan: StepPlan, seconds: float) -> None:
        num_tokens = sum(item.num_tokens for item in plan.scheduled)
        num_decode = sum(item.num_tokens == 1 and item.sequence.num_generated_tokens > 0 for item in plan.scheduled)
        self._count["steps"] += 1
        self._count["decode_tokens"] += num_decode
        self._count["prefill_tokens"] += num_tokens - num_decode
        if num_decode == num_tokens:
            self._decode_step_s = _smoothed(self._decode_step_s, seconds)
        elif num_tokens - num_decode >= 4 * self._limits.block_size and seconds > 0:
            self._prefill_tokens_per_s = _smoothed(self._prefill_tokens_per_s, (num_tokens - num_decode) / seconds)

    def _postprocess(self, plan: StepPlan, logits: torch.Tensor, now_s: float) -> None:
        drawing: list[Seq] = []
        num_published = 0
        for item in plan.scheduled:
            sequence = item.sequence
            if not sequence.job.reported:
                sequence.job.computed_tokens += item.num_tokens
            sequence.num_computed_tokens += item.num_tokens
            num_published += self._publish_full_blocks(sequence)
            if sequence.num_missing_tokens:
                continue
            if sequence.draws:
                drawing.append(sequence)
            else:
                self._caught_up_without_drawing(sequence, now_s)
        if num_published:
            self.on_published()
        if drawing:
            self._draw(drawing, logits, now_s)

    def _publish_full_blocks(self, sequence: Seq) -> int:
        """How many there were."""
        size = self._limits.block_size
        first = sequence.num_published_blocks
        for i in range(sequence.num_published_blocks, sequence.num_computed_tokens // size):
            block = sequence.block_table[i]
            self._publish(
                sequence,
                block,
                sequence.chain.keys[i],
                sequence.chain.parent_of(i),
                self._memory.checksum(block),
                writer=self._writer,
                owner=owner_of(sequence.chain.root),
            )
            sequence.num_published_blocks = i + 1
        return sequence.num_published_blocks - first

    def _publish(
        self, sequence: Seq, block: int, key: Key, parent: Key, checksum: bytes, *, writer: bytes, owner: bytes
    ) -> None:
        """Makes a full block of `sequence` findable. If another one was first, `sequence` goes on with that block: a duplicate
        would hold the other one against eviction, as its parent, and never be found itself."""
        size = self._limits.block_size
        with self._pool.lock:
            known = self._pool.lookup(key)
            if known is not None and known.block_id == block:
                return  # it came for two
            if not self._pool.publish(block, key, parent, size, checksum, writer=writer, owner=owner):
                index = sequence.block_table.index(block)
                sequence.block_table[index : index + 1] = self._pool.match([key])
                self._pool.release([block])

    def _draw(self, drawing: list[Seq], logits: torch.Tensor, now_s: float) -> None:
        """Draws the next token of each of `drawing`, whose logits are the rows of `logits`; an unforked one draws `n`."""
        rows: list[int] = []
        requests: list[SampleRequest] = []
        for row, sequence in enumerate(drawing):
            job = sequence.job
            num_samples = 1 if job.forked else job.dispatch.n
            prompt, output = _history(sequence)
            for index in range(sequence.index, sequence.index + num_samples):
                rows.append(row)
                requests.append(
                    SampleRequest(
                        sampling=job.dispatch.sampling,
                        sample_index=index,
                        position=sequence.num_generated_tokens,
                        prompt_token_ids=prompt,
                        output_token_ids=output,
                    )
                )
        drawn = iter(sample(logits if len(rows) == len(drawing) else logits[rows], requests))
        for sequence in drawing:
            job = sequence.job
            first = not job.forked
            samples = self._fork(job) if first else [sequence]
            if first:
                self._report(job, now_s)
            for sibling in samples:
                self._take_token(job, sibling, next(drawn))
            if first and job.dispatch.fence.role == "prefill" and job.samples:
                self._hold(job, now_s)

    def _fork(self, job: Job) -> list[Seq]:
        """Makes the trunk into `n` samples that share all its blocks; whoever writes to a shared block copies it first."""
        trunk = job.trunk
        job.forked = True
        samples = [trunk]
        for index in range(trunk.index + 1, trunk.index + job.dispatch.n):
            chain = KeyChain(job.dispatch.root, self._limits.block_size, trunk.tokens)
            sibling = Seq(job, index, list(trunk.tokens), chain, trunk.draws, trunk.state, list(trunk.block_table))
            sibling.num_computed_tokens = trunk.num_computed_tokens
            sibling.num_published_blocks = trunk.num_published_blocks
            self._pool.retain(sibling.block_table)
            job.samples[index] = sibling
            self.scheduler.adopt(sibling)
            samples.append(sibling)
        return samples

    def _take_token(self, job: Job, sequence: Seq, drawn: Sampled) -> None:
        sampling = job.dispatch.sampling
        position = sequence.num_generated_tokens
        reason: FinishReason | None = None
        token_ids = [drawn.token_id]
        logprobs = [drawn.logprobs] if drawn.logprobs is not None else []
        if drawn.token_id in sampling.stop_token_ids and position >= sampling.min_tokens:
            reason, token_ids, logprobs = "stop", [], []
        else:
            sequence.append(drawn.token_id)
            if position + 1 >= sampling.max_tokens:
                reason = "length"
        self._out.replies.append(
            (
                job.router,
                Tokens(
                    fence=job.dispatch.fence,
                    index=sequence.index,
                    position=position,
                    token_ids=token_ids,
                    logprobs=logprobs,
                    finish_reason=reason,
                    durable_position=self._durability.position(sequence),
                ),
            )
        )
        if reason is not None:
            self._finish_sample(job, sequence)

    def _hold(self, job: Job, now_s: float) -> None:
        """Prefill is done: the blocks stay, the last partial one findable for the hand-over alone."""
        trunk = job.trunk
        job.hold_until_s = now_s + job.dispatch.hold_s
        for sequence in job.samples.values():
            sequence.state = State.HELD
        num_tokens = trunk.num_computed_tokens
        tail = num_tokens % self._limits.block_size
        if tail:
            chain = KeyChain(job.dispatch.root, self._limits.block_size, trunk.tokens[:num_tokens])
            key = chain.partial_key()
            assert key is not None
            index = num_tokens // self._limits.block_size
            block = trunk.block_table[index]
            self._memory.zero_unused(block, tail)
            parent = chain.parent_of(len(chain.keys))
            with self._pool.lock:
                checksum = self._memory.checksum(block)
                if not self._pool.publish(
                    block, key, parent, tail, checksum, announce=False, writer=self._writer, owner=owner_of(chain.root)
                ):
                    # Another job holds the same prompt: this one holds its block too, or it would go with that job.
                    trunk.block_table[index : index + 1] = self._pool.match([key])
                    self._pool.release([block])

    def _caught_up_without_drawing(self, sequence: Seq, now_s: float) -> None:
        """The KV of a decode role is complete; it goes on as soon as its first tokens are there."""
        job = sequence.job
        sequence.state = State.PARKED
        self._report(job, now_s)
        if job.first_tokens is not None:
            self._start_decoding(job)

    def _start_decoding(self, job: Job) -> None:
        assert job.first_tokens is not None
        job.trunk.state = State.RUNNING
        for sequence, token in zip(self._fork(job), job.first_tokens, strict=True):
            if token < 0 or sequence.index in job.stopped:
                self._finish_sample(job, sequence)
                continue
            sequence.draws = True
            sequence.append(token)

    # --- ends ------------------------------------------------------------------------------------------------------

    def _report(self, job: Job, now_s: float) -> None:
        if job.reported:
            return
        job.reported = True
        admitted_s = job.received_s if job.admitted_s is None else job.admitted_s
        fetched_s = admitted_s if job.fetched_s is None else job.fetched_s
        self._out.replies.append(
            (
                job.router,
                RoleReport(
                    fence=job.dispatch.fence,
                    local_hit_tokens=job.local_hit_tokens,
                    fetched_tokens=job.fetched_tokens,
                    computed_tokens=job.computed_tokens,
                    fetched=job.fetched,
                    queue_s=admitted_s - job.received_s,
                    fetch_s=fetched_s - admitted_s,
                    compute_s=now_s - fetched_s,
                ),
            )
        )

    def _finish_sample(self, job: Job, sequence: Seq) -> None:
        self._fetches.leave(sequence)
        self.scheduler.finish(sequence)
        del job.samples[sequence.index]
        if not job.samples:
            self._count["finished"] += 1
            self._forget(job)

    def _drop(self, job: Job) -> None:
        """Gives back all that a job holds; nothing of it may be in a fetch any more."""
        assert not job.fetch_ids
        for sequence in list(job.samples.values()):
            self._fetches.leave(sequence)
            self.scheduler.finish(sequence)
        job.samples.clear()
        self._forget(job)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.router, job.dispatch.fence]
        if job.dispatch.fence.role == "prefill":
            self._out.withdrawals.append(job.arrival)

    def _abort(self, job: Job) -> None:
        self._count[job.aborted_in] += 1
        self._drop(job)
        self._out.replies.append((job.router, Aborted(job.dispatch.fence)))

    def _fail(self, job: Job, error: TandemError) -> None:
        self._drop(job)
        self._out.replies.append((job.router, Failed(job.dispatch.fence, error.code, str(error)[:4096])))

    def _expire(self, now_s: float) -> None:
        for job in list(self._jobs.values()):
            if job.trunk.state is State.HELD and now_s >= job.hold_until_s:
                log.warning("%s: nobody fetched the prompt's KV within %.1f s", job.dispatch.fence, job.dispatch.hold_s)
                job.aborted_in = _abort_counter(job)
                self._abort(job)
            elif now_s >= job.deadline_s and not job.aborting:
                if job.fetch_ids:
                    self.on_abort(job.router, job.dispatch.fence, "deadline")
                else:
                    self._fail(job, DeadlineExceeded("the request's deadline passed on the worker"))

    def _keys(self, sequence: Seq) -> tuple[Key, ...]:
        partial = sequence.chain.partial_key()
        return (*sequence.chain.keys, *([partial] if partial else []))


def _abort_counter(job: Job) -> str:
    """Which of `Counters` the end of a job in its present state counts in."""
    if job.fetch_ids:
        return "aborted_fetching"
    states = {sequence.state for sequence in job.samples.values()}
    if State.HELD in states:
        return "released_holds"
    if states == {State.WAITING}:
        return "aborted_waiting"
    return "aborted_decode" if job.forked and job.dispatch.fence.role == "decode" else "aborted_prefill"


def _history(sequence: Seq) -> tuple[list[int], list[int]]:
    """Prompt and generated tokens, where the sampling looks at them: copying thousands of ids a token costs time."""
    sampling = sequence.job.dispatch.sampling
    if sampling.repetition_penalty == 1.0 and not sampling.presence_penalty and not sampling.frequency_penalty:
        return [], []
    length = sequence.job.dispatch.num_prompt_tokens
    return sequence.tokens[:length], sequence.tokens[length:]


def _smoothed(old: float, new: float) -> float:
    return new if old == 0 else old + _SMOOTHING * (new - old)
