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
    at_s: float


@dataclass(slots=True)
class _Account:
    serial: int = 0
    report: Load = field(default_factory=Load)
    reported_s: float = 0.0
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

    def dispatched(self, process: str, fence: Fence, num_tokens: int, num_sequences: int, now_s: float) -> None:
        """`num_tokens` have to be computed there."""
        account = self._accounts[process]
        account.serial += 1
        account.own[fence] = _Own(account.serial, num_tokens, num_sequences, now_s)

    def ended(self, process: str, fence: Fence) -> None:
        """A dispatch is over, whatever way. Unknown ones are ignored."""
        account = self._accounts.get(process)
        if account is not None:
            account.own.pop(fence, None)

    def reported(self, process: str, load: Load, now_s: float) -> None:
        """A heartbeat's load: dispatches up to `num_dispatches` are in it and are not counted twice."""
        account = self._accounts.get(process)
        if account is None:
            return
        account.report = load
        account.reported_s = now_s
        for fence in [fence for fence, own in account.own.items() if own.serial <= load.num_dispatches]:
            del account.own[fence]

    def load(self, process: str, now_s: float) -> WorkerLoad:
        """What was there at the last report and came since, less what the worker has computed meanwhile at its price."""
        account = self._accounts[process]
        report, at_s = account.report, account.reported_s
        tokens, token_s = float(report.waiting_tokens), report.prices.token_s
        num_sequences = report.num_waiting + report.num_running
        for own in account.own.values():  # in the order in which they were sent
            tokens = _left(tokens, own.at_s - at_s, token_s) + own.num_tokens
            at_s = own.at_s
            num_sequences += own.num_sequences
        return WorkerLoad(round(_left(tokens, now_s - at_s, token_s)), num_sequences)

    def num_unreported(self) -> int:
        """Dispatches that no report includes yet; 0 when the cluster is idle."""
        return sum(len(account.own) for account in self._accounts.values())

    def processes(self) -> set[str]:
        return set(self._accounts)


def _left(tokens: float, seconds: float, token_s: float) -> float:
    """Of work that went on for so long; without a price nothing is known to be done."""
    return max(0.0, tokens - seconds / token_s) if token_s and seconds > 0 else tokens
