"""LMCache's storage as a peer, without vLLM: its StorageManager over local CPU memory, or over files.

Runs in `.peers/lmcache` (`make peers`). `--way` is cpu or disk; the files are in `--dir`. A put allocates in LMCache's pool,
copies in and hands over, until the backend has it all; a get copies out into a private buffer. Before a get from files the
page cache is dropped for them.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from pathlib import Path

import numpy as np
from blocks import arguments, filled, serve
from child import own_stdout
from stores import operations

os.environ.update(LMCACHE_TRACK_USAGE="false", DO_NOT_TRACK="1", LMCACHE_LOG_LEVEL="ERROR", HF_HUB_OFFLINE="1")
LAYERS, TOKENS = 30, 16
"""A slab is keys and values of so many layers and tokens."""
PUT_S = 120.0


class LMCache:
    def __init__(self, way: str, folder: str, source: np.ndarray, target: np.ndarray) -> None:
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.event_manager import EventManager
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.storage_manager import StorageManager

        torch.set_num_threads(1)
        self._disk = way == "disk"
        self._folder = Path(folder)
        gigabytes = source.nbytes / 2**30
        settings = {"chunk_size": TOKENS, "local_cpu": not self._disk, "max_local_cpu_size": gigabytes + 0.6}
        if self._disk:
            settings |= {"local_disk": f"file://{folder}/", "max_local_disk_size": 2 * gigabytes + 1}
        width = source.shape[1] // (LAYERS * 2 * TOKENS * 2)
        if width * LAYERS * 2 * TOKENS * 2 != source.shape[1]:
            raise ValueError(f"slabs of {source.shape[1]} bytes are no keys and values of {LAYERS} layers in bf16")
        metadata = LMCacheMetadata(
            model_name="m", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
            kv_dtype=torch.bfloat16, kv_shape=(LAYERS, 2, TOKENS, 1, width), role="worker", chunk_size=TOKENS,
        )  # fmt: skip
        self._manager = StorageManager(LMCacheEngineConfig.from_defaults(**settings), metadata, EventManager())
        self._backend = self._manager.storage_backends["LocalDiskBackend" if self._disk else "LocalCPUBackend"]
        self._shape, self._dtype = torch.Size([2, LAYERS, TOKENS, width]), torch.bfloat16
        self._format = MemoryFormat.KV_2LTD
        self._bytes = torch.uint8
        self._source = torch.from_numpy(source)
        self._target = torch.from_numpy(target)
        self._keys = [CacheEngineKey("m", 1, 0, row * 7919 + 1, torch.bfloat16) for row in range(len(source))]

    def forget(self) -> None:
        for key in self._keys:
            self._backend.remove(key)

    def put(self, rows: range) -> None:
        objects = self._manager.batched_allocate(self._shape, self._dtype, len(rows), fmt=self._format)
        for row, entry in zip(rows, objects, strict=True):
            entry.tensor.view(self._bytes).view(-1).copy_(self._source[row])
        self._manager.batched_put([self._keys[row] for row in rows], objects)

    def wait_until_put(self) -> None:
        gives_up = time.monotonic() + PUT_S
        while self._num_stored() < len(self._keys) or (self._disk and self._backend.disk_worker.put_tasks):
            if time.monotonic() > gives_up:
                raise RuntimeError(f"{self._num_stored()} of {len(self._keys)} values are stored after {PUT_S} s")
            time.sleep(0.0005)

    def before_get(self) -> None:
        if self._disk:
            os.sync()
            for path in self._folder.iterdir():
                file = os.open(path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)

    def get(self, rows: range) -> None:
        objects = self._manager.batched_get([self._keys[row] for row in rows], location=str(self._backend))
        for row, entry in zip(rows, objects, strict=True):
            self._target[row].copy_(entry.tensor.view(self._bytes).view(-1))
            entry.ref_count_down()

    def _num_stored(self) -> int:
        return len(self._backend.dict) if self._disk else len(self._backend.hot_cache)


if __name__ == "__main__":
    options = arguments()
    answers = own_stdout()
    source = filled(options.num_blocks, options.slab_bytes, 1)
    target = np.zeros_like(source)
    store = LMCache(options.way, options.dir, source, target)
    serve(answers, importlib.metadata.version("lmcache"), operations(store, source, target, options.batch_blocks))
    os._exit(0)
