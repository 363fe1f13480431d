"""The bench's side of a transfer: reads and whole fetches from a source process into an arena of ours.

Owns the transports and services that it opens. Waits like the product does: for a descriptor, unless there is something to do.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.fetcher import READ_BYTES
from kvpool.service import KVService
from kvpool.sink import FetchedBatch, FetchEnded, FetchPlan, WantedBlock
from kvpool.transport.tcp_stream import TlsFiles
from protos.control import Source
from tandem.bench.kv_source import BLOCK_SIZE, HOST, Spent, TransportName, make_transport
from tandem.clock import now_s
from tandem.errors import TandemError
from tandem.machine import machine_id

_LIMIT_S = 30.0
"""A batch that takes longer is an error."""


class Reader:
    """Reads by one transport, checksums included. Raises TransportError if the source can't be reached."""

    def __init__(self, name: TransportName, arena: Arena, source: Source, tls: TlsFiles | None) -> None:
        self._name = name
        self._portion = max(1, READ_BYTES // arena.slab_bytes)
        self._transport = make_transport(name, arena, os.urandom(8), tls)
        self._poll = select.poll()
        self._poll.register(self._transport.fileno(), select.POLLIN)
        self._next_id = 0
        try:
            self._channel = self._transport.connect(source)
            self.read([0], [0])  # a connection that is on its way can't wait for its turn
        except BaseException:
            self._transport.close()
            raise

    def read(self, locations: Sequence[int], block_ids: Sequence[int]) -> float:
        """Seconds until every block is there, in reads as large as the product's. Raises TandemError."""
        began = time.perf_counter()
        pending = set()
        for first in range(0, len(locations), self._portion):
            last = first + self._portion
            self._channel.start_read(self._next_id, locations[first:last], block_ids[first:last])
            pending.add(self._next_id)
            self._next_id += 1
        while pending:
            if not self._transport.busy and not self._poll.poll(_LIMIT_S * 1000):
                raise TandemError(f"{self._name}: nothing came for {_LIMIT_S:g} s")
            for result in self._transport.poll():
                if result.checksums is None:
                    raise TandemError(f"{self._name}: a read failed: {result.error}")
                pending.remove(result.read_id)
        return time.perf_counter() - began

    def close(self) -> None:
        self._transport.close()


@dataclass(frozen=True, slots=True)
class Took:
    """What some fetches took on our side."""

    seconds: float
    spent: Spent


class Fetches:
    """Whole fetches through a `KVService` with one transport: messages, leases, reads, verification."""

    def __init__(self, name: TransportName, arena: Arena, source: Source, tls: TlsFiles | None) -> None:
        self._name = name
        self._source = source
        self._ended: list[FetchEnded] = []
        epoch = os.urandom(8)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._service = KVService(
            context=self._context,
            pool=BlockPool(arena.num_blocks, BLOCK_SIZE, "DEVICE", keep_events=False),
            arena=arena,
            process="sink",
            epoch=epoch,
            bind_host=HOST,
            transports=[make_transport(name, arena, epoch, tls)],
            machine_id=machine_id(),
            lease_s=5.0,
            grace_s=1.0,
            on_blocks=self._on_blocks,
            on_ended=self._on_ended,
        )
        self._poller = zmq.Poller()
        self._service.register(self._poller)

    def fetch(self, batches: Sequence[tuple[WantedBlock, ...]], in_flight: int = 1) -> Took:
        """A fetch for each batch, at most `in_flight` at a time, until every block is there and verified. Raises TandemError if
        one isn't."""
        plans = [
            FetchPlan(os.urandom(16), "bench", blocks, (self._source,), "", now_s() + _LIMIT_S) for blocks in batches
        ]
        before, began = Spent.here(), time.perf_counter()
        num_started = num_ended = 0
        while num_ended < len(plans):
            while num_started < min(len(plans), num_ended + in_flight):
                self._service.start_fetch(plans[num_started], now_s())
                num_started += 1
            due_s = self._service.tick(now_s())
            if not self._ended:
                ready = dict(self._poller.poll(max(0, int((due_s - now_s()) * 1000))))
                self._service.handle(ready, now_s())
            for ended in self._ended:
                if ended.missing:
                    raise TandemError(f"{self._name}: a fetch missed {len(ended.missing)} blocks")
            num_ended += len(self._ended)
            self._ended.clear()
        return Took(time.perf_counter() - began, Spent.here() - before)

    def close(self) -> None:
        self._service.close()
        self._context.term()

    def _on_blocks(self, fetch_id: bytes, batch: FetchedBatch) -> None:
        pass

    def _on_ended(self, ended: FetchEnded) -> None:
        self._ended.append(ended)
