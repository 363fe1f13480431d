"""NIXL as a peer: its UCX backend between two processes, one request for a batch of scattered blocks.

Runs in `.peers/nixl` (`make peers`). `--way` is UCX_TLS: empty lets UCX choose (shared memory on one machine), "tcp,self" is
TCP over loopback. Timed from `transfer` to DONE: making the request isn't counted, though Tandem's reads include it.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from blocks import Mover, answer_blocks, arguments, filled, serve
from child import own_stdout


def agent(way: str, name: str) -> Any:
    if way:
        os.environ["UCX_TLS"] = way
        os.environ["UCX_NET_DEVICES"] = "lo"
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def target(way: str, num_blocks: int, slab_bytes: int, connection: Connection) -> None:
    arena = filled(num_blocks, slab_bytes, 2)
    ours = agent(way, "target")
    registered = ours.register_memory([(arena.ctypes.data, arena.nbytes, 0, "")], "DRAM")
    connection.send((ours.get_agent_metadata(), arena.ctypes.data))
    answer_blocks(arena, connection)
    del registered
    os._exit(0)


class Nixl:
    def __init__(self, way: str, arena: np.ndarray, metadata: bytes, their_address: int) -> None:
        self._arena = arena
        self._their_address = their_address
        self._agent = agent(way, "initiator")
        self._registered = self._agent.register_memory([(arena.ctypes.data, arena.nbytes, 0, "")], "DRAM")
        peer = self._agent.add_remote_agent(metadata)
        self._peer = peer.decode() if isinstance(peer, bytes) else peer

    def read(self, remote: list[int], local: list[int]) -> float:
        return self._move("READ", remote, local)

    def write(self, remote: list[int], local: list[int]) -> float:
        return self._move("WRITE", remote, local)

    def _move(self, what: str, remote: list[int], local: list[int]) -> float:
        size, base = self._arena.shape[1], self._arena.ctypes.data
        ours = self._agent.get_xfer_descs([(base + block * size, size, 0) for block in local], "DRAM")
        theirs = self._agent.get_xfer_descs([(self._their_address + block * size, size, 0) for block in remote], "DRAM")
        request = self._agent.initialize_xfer(what, ours, theirs, self._peer)
        began = time.perf_counter()
        state = self._agent.transfer(request)
        while state == "PROC":
            state = self._agent.check_xfer_state(request)
        seconds = time.perf_counter() - began
        if state != "DONE":
            raise RuntimeError(f"a transfer ended as {state}")
        self._agent.release_xfer_handle(request)
        return seconds


if __name__ == "__main__":
    options = arguments()
    answers = own_stdout()
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    shape = (options.num_blocks, options.slab_bytes)
    other = spawn.Process(target=target, args=(options.way, *shape, there), daemon=True)
    other.start()
    there.close()
    metadata, address = here.recv()
    arena = filled(*shape, 1)
    engine = Nixl(options.way, arena, metadata, address)
    mover = Mover(engine, arena, here, options.batch_blocks, random.Random(7))
    serve(answers, importlib.metadata.version("nixl-cu12"), mover.operations())
    other.terminate()
    os._exit(0)
