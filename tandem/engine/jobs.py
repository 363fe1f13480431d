"""The jobs of this worker, from dispatch to end.

Owns which dispatches are known, and every way in which they and their samples end: whatever it is, all that a job holds
is given back and it is said exactly once. It computes nothing and fetches nothing. Memory that a fetch may still write
into is not given back before that fetch has ended: till then the end of its job waits.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future

from kvpool.block_pool import BlockId
from kvpool.keys import Key, KeyChain
from protos.control import MAX_AUDITED_FENCES, Aborted, Dispatch, Failed, Fence, Grammar, Owned, RoleReport
from tandem.engine.fetching import Fetches
from tandem.engine.limits import EngineLimits
from tandem.engine.output import Outbox
from tandem.engine.scheduler import Scheduler
from tandem.engine.sequence import Job, Sequence, State
from tandem.errors import DeadlineExceeded, Draining, InvalidRequest, TandemError
from tandem.grammar.matcher import Matcher, MatcherSource
from tandem.logs import about

log = logging.getLogger(__name__)

MAX_OVER = 4096
"""So many dispatches that are over are remembered."""
_LEAVING = "this worker is leaving"
_ENDS = ("finished", "aborted_waiting", "aborted_fetching", "aborted_prefill", "aborted_decode", "released_holds")


class Jobs:
    """Every dispatch that is not over.

    A job ends by its last `finish_sample`, by `fail`, by `give_back_all` or by `abort`; where that had to wait for fetches,
    `finish_abort` completes it. Once it is `leaving`, new dispatches are refused.
    """

    def __init__(
        self,
        limits: EngineLimits,
        scheduler: Scheduler,
        fetches: Fetches,
        outbox: Outbox,
        matchers: MatcherSource | None,
    ) -> None:
        self._limits = limits
        self._scheduler = scheduler
        self._fetches = fetches
        self._outbox = outbox
        self._matchers = matchers
        self._jobs: dict[tuple[int, Fence], Job] = {}
        self._compiling: dict[tuple[int, Fence], Future[Matcher]] = {}
        """What those jobs wait for that are not in line yet."""
        self._over: dict[tuple[int, Fence], None] = {}
        self._num_arrivals = 0
        self.leaving = False
        self.num_dispatches: dict[int, int] = {}
        """Dispatches taken in so far from each router that is not lost, refused ones too."""
        self.num_ended = dict.fromkeys(_ENDS, 0)
        """Jobs that finished or were aborted, by the field of `Counters`."""

    @property
    def is_empty(self) -> bool:
        return not self._jobs

    def account(self, router: int, number: int) -> Owned:
        """What an audit wants to know of the dispatches."""
        fences = [fence for owner, fence in self._jobs if owner == router]
        return Owned(number, num_jobs=len(self._jobs), fences=fences[:MAX_AUDITED_FENCES])

    def block_ids(self) -> set[BlockId]:
        """The blocks that the sequences have."""
        return {block for job in self._jobs.values() for sample in job.samples.values() for block in sample.block_table}

    def get(self, router: int, fence: Fence) -> Job | None:
        """None for a dispatch that never came, or is over."""
        return self._jobs.get((router, fence))

    # --- the begin ---------------------------------------------------------------------------------------------------

    def start(self, router: int, dispatch: Dispatch, now_s: float) -> None:
        """Takes on a dispatch, or answers `Failed` if it can never run here. A fence that is or was known is ignored: the message
        came twice, or after the one that ended it."""
        if (router, dispatch.fence) in self._jobs or (router, dispatch.fence) in self._over:
            return
        self.num_dispatches[router] = self.num_dispatches.get(router, 0) + 1
        if self.leaving:
            self._outbox.reply(router, _failed(dispatch.fence, Draining(_LEAVING)))
            return
        try:
            tokens = self._limits.checked_tokens(dispatch)
        except InvalidRequest as error:
            self._outbox.reply(router, _failed(dispatch.fence, error))
            return
        job = Job(dispatch, router, self._num_arrivals, now_s, now_s + dispatch.deadline_s, now_s + dispatch.due_s)
        self._num_arrivals += 1
        draws = dispatch.fence.role == "prefill" or dispatch.prefill_here
        chain = KeyChain(dispatch.root, self._limits.block_size, tokens)
        job.samples[dispatch.index] = Sequence(job, dispatch.index, tokens, chain, draws)
        self._jobs[router, dispatch.fence] = job
        log.debug("%s taken in: %d tokens", dispatch.fence.role, len(tokens), extra=_about(dispatch.fence))
        if dispatch.fence.role == "prefill":
            self._outbox.promise(job.arrival, _keys(chain))
        grammar = dispatch.sampling.grammar
        if not isinstance(grammar, Grammar):
            self._scheduler.add(job.trunk)
        elif self._matchers is None:
            self.fail(
                job, InvalidRequest("a grammar is given, and this worker's model has no vocabulary to hold it to")
            )
        else:
            self._compiling[router, dispatch.fence] = self._matchers.begin(
                grammar, tokens[dispatch.num_prompt_tokens :]
            )

    def line_up(self) -> None:
        """Those whose grammar has been compiled get in line."""
        for key, future in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[key]
            job = self._jobs[key]
            try:
                job.trunk.matcher = future.result()
            except TandemError as error:
                self.fail(job, error)
            except Exception as error:  # nobody waits for ever, and others go on
                log.exception("%s: its grammar could not be compiled", job.dispatch.fence)
                self.fail(job, TandemError(f"the grammar could not be compiled: {error}"))
            else:
                self._scheduler.add(job.trunk)

    def report(self, job: Job, now_s: float) -> None:
        """Says once how the job came to its KV, which is complete."""
        if job.reported:
            return
        job.reported = True
        admitted_s = job.received_s if job.admitted_s is None else job.admitted_s
        fetched_s = admitted_s if job.fetched_s is None else job.fetched_s
        self._outbox.reply(
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
        log.debug(
            "%s has its KV: %d tokens here, %d fetched, %d computed",
            job.dispatch.fence.role,
            job.local_hit_tokens,
            job.fetched_tokens,
            job.computed_tokens,
            extra=_about(job.dispatch.fence),
        )

    # --- the ends ----------------------------------------------------------------------------------------------------

    def finish_sample(self, sequence: Sequence) -> None:
        """The sample, which has no fetch of its own, is over and gives back all it holds; with the last one its job is."""
        self._remove(sequence)
        if not sequence.job.samples:
            self.num_ended["finished"] += 1
            fence = sequence.job.dispatch.fence
            log.debug("%s is finished", fence.role, extra=_about(fence))
            self._forget(sequence.job)

    def stop_sample(self, router: int, fence: Fence, index: int) -> None:
        """Ends one sample of a decode role without a further message: at the fork if that is still to come, after its own
        fetch if one is running, else now."""
        job = self._jobs.get((router, fence))
        if job is None or fence.role == "prefill":
            return
        sequence = job.samples.get(index)
        if not job.forked:
            job.stopped.add(index)
        elif sequence is not None and sequence.fetch_id is not None:
            job.stopped.add(index)
            self._fetches.cancel(sequence)
        elif sequence is not None:
            self.finish_sample(sequence)

    def fail(self, job: Job, error: TandemError) -> None:
        """Ends a job of which nothing is in a fetch with `Failed`."""
        assert not job.fetch_ids
        for sequence in list(job.samples.values()):
            self._remove(sequence)
        self._forget(job)
        log.info("%s failed, %s", job.dispatch.fence.role, error.code, extra=_about(job.dispatch.fence))
        self._outbox.reply(job.router, _failed(job.dispatch.fence, error))

    def break_off(self, job: Job, error: TandemError) -> None:
        """Ends a job with `Failed` as soon as nothing of it is in a fetch; its samples don't go on."""
        job.error = error
        self._drop(job)

    def abort(self, router: int, fence: Fence, reason: str) -> None:
        """Drops a dispatch; `Aborted` follows when nothing of it is held any more (at once for an unknown fence)."""
        job = self._jobs.get((router, fence))
        if job is None:
            self.refuse(router, fence)
            self._outbox.reply(router, Aborted(fence))
            return
        if job.aborting:
            return
        log.debug("%s is aborted: %s", fence.role, reason, extra=_about(fence))
        self._drop(job)

    def give_back_all(self) -> None:
        """Drops every dispatch with `Failed` `draining`, by which its router knows that somebody else is to go on with it."""
        for job in list(self._jobs.values()):
            if not job.aborting:
                self.break_off(job, Draining(_LEAVING))

    def _drop(self, job: Job) -> None:
        job.aborting = True
        job.aborted_in = _abort_counter(job)
        for sequence in job.samples.values():
            if sequence.fetch_id is not None:
                self._fetches.cancel(sequence)
        self.finish_abort(job)

    def finish_abort(self, job: Job) -> None:
        """Gives back what no fetch may write into any more of an aborted job, which ends with the last of it."""
        for sequence in list(job.samples.values()):
            if sequence.fetch_id is None:
                self._remove(sequence)
        if not job.samples:
            self.num_ended[job.aborted_in] += 1
            self._forget(job)
            fence = job.dispatch.fence
            self._outbox.reply(job.router, Aborted(fence) if job.error is None else _failed(fence, job.error))

    def drop_router(self, router: int) -> None:
        """Aborts everything that this router dispatched, and forgets it."""
        for owner, fence in list(self._jobs):
            if owner == router:
                self.abort(owner, fence, "its router is lost")
        self.num_dispatches.pop(router, None)

    def refuse(self, router: int, fence: Fence) -> None:
        """This dispatch is over, whether it has come or not."""
        self._over[router, fence] = None
        if len(self._over) > MAX_OVER:
            del self._over[next(iter(self._over))]

    def expire(self, now_s: float) -> None:
        """Ends the jobs whose deadline or hold is over."""
        for (router, fence), job in list(self._jobs.items()):
            if job.trunk.state is State.HELD and now_s >= job.hold_until_s:
                log.warning("nobody fetched the prompt's KV within %.1f s", job.dispatch.hold_s, extra=_about(fence))
                self.abort(router, fence, "its hold is over")
            elif now_s >= job.deadline_s and not job.aborting:
                if job.fetch_ids:
                    self.abort(router, fence, "deadline")
                else:
                    self.fail(job, DeadlineExceeded("the request's deadline passed on the worker"))

    def _remove(self, sequence: Sequence) -> None:
        """Gives back all that a sample holds; its job goes on without it."""
        self._fetches.leave(sequence)
        self._scheduler.finish(sequence)
        del sequence.job.samples[sequence.index]

    def _forget(self, job: Job) -> None:
        del self._jobs[job.router, job.dispatch.fence]
        if (compiling := self._compiling.pop((job.router, job.dispatch.fence), None)) is not None:
            compiling.cancel()
        self.refuse(job.router, job.dispatch.fence)
        if job.dispatch.fence.role == "prefill":
            self._outbox.withdraw(job.arrival)


def _about(fence: Fence) -> dict[str, object]:
    return about(fence.request_id, fence.attempt)


def _keys(chain: KeyChain) -> tuple[Key, ...]:
    partial = chain.partial_key()
    return (*chain.keys, *([partial] if partial else []))


def _failed(fence: Fence, error: TandemError) -> Failed:
    return Failed(fence, error.code, str(error)[:4096])


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
