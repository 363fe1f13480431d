"""What all stores that are peers do: put all values, a batch a call, and get them back into a private buffer.

`put` first forgets, untimed, what is there; `get` is compared byte for byte. Runs in a peer's own virtual environment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from blocks import Operation


class Store(Protocol):
    """Values are rows of `source`; they come back into the same rows of `target`."""

    def forget(self) -> None: ...

    def put(self, rows: range) -> None: ...

    def wait_until_put(self) -> None: ...

    def before_get(self) -> None: ...

    def get(self, rows: range) -> None: ...


def operations(store: Store, source: np.ndarray, target: np.ndarray, batch_blocks: int) -> dict[str, Operation]:
    batches = [range(first, min(first + batch_blocks, len(source))) for first in range(0, len(source), batch_blocks)]

    def put() -> float:
        store.forget()
        began = time.perf_counter()
        for rows in batches:
            store.put(rows)
        store.wait_until_put()
        return time.perf_counter() - began

    def get() -> float:
        target[:] = 0
        store.before_get()
        began = time.perf_counter()
        for rows in batches:
            store.get(rows)
        seconds = time.perf_counter() - began
        if not np.array_equal(source, target):
            raise RuntimeError("what came back differs from what was put")
        return seconds

    def repeat(once: Callable[[], float]) -> Operation:
        return lambda times: [once() for _ in range(times)]

    return {"put": repeat(put), "get": repeat(get)}
