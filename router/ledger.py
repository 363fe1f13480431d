"""Load per worker as this router sees it: the worker's last report and our own dispatches that it doesn't include yet.

Owns the count of dispatches per worker. Pure; it never decides where anything goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.control import Fence, Load


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What waits and runs at a worker: tokens whose KV it still has to get, and sequences."""

    waiting_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True)
class _Own:
    serial: int
    num_tokens: int
    num_sequences: int


@dataclass(slots=True)
class _Account:
    serial: int = 0
    report: Load = field(default_factory=Load)
    own: dict[Fence, _Own] = field(default_factory=dict)


class Ledger:
    """Accounts by worker name. Our dispatches are numbered as the worker counts them in `Load.num_dispatches`; both begin at
    0 when it joins, also when the same epoch comes back (a worker that lost its router forgets what that had sent)."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def join(self, process: str) -> None:
        self._accounts[process] = _Account()

    def forget(self, process: str) -> None:
        """A worker is lost: its account closes."""
        self._accounts.pop(process, None)

    def dispatched(self, process: str, fence: Fence, num_tokens: int, num_sequences: int) -> None:
        account = self._accounts[process]
        account.serial += 1
        account.own[fence] = _Own(account.serial, num_tokens, num_sequences)

    def ended(self, process: str, fence: Fence) -> None:
        """A dispatch is over, whatever way. Unknown ones are ignored."""
        account = self._accounts.get(process)
        if account is not None:
            account.own.pop(fence, None)

    def reported(self, process: str, load: Load) -> None:
        """A heartbeat's load: dispatches up to `num_dispatches` are in it and are not counted twice."""
        account = self._accounts.get(process)
        if account is None:
            return
        account.report = load
        for fence in [fence for fence, own in account.own.items() if own.serial <= load.num_dispatches]:
            del account.own[fence]

    def load(self, process: str) -> WorkerLoad:
        account = self._accounts[process]
        report = account.report
        return WorkerLoad(
            report.waiting_tokens + sum(own.num_tokens for own in account.own.values()),
            report.num_waiting + report.num_running + sum(own.num_sequences for own in account.own.values()),
        )

    def num_unreported(self) -> int:
        """Dispatches that no report includes yet; 0 when the cluster is idle."""
        return sum(len(account.own) for account in self._accounts.values())

    def processes(self) -> set[str]:
        return set(self._accounts)
