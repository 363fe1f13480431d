"""How models were served before paging: no KV cache, or contiguous KV that is reserved up to the longest request.

Owns the lower rungs of `tandem bench ladder`. They compute with the product's model and runner, so their tokens must be the
product's; what differs is how often a token is computed and how memory and batches are managed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from protos.control import Sampling
from tandem.bench.ladder.kv_meter import KVMeter
from tandem.bench.ladder.workload import MAX_TOKENS, Playback, Request, Run
from tandem.clock import now_s
from tandem.engine.runner import Chunk
from tandem.engine.sampler import SampleRequest, sample


class Computer(Protocol):
    """`tandem.engine.runner.Runner`."""

    @property
    def max_rows(self) -> int:
        """Tokens that one call may compute."""

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """fp32 logits `[num_chunks_that_want_logits, vocab_size]`, in order."""


def no_kv_cache(
    computer: Computer, requests: Sequence[Request], num_blocks: int, clock: Callable[[], float] = now_s
) -> Run:
    """One request at a time; every token computes all tokens before it again. Keeps no KV from one token to the next.

    `num_blocks` blocks, from block 0 on, hold the longest request; their content is lost.
    """
    playback = Playback(requests, clock)
    table = range(num_blocks)
    while not playback.is_done:
        for request in playback.take(1):
            tokens = list(request.prompt)
            is_complete = False
            while not is_complete:
                for start in range(0, len(tokens), computer.max_rows):
                    end = min(len(tokens), start + computer.max_rows)
                    logits = computer.run([Chunk(tokens[start:end], start, table, end == len(tokens))])
                (drawn,) = _greedy(logits)
                tokens.append(drawn)
                is_complete = playback.draw(request, [drawn])
        playback.wait()
    return playback.run(None)


def reserved_batches(
    computer: Computer,
    requests: Sequence[Request],
    num_blocks: int,
    batch_size: int,
    clock: Callable[[], float] = now_s,
) -> Run:
    """Static batches of up to `batch_size` of the requests that have arrived; batch size 1 is a plain KV cache.

    Each sequence has `MAX_TOKENS` contiguous slots: `num_blocks` blocks of the arena, from block 0 on; what they held is lost. A
    batch computes its prompts whole, then a token of each sequence a step; its memory is free when its last sequence ends, and
    only then the next batch begins. In its favour: batches don't wait until they are full, prompts are not padded, sequences
    that have ended cost no computation, tokens are shown when drawn.
    """
    playback, meter = Playback(requests, clock), KVMeter()
    while not playback.is_done:
        if taken := playback.take(batch_size):
            batch = [
                _Reserved(request, range(place * num_blocks, (place + 1) * num_blocks))
                for place, request in enumerate(taken)
            ]
            for part in _whole_prompts(batch, computer.max_rows):
                _step(computer, part, batch, playback, meter, clock)
            while running := [sequence for sequence in batch if not sequence.has_ended]:
                _step(computer, running, batch, playback, meter, clock)
        else:
            playback.wait()
    return playback.run(meter.wasted)


class _Reserved:
    """A sequence and its place in memory."""

    def __init__(self, request: Request, blocks: range) -> None:
        self.request = request
        self.blocks = blocks
        self.tokens = list(request.prompt)
        self.num_computed = 0
        self.has_ended = False

    def chunk(self) -> Chunk:
        return Chunk(self.tokens[self.num_computed :], self.num_computed, self.blocks, True)


def _whole_prompts(batch: Sequence[_Reserved], max_rows: int) -> list[list[_Reserved]]:
    """The batch in parts whose prompts fit one call."""
    parts: list[list[_Reserved]] = []
    room = 0
    for sequence in batch:
        if len(sequence.tokens) > room:
            parts.append([])
            room = max_rows
        parts[-1].append(sequence)
        room -= len(sequence.tokens)
    return parts


def _step(
    computer: Computer,
    scheduled: Sequence[_Reserved],
    batch: Sequence[_Reserved],
    playback: Playback,
    meter: KVMeter,
    clock: Callable[[], float],
) -> None:
    began_s = clock()
    drawn = _greedy(computer.run([sequence.chunk() for sequence in scheduled]))
    for sequence in scheduled:
        sequence.num_computed = len(sequence.tokens)
    used = sum(sequence.num_computed for sequence in batch if not sequence.has_ended)
    meter.add(clock() - began_s, len(batch) * MAX_TOKENS, used)
    for sequence, token in zip(scheduled, drawn, strict=True):
        sequence.tokens.append(token)
        sequence.has_ended = playback.draw(sequence.request, [token])


def _greedy(logits: torch.Tensor) -> list[int]:
    wanted = SampleRequest(Sampling(max_tokens=1), 0, 0, (), ())
    return [drawn.token_id for drawn in sample(logits, [wanted] * len(logits))]
