"""RouterCore: requests and messages in, actions out.

Owns the life of every request, through membership, index, fleet, admission, policy and journal. Pure: no socket, no clock, no
task; its shell (`router/server.py`) does what it returns, in order.

A request's dispatches take one of three forms:

    hand-over     prefill role + decode role that waits for it. `n` samples each. The first tokens that the prefill role draws
                  are accepted, shown, and sent on in `FirstTokens` once all are there: one entry a sample in index order, -1
                  for a sample that its first token finished (decode skips it).
    prefill here  one decode dispatch with `prefill_here` for all `n` samples, while some first token is still unknown. It
                  draws position 0 itself; a first token that is known already comes again and is dropped as a duplicate.
    continuation  one decode dispatch a sample (`n == 1`, `index` set, `prefill_here`) whose `token_ids` are the prompt and
                  the tokens accepted so far: after a crash or a failed fetch. It draws the next token itself;
                  `FirstTokens` never goes with `prefill_here`. `sampling` is the request's own: positions and
                  `max_tokens` count from the prompt's end.

What ends a dispatch:

    prefill   Abort "handed over" at decode's RoleReport or first frame
    decode    Ack(final) for each of its samples, or Abort. Ack(final) before the worker has finished a sample ends that
              sample alone (a stop string matched, other samples go on)
    either    Failed, an Aborted that nobody asked for (a prefill worker's hold ran out), or the loss of its process

Any message may be lost. An Abort is repeated until `Aborted`, a few times; a frame of an unknown fence is answered with Abort.
A dispatch from which nothing new came for a while is probed with `Resend`, and with `FirstTokens` where those may be lost: a
worker sends what it kept, and answers for a fence it doesn't know with Failed `worker_lost`, which makes good a lost Dispatch,
Failed or Aborted.

A request that goes on with an answer that broke off at another router begins with the tokens that its client has: a continuation
like after a crash.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import msgspec

from protos.control import (
    PROTOCOL_VERSION,
    Abort,
    Aborted,
    Ack,
    DispatchRole,
    Failed,
    Fence,
    Goodbye,
    Heartbeat,
    Hello,
    Leave,
    Owned,
    Peers,
    Refused,
    Resend,
    RoleReport,
    Started,
    Tokens,
    ToRouter,
    Welcome,
)
from protos.kv_events import EventBatch
from router.actions import (
    Action,
    CompletedEvent,
    Emit,
    FailedEvent,
    Replay,
    Send,
    Subscribe,
    TokensEvent,
    Unsubscribe,
)
from router.admission import BATCH, INTERACTIVE, Slo
from router.approximate import Approximate
from router.fleet import Fleet
from router.journal import PROBE_S, Accepted, DispatchRecord, Gap, Journal, Outcome, Record, Request, Run
from router.line import Line
from router.membership import Cause, Changed, Joined, Lost, Member, Membership, Rejected, own_tier
from router.planner import Planner, root_of, send_first_tokens
from router.poison import Poison
from router.policy.base import Policy
from router.policy.seconds import PredictedSeconds
from router.prefix_index import MAX_KEYS, PrefixIndex
from router.wanted import Wanted
from tandem.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    Overloaded,
    Quarantined,
    TandemError,
    Unavailable,
    WorkerLost,
    error_from_code,
)

RETRYABLE = frozenset(
    {
        "fetch_failed",
        "overloaded",
        "transport_error",
        "unavailable",
        "worker_lost",
        "storage_fault",
        "internal",
        "draining",
    }
)
"""Failures of a dispatch after which another one may succeed."""
ABORT_RETRY_S = 1.0
ABORT_TRIES = 10
MAX_PROBE_S = 8.0
"""Probes of a silent dispatch come after `journal.PROBE_S`, and then at doubling intervals up to this."""
MAX_BACKOFF_S = 5.0
TRIAL_RETRY_S = 0.02
"""A suspect looks so often whether it may be tried."""
DEATHS: frozenset[Cause] = frozenset({"closed", "replaced", "stuck"})
"""Losses of which a request may be the cause."""
MAX_RUNS = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """The values of the configuration that the core uses. Seconds."""

    router: str
    epoch: bytes
    model: str = ""
    """The model's name; workers that say another one are refused. Empty: they may serve any."""
    heartbeat_s: float = 0.25
    liveness_s: float = 3.0
    progress_s: float = 60.0
    max_attempts: int = 3
    max_active_requests: int = 1024
    max_model_len: int = 0
    hold_s: float = 10.0
    unavailable_after_s: float = 10.0
    """How long a request waits for a worker that could serve it."""
    max_jitter_s: float = 0.1
    """Re-dispatches after a death are spread over so long, so that they don't all fall on the survivor at once."""
    interactive: Slo = INTERACTIVE
    batch: Slo = BATCH
    max_index_keys: int = MAX_KEYS
    """Blocks that the prefix index knows at most; past that those that came first are dropped."""
    reject_late: bool = False
    """Requests whose SLO can't be kept are refused at once."""


@dataclass(slots=True)
class _Closing:
    """An Abort that has not been confirmed yet: that may still be computed."""

    record: Record
    dispatch: DispatchRecord
    reason: str
    again_at_s: float
    tries_left: int

    @property
    def process(self) -> str:
        return self.dispatch.process


class RouterCore:
    """One router's state. Not thread-safe: its shell calls it from one thread, with a `now_s` that never goes back."""

    def __init__(self, settings: Settings, rng: random.Random, policy: Policy | None = None) -> None:
        self.settings = settings
        self.membership = Membership(
            heartbeat_s=settings.heartbeat_s,
            liveness_s=settings.liveness_s,
            progress_s=settings.progress_s,
            model=settings.model,
        )
        self.index = PrefixIndex(settings.max_index_keys)
        self._approximate = Approximate(self.index)
        self.fleet = Fleet()
        self.journal = Journal()
        self._planner = Planner(
            membership=self.membership,
            index=self.index,
            approximate=self._approximate,
            fleet=self.fleet,
            policy=policy or PredictedSeconds(),
            rng=rng,
            hold_s=settings.hold_s,
        )
        self._line = Line(
            self._planner, self.fleet, self.journal, interactive=settings.interactive, batch=settings.batch
        )
        self.poison = Poison()
        self.wanted = Wanted()
        self._told_to_leave: dict[str, str] = {}
        """Why, by process, of those that have not said yet that they do."""
        self._rng = rng
        self._waiting: dict[str, None] = {}
        self._closing: dict[Fence, _Closing] = {}
        self._peers_number, self._peers_changed_s = 0, 0.0
        self._keepalive_at_s = 0.0
        self.num_left_waiting = 0
        """Requests that ended while they waited for a worker or for room."""
        self.num_redispatches: Counter[tuple[str, str]] = Counter()
        """Dispatches that had to be made again, by their role and what became of them: the `Cause` of a lost process, the code of
        a failure, or `dropped` by the worker itself."""
        self.num_lost: Counter[tuple[str, str]] = Counter()
        """Processes that were lost, by role and `Cause`."""

    # --- what the shell reads ------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a request could be served now: a decode worker is there and stays."""
        return bool(len(self.fleet.decodes))

    @property
    def num_closing(self) -> int:
        """Aborts that are not confirmed yet."""
        return len(self._closing)

    def closing(self, process: str) -> set[Fence]:
        """The dispatches at that process whose abort is not confirmed yet."""
        return {fence for fence, closing in self._closing.items() if closing.process == process}

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a worker, or for room at one."""
        return len(self._waiting) + len(self._line)

    def max_model_len(self) -> int:
        """Tokens of prompt and answer together; 0 while no worker has said its limit and none is configured."""
        limits = (self.settings.max_model_len, self.membership.max_model_len())
        return min((limit for limit in limits if limit), default=0)

    # --- requests ------------------------------------------------------------------------------------------------------

    def submit(self, request: Request, now_s: float) -> list[Action]:
        """Takes a request. Whatever happens, one terminal event will be emitted for it.

        Raises Overloaded if too many are active, InvalidRequest if the prompt is longer than the context, and Quarantined if
        it has killed workers.
        """
        self._line.check_place(self.settings.max_active_requests)
        self._check_context(request)
        self.poison.check(request.prompt, now_s)
        record = self.journal.open(request, now_s)
        if not record.unfinished():
            return self._end(record, None, now_s)
        group = self.membership.served_group
        if self.settings.reject_late and group is not None:
            try:
                self._line.check_slo(record, group, now_s)
            except Overloaded:
                self.journal.drop(record)
                raise
        return self._plan(record, now_s)

    @property
    def root(self) -> bytes:
        """Of the keys of the workers that serve, without a salt; empty while there are none."""
        group = self.membership.served_group
        return b"" if group is None else root_of(group)

    def cancel(self, request_id: str, now_s: float, error: TandemError | None = None) -> list[Action]:
        """Ends a request: the client left, or `error` says why. Unknown ids are ignored: it has ended already."""
        record = self.journal.get(request_id)
        if record is None:
            return []
        return self._end(record, error or Cancelled("the client cancelled the request"), now_s)

    def stop_sample(self, request_id: str, index: int, num_tokens: int, now_s: float) -> list[Action]:
        """The shell found a stop string: the sample ends after its first `num_tokens` tokens. Its worker is told by
        Ack(final) for this sample, or by Abort when it was the last one."""
        record = self.journal.get(request_id)
        if record is None or record.samples[index].finished:
            return []
        sample = record.samples[index]
        position = len(sample.tokens)
        del sample.tokens[num_tokens:]
        sample.finish_reason = "stop"
        if not record.unfinished():
            return self._end(record, None, now_s)
        actions: list[Action] = []
        for dispatch in record.live("decode"):
            if dispatch.covers(index) and (not dispatch.waits or dispatch.first_tokens_sent):
                ack = Ack(fence=dispatch.fence, index=index, position=position, final=True)
                actions.append(Send(dispatch.process, dispatch.epoch, ack))
                dispatch.ended.add(index)
        self._release_ended(record, now_s)
        return actions

    # --- messages ------------------------------------------------------------------------------------------------------

    def on_message(self, process: str, epoch: bytes, message: ToRouter, now_s: float) -> list[Action]:
        """Takes a message of `process` in its `epoch`, as its connection identifies it. Those of a process that is not a
        member are ignored, but for its hello, and for a heartbeat that tells of a router before us."""
        if isinstance(message, Hello | Heartbeat | Goodbye) and (message.process, message.epoch) != (process, epoch):
            return []
        if isinstance(message, Hello):
            return self._on_hello(message, now_s)
        if not self.membership.is_member(process, epoch):
            greeted = isinstance(message, Heartbeat) and self.membership.greets(process, epoch, now_s)
            return [Send(process, epoch, self._welcome())] if greeted else []
        match message:
            case Heartbeat():
                return self._on_heartbeat(message, now_s)
            case Goodbye():
                return self._on_left(process, epoch, now_s, goodbye=True)
            case Started(fence=fence):
                if (found := self.journal.find(fence, process, epoch)) is not None and not found[1].started:
                    found[1].started_at_s = now_s
                return []
            case Aborted(fence=fence):
                return self._on_aborted(process, epoch, fence, now_s)
            case Tokens():
                return self._on_tokens(process, epoch, message, now_s)
            case RoleReport():
                return self._on_report(process, epoch, message, now_s)
            case Failed():
                return self._on_failed(process, epoch, message, now_s)
            case Owned():
                return []  # an audit's (`router/auditor.py`)

    def drain(self, process: str, reason: str) -> tuple[int, list[Action]]:
        """A worker is to finish what it has and to leave. Returns how many dispatches of ours it has. Where replicas are wanted,
        one fewer of its role is from now on.

        Raises InvalidRequest for one that is no worker of ours.
        """
        member = self.membership.get(process)
        if member is None or member.role == "pool":
            here = ", ".join(sorted(one.name for one in self.membership if one.role != "pool")) or "none"
            raise InvalidRequest(f"{process!r} is no worker that is connected to this router; those are: {here}")
        if self.fleet.drain(process):
            self.wanted.without_one(member.role, f"{process} was told to leave: {reason}")
        self._told_to_leave[process] = reason[:256]
        return self.fleet.dispatched_to(process), [Send(process, member.epoch, Leave(reason=reason[:256]))]

    def on_closed(self, process: str, epoch: bytes, now_s: float) -> list[Action]:
        """A process can't be reached any more."""
        return self._on_left(process, epoch, now_s, goodbye=False)

    def on_events(self, process: str, epoch: bytes, seq: int, batch: EventBatch, now_s: float) -> list[Action]:
        """Takes a live batch of KV events."""
        return self._replay(process, self.index.on_batch(process, epoch, seq, batch, now_s))

    def on_replayed(self, process: str, epoch: bytes, seq: int, batch: EventBatch, now_s: float) -> None:
        """Takes a replayed batch."""
        self.index.on_replay(process, epoch, seq, batch, now_s)

    def on_replay_end(self, process: str, epoch: bytes, complete: bool) -> None:
        """The replay is over, or broke off. Not said of one that a newer one replaced, or whose process is gone."""
        self.index.on_replay_end(process, epoch, complete)

    def tick(self, now_s: float) -> list[Action]:
        """Everything that time does: call it every 50 ms or so."""
        actions: list[Action] = []
        expired = self.membership.expired(now_s)
        for lost in expired:  # first of all: nothing may be planned onto one that is gone too
            self._forget_process(lost.name)
        for lost in expired:
            actions += self._on_lost(lost, now_s)
        if now_s >= self._keepalive_at_s:
            self._keepalive_at_s = now_s + self.settings.heartbeat_s
            actions += [Send(member.name, member.epoch, self._welcome(member)) for member in self.membership]
        self._approximate.tick(now_s)
        for record in self.journal:
            if now_s >= record.request.deadline_s:
                budget_s = record.request.deadline_s - record.accepted_at_s
                actions += self._end(record, DeadlineExceeded(f"not complete after {budget_s:.2f} s"), now_s)
        for request_id in list(self._waiting):
            waiting = self.journal.get(request_id)
            if waiting is not None and now_s >= waiting.plan_after_s:
                actions += self._plan(waiting, now_s)
        actions += self._release(now_s)
        return actions + self._probe(now_s) + self._repeat_aborts(now_s)

    # --- members -------------------------------------------------------------------------------------------------------

    def _welcome(self, member: Member | None = None) -> Welcome:
        settings = self.settings
        return Welcome(
            version=PROTOCOL_VERSION,
            router=settings.router,
            epoch=settings.epoch,
            heartbeat_s=settings.heartbeat_s,
            liveness_s=settings.liveness_s,
            answers=0 if member is None else member.hello.number,
        )

    def _on_hello(self, hello: Hello, now_s: float) -> list[Action]:
        actions: list[Action] = []
        for event in self.membership.hello(hello, now_s):
            match event:
                case Rejected(reason=reason):
                    actions.append(Send(hello.process, hello.epoch, Refused(reason=reason)))
                case Lost():
                    actions += self._on_lost(event, now_s)
                case Changed(member=member, group_changed=group_changed, endpoints_changed=endpoints_changed):
                    actions.append(Send(member.name, member.epoch, self._welcome(member)))
                    if endpoints_changed:
                        actions += self._follow(member, 0)
                    if group_changed:
                        self.fleet.regroup(member.name, member.hello.group)
                        self.fleet.serve(self.membership.served_group)
                    if group_changed or member.role == "pool":
                        actions += self._tell_peers(now_s)
                case Joined(member=member):
                    actions += self._on_joined(member, now_s)
        return actions

    @staticmethod
    def _follow(member: Member, from_seq: int) -> list[Action]:
        """What makes its KV events reach the index; nothing while it publishes none (a pool node without a group)."""
        endpoints = member.hello.endpoints
        if not endpoints.events:
            return []
        return [
            Subscribe(member.name, member.epoch, endpoints),
            Replay(member.name, member.epoch, endpoints, from_seq),
        ]

    def _on_joined(self, member: Member, now_s: float) -> list[Action]:
        hello = member.hello
        number = self.fleet.join(
            member.name, member.role, hello.endpoints.machine_id, hello.capacity, hello.group, now_s
        )
        self.fleet.serve(self.membership.served_group)
        from_seq = self.index.join(member.name, number, member.epoch, own_tier(member.role), now_s)
        if member.role != "pool" and not hello.endpoints.events:
            self._approximate.join(number, hello.capacity.num_blocks)
        actions: list[Action] = [
            Send(member.name, member.epoch, self._welcome(member)),
            *self._follow(member, from_seq),
            *self._tell_peers(now_s),
        ]
        for request_id in list(self._waiting):
            record = self.journal.get(request_id)
            if record is not None and now_s >= record.plan_after_s:
                actions += self._plan(record, now_s)
        return actions + self._release(now_s)

    def _on_left(self, process: str, epoch: bytes, now_s: float, *, goodbye: bool) -> list[Action]:
        lost = self.membership.leave(process, epoch, now_s, goodbye=goodbye)
        return self._on_lost(lost, now_s) if lost is not None else []

    def _forget_process(self, name: str) -> None:
        """Nothing is looked for at it any more, and nothing sent there."""
        self.index.forget(name)
        number = self.fleet.number(name)
        if number is not None:
            self._approximate.forget(number)
        self.fleet.forget(name)
        self.fleet.serve(self.membership.served_group)

    def _on_lost(self, lost: Lost, now_s: float) -> list[Action]:
        self.num_lost[lost.role, lost.cause] += 1
        self._told_to_leave.pop(lost.name, None)
        self._forget_process(lost.name)
        # Others may have noticed before us, and what it had was called off because of that: it died of it all the same.
        closed = [(fence, one) for fence, one in self._closing.items() if one.process == lost.name]
        called_off = [(one.record, one.dispatch) for _, one in closed if self._is_unproven(one.record)]
        for fence, _ in closed:
            del self._closing[fence]
        actions: list[Action] = [Unsubscribe(lost.name, lost.epoch, lost.reason), *self._tell_peers(now_s)]
        held = [
            (record, dispatch)
            for record in self.journal
            for dispatch in record.dispatches.values()
            if dispatch.process == lost.name
        ]
        roles: dict[str, set[DispatchRole]] = {}
        for record, dispatch in held:
            roles.setdefault(record.request_id, set()).add(dispatch.fence.role)
            del record.dispatches[dispatch.fence]
            dispatch.over(now_s, lost.cause, failed=True)
        culprit = self.poison.on_death([*called_off, *held], now_s) if lost.cause in DEATHS else None
        if culprit is not None:
            text = f"{culprit.num_deaths} workers died while they computed this request, the last was {lost.name}"
            actions += self._end(culprit, Quarantined(text), now_s)
        error = WorkerLost(f"{lost.role} worker {lost.name} was lost ({lost.reason})")
        for record in {record.request_id: record for record, _ in held if record is not culprit}.values():
            record.plan_after_s = now_s + self._rng.uniform(0.0, self.settings.max_jitter_s)
            counted = lost.cause != "left"
            actions += self._after_failure(
                record, roles[record.request_id], error, now_s, reason=lost.cause, counted=counted
            )
        return actions

    def _is_unproven(self, record: Record) -> bool:
        """Whether it is not over, and nobody generates it now."""
        is_here = self.journal.get(record.request_id) is record
        return is_here and not any(dispatch.generates for dispatch in record.dispatches.values())

    def _tell_peers(self, now_s: float) -> list[Action]:
        self._peers_number += 1
        self._peers_changed_s = now_s
        peers = self._peers()
        return [Send(member.name, member.epoch, peers) for member in self.membership.to_tell()]

    def _peers(self) -> Peers:
        return self.membership.peers(self._peers_number)

    def _has_missed_peers(self, member: Member, message: Heartbeat, now_s: float) -> bool:
        """Whether the last list that it was told never came there, or leaves out that it keeps blocks, because its hello of
        them was lost: it says so again when it doesn't find itself among its peers."""
        if now_s - self._peers_changed_s > 2 * self.settings.heartbeat_s and message.peers != self._peers_number:
            return self.membership.is_told(member)
        return member.role == "pool" and message.events_seq >= 0 and not member.hello.endpoints.events

    def _on_heartbeat(self, message: Heartbeat, now_s: float) -> list[Action]:
        self.membership.heartbeat(message, now_s)
        again: list[Action] = []
        if message.draining:
            self.fleet.drain(message.process)
            self._told_to_leave.pop(message.process, None)
        elif (reason := self._told_to_leave.get(message.process)) is not None:
            again = [Send(message.process, message.epoch, Leave(reason=reason))]  # it has not heard it, or not yet
        self.fleet.reported(message.process, message.load, message.links, message.step_age_s, now_s)
        from_seq = self.index.on_announced(message.process, message.epoch, message.events_seq, now_s)
        actions = self._replay(message.process, from_seq)
        member = self.membership.get(message.process)
        if member is not None and self._has_missed_peers(member, message, now_s):
            actions.append(Send(member.name, member.epoch, self._peers()))
        return [*again, *actions, *self._release(now_s)]

    def _replay(self, process: str, from_seq: int | None) -> list[Action]:
        member = self.membership.get(process)
        if from_seq is None or member is None or not member.hello.endpoints.events:
            return []
        return [Replay(process, member.epoch, member.hello.endpoints, from_seq)]

    # --- frames of dispatches ------------------------------------------------------------------------------------------

    def _on_tokens(self, process: str, epoch: bytes, message: Tokens, now_s: float) -> list[Action]:
        found = self.journal.find(message.fence, process, epoch)
        if found is None:
            if message.fence in self._closing:
                return []  # its Abort is under way, this frame has crossed it
            return [Send(process, epoch, Abort(fence=message.fence, reason="this dispatch is over"))]
        record, dispatch = found
        verdict = self.journal.accept(record, dispatch, message)
        if verdict is None:
            return []
        fence, index = message.fence, message.index
        if isinstance(verdict, Gap):
            return [Send(process, epoch, Resend(fence=fence, index=index, position=verdict.position))]
        actions: list[Action] = [
            Send(process, epoch, Ack(fence=fence, index=index, position=verdict.ack, final=verdict.final))
        ]
        if verdict.final:
            dispatch.ended.add(index)
        if not dispatch.generates:
            dispatch.generates = True
            self.poison.cleared(record.request_id)
            actions += self._hand_over(record, dispatch, now_s)
        if isinstance(verdict, Accepted):
            dispatch.progress_at_s = now_s
            dispatch.probe_after_s = PROBE_S
            if record.first_token_at_s is None:
                record.first_token_at_s = now_s
                self._learn_overhead(record)
            if verdict.finish_reason is not None:
                self.fleet.answered(len(record.samples[index].tokens))
            event = TokensEvent(index, verdict.position, verdict.token_ids, verdict.logprobs, verdict.finish_reason)
            actions.append(Emit(record.request_id, event))
            if verdict.position == 0:
                actions += self._planner.first_tokens(record)
            if verdict.final and not record.unfinished():
                return actions + self._end(record, None, now_s)
        if verdict.final:
            self._release_ended(record, now_s)
        return actions

    def _on_report(self, process: str, epoch: bytes, message: RoleReport, now_s: float) -> list[Action]:
        record = self.journal.get(message.fence.request_id)
        dispatch = record.sent.get(message.fence) if record is not None else None
        if record is None or dispatch is None or (dispatch.process, dispatch.epoch) != (process, epoch):
            return []
        if len(record.runs) < MAX_RUNS and all(run.report.fence != message.fence for run in record.runs):
            record.runs.append(Run(process, dispatch.predicted_ttft_s, message, now_s))
            self._learn_overhead(record)
        self.fleet.computed(process, message.fence, now_s)
        if message.fence not in record.dispatches:
            return []
        dispatch.progress_at_s = now_s
        return [*self._hand_over(record, dispatch, now_s), *self._release(now_s)]

    def _hand_over(self, record: Record, dispatch: DispatchRecord, now_s: float) -> list[Action]:
        """A dispatch gave a sign of having its KV. Decode's is the end of the prefill role, once that has drawn."""
        prefill = record.prefill()
        if dispatch.fence.role == "decode" and prefill is not None and record.first_tokens_known():
            return [self._abort(record, prefill, "handed over", now_s)]
        return []

    def _release_ended(self, record: Record, now_s: float) -> None:
        """Forgets decode dispatches whose worker knows the end of every sample: it holds nothing of them any more."""
        for dispatch in record.live("decode"):
            if len(dispatch.ended) == dispatch.n:
                self._forget(record, dispatch, now_s)
                dispatch.over(now_s, "finished")

    def _on_failed(self, process: str, epoch: bytes, message: Failed, now_s: float) -> list[Action]:
        self._closing.pop(message.fence, None)
        found = self.journal.find(message.fence, process, epoch)
        if found is None:
            return []
        record, dispatch = found
        role = dispatch.fence.role
        self._forget(record, dispatch, now_s)
        dispatch.over(now_s, message.code, failed=True)
        error = error_from_code(message.code, f"{role} at {process}: {message.message}")
        if message.code not in RETRYABLE:
            return self._end(record, error, now_s)
        actions: list[Action] = []
        if message.code == Draining.code:
            self.fleet.drain(process)
        elif message.code == "fetch_failed":
            record.prefill_here_only = True
            prefill = record.prefill()
            if prefill is not None:
                actions.append(self._abort(record, prefill, "the hand-over failed", now_s))
        else:
            record.avoid.add((process, epoch))
            backoff_s = min(MAX_BACKOFF_S, self.settings.max_jitter_s * 2 ** record.failures[role])
            record.plan_after_s = now_s + self._rng.uniform(0.0, backoff_s)
        counted = message.code != Draining.code
        return actions + self._after_failure(record, {role}, error, now_s, reason=message.code, counted=counted)

    def _on_aborted(self, process: str, epoch: bytes, fence: Fence, now_s: float) -> list[Action]:
        """Nothing of this fence is held any more. If nobody asked for that, the dispatch is lost."""
        self._closing.pop(fence, None)
        found = self.journal.find(fence, process, epoch)
        if found is None:
            return []
        record, dispatch = found
        self._forget(record, dispatch, now_s)
        dispatch.over(now_s, "dropped", failed=True)
        error = WorkerLost(f"{fence.role} at {process}: it dropped the dispatch by itself")
        return self._after_failure(record, {fence.role}, error, now_s, reason="dropped")

    def _after_failure(
        self,
        record: Record,
        roles: set[DispatchRole],
        error: TandemError,
        now_s: float,
        *,
        reason: str,
        counted: bool = True,
    ) -> list[Action]:
        """Dispatches of `roles` are gone, for `reason`: plans again, or ends the request when that has happened too often. What a
        worker gave back as it left is not `counted`."""
        if "prefill" in roles and record.first_tokens_known():
            roles = roles - {"prefill"}  # it had done its part; what decode can't fetch any more, decode will say
        for role in roles if counted else ():
            record.failures[role] += 1
            if record.failures[role] >= self.settings.max_attempts:
                tries = f"after {record.failures[role]} attempts of {role}, the limit is {self.settings.max_attempts}"
                return self._end(record, type(error)(f"{error}; {tries}"), now_s)
        self.num_redispatches.update((role, reason) for role in roles)
        actions: list[Action] = []
        if "prefill" in roles and not record.first_tokens_known():
            # Decode waits for a source that is gone and for tokens that nobody samples: both roles are dispatched anew.
            for dispatch in record.live("decode"):
                if dispatch.waits:
                    actions.append(self._abort(record, dispatch, "the prefill role is dispatched again", now_s))
        return actions + self._plan(record, now_s)

    # --- ending --------------------------------------------------------------------------------------------------------

    def _end(self, record: Record, error: TandemError | None, now_s: float) -> list[Action]:
        """The one place where a request ends: every dispatch released, one terminal event."""
        actions: list[Action] = []
        self._release_ended(record, now_s)
        for dispatch in list(record.dispatches.values()):
            actions.append(self._abort(record, dispatch, "the request has ended", now_s))
        self.num_left_waiting += record.request_id in self._waiting or record.request_id in self._line
        self._waiting.pop(record.request_id, None)
        self._line.remove(record.request_id)
        self.poison.cleared(record.request_id)
        outcome: Outcome = "completed"
        if error is not None:
            outcome = "cancelled" if isinstance(error, Cancelled) else "failed"
        text, code = ("", "") if error is None else (str(error), error.code)
        summary = self.journal.close(record, outcome, text, now_s, code)
        event = CompletedEvent(summary) if error is None else FailedEvent(error)
        return [*actions, Emit(record.request_id, event), *self._release(now_s)]

    def _forget(self, record: Record, dispatch: DispatchRecord, now_s: float) -> None:
        del record.dispatches[dispatch.fence]
        self.fleet.ended(dispatch.process, dispatch.fence, now_s)

    def _abort(self, record: Record, dispatch: DispatchRecord, reason: str, now_s: float) -> Action:
        self._forget(record, dispatch, now_s)
        dispatch.over(now_s, reason)
        self._closing[dispatch.fence] = _Closing(record, dispatch, reason, now_s + ABORT_RETRY_S, ABORT_TRIES)
        return Send(dispatch.process, dispatch.epoch, Abort(fence=dispatch.fence, reason=reason))

    def _repeat_aborts(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        for fence, closing in list(self._closing.items()):
            if now_s < closing.again_at_s:
                continue
            if closing.tries_left == 0:
                del self._closing[fence]
                continue
            closing.tries_left -= 1
            closing.again_at_s = now_s + ABORT_RETRY_S
            actions.append(Send(closing.process, closing.dispatch.epoch, Abort(fence=fence, reason=closing.reason)))
        return actions

    def _probe(self, now_s: float) -> list[Action]:
        """Asks again for what a dispatch owes, when nothing new came for a while: its last frame may be lost, and no later one
        shows the gap. One that owes nothing is asked too, whether it is still there."""
        actions: list[Action] = []
        for record in self.journal:
            for dispatch in record.dispatches.values():
                if now_s - dispatch.progress_at_s < dispatch.probe_after_s:
                    continue
                dispatch.progress_at_s = now_s
                dispatch.probe_after_s = min(MAX_PROBE_S, 2 * dispatch.probe_after_s)
                for index in record.owed(dispatch) or [dispatch.index]:
                    resend = Resend(fence=dispatch.fence, index=index, position=len(record.samples[index].tokens))
                    actions.append(Send(dispatch.process, dispatch.epoch, resend))
                if dispatch.first_tokens_sent and not dispatch.generates:
                    actions.append(send_first_tokens(record, dispatch))
        return actions

    # --- planning ------------------------------------------------------------------------------------------------------

    def _check_context(self, request: Request) -> None:
        limit = self.max_model_len()
        if limit and len(request.prompt) >= limit:
            raise InvalidRequest(
                f"the prompt has {len(request.prompt)} tokens; with an answer of at least one it must fit into {limit}"
            )

    def _plan(self, record: Record, now_s: float) -> list[Action]:
        """Dispatches whatever this request lacks when there is room for it; without any worker that could serve it, it waits for
        one."""
        group = self.membership.served_group
        if group is None or not len(self.fleet.decodes) or now_s < record.plan_after_s:
            return self._wait(record, now_s)
        if not self.poison.may_go(record.request_id):
            record.plan_after_s = now_s + TRIAL_RETRY_S
            self._waiting[record.request_id] = None
            return []
        self._waiting.pop(record.request_id, None)
        record.waiting_since_s = None
        actions: list[Action] = []
        if not record.planned:
            record.planned = True
            try:
                self._check_context(record.request)
            except InvalidRequest as error:
                return self._end(record, error, now_s)
            if limit := self.max_model_len():
                room = limit - len(record.request.prompt)
                record.sampling = msgspec.structs.replace(
                    record.sampling, max_tokens=min(record.sampling.max_tokens, room)
                )
            actions = self._end_full(record)
            if not record.unfinished():
                return actions + self._end(record, None, now_s)
        if record.prefill() is not None or not record.uncovered():
            sent = self._planner.dispatch(record, group, now_s, wait=False)
            assert not isinstance(sent, float), "it may not wait"
            return actions + sent
        if record.request_id not in self._line:
            self._line.enter(record, group, now_s)
        return actions + self._release(now_s)

    @staticmethod
    def _end_full(record: Record) -> list[Action]:
        """Ends the samples of a resumed request that had all their tokens already, but not their ends."""
        actions: list[Action] = []
        for index in record.unfinished():
            sample = record.samples[index]
            if len(sample.tokens) >= record.sampling.max_tokens:
                sample.finish_reason = "length"
                event = TokensEvent(index, len(sample.tokens), (), (), "length")
                actions.append(Emit(record.request_id, event))
        return actions

    def _release(self, now_s: float) -> list[Action]:
        """Dispatches those in line for which there is room."""
        if not self._line:
            return []
        group = self.membership.served_group
        actions: list[Action] = []
        if group is None or not len(self.fleet.decodes):
            for request_id in self._line:
                self._line.remove(request_id)
                record = self.journal.get(request_id)
                actions += self._wait(record, now_s) if record is not None else []
            return actions
        return self._line.release(group, now_s)

    def _learn_overhead(self, record: Record) -> None:
        """What the first token took beyond what its worker took for it: messages and the like. Known once both the token and the
        worker's first report are there; of requests that were dispatched once."""
        if record.first_token_at_s is None or len(record.runs) != 1 or len(record.placements) != 1:
            return
        report = record.runs[0].report
        if report.fence.role == "decode" and record.placements[0].prefill is not None:
            return
        at_worker_s = report.queue_s + report.fetch_s + report.compute_s
        self.fleet.took_longer(record.first_token_at_s - record.sent[report.fence].sent_at_s - at_worker_s)

    def _wait(self, record: Record, now_s: float) -> list[Action]:
        if record.waiting_since_s is None:
            record.waiting_since_s = now_s
        if now_s - record.waiting_since_s >= self.settings.unavailable_after_s:
            waited = f"no decode worker for {self.settings.unavailable_after_s:g} s"
            lost = record.failures["decode"] > 0
            return self._end(record, WorkerLost(f"{waited} after one was lost") if lost else Unavailable(waited), now_s)
        self._waiting[record.request_id] = None
        return []
