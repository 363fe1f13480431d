"""The load of the router's benches: which workers hold which blocks, and what is asked for.

Owns the shape, which is that of NVIDIA Dynamo's own comparison: prompts of 64 blocks that several workers hold, and tails of 32
blocks on top of one of them, each at one of its holders. Every event stores 32 blocks. What is asked for is a prompt, a tail of
it and 32 blocks that nobody has; or blocks that nobody has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from kvpool.keys import Key

PROMPTS = 200
PROMPT_BLOCKS = 64
TAIL_BLOCKS = 32
ASKED_BLOCKS = PROMPT_BLOCKS + 2 * TAIL_BLOCKS


@dataclass(frozen=True, slots=True)
class Stored:
    """One event: a worker, by its number, stores `TAIL_BLOCKS` blocks after `parent`."""

    worker: int
    parent: Key | None
    keys: list[Key]


class IndexLoad:
    """`entries` (block, worker) pairs over `workers`, each prompt at `holders` of them; the same for the same seed."""

    def __init__(self, workers: int, entries: int, holders: int, seed: int = 1) -> None:
        self.workers = workers
        self.entries = entries
        self._random = Random(seed)
        self._prompts = [self._keys(PROMPT_BLOCKS) for _ in range(PROMPTS)]
        self._holders = [self._random.sample(range(workers), min(holders, workers)) for _ in self._prompts]
        self._tails: list[tuple[int, list[Key]]] = []
        """Some of them: `(prompt, keys)`."""

    def events(self) -> Iterator[Stored]:
        """All events, in an order in which workers could send them; once."""
        num_entries = 0
        for prompt, holders in zip(self._prompts, self._holders, strict=True):
            for worker in holders:
                for first in range(0, PROMPT_BLOCKS, TAIL_BLOCKS):
                    parent = prompt[first - 1] if first else None
                    yield Stored(worker, parent, prompt[first : first + TAIL_BLOCKS])
                    num_entries += TAIL_BLOCKS
        while num_entries < self.entries:
            number = self._random.randrange(PROMPTS)
            tail = self._keys(TAIL_BLOCKS)
            if len(self._tails) < 20_000:
                self._tails.append((number, tail))
            yield Stored(self._random.choice(self._holders[number]), self._prompts[number][-1], tail)
            num_entries += TAIL_BLOCKS

    @property
    def longest_hit(self) -> int:
        """Blocks that are there of each of `hits`: few entries are prompts alone."""
        return PROMPT_BLOCKS + (TAIL_BLOCKS if self._tails else 0)

    def hits(self, count: int) -> list[list[Key]]:
        """What is asked for and partly there, after `events`: `ASKED_BLOCKS` keys each."""
        chosen = self._random.choices(self._tails, k=count) if self._tails else [(0, self._keys(TAIL_BLOCKS))] * count
        return [self._prompts[number] + tail + self._keys(TAIL_BLOCKS) for number, tail in chosen]

    def misses(self, count: int) -> list[list[Key]]:
        """What is asked for and nowhere."""
        return [self._keys(ASKED_BLOCKS) for _ in range(count)]

    def _keys(self, count: int) -> list[Key]:
        data = self._random.randbytes(16 * count)
        return [data[16 * i : 16 * i + 16] for i in range(count)]
