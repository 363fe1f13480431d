"""Blocks whose every byte follows from their number, a DISK tier full of them, and a process that writes them for ever (run as
`python -m tests.kvpool.disk_blocks DIRECTORY…`)."""

from __future__ import annotations

import hashlib
import select
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvpool.arena import Arena, checksum_of
from kvpool.block_pool import BlockRecord
from kvpool.tiers.disk.requests import Loaded, LoadFailed, LoadRequest, NotStored, Result, Stored
from kvpool.tiers.disk.segments import slot_bytes_for
from kvpool.tiers.disk.tier import DiskTier
from tandem.clock import now_s

SIZE = 16
GROUP = b"g" * 32
WRITER = b"w" * 8
ROOT = b"r" * 16
CHAIN = 32
"""Blocks `n * CHAIN …` up to the next such number are one chain."""


def key_of(number: int) -> bytes:
    return hashlib.sha256(b"block %d" % number).digest()[:16]


def parent_of(number: int) -> bytes:
    return key_of(number - 1) if number % CHAIN else ROOT


def owner_of(number: int) -> bytes:
    return struct.pack(">Q", number)


def bytes_of(key: bytes, slab_bytes: int) -> bytes:
    """The only bytes that are right for the block `key`."""
    return hashlib.shake_128(key).digest(slab_bytes)


class DiskWorld:
    """A tier over an arena of its own. `store` and `load` wait for the results."""

    def __init__(
        self,
        directories: Sequence[Path],
        *,
        slots: int = 64,
        slab_bytes: int = 4096,
        num_host_blocks: int = 64,
        group: bytes = GROUP,
        **options: Any,
    ) -> None:
        self.slab_bytes = slab_bytes
        self.arena = Arena(num_host_blocks, slab_bytes)
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
        self.tier = DiskTier(
            directories,
            bytes_per_directory=slots * slot_bytes_for(slab_bytes),
            arena=self.arena,
            block_size=SIZE,
            group=group,
            native=None,
            **options,
        )

    def __enter__(self) -> DiskWorld:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        self.tier.close()
        self.arena.close()

    def request(self, number: int, block_id: int) -> BlockRecord:
        """Puts the bytes of block `number` into the arena's block `block_id`, and asks to store them."""
        data = bytes_of(key_of(number), self.slab_bytes)
        self.arena.slab(block_id)[:] = data
        return BlockRecord(
            block_id, key_of(number), parent_of(number), SIZE, checksum_of(data), True, WRITER, owner_of(number)
        )

    def wait(self, num_results: int, seconds: float = 20.0) -> list[Result]:
        results: list[Result] = []
        deadline = now_s() + seconds
        while len(results) < num_results:
            left = deadline - now_s()
            assert left > 0, f"{len(results)} of {num_results} results came in time"
            select.select([self.tier], [], [], left)
            results += self.tier.poll()
        assert len(results) == num_results
        return results

    def store(self, numbers: Sequence[int]) -> list[Stored | NotStored]:
        """As many as the arena has blocks at once."""
        results: list[Any] = []
        for begin in range(0, len(numbers), self.arena.num_blocks):
            part = numbers[begin : begin + self.arena.num_blocks]
            self.tier.store([self.request(number, block_id) for block_id, number in enumerate(part)])
            results += self.wait(len(part))
        return results

    def load(self, keys: Sequence[bytes]) -> dict[bytes, bytes | str]:
        """What came up of each key: its bytes, or why it failed."""
        found: dict[bytes, bytes | str] = {}
        for begin in range(0, len(keys), self.arena.num_blocks):
            part = keys[begin : begin + self.arena.num_blocks]
            self.arena.array[:] = 0xEE
            self.tier.load([LoadRequest(key, block_id) for block_id, key in enumerate(part)])
            for result in self.wait(len(part)):
                assert isinstance(result, (Loaded, LoadFailed))
                assert part[result.block_id] == result.key
                if isinstance(result, Loaded):
                    found[result.key] = bytes(self.arena.slab(result.block_id))
                    assert result.checksum == checksum_of(found[result.key])
                else:
                    found[result.key] = result.reason
        return found

    def evict(self, keys: Sequence[bytes]) -> list[bytes]:
        """Pushes these out, as if others had needed their room."""
        return self.tier.pool.evict(keys)

    def held(self) -> list[bytes]:
        """The keys in the index."""
        return [key for event in self.tier.pool.snapshot() for key in event.block_hashes]  # type: ignore[union-attr,misc]

    def check_all(self) -> set[bytes]:
        """Loads all there is: right bytes or a failure, never anything else. Returns the keys with right bytes."""
        found = self.load(self.held())
        good = {key for key, data in found.items() if isinstance(data, bytes)}
        for key in good:
            assert found[key] == bytes_of(key, self.slab_bytes), f"wrong bytes for {key.hex()}"
        self.tier.pool.check()
        return good


def write_for_ever(directories: Sequence[Path], slots: int, slab_bytes: int, first: int) -> None:
    """Stores `first`, `first + 1` … and prints each number as soon as it is acknowledged. Removes and overwrites, too: there are
    fewer slots than numbers."""
    world = DiskWorld(directories, slots=slots, slab_bytes=slab_bytes)
    rng = np.random.default_rng(first)
    print("open", flush=True)
    number = first
    while True:
        numbers = range(number, number + int(rng.integers(1, 33)))
        number = numbers.stop
        by_key = {key_of(one): one for one in numbers}
        done = [by_key[result.key] for result in world.store(numbers) if isinstance(result, Stored)]
        print(*done, flush=True)


if __name__ == "__main__":
    write_for_ever([Path(name) for name in sys.argv[4:]], int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
