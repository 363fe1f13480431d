"""Cores of this machine that a worker has for itself, so that the scheduler doesn't move its threads from cache to cache.

Owns the claims: each is a bound abstract socket, which the kernel takes back with its process. Whoever doesn't find enough free
cores among those it may run on runs where the scheduler puts it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path


class Cores:
    """`ids`: the claimed cores. Others can have them again after `close`, or when this process is gone."""

    def __init__(self, ids: list[int], claims: list[socket.socket]) -> None:
        self.ids = ids
        self._claims = claims

    def close(self) -> None:
        for claim in self._claims:
            claim.close()
        self._claims.clear()


def _bound(name: str) -> socket.socket | None:
    with contextlib.ExitStack() as undo:
        try:
            bound = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            bound.bind(name)
        except OSError:
            return None
        undo.pop_all()
        return bound


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two that claim at once would each take some cores, find too few, and both give up. Waits at most a second."""
    held = None
    for _ in range(100):
        held = _bound("\0tandem-cores")
        if held is not None:
            break
        time.sleep(0.01)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def _others_before(core: int) -> int:
    """How many hardware threads of lower number share this one's core; 0 if the system doesn't tell."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text(encoding="ascii")
        firsts = [tuple(map(int, part.split("-"))) for part in text.strip().split(",")]
    except (OSError, ValueError):
        return 0
    return sum(min(core, part[-1] + 1) - part[0] for part in firsts if part[0] < core)


def claim_cores(count: int) -> Cores | None:
    """`count` cores that no other worker under this network namespace has claimed, or None: so many aren't left. Of cores with
    several hardware threads first one thread each."""
    with contextlib.ExitStack() as undo, _one_at_a_time():
        ids: list[int] = []
        claims: list[socket.socket] = []
        for core in sorted(os.sched_getaffinity(0), key=lambda core: (_others_before(core), core)):
            claim = _bound(f"\0tandem-core-{core}")
            if claim is None:
                continue
            undo.callback(claim.close)
            ids.append(core)
            claims.append(claim)
            if len(ids) == count:
                undo.pop_all()
                return Cores(ids, claims)
    return None
