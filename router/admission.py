"""The line of requests that wait for room: who is next.

Owns the order, and nothing of where anything goes: a request is held here until a worker has room for it (late binding), so that
one that comes later and is more urgent can overtake, and the choice of its workers is made when it can start. Pure.

    order       by the point in time at which its first token is due: `tag + SLO`. A class' SLO is long or short; a long
                uncached prompt is due later. Nothing starves: what comes later is due later, too
    fair share  `tag` is the arrival, or, for a tenant that asks for more than its share, when its share would have served what it
                asked for before (virtual clock; Zhang, *VirtualClock*, SIGCOMM 1990): it queues behind itself, not before others
    too late    what can't keep its SLO any more gives way to those who still can: it is put back once, by its SLO
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LOOK_AHEAD = 4
"""So many are tried while the first one finds no room."""
ROOM_S = 0.25
"""A worker has room for another prompt when those it has are predicted to be computed within this: it never idles, and what
comes later can still go before what waits."""
MIN_WAIT_S, MAX_WAIT_S = 0.02, 0.2
"""A request that found no room is tried again after so long: predictions err, and workers come."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a class of requests is promised. 0 for `tpot_s`: nothing."""

    ttft_s: float
    ttft_per_token_s: float = 0.0
    """For each prompt token that has to be computed."""
    tpot_s: float = 0.0

    def first_token_s(self, uncached_tokens: float) -> float:
        return self.ttft_s + self.ttft_per_token_s * uncached_tokens


INTERACTIVE = Slo(ttft_s=2.0, ttft_per_token_s=1e-3)
BATCH = Slo(ttft_s=60.0, ttft_per_token_s=1e-3)
"""Where nothing else is promised: an order, not a limit."""


@dataclass(slots=True, eq=False)
class Held:
    """One that waits. `work_s` is what its prefill takes, about; `slo_s` from its arrival to its first token."""

    request_id: str
    tenant: str
    arrived_s: float
    slo_s: float
    work_s: float
    due_s: float
    """By which it is ordered."""
    put_back: bool = False
    try_at_s: float = 0.0
    """When its workers are predicted to have room: trying before is of no use."""

    @property
    def slo_at_s(self) -> float:
        """When its first token is due by its SLO."""
        return self.arrived_s + self.slo_s


class Admission:
    """Those that wait, by `due_s`."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._tags: dict[str, float] = {}
        self._num = 0
        self._first: list[Held] | None = None
        """The first few, as long as they are."""

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._held))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    def due_s(self, tenant: str, slo_s: float, now_s: float) -> float:
        """By when a request that came now would be ordered."""
        return max(now_s, self._tags.get(tenant, now_s)) + slo_s

    def add(
        self,
        request_id: str,
        tenant: str,
        slo_s: float,
        work_s: float,
        num_workers: int,
        now_s: float,
        due_s: float | None = None,
    ) -> Held:
        """A request came. `num_workers` compute prompts: a tenant's share is theirs, divided by those who wait. One that was
        dispatched before keeps its `due_s`, and is not counted again."""
        assert request_id not in self._held, f"{request_id} waits already"
        if due_s is not None:
            held = Held(request_id, tenant, due_s - slo_s, slo_s, work_s, due_s, put_back=True)
            self._hold(held)
            return held
        tag = max(now_s, self._tags.get(tenant, now_s))
        tenants = {held.tenant for held in self._held.values()} | {tenant} if len(self._tags) > 1 else {tenant}
        self._tags[tenant] = tag + work_s * len(tenants) / max(1, num_workers)
        held = Held(request_id, tenant, now_s, slo_s, work_s, tag + slo_s)
        self._hold(held)
        if len(self._tags) > 2 * len(self._held) + 64:
            self._tags = {name: tag_s for name, tag_s in self._tags.items() if tag_s > now_s}
        return held

    def _hold(self, held: Held) -> None:
        self._held[held.request_id] = held
        self._push(held)

    def put_back(self, request_id: str, now_s: float) -> None:
        """Its SLO can't be kept any more: it is due as if it came now. Once; later calls change nothing."""
        held = self._held[request_id]
        if not held.put_back:
            held.put_back = True
            held.due_s = now_s + held.slo_s
            self._push(held)

    def remove(self, request_id: str) -> None:
        """It has been dispatched, or has ended. Unknown ones are ignored."""
        held = self._held.pop(request_id, None)
        if held is not None and self._first is not None and held in self._first:
            self._first = None

    def all(self) -> list[Held]:
        """All in line, in order."""
        return self._find(len(self._held))

    def first(self) -> list[Held]:
        """The first `LOOK_AHEAD` in line."""
        if self._first is None:
            self._first = self._find(LOOK_AHEAD)
        return self._first

    def _find(self, limit: int) -> list[Held]:
        found: list[Held] = []
        entries: list[tuple[float, int, str]] = []
        while self._heap and len(found) < limit:
            entry = heapq.heappop(self._heap)
            held = self._held.get(entry[2])
            if held is None or held.due_s != entry[0]:
                continue  # gone, or put back: it is in the heap again
            entries.append(entry)
            found.append(held)
        for entry in entries:
            heapq.heappush(self._heap, entry)
        return found

    def release(self, now_s: float, dispatch: Callable[[Held], float]) -> None:
        """Offers the first few in line to `dispatch`, which takes one (0), or says for how many seconds it is predicted to find
        no room, until there is none. A request whose workers are busy doesn't keep those behind it from others'."""
        going = True
        while going and self._held:
            going = False
            for held in self.first():
                if now_s < held.try_at_s:
                    continue
                if now_s > held.slo_at_s and not held.put_back:
                    self.put_back(held.request_id, now_s)
                    going = True
                    break
                full_s = dispatch(held)
                if full_s <= 0.0:
                    self.remove(held.request_id)
                    going = True
                    break
                held.try_at_s = now_s + min(max(full_s, MIN_WAIT_S), MAX_WAIT_S)

    def next_try_s(self) -> float | None:
        """When `release` may find room for one of the first in line; None: nobody waits."""
        return min((held.try_at_s for held in self.first()), default=None)

    def ahead_s(self, due_s: float) -> float:
        """What the prefills of those take that would go before one due then."""
        return sum(held.work_s for held in self._held.values() if held.due_s <= due_s)

    def _push(self, held: Held) -> None:
        self._num += 1
        first = self._first
        if first is not None and (held in first or len(first) < LOOK_AHEAD or held.due_s < first[-1].due_s):
            self._first = None
        heapq.heappush(self._heap, (held.due_s, self._num, held.request_id))
