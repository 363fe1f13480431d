"""From the workers that there are to those that are wanted: who starts, who leaves, who changes its role.

Owns the choice. A worker that changes its role leaves, and another one starts in its place, which nobody else gets meanwhile;
whoever leaves finishes what it has first. So there are never more places taken than by those that are wanted and those that
leave. Pure: the same answer for the same state, so whoever acts on it may be killed at any time and begin again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tandem.scaling.scaler import ROLES, Counts, Name


class State(Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker. `load` says how busy it is; `then` is the role that starts in its place once it has left, None: nobody."""

    name: str
    role: Name
    state: State
    load: float = 0.0
    then: Name | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """A worker of this role starts, in a new place."""

    role: Name


@dataclass(frozen=True, slots=True)
class Leave:
    """This worker finishes what it has and leaves, and `then` one of that role starts in its place. Said again of one that leaves
    already when only what comes after it is another."""

    name: str
    then: Name | None = None


def reconcile(wanted: Counts, workers: Sequence[Worker]) -> list[Start | Leave]:
    """What is to be done now. Those that do not serve yet leave first, then the least busy ones, of equals the youngest."""
    after: dict[str, Name | None] = {worker.name: worker.then for worker in workers if worker.state is State.LEAVING}
    missing: dict[Name, int] = {}
    leaving: list[str] = []
    for role in ROLES:
        staying = [worker for worker in workers if worker.role == role and worker.state is not State.LEAVING]
        coming = [name for name, then in after.items() if then == role]
        over = len(staying) + len(coming) - wanted.of(role)
        missing[role] = max(0, -over)
        for name in coming[: max(0, over)]:
            after[name] = None
        staying.sort(key=lambda worker: (worker.state is State.RUNNING, worker.load, -_age(worker.name)))
        leaving += [worker.name for worker in staying[: max(0, over - len(coming))]]
    free = [*leaving, *(name for name, then in after.items() if then is None)]
    for role in ROLES:
        for name in free[: missing[role]]:
            after[name] = role
        taken = min(missing[role], len(free))
        missing[role] -= taken
        free = free[taken:]
    known = {worker.name: worker.then for worker in workers if worker.state is State.LEAVING}
    actions: list[Start | Leave] = []
    for name in leaving:
        actions.append(Leave(name, after.get(name)))
    actions += [Leave(name, after[name]) for name, then in known.items() if after[name] != then]
    actions += [Start(role) for role in ROLES for _ in range(missing[role])]
    return actions


def _age(name: str) -> int:
    """The number of `ROLE-N`: free numbers are taken from below, so higher ones are younger, about."""
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0
