"""A model without weights: the next token is a hash of all tokens before, read back from the KV memory.

Whoever mixes up block tables, copies on write, prefix hits or preemption reads other tokens and so draws others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from tandem.engine.runner import Chunk

VOCAB = 97


def next_token(tokens: Sequence[int], vocab: int = VOCAB) -> int:
    digest = hashlib.sha256(np.asarray(tokens, dtype=np.uint32).tobytes()).digest()
    return int.from_bytes(digest[:4], "little") % vocab


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The truth: what a greedy stream must be."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeMemory:
    """Slabs of `block_size` 32-bit cells; a cell holds token id + 1, 0 is unused."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.cells = np.full((num_blocks, block_size), 0xDEAD, dtype=np.uint32)

    def checksum(self, block_id: int) -> bytes:
        return hashlib.sha256(self.cells[block_id].tobytes()).digest()[:8]

    def copy(self, source: int, target: int) -> None:
        self.cells[target] = self.cells[source]

    def zero_unused(self, block_id: int, num_tokens: int) -> None:
        self.cells[block_id, num_tokens:] = 0


class FakeRunner:
    def __init__(self, memory: FakeMemory, block_size: int) -> None:
        self.memory = memory
        self.block_size = block_size
        self.max_rows = 0

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.max_rows = max(self.max_rows, sum(len(chunk.token_ids) for chunk in chunks))
        cells = self.memory.cells
        for chunk in chunks:
            for i, token in enumerate(chunk.token_ids):
                position = chunk.start + i
                cells[chunk.block_table[position // self.block_size], position % self.block_size] = token + 1
        rows = []
        for chunk in chunks:
            if chunk.want_logits:
                end = chunk.start + len(chunk.token_ids)
                read = cells[list(chunk.block_table)].reshape(-1)[:end].astype(np.int64) - 1
                row = torch.zeros(VOCAB)
                row[next_token(read.tolist())] = 9.0
                rows.append(row)
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)
