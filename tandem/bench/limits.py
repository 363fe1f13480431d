"""What one core of this machine can do at best: how fast it reads memory and multiplies matrices.

Owns two measurements, the references of engine benchmarks; knows nothing of models.
"""

from __future__ import annotations

import ctypes
import time

import torch

_BYTES = 512 * 2**20
_SIZE = 1024


class MemoryReader:
    """Reads more memory than any cache holds, with the C library's vectorised search for a byte that isn't there."""

    def __init__(self) -> None:
        # Written, because untouched pages would all be one page of zeros.
        self._buffer = ctypes.create_string_buffer(_BYTES)
        ctypes.memset(self._buffer, 1, _BYTES)
        self._find = ctypes.CDLL(None).memchr
        self._find.restype = ctypes.c_void_p
        self._find.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def bytes_per_s(self) -> float:
        """One pass, on the calling thread."""
        began = time.perf_counter()
        found = self._find(self._buffer, 2, _BYTES)
        seconds = time.perf_counter() - began
        assert found is None
        return _BYTES / seconds


def matmul_flops_per_s(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square product on one thread, best of three."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.ones(_SIZE, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - began)
        return 2 * _SIZE**3 / min(times[1:])
    finally:
        torch.set_num_threads(threads)
