"""The half of a peer that moves or keeps blocks: what is moved, and the lines of `child` for it.

A `move` asks for an operation, `times` times; the answer `moved` has the seconds of each. What was moved last is compared byte
for byte before it is answered. Runs inside a peer's own virtual environment and needs numpy alone.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol, TextIO

import numpy as np
from child import answer_all

WARM_UP = 3
"""Batches of each turn that don't count."""

Operation = Callable[[int], list[float]]


def arguments() -> argparse.Namespace:
    """The command line of every such peer. `--values` and `--dir` are for stores alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slab-bytes", type=int, required=True)
    parser.add_argument("--batch-blocks", type=int, required=True)
    parser.add_argument("--num-blocks", type=int, required=True, help="of an arena, or values of a store")
    parser.add_argument("--way", default="", help="what the peer's script says")
    parser.add_argument("--dir", default="")
    return parser.parse_args()


def serve(answers: TextIO, version: str, operations: dict[str, Operation]) -> None:
    """Answers until stdin ends."""

    def moved(request: dict[str, Any]) -> dict[str, Any]:
        return {"t": "moved", "seconds": operations[request["op"]](request["times"])}

    answer_all(answers, version, moved)


def filled(num_blocks: int, slab_bytes: int, seed: int) -> np.ndarray:
    """Random bytes, `[num_blocks, slab_bytes]`, every page written."""
    words = np.random.default_rng(seed).integers(0, 1 << 63, num_blocks * slab_bytes // 8 + 1, dtype=np.int64)
    return words.view(np.uint8)[: num_blocks * slab_bytes].reshape(num_blocks, slab_bytes)


class Engine(Protocol):
    """Moves one batch between our blocks and another process's; answers its seconds."""

    def read(self, remote: list[int], local: list[int]) -> float: ...

    def write(self, remote: list[int], local: list[int]) -> float: ...


@dataclass
class Mover:
    """Batches of random blocks by `engine`. `arena` is ours, and `target` answers a list of its blocks with their bytes."""

    engine: Engine
    arena: np.ndarray
    target: Connection
    batch_blocks: int
    generator: random.Random

    def operations(self) -> dict[str, Operation]:
        return {
            "read": lambda times: self._move(self.engine.read, times),
            "write": lambda times: self._move(self.engine.write, times),
        }

    def _move(self, move: Callable[[list[int], list[int]], float], times: int) -> list[float]:
        seconds = []
        every = range(len(self.arena))
        for _ in range(times + WARM_UP):
            remote = self.generator.sample(every, self.batch_blocks)
            local = self.generator.sample(every, self.batch_blocks)
            seconds.append(move(remote, local))
        self.target.send(remote)
        theirs = self.target.recv()
        if theirs != [self.arena[block].tobytes() for block in local]:
            raise RuntimeError("the bytes that were moved differ")
        return seconds[WARM_UP:]


def answer_blocks(arena: np.ndarray, connection: Connection) -> None:
    """The target's part: the bytes of the blocks that are asked for, until nobody asks any more."""
    while True:
        try:
            blocks = connection.recv()
        except EOFError:
            return
        connection.send([arena[block].tobytes() for block in blocks])
