"""Who is alive: hello, heartbeat, deadlines, and which processes route together.

Owns the table of processes by name and the served routing group. Pure: messages and `now_s` in, events out; it never sends,
and knows nothing of requests or blocks.

    hello ──► Joined ──(heartbeats)──► … ──► Lost      silence for `liveness_s`, a step older than `progress_s`, goodbye,
      │         │                                      a closed connection, or a new epoch of the same name
      │         └─ hello again ──► Changed (its Welcome was late; a pool node has learnt its group), or, from a worker that
      │                            was welcome already, Lost and Joined: it had lost us and dropped its work; so from one
      │                            that names our member's epoch as its own former one
      └──► Rejected                                    protocol version, role, or a name whose other epoch is proven alive

A hello under a name that another epoch holds is not answered at once: refusing would stop a restarted worker whose
predecessor's death has not been noticed yet. It is repeated every second, and by then the old epoch has either spoken
once more after `liveness_s`, so that it is no late word of one that has died (Rejected), or been silent for two heartbeats
(Lost, then Joined).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from protos.control import PROTOCOL_VERSION, Heartbeat, Hello, Peers, Role, RoutingGroup, Source, Tier

MAX_MEMBERS = 4096


@dataclass(slots=True)
class Member:
    """One live process. `heartbeat` is the last one, None before the first."""

    hello: Hello
    joined_at_s: float
    heard_at_s: float
    heartbeat: Heartbeat | None = None

    @property
    def name(self) -> str:
        return self.hello.process

    @property
    def epoch(self) -> bytes:
        return self.hello.epoch

    @property
    def role(self) -> Role:
        return self.hello.role

    def source(self, tier: Tier) -> Source:
        """This process as a KVSource of `tier`."""
        return Source(process=self.name, epoch=self.epoch, tier=tier, endpoints=self.hello.endpoints)


@dataclass(frozen=True, slots=True)
class Joined:
    """A process became a member."""

    member: Member


@dataclass(frozen=True, slots=True)
class Changed:
    """A member said hello again; `group_changed` when it routes elsewhere now, `endpoints_changed` when it listens elsewhere
    (a pool node that has learnt what to hold)."""

    member: Member
    group_changed: bool
    endpoints_changed: bool


Cause = Literal["closed", "left", "silent", "stuck", "replaced", "rejoined"]
"""Why a process is lost: its connection closed, it said goodbye, no heartbeat came, a step does not end, a new process has its
name, or it came back by itself after it had lost us or had given its epoch up."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A process is no member any more; all it held is gone for us. `reason` is for people."""

    name: str
    epoch: bytes
    role: Role
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A hello that can't be accepted, and why."""

    reason: str


MemberEvent = Joined | Changed | Lost | Rejected


def own_tier(role: Role) -> Tier:
    """The tier in which a process of `role` holds blocks."""
    return "HOST" if role == "pool" else "DEVICE"


class Membership:
    """Processes by name. Only those of `served_group` route together; a pool node with no group yet is told of it. With
    `model`, those that say they serve another one are rejected."""

    def __init__(self, *, heartbeat_s: float, liveness_s: float, progress_s: float, model: str = "") -> None:
        self._heartbeat_s = heartbeat_s
        self._liveness_s = liveness_s
        self._progress_s = progress_s
        self._model = model
        self._members: dict[str, Member] = {}
        self._rivals: dict[str, tuple[bytes, float]] = {}
        self._unanswered_until_s: dict[tuple[str, bytes], float] = {}
        self._served: RoutingGroup | None = None
        self._workers: dict[Role, list[Member]] = {}
        self._max_model_len = 0
        self._checked_at_s: float | None = None

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    @property
    def served_group(self) -> RoutingGroup | None:
        """The group requests are routed in: it stays until its last worker is lost, then the one with most workers."""
        return self._served

    def get(self, name: str) -> Member | None:
        return self._members.get(name)

    def is_member(self, name: str, epoch: bytes) -> bool:
        member = self._members.get(name)
        return member is not None and member.epoch == epoch

    def workers(self, role: Role) -> list[Member]:
        """Members of `role` in the served group, in the order they joined."""
        return self._workers.get(role, [])

    def hello(self, hello: Hello, now_s: float) -> list[MemberEvent]:
        """Takes a hello. An empty list means: say nothing yet, it will be repeated."""
        if hello.version != PROTOCOL_VERSION:
            return [Rejected(f"protocol version {hello.version} is not this router's {PROTOCOL_VERSION}")]
        if hello.role == "router":
            return [Rejected("role 'router' can't join a router")]
        if hello.group is None and hello.role != "pool":
            return [Rejected(f"a {hello.role} worker must say its routing group")]
        if self._model and hello.model not in ("", self._model):
            return [Rejected(f"{hello.process} serves model {hello.model!r}, this router serves {self._model!r}")]
        events: list[MemberEvent] = []
        old = self._members.get(hello.process)
        if old is not None and old.epoch == hello.epoch and old.role != hello.role:
            return [
                Rejected(f"{hello.process} said it was a {old.role}, now a {hello.role}: a role is for a whole epoch")
            ]
        if old is not None and old.epoch == hello.epoch and 0 < hello.number <= old.hello.number:
            return []  # it came twice, or after a later one
        if old is not None and old.epoch == hello.epoch and old.role != "pool" and old.heartbeat is not None:
            events.append(
                self._lose(old, now_s, "rejoined", "said hello again: it had lost this router, and dropped its work")
            )
        elif old is not None and old.epoch == hello.epoch:
            group_changed = old.hello.group != hello.group
            endpoints_changed = old.hello.endpoints != hello.endpoints
            old.hello = hello
            old.heard_at_s = now_s
            self._choose_group()
            return [Changed(old, group_changed, endpoints_changed)]
        elif old is not None and old.epoch in hello.former_epochs:
            events.append(self._lose(old, now_s, "rejoined", "gave its epoch up, with all it did in it"))
        elif old is not None:
            verdict = self._rival(old, hello, now_s)
            if not isinstance(verdict, Lost):
                return [verdict] if verdict is not None else []
            events.append(verdict)
        elif len(self._members) >= MAX_MEMBERS:
            return [Rejected(f"{len(self._members)} processes are connected, the limit is {MAX_MEMBERS}")]
        member = Member(hello, joined_at_s=now_s, heard_at_s=now_s)
        self._members[hello.process] = member
        self._choose_group()
        events.append(Joined(member))
        return events

    def _rival(self, old: Member, hello: Hello, now_s: float) -> Lost | Rejected | None:
        epoch, first_seen_s = self._rivals.get(old.name, (b"", 0.0))
        if epoch != hello.epoch:
            epoch, first_seen_s = hello.epoch, now_s
            self._rivals[old.name] = (epoch, first_seen_s)
        if now_s - old.heard_at_s > 2 * self._heartbeat_s:
            return self._lose(old, now_s, "replaced", f"replaced by a new process of the name {old.name!r}")
        if old.heard_at_s > first_seen_s + self._liveness_s:
            del self._rivals[old.name]
            return Rejected(f"the name {old.name!r} is taken by a live process (pid {old.hello.pid})")
        return None

    def heartbeat(self, message: Heartbeat, now_s: float) -> Member | None:
        """Notes a heartbeat; the member it came from, or None if that epoch is no member."""
        member = self._members.get(message.process)
        if member is None or member.epoch != message.epoch:
            return None
        member.heartbeat = message
        member.heard_at_s = now_s
        return member

    def greets(self, name: str, epoch: bytes, now_s: float) -> bool:
        """Whether the heartbeat of this process, which is no member, is to be answered with a welcome: it believes in a router
        of before us, and our epoch tells it to say hello.

        Answered once; then it has as long to act as it takes to find us silent (and say hello for that). One that we have
        lost ourselves knows our epoch, so a welcome would but keep it from noticing: it isn't answered for as long either.
        """
        if now_s < self._unanswered_until_s.get((name, epoch), now_s) or len(self._unanswered_until_s) >= MAX_MEMBERS:
            return False
        self._unanswered_until_s[name, epoch] = now_s + 2 * self._liveness_s
        return True

    def leave(self, name: str, epoch: bytes, now_s: float, *, goodbye: bool) -> Lost | None:
        """A goodbye or a closed connection. None if that epoch is no member."""
        member = self._members.get(name)
        if member is None or member.epoch != epoch:
            return None
        if goodbye:
            return self._lose(member, now_s, "left", "said goodbye")
        return self._lose(member, now_s, "closed", "its connection closed")

    def expired(self, now_s: float) -> list[Lost]:
        """Those whose liveness or progress deadline has passed. Time in which this router itself did not run (no call for
        over a second) is not held against anybody."""
        gap_s = 0.0 if self._checked_at_s is None else now_s - self._checked_at_s
        self._checked_at_s = now_s
        if gap_s > 1.0:
            for member in self._members.values():
                member.heard_at_s = min(now_s, member.heard_at_s + gap_s)
        for who in [who for who, until_s in self._unanswered_until_s.items() if now_s >= until_s]:
            del self._unanswered_until_s[who]
        lost: list[Lost] = []
        for member in list(self._members.values()):
            silent_s = now_s - member.heard_at_s
            if silent_s > self._liveness_s:
                reason = f"no heartbeat for {silent_s:.1f} s, the limit is {self._liveness_s} s"
                lost.append(self._lose(member, now_s, "silent", reason))
            elif member.heartbeat is not None and member.heartbeat.step_age_s > self._progress_s:
                age_s = member.heartbeat.step_age_s
                reason = f"one step runs for {age_s:.1f} s, the limit is {self._progress_s} s"
                lost.append(self._lose(member, now_s, "stuck", reason))
        return lost

    def _lose(self, member: Member, now_s: float, cause: Cause, reason: str) -> Lost:
        del self._members[member.name]
        self._unanswered_until_s[member.name, member.epoch] = now_s + 2 * self._liveness_s
        self._rivals.pop(member.name, None)
        self._choose_group()
        return Lost(member.name, member.epoch, member.role, cause, reason)

    def _choose_group(self) -> None:
        counts: dict[RoutingGroup, int] = {}
        for member in self._members.values():
            if member.role != "pool" and member.hello.group is not None:
                counts[member.hello.group] = counts.get(member.hello.group, 0) + 1
        if counts and self._served not in counts:
            self._served = max(counts, key=lambda group: counts[group])
        self._workers = {}
        for member in self._members.values():
            if self._served is not None and member.hello.group == self._served:
                self._workers.setdefault(member.role, []).append(member)
        workers = (*self.workers("prefill"), *self.workers("decode"))
        lengths = [length for member in workers if (length := member.hello.capacity.max_model_len)]
        self._max_model_len = min(lengths, default=0)

    def max_model_len(self) -> int:
        """The shortest context among the served workers, in tokens; 0 when none is there."""
        return self._max_model_len

    def to_tell(self) -> list[Member]:
        """Who is told of its peers: the served group, and pool nodes that have no group yet."""
        return [member for member in self._members.values() if self.is_told(member)]

    def is_told(self, member: Member) -> bool:
        """Whether it is one of them."""
        return member.hello.group == self._served or (member.role == "pool" and not member.hello.group)

    def peers(self, number: int) -> Peers:
        """What they are told: the workers of the served group, and the pool nodes that keep its blocks."""
        workers = [*self.workers("prefill"), *self.workers("decode")]
        pools = [m for m in self._members.values() if m.role == "pool" and m.hello.group == self._served]
        return Peers(
            workers=[m.source("DEVICE") for m in workers],
            group=self._served,
            slab_bytes=next((m.hello.capacity.slab_bytes for m in workers if m.hello.capacity.slab_bytes), 0),
            pools=[m.source("HOST") for m in pools if self._served is not None],
            number=number,
        )
