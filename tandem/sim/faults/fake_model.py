"""A model whose every answer is known: KV and tokens are hashes of all tokens before.

Owns the arithmetic, the runner that writes KV into a real arena and reads it back from there, and the truth that a stream must
equal. The KV of a token is 4 bytes, a hash of it and of the KV before it, so that a block's bytes follow from what its key is
made of; the next token is a hash of the KV of all tokens, as it lies in memory. Whoever mixes up blocks, reads too early or frees
too soon draws other tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from kvpool.arena import Arena
from kvpool.keys import KeyChain, root_key
from protos.control import RoutingGroup, Sampling
from tandem.engine.runner import Chunk
from tandem.engine.sampler import Sampled, SampleRequest

VOCAB = 97
BLOCK_SIZE = 4
CELL_BYTES = 4
SLAB_BYTES = BLOCK_SIZE * CELL_BYTES
EOS = 0
GROUP = RoutingGroup(b"simulated model!", "simulated", b"simulated class!", BLOCK_SIZE)
ROOT = root_key(
    model_fingerprint=GROUP.model_fingerprint, kv_format=GROUP.kv_format, numerics_class=GROUP.numerics_class
)

_TOKENS = [token.to_bytes(1, "little") for token in range(VOCAB)]


def next_token(context: bytes, seed: int, index: int) -> int:
    """`context` is the KV of all tokens before."""
    return xxhash.xxh3_64_intdigest(context, seed * 64 + index) % VOCAB


def kv_of(tokens: Sequence[int], before: int = 0) -> bytes:
    """Of `tokens`, after a token whose KV is `before`."""
    cells = []
    for token in tokens:
        before = zlib.crc32(_TOKENS[token], before)
        cells.append(before.to_bytes(CELL_BYTES, "little"))
    return b"".join(cells)


def answer(prompt: Sequence[int], sampling: Sampling, index: int) -> list[int]:
    """The truth: the tokens of sample `index`, up to the end that the sampling sets."""
    context = kv_of(prompt)
    tokens: list[int] = []
    while len(tokens) < sampling.max_tokens:
        token = next_token(context, sampling.seed, index)
        if token in sampling.stop_token_ids and len(tokens) >= sampling.min_tokens:
            break
        tokens.append(token)
        context += kv_of((token,), int.from_bytes(context[-CELL_BYTES:], "little"))
    return tokens


def block_bytes(tokens: Sequence[int]) -> dict[bytes, bytes]:
    """Key → bytes of every full block of a sequence."""
    chain = KeyChain(ROOT, BLOCK_SIZE, tokens)
    kv = kv_of(tokens)
    return {key: kv[i * SLAB_BYTES : (i + 1) * SLAB_BYTES] for i, key in enumerate(chain.keys)}


@dataclass(frozen=True, slots=True)
class FakeLogits:
    """In the place of logits: the context of each row."""

    contexts: list[bytes]

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, rows: list[int]) -> FakeLogits:
        return FakeLogits([self.contexts[row] for row in rows])


def sample(logits: FakeLogits, requests: Sequence[SampleRequest]) -> list[Sampled]:
    """In the place of `tandem.engine.sampler.sample`."""
    return [
        Sampled(next_token(context, request.sampling.seed, request.sample_index), None)
        for context, request in zip(logits.contexts, requests, strict=True)
    ]


class ArenaMemory:
    """`tandem.engine.memory.Memory` over an arena, without torch."""

    def __init__(self, arena: Arena) -> None:
        self._bytes = arena.array.reshape(-1).data

    def checksum(self, block_id: int) -> bytes:
        return xxhash.xxh3_64_digest(self._bytes[block_id * SLAB_BYTES : (block_id + 1) * SLAB_BYTES])

    def copy(self, source: int, target: int) -> None:
        self._bytes[target * SLAB_BYTES : (target + 1) * SLAB_BYTES] = self._bytes[
            source * SLAB_BYTES : (source + 1) * SLAB_BYTES
        ]

    def zero_unused(self, block_id: int, num_tokens: int) -> None:
        begin, end = block_id * SLAB_BYTES + num_tokens * CELL_BYTES, (block_id + 1) * SLAB_BYTES
        self._bytes[begin:end] = bytes(end - begin)


class FakeRunner:
    """In the place of `tandem.engine.runner.Runner`. `takes(seconds)` is told how long each step took."""

    def __init__(self, arena: Arena, takes: Callable[[float], None]) -> None:
        self._bytes = arena.array.reshape(-1).data
        self._cells = self._bytes.cast("I")
        self._takes = takes
        self.base_s = 0.015
        self.token_s = 0.0005

    def run(self, chunks: Sequence[Chunk]) -> FakeLogits:
        cells, kv = self._cells, self._bytes
        contexts: list[bytes] = []
        num_tokens = 0
        for chunk in chunks:
            table, position = chunk.block_table, chunk.start
            before = 0
            if position:
                last = position - 1
                before = cells[table[last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE]
            for token in chunk.token_ids:
                before = zlib.crc32(_TOKENS[token], before)
                cells[table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE] = before
                position += 1
            num_tokens += len(chunk.token_ids)
        for chunk in chunks:
            if chunk.want_logits:
                num_bytes = (chunk.start + len(chunk.token_ids)) * CELL_BYTES
                slabs = [kv[block * SLAB_BYTES : (block + 1) * SLAB_BYTES] for block in chunk.block_table]
                contexts.append(b"".join(slabs)[:num_bytes])
        self._takes(self.base_s + num_tokens * self.token_s)
        return FakeLogits(contexts)
