"""One side of a fetch between two hosts: run as `python -m tests.kvpool.two_hosts`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import msgspec
import zmq

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.service import KVService
from kvpool.sink import FetchedBatch, FetchEnded, FetchPlan, WantedBlock
from kvpool.transport.build import make_transports
from protos.control import Source
from tandem.clock import now_s
from tandem.config import TransferConfig
from tandem.machine import machine_id
from tests.kvpool.child import say
from tests.kvpool.processes import ROOT, SIZE, bytes_of, key_of


class Side:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.names: list[str] = arguments["names"]
        self.slab_bytes: int = arguments["slab_bytes"]
        self.epoch = os.urandom(8)
        self.pool = BlockPool(2 * len(self.names), SIZE, "DEVICE")
        self.arena = Arena(2 * len(self.names), self.slab_bytes)
        self.came: dict[str, int] = {}
        self.used: set[str] = set()
        self.ended: FetchEnded | None = None
        transfer = TransferConfig(transports=arguments["transports"], host=arguments["host"])
        self.service = KVService(
            context=zmq.Context(), pool=self.pool, arena=self.arena, process=f"side-{os.getpid()}", epoch=self.epoch,
            bind_host=arguments["host"], machine_id=machine_id(), lease_s=5.0, grace_s=1.0,
            transports=make_transports(
                transfer, self.arena, self.epoch, machine_id=machine_id(), native=native()
            ),
            on_blocks=self._on_blocks, on_ended=self._on_ended,
            peer_bytes_per_s=arguments.get("peer_bytes_per_s", 0.0),
        )  # fmt: skip
        self.poller = zmq.Poller()
        self.service.register(self.poller)

    def _on_blocks(self, fetch_id: bytes, batch: FetchedBatch) -> None:
        self.used.add(batch.transport)
        self.came |= {
            block.key.decode().strip(): block_id for block, block_id in zip(batch.blocks, batch.block_ids, strict=True)
        }

    def _on_ended(self, ended: FetchEnded) -> None:
        self.ended = ended

    def put(self) -> None:
        blocks = self.pool.allocate(len(self.names))
        assert blocks is not None
        parent = ROOT
        for block_id, name in zip(blocks, self.names, strict=True):
            self.arena.slab(block_id)[:] = bytes_of(name, self.slab_bytes)
            self.pool.publish(block_id, key_of(name), parent, SIZE, self.arena.checksum(block_id))
            parent = key_of(name)
        self.pool.release(blocks)

    def fetch(self, sources: list[Source]) -> None:
        blocks = self.pool.allocate(len(self.names))
        assert blocks is not None
        parents = [ROOT, *map(key_of, self.names)]
        wanted = tuple(
            WantedBlock(key_of(name), parent, SIZE, block_id)
            for name, parent, block_id in zip(self.names, parents, blocks, strict=False)
        )
        plan = FetchPlan(os.urandom(16), "request", wanted, tuple(sources), "", now_s() + 60.0)
        self.service.start_fetch(plan, now_s())

    def step(self) -> None:
        self.service.handle(dict(self.poller.poll(5)), now_s())
        self.service.publish_pool_events(now_s())
        self.service.tick(now_s())


def main(arguments: dict[str, Any]) -> None:
    side = Side(arguments)
    if arguments["role"] == "source":
        side.put()
        say(Source(f"side-{os.getpid()}", side.epoch, "DEVICE", side.service.endpoints))
        while True:
            side.step()
    side.fetch(msgspec.convert(arguments["sources"], list[Source]))
    while side.ended is None:
        side.step()
        pause_after = arguments.pop("pause_after", 0) if len(side.came) >= arguments.get("pause_after", 1 << 30) else 0
        if pause_after:
            say({"came": len(side.came)})
            sys.stdin.readline()
    wrong = [
        name
        for name, block_id in side.came.items()
        if side.arena.slab(block_id).tobytes() != bytes_of(name, side.slab_bytes)
    ]
    missing = [key.decode().strip() for key in side.ended.missing]
    say({"wrong": wrong, "missing": missing, "transports": sorted(side.used)})
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
