"""What must come out: the tokens of every request and the bytes of every block, computed beside everything.

Owns what is known of requests from the moment they are made, and which blocks a pool node has ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpool.keys import Key, prompt_keys
from protos.control import Sampling
from tandem.sim.faults.fake_model import BLOCK_SIZE, ROOT, answer, block_bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `stop` are the tokens that play its stop strings; `shown[i]` is what its client must have of sample `i` in the
    end, `keys[i]` the full blocks of prompt and answer as a worker may compute them."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    n: int
    stop: frozenset[int]
    shown: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[Key, ...], ...]


class Truth:
    """All requests of a run."""

    def __init__(self) -> None:
        self.asked: dict[str, Asked] = {}
        self.blocks: dict[Key, bytes] = {}
        """Every full block that anybody may ever hold."""
        self.partial: set[Key] = set()
        self.kept: set[Key] = set()
        """Blocks that some pool node has held."""

    def add(self, request_id: str, prompt: Sequence[int], sampling: Sampling, n: int, stop: frozenset[int]) -> Asked:
        shown: list[tuple[int, ...]] = []
        keys: list[tuple[Key, ...]] = []
        for index in range(n):
            tokens = answer(prompt, sampling, index)
            blocks = block_bytes([*prompt, *tokens])
            self.blocks |= blocks
            keys.append(tuple(blocks))
            end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
            shown.append(tuple(tokens[:end]))
        partial = prompt_keys(ROOT, prompt, BLOCK_SIZE).partial
        if partial is not None:
            self.partial.add(partial)
        asked = self.asked[request_id] = Asked(request_id, tuple(prompt), sampling, n, stop, tuple(shown), tuple(keys))
        return asked
