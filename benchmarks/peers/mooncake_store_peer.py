"""Mooncake's store as a peer: a master, a process that gives the memory, and this client, over TCP on loopback.

Runs in `.peers/mooncake` (`make peers`). With `--way local` this client gives the memory itself, so that nothing leaves it.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from blocks import arguments, filled, serve
from child import own_stdout
from stores import operations

PACKAGE = "mooncake-transfer-engine-non-cuda"
LOCAL_BYTES = 1 << 30
START_S = 30.0
os.environ.setdefault("GLOG_minloglevel", "2")
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
os.environ.setdefault("MC_STORE_CLIENT_METRIC", "0")
os.environ.setdefault("MC_YLT_LOG_LEVEL", "error")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def client(master: int, segment_bytes: int, local_bytes: int) -> Any:
    """Tries until the master answers."""
    from mooncake.store import MooncakeDistributedStore

    gives_up = time.monotonic() + START_S
    while True:
        store = MooncakeDistributedStore()
        code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, local_bytes, "tcp", "", f"127.0.0.1:{master}")
        if not code:
            return store
        if time.monotonic() > gives_up:
            raise RuntimeError(f"setup answered {code}")
        time.sleep(0.2)


def give_memory(master: int, num_bytes: int, connection: Connection) -> None:
    store = client(master, num_bytes, 16 << 20)
    connection.send("up")
    try:
        connection.recv()
    except EOFError:
        pass
    store.close()
    os._exit(0)


class Mooncake:
    def __init__(self, store: Any, source: np.ndarray, target: np.ndarray) -> None:
        self._store = store
        self._source = source
        self._target = target
        self._size = source.shape[1]
        for buffer in (source, target):
            if code := store.register_buffer(buffer.ctypes.data, buffer.nbytes):
                raise RuntimeError(f"register_buffer answered {code}")

    def forget(self) -> None:
        self._store.remove_all(True)

    def put(self, rows: range) -> None:
        codes = self._store.batch_put_from(*self._call(self._source, rows))
        if any(codes):
            raise RuntimeError(f"batch_put_from answered {codes}")

    def wait_until_put(self) -> None:
        pass

    def before_get(self) -> None:
        pass

    def get(self, rows: range) -> None:
        sizes = self._store.batch_get_into(*self._call(self._target, rows))
        if any(size != self._size for size in sizes):
            raise RuntimeError(f"batch_get_into answered {sizes}")

    def _call(self, buffer: np.ndarray, rows: range) -> tuple[list[str], list[int], list[int]]:
        addresses = [buffer.ctypes.data + row * self._size for row in rows]
        return [f"block/{row}" for row in rows], addresses, [self._size] * len(rows)


if __name__ == "__main__":
    options = arguments()
    answers = own_stdout()
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "mooncake_master"), f"--rpc_port={port}", "--rpc_address=127.0.0.1",
        f"--metrics_port={free_port()}", "--metrics_host=127.0.0.1", "--enable_metric_reporting=false",
    ]  # fmt: skip
    master = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
    num_bytes = 2 * options.num_blocks * options.slab_bytes + (256 << 20)
    try:
        if options.way == "local":
            store = client(port, num_bytes, LOCAL_BYTES)
        else:
            spawn = multiprocessing.get_context("spawn")
            here, there = spawn.Pipe()
            giver = spawn.Process(target=give_memory, args=(port, num_bytes, there), daemon=True)
            giver.start()
            there.close()
            here.recv()
            store = client(port, 0, LOCAL_BYTES)
        source = filled(options.num_blocks, options.slab_bytes, 1)
        target = np.zeros_like(source)
        found = operations(Mooncake(store, source, target), source, target, options.batch_blocks)
        serve(answers, importlib.metadata.version(PACKAGE), found)
    finally:
        master.kill()
        if options.way != "local":
            giver.terminate()
    os._exit(0)
