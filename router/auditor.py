"""One audit: every process is asked what it owns, and that is held against what this router and the other processes believe.

Owns the questions, the answers and the comparison. Pure: it changes nothing, and its shell sends what it returns. Messages of
one process keep their order, so what it owned when it answered can be compared with what was believed just then; what was on
its way between two moments shows as a difference all the same, so an audit goes in rounds, and only what no round clears is true.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from protos.control import Audit, Fence, Owned, Tier
from router.actions import Send
from router.membership import Member
from router.router import RouterCore

OVERDUE_S = 1.0
"""A lease ends by itself, and its owner looks so often at least."""
MAX_NAMED = 3
"""Findings of one check that are told in full."""
TIERS: tuple[Tier, ...] = ("DEVICE", "HOST", "DISK")

Who = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of an audit."""

    check: str
    ok: bool
    evidence: str


@dataclass(slots=True)
class _Asked:
    """One process of a round. `before`: the dispatches that it held when it was asked."""

    member: Member
    before: set[Fence]
    owned: Owned | None = None
    dispatches: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    compared: bool = False


class Auditor:
    """One round after the other, `number` by number; a shell passes on what it says and what it is answered."""

    def __init__(self, core: RouterCore) -> None:
        self._core = core
        self._asked: dict[Who, _Asked] = {}
        self._number = 0

    def ask(self, number: int) -> list[Send]:
        """Begins a round."""
        self._number = number
        self._asked = {(m.name, m.epoch): _Asked(m, self._held(m)) for m in self._core.membership}
        return [Send(name, epoch, Audit(number)) for name, epoch in self._asked]

    def take(self, process: str, epoch: bytes, owned: Owned) -> None:
        """An answer."""
        asked = self._asked.get((process, epoch))
        if asked is None or owned.number != self._number:
            return
        asked.owned = owned
        asked.dispatches = self._wrong_dispatches(asked, owned)

    def is_complete(self) -> bool:
        """Whether all have answered, and the index knows what they had told until then. Compares what can be compared now."""
        for asked in self._asked.values():
            if asked.owned is not None and not asked.compared:
                self._compare_blocks(asked, asked.owned)
        return all(asked.compared or not self._is_member(who) for who, asked in self._asked.items())

    def findings(self) -> list[Finding]:
        """What the round shows."""
        asked = [asked for who, asked in self._asked.items() if self._is_member(who)]
        silent = [a.member.name for a in asked if a.owned is None]
        answers = {a.member.name: a.owned for a in asked if a.owned is not None}
        num_blocks = sum(tier.num_blocks for owned in answers.values() for tier in owned.tiers)
        num_keys = sum(tier.num_keys for owned in answers.values() for tier in owned.tiers)
        num_fences = sum(len(owned.fences) for owned in answers.values())
        behind = [self._behind(a.member.name, a.owned) for a in asked if a.owned is not None and not a.compared]
        wrong_blocks = [text for a in asked for text in a.blocks]
        return [
            _finding(
                "every process says what it owns", f"{len(answers)} answers", [f"silent: {name}" for name in silent]
            ),
            _finding("the index holds what is held", f"{num_keys} keys", [*wrong_blocks, *behind]),
            _finding(
                "every dispatch is known at both ends",
                f"{num_fences} dispatches",
                [text for a in asked for text in a.dispatches],
            ),
            _finding("the ledger counts what is dispatched", f"{len(asked)} accounts", self._ledger(asked)),
            _finding("every block is somebody's", f"{num_blocks} blocks", _strays(answers)),
            _finding("no lease outlives its time", f"{_num_leases(answers)} leases", _overdue(answers)),
            _finding("every pool's books are right", f"{len(answers)} processes", _faults(answers)),
            _finding(
                "pool nodes know what workers hold", "", _followed(answers, {a.member.name: a.member for a in asked})
            ),
            _finding("no memory of a dead process is mapped", f"{_num_segments(answers)} segments", _leftovers(asked)),
        ]

    def _behind(self, name: str, owned: Owned) -> str:
        seq, _, _ = self._core.index.held(name, "DEVICE")
        return f"the index is at batch {seq} of {name}, which is at {owned.events_seq}"

    def _is_member(self, who: Who) -> bool:
        return self._core.membership.is_member(*who)

    def _held(self, member: Member) -> set[Fence]:
        return {
            dispatch.fence
            for record in self._core.journal
            for dispatch in record.dispatches.values()
            if (dispatch.process, dispatch.epoch) == (member.name, member.epoch)
        }

    def _wrong_dispatches(self, asked: _Asked, owned: Owned) -> list[str]:
        name, now = asked.member.name, self._held(asked.member)
        there = set(owned.fences)
        lost = (asked.before & now) - there
        orphans = there - asked.before - now - self._core.closing(name)
        return [
            *(f"{name} doesn't know {_named(fence)}" for fence in lost),
            *(f"{name} holds {_named(fence)}, which is nobody's" for fence in orphans),
        ]

    def _compare_blocks(self, asked: _Asked, owned: Owned) -> None:
        name = asked.member.name
        if not asked.member.hello.endpoints.events or not owned.tiers:
            asked.compared = True  # it publishes nothing, so nothing of it is known for certain
            return
        told = {tier.tier: (tier.num_keys, tier.digest) for tier in owned.tiers}
        for tier in TIERS:
            seq, num_keys, digest = self._core.index.held(name, tier)
            if seq != owned.events_seq:
                return
            there, its_digest = told.get(tier, (0, bytes(len(digest))))
            if num_keys != there:
                asked.blocks.append(f"{name} holds {there} keys in {tier}, the index {num_keys} of it")
            elif digest != its_digest:
                asked.blocks.append(f"{name} holds {there} keys in {tier}, the index as many others")
        asked.compared = True

    def _ledger(self, asked: Iterable[_Asked]) -> list[str]:
        wrong = []
        for one in asked:
            name, held = one.member.name, len(self._held(one.member))
            counted = self._core.fleet.dispatched_to(name)
            if counted != held:
                wrong.append(f"{name} has {held} dispatches, its account {counted}")
        return wrong


def _finding(check: str, evidence: str, wrong: list[str]) -> Finding:
    if len(wrong) > MAX_NAMED:
        wrong = [*wrong[:MAX_NAMED], f"and {len(wrong) - MAX_NAMED} more"]
    return Finding(check, not wrong, "; ".join(wrong) if wrong else evidence or "all agree")


def _named(fence: Fence) -> str:
    return f"{fence.role} {fence.attempt} of {fence.request_id}"


def _strays(answers: dict[str, Owned]) -> list[str]:
    wrong = []
    for name, owned in answers.items():
        if owned.num_stray_blocks:
            wrong.append(f"{name} references {owned.num_stray_blocks} blocks for nobody")
        for tier in owned.tiers:
            counted = tier.free + tier.referenced + tier.cached + tier.lent + tier.retired
            if counted != tier.num_blocks:
                wrong.append(f"{name} has {tier.num_blocks} blocks in {tier.tier}, counted {counted}")
    return wrong


def _num_leases(answers: dict[str, Owned]) -> int:
    return sum(tier.num_leases for owned in answers.values() for tier in owned.tiers)


def _overdue(answers: dict[str, Owned]) -> list[str]:
    return [
        f"{name} has a lease in {tier.tier} that is over since {tier.lease_overdue_s:.1f} s"
        for name, owned in answers.items()
        for tier in owned.tiers
        if tier.lease_overdue_s > OVERDUE_S
    ]


def _faults(answers: dict[str, Owned]) -> list[str]:
    return [f"{name}: {tier.fault}" for name, owned in answers.items() for tier in owned.tiers if tier.fault]


def _followed(answers: dict[str, Owned], members: dict[str, Member]) -> list[str]:
    """Only where both speak of the same batch of events: otherwise some are on their way."""
    wrong = []
    for name, owned in answers.items():
        for seen in owned.followed:
            worker, there = members.get(seen.process), answers.get(seen.process)
            if worker is None or worker.epoch != seen.epoch or there is None or there.events_seq != seen.seq:
                continue
            held = [tier for tier in there.tiers if tier.tier == "DEVICE"]
            if [(tier.num_keys, tier.digest) for tier in held] != [(seen.num_keys, seen.digest)]:
                wrong.append(
                    f"{name} takes {seen.process} to hold {seen.num_keys} keys, it holds {held[0].num_keys if held else 0}"
                )
    return wrong


def _num_segments(answers: dict[str, Owned]) -> int:
    return sum(len(owned.mapped) for owned in answers.values())


def _leftovers(asked: list[_Asked]) -> list[str]:
    """Arenas that somebody maps and no process of its machine has."""
    living: dict[str, set[int]] = {}
    for one in asked:
        if one.owned is not None:
            living.setdefault(one.member.hello.endpoints.machine_id, set()).add(one.owned.segment)
    if any(one.owned is None for one in asked):
        return []  # whose they are is not known then; that one is silent is told above
    return [
        f"{one.member.name} maps {len(left)} arenas of nobody"
        for one in asked
        if one.owned is not None and (left := set(one.owned.mapped) - living[one.member.hello.endpoints.machine_id])
    ]
