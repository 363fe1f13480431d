"""The HOST tier of a pool node, used from another process: how fast it takes in what a worker announces, and gives it out.

Owns the worker's part. Put: blocks are published and announced, the node fetches them and says that it keeps them, as it does
for every worker. Get: fetches of a batch each. Every round has blocks of new names.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence

import numpy as np
import zmq

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.keys import Key
from kvpool.service import KVService
from kvpool.sink import WantedBlock
from kvpool.transport.shm import ShmTransport
from protos.control import Source
from tandem.bench.kv_source import BLOCK_SIZE, HOST
from tandem.bench.pool_node import PoolNodeProcess
from tandem.bench.transfer_sink import Fetches
from tandem.clock import now_s
from tandem.errors import TandemError
from tandem.machine import machine_id

CHAIN_BLOCKS = 125
_LIMIT_S = 60.0
_MIN_HOST_BYTES = 1 << 20
"""Of the configuration."""
_POLL_MS = 1000


def chain(name: str, num_blocks: int) -> list[tuple[Key, Key]]:
    """So many blocks, `(key, parent)`, in chains of 2,000 tokens."""
    keys = [hashlib.sha256(f"{name}/{number}".encode()).digest()[:16] for number in range(num_blocks)]
    root = hashlib.sha256(name.encode()).digest()[:16]
    return [(key, keys[number - 1] if number % CHAIN_BLOCKS else root) for number, key in enumerate(keys)]


class HostTier:
    """A worker with `values` blocks in `arena`, and a node that keeps them. The arena has twice as many blocks, full of random
    bytes in the first half; what comes back goes to the second."""

    def __init__(self, arena: Arena, values: int, batch_blocks: int) -> None:
        self._arena = arena
        self._values = values
        self._batch = batch_blocks
        self._round = 0
        self._blocks: list[tuple[Key, Key]] = []
        self._checksums = [arena.checksum(block_id) for block_id in range(values)]
        self._pool = BlockPool(values, BLOCK_SIZE, "DEVICE")
        self._held: list[int] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        epoch = os.urandom(8)
        self._service = KVService(
            context=self._context,
            pool=self._pool,
            arena=arena,
            process="worker",
            epoch=epoch,
            bind_host=HOST,
            transports=[ShmTransport(arena, epoch, machine_id(), native())],
            machine_id=machine_id(),
            lease_s=5.0,
            grace_s=1.0,
            on_blocks=lambda *_: None,
            on_ended=lambda _: None,
        )
        self._poller = zmq.Poller()
        self._service.register(self._poller)
        # As much as a round: after one of them all its memory has been touched, and every block takes an older one's place.
        self._node = PoolNodeProcess(arena.slab_bytes, max(_MIN_HOST_BYTES, values * arena.slab_bytes))
        self._node.follow([Source("worker", epoch, "DEVICE", self._service.endpoints)])
        self._fetches = Fetches("shm", arena, self._node.source, None)

    def put(self) -> float:
        """Seconds from before the first block is announced until the node has said that it keeps all. Raises TandemError."""
        self._forget()
        self._round += 1
        self._blocks = chain(f"round {self._round}", self._values)
        began, due_s, num_kept, num_announced = time.perf_counter(), 0.0, 0, 0
        gives_up = now_s() + _LIMIT_S
        while num_kept < self._values:
            if num_announced < self._values:
                num_announced = self._announce(num_announced)
                due_s = now_s()
            self._step(due_s)
            due_s = self._service.tick(now_s())
            num_kept += self._pool.num_kept(self._held, num_kept)
            if now_s() > gives_up:
                raise TandemError(f"the pool node kept {num_kept} of {self._values} blocks in {_LIMIT_S:g} s")
        return time.perf_counter() - began

    def get(self, in_flight: int) -> float:
        """Seconds of fetching back what was put last, a batch a fetch and so many at a time. Raises TandemError."""
        targets = range(self._values, 2 * self._values)
        self._arena.array[self._values :] = 0
        wanted = [
            WantedBlock(key, parent, BLOCK_SIZE, block_id)
            for (key, parent), block_id in zip(self._blocks, targets, strict=True)
        ]
        batches = [tuple(wanted[first : first + self._batch]) for first in range(0, self._values, self._batch)]
        seconds = self._fetches.fetch(batches, in_flight).seconds
        if not np.array_equal(self._arena.array[self._held], self._arena.array[self._values :]):
            raise TandemError("what came back from the pool node differs from what was put")
        return seconds

    def close(self) -> None:
        self._fetches.close()
        self._node.close()
        self._service.close()
        self._context.term()

    def _forget(self) -> None:
        """Makes all blocks anew, without the node's copies: it goes on to keep what it has while it has room."""
        self._pool.release(self._held)
        self._pool.clear_cached()
        held = self._pool.allocate(self._values)
        assert held is not None, "a lease of the round before is still open"
        self._held = held
        self._service.publish_pool_events(now_s())

    def _announce(self, first: int) -> int:
        """A batch more; how many are announced then."""
        last = min(first + self._batch, self._values)
        for number in range(first, last):
            block_id, (key, parent) = self._held[number], self._blocks[number]
            self._pool.publish(block_id, key, parent, BLOCK_SIZE, self._checksums[block_id])
        self._service.publish_pool_events(now_s())
        return last

    def _step(self, due_s: float) -> None:
        ready = dict(self._poller.poll(min(_POLL_MS, max(0, int((due_s - now_s()) * 1000)))))
        self._node.answer()
        self._service.handle(ready, now_s())


def batches_of(values: int, batch_blocks: int) -> Sequence[range]:
    """The rows of each call."""
    return [range(first, min(first + batch_blocks, values)) for first in range(0, values, batch_blocks)]
