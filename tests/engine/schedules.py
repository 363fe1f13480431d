"""Random lives of sequences on two workers, compared bit for bit with each sequence computed alone.

A schedule is a seed. It picks sequences and how far each goes, gives some of them a prefix hit, and then takes steps until all
are done: any mix of chunks, decoding token by token among them, on either worker. Workers differ in their threads, arenas and
block ids. In between a sequence is preempted (its blocks are poisoned and used for others, and it is computed again elsewhere) or
handed over to the other worker. Every logit that the truth knows and every bit of KV must come out as it is there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.cpu import Native
from tandem.engine.runner import Chunk, Runner, layout_for
from tandem.models.loader import TORCH_DTYPES, LoadedModel

BLOCK_SIZES = (1, 4, 16, 64, 256)
MAX_ROWS = 512


@dataclass(frozen=True)
class Truth:
    """One model and some sequences, each computed alone in chunks of 512 rows: the KV of every token, and the logits at the ends
    of some prefixes of it."""

    model: LoadedModel
    native: Native | None
    sequences: tuple[tuple[int, ...], ...]
    kv: tuple[Tensor, ...]
    logits: tuple[dict[int, Tensor], ...]


@dataclass
class Life:
    """One sequence on its way: `done` tokens of `target` have KV, in the blocks `table` of the worker."""

    index: int
    target: int
    worker: Worker
    table: list[int] = field(default_factory=list)
    done: int = 0


class Worker:
    """A runner, its arena, in which every unwritten slot is NaN, and its free blocks."""

    def __init__(self, truth: Truth, num_blocks: int, block_size: int, threads: int, choose: random.Random) -> None:
        self.layout = layout_for(truth.model.config, truth.model.dtype, block_size)
        shape = (num_blocks, *self.layout.slab_shape)
        self.arena = torch.full(shape, torch.nan, dtype=TORCH_DTYPES[truth.model.dtype])
        self.runner = Runner(
            truth.model, self.arena, self.layout, native=truth.native, max_rows=MAX_ROWS, threads=threads
        )
        self.free = list(range(num_blocks))
        choose.shuffle(self.free)

    def cover(self, life: Life, num_tokens: int) -> None:
        """Gives the sequence blocks for that many tokens."""
        while len(life.table) < self.layout.num_blocks_for(num_tokens):
            life.table.append(self.free.pop())

    def receive(self, life: Life, kv: Tensor) -> None:
        """KV of the first tokens, [num_tokens, num_layers, 2, num_kv_heads, head_dim], that somebody else computed."""
        life.worker, life.table, life.done = self, [], len(kv)
        self.cover(life, len(kv))
        for first in range(0, len(kv), self.layout.block_size):
            part = kv[first : first + self.layout.block_size]
            block = life.table[first // self.layout.block_size]
            self.arena[block, :, :, :, : len(part)] = part.permute(1, 2, 3, 0, 4)

    def evict(self, life: Life, choose: random.Random) -> None:
        """Takes the sequence's blocks away; what was in them is NaN."""
        self.arena[life.table] = torch.nan
        self.free += life.table
        choose.shuffle(self.free)
        life.table, life.done = [], 0


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def kv_of(arena: Tensor, table: Sequence[int], num_tokens: int) -> Tensor:
    """[num_tokens, num_layers, 2, num_kv_heads, head_dim]"""
    return arena[list(table)].permute(0, 4, 1, 2, 3, 5).flatten(0, 1)[:num_tokens]


def make_truth(model: LoadedModel, native: Native | None, lengths: Sequence[int], ends: Sequence[int]) -> Truth:
    generator = torch.Generator().manual_seed(5)
    all_tokens, all_kv, all_logits = [], [], []
    for length in lengths:
        tokens = torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()
        layout = layout_for(model.config, model.dtype, 16)
        table = list(range(layout.num_blocks_for(length)))
        arena = torch.full((len(table), *layout.slab_shape), torch.nan, dtype=TORCH_DTYPES[model.dtype])
        runner = Runner(model, arena, layout, native=native, max_rows=MAX_ROWS)
        for start in range(0, length, MAX_ROWS):
            runner.run([Chunk(tokens[start : start + MAX_ROWS], start, table, False)])
        all_tokens.append(tuple(tokens))
        all_kv.append(kv_of(arena, table, length).clone())
        found = {}
        for end in sorted({*(end for end in ends if end < length), length}):
            start = max(0, end - MAX_ROWS)
            found[end] = runner.run([Chunk(tokens[start:end], start, table, True)])[0]
        all_logits.append(found)
    return Truth(model, native, tuple(all_tokens), tuple(all_kv), tuple(all_logits))


def _chunk_size(choose: random.Random, single_rows: float, room: int) -> int:
    if choose.random() < single_rows:
        return 1
    return min(room, choose.randint(2, 6)) if choose.random() < 0.3 else choose.randint(1, room)


def _step(truth: Truth, worker: Worker, lives: list[Life], choose: random.Random, room: int, singles: float) -> None:
    chunks, wanted = [], []
    for life in choose.sample(lives, choose.randint(1, len(lives))):
        if room == 0:
            break
        end = min(life.done + _chunk_size(choose, singles, room), life.target)
        known = truth.logits[life.index]
        stops = [stop for stop in known if life.done < stop < end]
        if stops and choose.random() < 0.5:
            end = choose.choice(stops)
        worker.cover(life, end)
        want = end in known or choose.random() < 0.2
        tokens = truth.sequences[life.index][life.done : end]
        chunks.append(Chunk(tokens, life.done, tuple(life.table), want))
        if want:
            wanted.append(known.get(end))
        room -= end - life.done
        life.done = end
    logits = worker.runner.run(chunks)
    assert logits.shape == (len(wanted), truth.model.config.vocab_size)
    for row, expected in zip(logits, wanted, strict=True):
        assert torch.isfinite(row).all()
        assert expected is None or torch.equal(bits(row), bits(expected)), "logits"


def run_schedule(truth: Truth, seed: int, step_rows: int, single_rows: float, threads: tuple[int, int]) -> None:
    """Raises AssertionError at the first bit that differs."""
    choose = random.Random(seed)
    block_size = choose.choice(BLOCK_SIZES)
    picked = choose.sample(range(len(truth.sequences)), choose.randint(1, len(truth.sequences)))
    targets = [choose.choice(list(truth.logits[index])) for index in picked]
    needed = sum(-(-target // block_size) for target in targets)
    workers = [Worker(truth, needed + choose.randint(1, 5), block_size, count, choose) for count in threads]
    lives = [Life(index, target, choose.choice(workers)) for index, target in zip(picked, targets, strict=True)]

    def prefix_hit(life: Life, most: int) -> None:
        hit = choose.randrange(most) // block_size * block_size if choose.random() < 0.7 else 0
        life.worker.receive(life, truth.kv[life.index][:hit])

    for life in lives:
        prefix_hit(life, life.target)
    troubles = 3
    while open_lives := [life for life in lives if life.done < life.target]:
        life = choose.choice(open_lives)
        worker = life.worker
        if troubles and life.done and choose.random() < 0.15:
            troubles -= 1
            done = life.done
            moved = kv_of(worker.arena, life.table, done).clone()
            worker.evict(life, choose)
            if choose.random() < 0.5:
                choose.choice(workers).receive(life, moved)
            else:
                life.worker = choose.choice(workers)
                prefix_hit(life, done)
            continue
        here = [life for life in open_lives if life.worker is worker]
        _step(truth, worker, here, choose, step_rows, single_rows)
    for life in lives:
        found = kv_of(life.worker.arena, life.table, life.target)
        assert torch.equal(bits(found), bits(truth.kv[life.index][: life.target])), "KV"
        unwritten = life.target % block_size
        assert not unwritten or life.worker.arena[life.table[-1], :, :, :, unwritten:].isnan().all()
    assert all(worker.arena[worker.free].isnan().all() for worker in workers)
