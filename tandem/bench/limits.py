"""What the cores of this machine can do at best: how fast they read memory and multiply matrices.

Owns two measurements, the references of engine benchmarks; knows nothing of models.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import torch

_BYTES = 512 * 2**20
_SIZE = 1024


class MemoryReader:
    """Reads more memory than any cache holds, with the C library's vectorised search for a byte that isn't there, on `threads`
    threads, each its own part."""

    def __init__(self, threads: int = 1) -> None:
        # Written, because untouched pages would all be one page of zeros.
        self._buffer = ctypes.create_string_buffer(_BYTES)
        ctypes.memset(self._buffer, 1, _BYTES)
        self._find = ctypes.CDLL(None).memchr
        self._find.restype = ctypes.c_void_p
        self._find.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self._part_bytes = _BYTES // threads
        self._addresses = [ctypes.addressof(self._buffer) + index * self._part_bytes for index in range(threads)]
        # The calling thread reads the first part itself: on one thread nobody has to be woken.
        self._others = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="memory-reader")

    def bytes_per_s(self) -> float:
        """Passes over all the memory, best of three."""
        return max(self._pass() for _ in range(3))

    def _pass(self) -> float:
        began = time.perf_counter()
        others = [self._others.submit(self._read, address) for address in self._addresses[1:]]
        self._read(self._addresses[0])
        for other in others:
            other.result()
        return self._part_bytes * len(self._addresses) / (time.perf_counter() - began)

    def _read(self, address: int) -> None:
        found = self._find(address, 2, self._part_bytes)
        assert found is None


def matmul_flops_per_s(dtype: torch.dtype, threads: int = 1) -> float:
    """Floating-point operations a second of a square product on `threads` threads, best of three."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.ones(_SIZE, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - began)
        return 2 * _SIZE**3 / min(times[1:])
    finally:
        torch.set_num_threads(before)
