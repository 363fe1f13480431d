"""Mooncake's transfer engine as a peer: TCP over loopback between two processes, one call for a batch of scattered blocks.

Runs in `.peers/mooncake` (`make peers`).
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

PACKAGE = "mooncake-transfer-engine-non-cuda"
os.environ.setdefault("GLOG_minloglevel", "2")
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")


def engine_of(arena: np.ndarray) -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if code := engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError(f"initialize answered {code}")
    if code := engine.register_memory(arena.ctypes.data, arena.nbytes):
        raise RuntimeError(f"register_memory answered {code}")
    return engine


def target(num_blocks: int, slab_bytes: int, connection: Connection) -> None:
    arena = filled(num_blocks, slab_bytes, 2)
    engine = engine_of(arena)
    connection.send((f"127.0.0.1:{engine.get_rpc_port()}", arena.ctypes.data))
    answer_blocks(arena, connection)
    os._exit(0)


class Mooncake:
    def __init__(self, arena: np.ndarray, peer: str, their_address: int) -> None:
        self._arena = arena
        self._peer = peer
        self._their_address = their_address
        self._engine = engine_of(arena)

    def read(self, remote: list[int], local: list[int]) -> float:
        return self._move(self._engine.batch_transfer_sync_read, remote, local)

    def write(self, remote: list[int], local: list[int]) -> float:
        return self._move(self._engine.batch_transfer_sync_write, remote, local)

    def _move(self, call: Any, remote: list[int], local: list[int]) -> float:
        size, base = self._arena.shape[1], self._arena.ctypes.data
        ours = [base + block * size for block in local]
        theirs = [self._their_address + block * size for block in remote]
        sizes = [size] * len(local)
        began = time.perf_counter()
        code = call(self._peer, ours, theirs, sizes)
        seconds = time.perf_counter() - began
        if code:
            raise RuntimeError(f"a transfer answered {code}")
        return seconds


if __name__ == "__main__":
    options = arguments()
    answers = own_stdout()
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    shape = (options.num_blocks, options.slab_bytes)
    other = spawn.Process(target=target, args=(*shape, there), daemon=True)
    other.start()
    there.close()
    peer, address = here.recv()
    arena = filled(*shape, 1)
    mover = Mover(Mooncake(arena, peer, address), arena, here, options.batch_blocks, random.Random(7))
    serve(answers, importlib.metadata.version(PACKAGE), mover.operations())
    other.terminate()
    os._exit(0)
