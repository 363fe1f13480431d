"""What processes have counted, added up so that it never goes back.

Owns a total for each count of each process, across its incarnations. A process's own counts begin at 0 with each incarnation, and
what one had counted when the router first heard of it is not the router's to show: a total grows by what was seen to be added.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from protos.control import Role

KEEP_S = 600.0
"""So long the totals of a process are shown that is not heard of any more: it may come back under its name."""

Key = tuple[str, ...]
"""Names a count of a process: a total by its first two parts, and what else tells it from others that go into the same total."""
Total = tuple[str, str]
"""Names a total: what is counted, and of which kind; empty where there is but one."""


@dataclass(slots=True)
class _Account:
    epoch: bytes
    last: dict[Key, int]
    heard_at_s: float
    totals: dict[Total, int] = field(default_factory=dict)


class Totals:
    """Totals by process and role."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, Role], _Account] = {}

    def __iter__(self) -> Iterator[tuple[str, Role, Mapping[Total, int]]]:
        """Every process of which something is known, with its totals."""
        return ((process, role, account.totals) for (process, role), account in self._accounts.items())

    def take(
        self,
        process: str,
        role: Role,
        epoch: bytes,
        former_epochs: Sequence[bytes],
        counts: Mapping[Key, int],
        now_s: float,
    ) -> None:
        """What the process reports now. An epoch that is neither the last one nor came after it in the same process
        (`former_epochs`) counts from 0; in those, a count that fell has begun anew, and what isn't reported any more is over."""
        account = self._accounts.get((process, role))
        if account is None:
            account = self._accounts[process, role] = _Account(epoch, dict(counts), now_s)
            account.totals = dict.fromkeys((_total(key) for key in counts), 0)
            return
        goes_on = account.epoch == epoch or account.epoch in former_epochs
        for key, count in counts.items():
            last = account.last.get(key, 0) if goes_on else 0
            added = count - last if count >= last else count
            account.totals[_total(key)] = account.totals.get(_total(key), 0) + added
        account.epoch, account.last, account.heard_at_s = epoch, dict(counts), now_s

    def forget_silent(self, now_s: float) -> None:
        """Drops those that were not heard of for `KEEP_S`."""
        for name in [name for name, account in self._accounts.items() if now_s - account.heard_at_s > KEEP_S]:
            del self._accounts[name]


def _total(key: Key) -> Total:
    return key[0], key[1]
