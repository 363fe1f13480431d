"""Who serves blocks of our group, as all routers together say it.

Owns the last list of each router and what follows from them. Pure. A process is there as long as some router lists it. A router
that has just begun knows only those that have found it already: whom it leaves out in its first `GRACE_S` stays so long, unless a
new incarnation of it is listed.
"""

from __future__ import annotations

from protos.control import Peers, Source

GRACE_S = 3.0
"""Longer than it takes all processes to find a router that is back."""

_Name = tuple[str, bytes]


class PeerLists:
    """The lists of a process's routers."""

    def __init__(self) -> None:
        self._lists: dict[int, Peers] = {}
        self._since_s: dict[int, float] = {}
        """Since when each router speaks to us."""
        self._numbers: dict[int, int] = {}
        """Of the last list of each router that speaks to us."""
        self._latest = -1
        self._leaving: dict[_Name, tuple[Source, bool, float]] = {}
        """Whom nobody lists any more: as it was, whether it is a pool node, and until when it counts as there."""

    def said(self, router: int, peers: Peers, now_s: float) -> Peers | None:
        """A router's new list; returns what holds now, None before a router has a group to tell of. One that comes after a later
        one changes nothing."""
        if 0 < peers.number <= self.number(router):
            return self.merged(now_s)
        self._numbers[router] = peers.number
        if peers.group is None or not peers.slab_bytes:
            return self.merged(now_s)
        before = self.merged(now_s)
        until_s = self._since_s.setdefault(router, now_s) + GRACE_S
        self._lists[router] = peers
        self._latest = router
        if now_s < until_s:
            self._notice(before, until_s, now_s)
        return self.merged(now_s)

    def number(self, router: int) -> int:
        """Of the last list that came from it, 0 if none did since it was lost."""
        return self._numbers.get(router, 0)

    def lost(self, router: int) -> None:
        """A router is gone. What it said last counts no more where another one has said something; alone, it is all we know."""
        self._since_s.pop(router, None)
        self._numbers.pop(router, None)
        if router in self._lists and len(self._lists) > 1:
            del self._lists[router]
            if self._latest == router:
                self._latest = next(iter(self._lists))

    def due_s(self) -> float | None:
        """When somebody's time is over: `merged` then says something new."""
        return min((until_s for _, _, until_s in self._leaving.values()), default=None)

    def merged(self, now_s: float) -> Peers | None:
        """What holds now: the group is that of the last list; routers that tell of another one are not listened to."""
        if self._latest < 0:
            return None
        latest = self._lists[self._latest]
        lists = [
            latest,
            *(peers for peers in self._lists.values() if peers is not latest and peers.group == latest.group),
        ]
        workers = {_name(source): source for peers in lists for source in peers.workers}
        pools = {_name(source): source for peers in lists for source in peers.pools}
        present = {source.process for source in (*workers.values(), *pools.values())}
        for name, (source, is_pool, until_s) in list(self._leaving.items()):
            if until_s <= now_s or source.process in present:
                del self._leaving[name]
            else:
                (pools if is_pool else workers)[name] = source
        return Peers([*workers.values()], latest.group, latest.slab_bytes, [*pools.values()])

    def _notice(self, before: Peers | None, until_s: float, now_s: float) -> None:
        """Who was there before a change, and is listed by nobody after it, counts as there for a while."""
        after = self.merged(now_s)
        if before is None or after is None or before.group != after.group:
            return
        for is_pool, was, now in ((False, before.workers, after.workers), (True, before.pools, after.pools)):
            here = {_name(source) for source in now}
            processes = {source.process for source in now}
            for source in was:
                if _name(source) not in here and source.process not in processes:
                    self._leaving.setdefault(_name(source), (source, is_pool, until_s))


def _name(source: Source) -> _Name:
    return source.process, source.epoch
