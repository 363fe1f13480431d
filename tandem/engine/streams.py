"""The tokens of each sample: drawn here, or by the prefill worker for those that are handed over.

Owns what follows when a sequence's KV is complete: its report, the fork into samples, the draw, the hold for a
hand-over, the end of a sample by its own tokens. It computes no logits and fetches nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Many

import torch

from protos.control import FinishReason, Tokens
from tandem.engine.block_tables import BlockTables
from tandem.engine.durability import Durability
from tandem.engine.jobs import Jobs
from tandem.engine.output import Outbox
from tandem.engine.sampler import Sampled, Sampler, SampleRequest
from tandem.engine.scheduler import Scheduler
from tandem.engine.sequence import Job, Sequence, State
from tandem.errors import InvalidRequest
from tandem.grammar.matcher import Mask
from tandem.logs import about

log = logging.getLogger(__name__)


class Streams:
    """Goes on with sequences that lack nothing. Whoever `draws` is given to `draw` with its logits; a decode role without
    `prefill_here` is first `caught_up`, and goes on when it has been given its first tokens too."""

    def __init__(
        self,
        *,
        vocab_size: int,
        jobs: Jobs,
        scheduler: Scheduler,
        tables: BlockTables,
        durability: Durability,
        outbox: Outbox,
        sampler: Sampler,
    ) -> None:
        self._vocab_size = vocab_size
        self._jobs = jobs
        self._scheduler = scheduler
        self._tables = tables
        self._durability = durability
        self._outbox = outbox
        self._sample = sampler

    # --- samples that are drawn here ---------------------------------------------------------------------------------

    def draw(self, drawing: Many[Sequence], logits: torch.Tensor, now_s: float) -> None:
        """Draws the next token of each of `drawing`, whose logits are the rows of `logits`; an unforked one draws `n`."""
        masks = [self._mask(sequence) for sequence in drawing]
        rows: list[int] = []
        requests: list[SampleRequest] = []
        for row, sequence in enumerate(drawing):
            job = sequence.job
            if job.aborting:
                continue
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
                        allowed=masks[row],
                    )
                )
        drawn = iter(self._sample(logits if rows == list(range(len(logits))) else logits[rows], requests))
        for sequence in drawing:
            job = sequence.job
            if job.aborting:
                continue
            first = not job.forked
            samples = self._fork(job) if first else [sequence]
            if first:
                self._jobs.report(job, now_s)
            for sibling in samples:
                self._take_token(sibling, next(drawn))
            if first and job.dispatch.fence.role == "prefill" and job.samples:
                self._hold(job, now_s)

    def _mask(self, sequence: Sequence) -> Mask | None:
        """What the request's grammar allows next, if it has one; the job breaks off if that can't be said."""
        if sequence.matcher is None:
            return None
        job = sequence.job
        generated = sequence.tokens[job.dispatch.num_prompt_tokens :]
        try:
            return sequence.matcher.allowed(generated, job.dispatch.sampling.stop_token_ids)
        except InvalidRequest as error:
            if not job.aborting:
                self._jobs.break_off(job, error)
            return None

    def _take_token(self, sequence: Sequence, drawn: Sampled) -> None:
        job = sequence.job
        sampling = job.dispatch.sampling
        position = sequence.num_generated_tokens
        reason: FinishReason | None = None
        token_ids = [drawn.token_id]
        logprobs = [drawn.logprobs] if drawn.logprobs is not None else []
        stops = drawn.token_id in sampling.stop_token_ids and position >= sampling.min_tokens
        if stops or (sequence.matcher is not None and drawn.token_id in sequence.matcher.eos_token_ids):
            reason, token_ids, logprobs = "stop", [], []
        else:
            sequence.append(drawn.token_id)
            if position + 1 >= sampling.max_tokens:
                reason = "length"
        self._outbox.reply(
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
        if reason is not None:
            self._jobs.finish_sample(sequence)

    # --- the hand-over -----------------------------------------------------------------------------------------------

    def _hold(self, job: Job, now_s: float) -> None:
        """Prefill is done: the blocks stay, the last partial one findable for the hand-over alone."""
        job.hold_until_s = now_s + job.dispatch.hold_s
        for sequence in job.samples.values():
            sequence.state = State.HELD
        self._tables.publish_partial(job.trunk)

    def caught_up(self, sequence: Sequence, now_s: float) -> None:
        """The KV of a decode role is complete; it goes on as soon as its first tokens are there."""
        job = sequence.job
        sequence.state = State.PARKED
        self._jobs.report(job, now_s)
        if job.first_tokens is not None:
            self._start_decoding(job, job.first_tokens)

    def take_first_tokens(self, job: Job, token_ids: list[int]) -> None:
        """The tokens that prefill drew for this decode role, -1 for a sample that ended there; only the first such message
        counts."""
        if job.first_tokens is not None or job.trunk.draws:
            return
        if len(token_ids) != job.dispatch.n or max(token_ids) >= self._vocab_size:
            fence = job.dispatch.fence
            log.error(
                "%d first tokens for %d samples are ignored: too few, too many, or none of the model's",
                len(token_ids),
                job.dispatch.n,
                extra=about(fence.request_id, fence.attempt),
            )
            return
        job.first_tokens = token_ids
        if job.trunk.state is State.PARKED:
            self._start_decoding(job, token_ids)

    def _start_decoding(self, job: Job, first_tokens: Many[int]) -> None:
        job.trunk.state = State.RUNNING
        for sequence, token in zip(self._fork(job), first_tokens, strict=True):
            if token < 0 or sequence.index in job.stopped:
                self._jobs.finish_sample(sequence)
                continue
            sequence.draws = True
            sequence.append(token)

    def _fork(self, job: Job) -> list[Sequence]:
        """Makes the trunk into `n` samples that share all its blocks; whoever writes to a shared block copies it first."""
        trunk = job.trunk
        job.forked = True
        samples = [trunk]
        for index in range(trunk.index + 1, trunk.index + job.dispatch.n):
            sibling = self._tables.fork(trunk, index)
            sibling.matcher = None if trunk.matcher is None else trunk.matcher.fork()
            job.samples[index] = sibling
            self._scheduler.adopt(sibling)
            samples.append(sibling)
        return samples


def _history(sequence: Sequence) -> tuple[list[int], list[int]]:
    """Prompt and generated tokens, where the sampling looks at them: copying thousands of ids a token costs time."""
    sampling = sequence.job.dispatch.sampling
    if sampling.repetition_penalty == 1.0 and not sampling.presence_penalty and not sampling.frequency_penalty:
        return [], []
    length = sequence.job.dispatch.num_prompt_tokens
    return sequence.tokens[:length], sequence.tokens[length:]
