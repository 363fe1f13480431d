"""What an engine has to say: replies to routers, fetches to start and to cancel, promises and their withdrawals.

Owns what was said since it was last taken. It sends nothing: the transfer thread does, in the order that `Output`
gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpool.keys import Key
from kvpool.sink import FetchPlan
from protos.control import Aborted, Failed, Owned, RoleReport, Started, Tokens

Reply = Started | Tokens | RoleReport | Failed | Aborted | Owned


@dataclass(slots=True)
class Output:
    """What the transfer thread is to do, in this order: cancels, promises, fetches, withdrawals, replies."""

    computed: bool = False
    """Whether the step ran the model: then blocks may have been published."""

    replies: list[tuple[int, Reply]] = field(default_factory=list)
    """`(router, message)`."""
    fetches: list[FetchPlan] = field(default_factory=list)
    cancels: list[bytes] = field(default_factory=list)
    promises: list[tuple[int, tuple[Key, ...]]] = field(default_factory=list)
    """`(job's arrival, keys)`: what that job is going to publish; fetches for it wait until the promise is withdrawn."""
    withdrawals: list[int] = field(default_factory=list)
    """Jobs that are over."""

    @property
    def is_empty(self) -> bool:
        return not (self.computed or self.replies or self.fetches or self.cancels or self.promises or self.withdrawals)


class Outbox:
    """Collects the next `Output`: whoever in the engine has something to say puts it here."""

    def __init__(self) -> None:
        self._next = Output()

    @property
    def is_empty(self) -> bool:
        return self._next.is_empty

    def reply(self, router: int, message: Reply) -> None:
        self._next.replies.append((router, message))

    def fetch(self, plan: FetchPlan) -> None:
        self._next.fetches.append(plan)

    def cancel(self, fetch_id: bytes) -> None:
        self._next.cancels.append(fetch_id)

    def promise(self, arrival: int, keys: tuple[Key, ...]) -> None:
        self._next.promises.append((arrival, keys))

    def withdraw(self, arrival: int) -> None:
        self._next.withdrawals.append(arrival)

    def take(self, *, computed: bool = False) -> Output:
        """What was said since the last call; the caller's own. `computed` is `Output`'s."""
        output, self._next = self._next, Output()
        output.computed = computed
        return output
