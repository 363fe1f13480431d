"""How a sequence that was waiting gets its KV: room, what is here already, what others have; the rest is to be computed.

Owns the way from WAITING to RUNNING (or PARKED): whether and from whom a sequence fetches, what it shares with the
fetches of others, and what follows when a fetch ends, with everything, with holes, or with memory that can't be used
again. It never touches bytes, never computes, never draws.

    admitted ──► local hits ──► fetch, or wait for another's ──► what arrived without a hole ──► the rest is computed
                     └── nobody has more, or computing is faster ───────────────────────────────────►┘
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from kvpool.sink import FetchEnded, WantedBlock
from protos.control import FetchedFrom, Source
from tandem.engine.block_tables import BlockTables
from tandem.engine.fetching import Fetches
from tandem.engine.jobs import Jobs
from tandem.engine.limits import EngineLimits
from tandem.engine.meter import Meter
from tandem.engine.scheduler import Scheduler
from tandem.engine.sequence import Sequence, State
from tandem.engine.streams import Streams
from tandem.errors import FetchFailed


class Onboarding:
    """Admits sequences and carries them to the point from which they are computed.

    A sequence in FETCHING belongs to it: it goes on in `end_fetch`, when the last fetch that it waits for is over.
    """

    def __init__(
        self,
        *,
        limits: EngineLimits,
        scheduler: Scheduler,
        fetches: Fetches,
        tables: BlockTables,
        meter: Meter,
        jobs: Jobs,
        streams: Streams,
    ) -> None:
        self._limits = limits
        self._scheduler = scheduler
        self._fetches = fetches
        self._tables = tables
        self._meter = meter
        self._jobs = jobs
        self._streams = streams
        self.pools: tuple[Source, ...] = ()
        """Pool nodes that keep blocks of this group: a preempted sequence asks them for what it lost here."""
        self.num_prefix_hit_tokens = 0
        self.num_recomputed_tokens = 0
        """Tokens that had KV somewhere and are computed again."""
        self.num_shared_blocks = 0
        """Blocks that one fetch brings for several sequences."""

    def admit(self, now_s: float) -> None:
        """Admits whoever there is room for, in their order."""
        while (sequence := self._scheduler.admit()) is not None:
            job = sequence.job
            if job.admitted_s is None:
                job.admitted_s = now_s
            if not job.reported:
                job.local_hit_tokens = sequence.num_computed_tokens
                job.fetched_tokens = 0
            self._fetch_or_compute(sequence, now_s)

    def end_fetch(self, ended: FetchEnded, now_s: float) -> None:
        """A fetch is over: whoever waited for it goes on with what it brought, fetches the rest of what another one was to
        fetch, or ends if too little came. An unknown id is ignored."""
        waiting = self._fetches.end(ended.fetch_id)
        if not waiting:
            return
        owner, *sharers = waiting
        if ended.tainted:
            tainted = set(ended.tainted)
            for sequence in sharers:
                self._tables.let_go(sequence, tainted)
                self._start_over(sequence)
            sharers = []
            self._tables.retire(owner, tainted)
        goes_on = owner.state is State.FETCHING and not owner.job.aborting and not ended.tainted
        if not (goes_on and owner.is_waiting_for_blocks):
            self._take_arrived(owner, now_s)
        if owner.job.aborting:
            self._jobs.finish_abort(owner.job)
        elif owner.job.forked and owner.index in owner.job.stopped:
            self._jobs.finish_sample(owner)
        elif owner.state is State.WAITING or ended.tainted:
            self._start_over(owner)
        elif not owner.is_waiting_for_blocks:
            self._go_on(owner, now_s)
        for sequence in sharers:
            if not sequence.is_waiting_for_blocks and sequence.state is State.FETCHING:
                self._after_sharing(sequence, now_s)

    # --- what to get, and from whom ----------------------------------------------------------------------------------

    def _fetch_or_compute(self, sequence: Sequence, now_s: float) -> None:
        """Gets what the sequence lacks from others, where there are any and that is the faster way."""
        wanted = self._wanted(sequence)
        sources = self._sources(sequence)
        # A hand-over is fetched in any case: its computation is somebody else's.
        fetches = not sequence.draws or self._meter.fetching_is_faster(len(wanted), sequence.num_computed_tokens)
        if wanted and sources and fetches:
            self._fetch(sequence, wanted, sources, now_s)
        else:
            self._go_on(sequence, now_s)

    def _wanted(self, sequence: Sequence) -> tuple[WantedBlock, ...]:
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
        if partial is not None and not sequence.draws and sequence.num_missing_tokens:
            i = len(chain.keys)
            wanted.append(
                WantedBlock(partial, chain.parent_of(i), sequence.num_tokens - i * size, sequence.block_table[i])
            )
        return tuple(wanted)

    def _sources(self, sequence: Sequence) -> tuple[Source, ...]:
        """Whom to ask: those that the router named, and the pool for what was lost here."""
        named = sequence.job.dispatch.sources
        if not sequence.preempted:
            return tuple(named)
        known = {(source.process, source.epoch) for source in named}
        return (*named, *(pool for pool in self.pools if (pool.process, pool.epoch) not in known))

    def _fetch(
        self,
        sequence: Sequence,
        wanted: Many[WantedBlock],
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
        sequence.fetching_since_s = now_s
        own: list[WantedBlock] = []
        for block in wanted:
            found = self._fetches.under_way(block.key, wait_source) if share else None
            if found is None:
                own.append(block)
            else:
                their_block, fetch_id = found
                self._tables.share(sequence, block.block_id, their_block)
                self._fetches.share(fetch_id, sequence)
                self.num_shared_blocks += 1
        if not own:
            return
        held = job.dispatch.held_blocks
        self._fetches.start(
            sequence,
            own,
            sources,
            wait_source=wait_source,
            deadline_s=job.deadline_s if waits else min(job.deadline_s, now_s + self._limits.fetch_timeout_s),
            held=tuple(held) if len(held) == len(sources) and len(own) == len(wanted) else (),
        )

    # --- what came ---------------------------------------------------------------------------------------------------

    def _take_arrived(self, sequence: Sequence, now_s: float) -> None:
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
                self._tables.publish_fetched(sequence, block, found)
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
        if num_bytes and not job.dispatch.wait_source and now_s > sequence.fetching_since_s:
            self._meter.on_fetch(num_bytes, now_s - sequence.fetching_since_s)

    def _after_sharing(self, sequence: Sequence, now_s: float) -> None:
        """What others fetched is here, or did not come: then this one fetches the rest for itself, once."""
        self._take_arrived(sequence, now_s)
        wanted = self._wanted(sequence)
        sources = self._sources(sequence)
        if wanted and sources and self._tables.make_private(sequence, [block.block_id for block in wanted]):
            self._fetch(sequence, self._wanted(sequence), sources, now_s, share=False)
        else:
            self._go_on(sequence, now_s)

    def _start_over(self, sequence: Sequence) -> None:
        """Gives its blocks back and waits in line again; as soon as nothing is written into them any more. Till then it shares
        what it shared: who fetches that must hear from it should that be tainted too."""
        sequence.arrived = {}
        if sequence.fetch_id is None:
            self._fetches.leave(sequence)
            self._scheduler.requeue(sequence)
        elif sequence.state is State.FETCHING:
            self._fetches.preempt(sequence)

    def _go_on(self, sequence: Sequence, now_s: float) -> None:
        """The sequence has what it could find; the rest is computed, or is too much for this worker to decide."""
        job = sequence.job
        missing = sequence.num_missing_tokens
        if job.fetched_s is None:
            job.fetched_s = now_s
        if not job.reported:
            self.num_prefix_hit_tokens += job.local_hit_tokens
        if not sequence.draws and not job.reported and missing > self._limits.recompute_limit_tokens:
            self._jobs.fail(
                job,
                FetchFailed(
                    f"{missing} of {sequence.num_tokens} tokens could not be fetched; at most "
                    f"{self._limits.recompute_limit_tokens} are recomputed without asking"
                ),
            )
            return
        if job.reported or not sequence.draws:  # KV that existed: the hand-over's, or a preempted sequence's own
            self.num_recomputed_tokens += missing
        if missing:
            sequence.state = State.RUNNING
        else:
            self._streams.caught_up(sequence, now_s)
