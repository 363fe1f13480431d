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
from kvpool.sink import FetchedBatch, FetchEnded
from kvpool.transport.build import make_transports
from protos.control import Source
from tandem.clock import now_s
from tandem.config import TransferConfig
from tandem.machine import machine_id
from tests.kvpool.child import say
from tests.kvpool.named_blocks import SIZE, bytes_of, plan, put


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

    def step(self) -> None:
        self.service.handle(dict(self.poller.poll(5)), now_s())
        self.service.publish_pool_events(now_s())
        self.service.tick(now_s())


def main(arguments: dict[str, Any]) -> None:
    side = Side(arguments)
    if arguments["role"] == "source":
        side.pool.release(put(side.pool, side.arena, side.names))
        say(Source(f"side-{os.getpid()}", side.epoch, "DEVICE", side.service.endpoints))
        while True:
            side.step()
    sources = msgspec.convert(arguments["sources"], list[Source])
    side.service.start_fetch(plan(side.pool, side.names, sources, seconds=60.0), now_s())
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
