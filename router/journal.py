"""The request journal: what each request has been given so far, and by which dispatches.

Owns requests from acceptance to their one terminal message: tokens accepted per sample, live dispatches by fence, failures per
role. Pure. It decides what is accepted; it never decides where anything runs.

Fences. `attempt` numbers the dispatches of one role of one request, so that every dispatch has a fence of its own: the streams of
`n` samples that go on separately after a crash are `n` dispatches of role decode with `n` attempts and `index` set. What bounds
retries is `failures`, which counts deaths and failures per role, not attempts.

Exactly once. A frame is accepted only from a live fence that covers its sample, and only from the next position on: what
overlaps is cut off, what leaves a gap is asked for again. A prefill fence gives position 0 alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from kvpool.keys import Key
from protos.control import DispatchRole, Fence, FinishReason, RoleReport, Sampling, TokenLogprobs, Tokens
from router.policy.base import Placement
from router.prefixes import marks

Outcome = Literal["completed", "failed", "cancelled"]
MAX_RECENT = 256
MAX_LEGS = 64
"""So many dispatches of a request are remembered when it has ended."""
PROBE_S = 1.0
"""How long a dispatch may bring nothing new before it is asked."""


@dataclass(frozen=True, slots=True)
class SoFar:
    """What a client has of one sample, and why it ended if it has."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """That a request goes on with an answer that broke off at another router: for the `resume_no`-th time, with `so_far` of each
    sample, which were drawn by workers of this `root` (without a salt); empty: not known."""

    resume_no: int
    root: bytes
    so_far: tuple[SoFar, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A validated request. `deadline_s` is a point in time on the router's clock."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    n: int
    deadline_s: float
    tenant: str = ""
    tenant_salt: bytes = b""
    """In the root of its keys."""
    batch: bool = False
    """Of the class that is promised less: it waits while others are due sooner."""
    resumed: Resumed | None = None


@dataclass(slots=True)
class Sample:
    """One sample's stream: the tokens accepted so far, and why it ended."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class DispatchRecord:
    """One dispatch that a process holds. `waits` marks a decode dispatch that takes its first tokens from the
    prefill role."""

    fence: Fence
    process: str
    epoch: bytes
    index: int
    n: int
    progress_at_s: float
    """When it was sent, reported, last brought something new or was last asked."""
    predicted_ttft_s: float
    sent_at_s: float
    waits: bool = False
    first_tokens_sent: bool = False
    ended: set[int] = field(default_factory=set)
    """Samples whose end the worker has been told."""
    started_at_s: float | None = None
    """When its worker said that it begins to compute something of it."""
    generates: bool = False
    """A frame of tokens has come from it: it has all it needs."""
    probe_after_s: float = PROBE_S
    ended_at_s: float = 0.0
    end: str = ""
    """Why it is over."""
    failed: bool = False

    def over(self, now_s: float, end: str, *, failed: bool = False) -> None:
        """It is over, for the reason `end`; `failed` if its worker failed it."""
        self.ended_at_s, self.end, self.failed = now_s, end, failed

    @property
    def started(self) -> bool:
        return self.started_at_s is not None

    def covers(self, index: int) -> bool:
        return self.index <= index < self.index + self.n


@dataclass(frozen=True, slots=True)
class Leg:
    """One dispatch, from when it was sent until it was over; `end` says why it was. `failed`: it should have gone on."""

    fence: Fence
    process: str
    sent_at_s: float
    ended_at_s: float
    end: str
    failed: bool


@dataclass(frozen=True, slots=True)
class Run:
    """A role's report, with where it ran, what had been predicted, and when the report came."""

    process: str
    predicted_ttft_s: float
    report: RoleReport
    reported_at_s: float


@dataclass(slots=True)
class Record:
    """One active request."""

    request: Request
    accepted_at_s: float
    samples: list[Sample]
    sampling: Sampling
    dispatches: dict[Fence, DispatchRecord] = field(default_factory=dict)
    """Live ones."""
    sent: dict[Fence, DispatchRecord] = field(default_factory=dict)
    """All there ever were: a report may come after its dispatch is over."""
    attempts: dict[DispatchRole, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    failures: dict[DispatchRole, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    runs: list[Run] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    placed_after_s: list[float] = field(default_factory=list)
    """When, from its arrival on."""
    prompt_bytes: bytes = b""
    """Its tokens as they are hashed and travel, once that was needed."""
    keys_root: Key | None = None
    drawing_root: Key = b""
    """As `keys_root`, without the tenant's salt, which changes no bit of what is computed."""
    keys: tuple[Key, ...] = ()
    tokens_root: bytes = b""
    """Of the workers that drew its tokens, without a salt."""
    exact: bool = True
    """All its tokens were drawn by workers of one root."""
    num_deaths: int = 0
    """Workers that died while they computed it."""
    planned: bool = False
    counted: bool = False
    """It is in the traffic's totals."""
    prefill_here_only: bool = False
    avoid: set[tuple[str, bytes]] = field(default_factory=set)
    waiting_since_s: float | None = None
    plan_after_s: float = 0.0
    due_s: float = 0.0
    """When its first token is due."""
    promised_ttft_s: float = 0.0
    """How soon its first token was promised when it came; 0: nothing yet."""
    tpot_s: float = 0.0
    """What its later tokens are promised to take each; 0: nothing."""
    first_token_at_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def placed(self, placement: Placement, now_s: float) -> None:
        """Its workers were chosen."""
        self.placements.append(placement)
        self.placed_after_s.append(now_s - self.accepted_at_s)

    def live(self, role: DispatchRole) -> list[DispatchRecord]:
        return [dispatch for dispatch in self.dispatches.values() if dispatch.fence.role == role]

    def prefill(self) -> DispatchRecord | None:
        """The live prefill dispatch; there is never more than one."""
        return next(iter(self.live("prefill")), None)

    def unfinished(self) -> list[int]:
        return [index for index, sample in enumerate(self.samples) if not sample.finished]

    def uncovered(self) -> list[int]:
        """Unfinished samples that no live decode dispatch generates."""
        live = self.live("decode")
        return [index for index in self.unfinished() if not any(dispatch.covers(index) for dispatch in live)]

    def owed(self, dispatch: DispatchRecord) -> list[int]:
        """Samples of which more is to come from `dispatch`; from a prefill dispatch the first token alone."""
        once = dispatch.fence.role == "prefill"
        samples = range(dispatch.index, dispatch.index + dispatch.n)
        return [i for i in samples if not self.samples[i].finished and not (once and self.samples[i].tokens)]

    def drawn_by(self, root: bytes) -> None:
        """Workers of this root (without a salt) draw its tokens from now on."""
        if self.tokens_root != root and any(sample.tokens for sample in self.samples):
            self.exact = False
        self.tokens_root = root

    def first_tokens_known(self) -> bool:
        return all(sample.tokens or sample.finished for sample in self.samples)

    def new_fence(self, role: DispatchRole) -> Fence:
        resume_no = 0 if self.request.resumed is None else self.request.resumed.resume_no
        fence = Fence(self.request_id, resume_no, role, self.attempts[role])
        self.attempts[role] += 1
        return fence


@dataclass(frozen=True, slots=True)
class Accepted:
    """New tokens of a sample (none with a bare finish), and the position up to which the worker may forget."""

    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    ack: int
    final: bool


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Nothing new; acknowledge again, the last acknowledgement may be lost."""

    ack: int
    final: bool


@dataclass(frozen=True, slots=True)
class Gap:
    """Tokens are missing from `position` on."""

    position: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What is remembered of a finished request, for explanations."""

    request_id: str
    outcome: Outcome
    error: str
    num_prompt_tokens: int
    num_generated_tokens: int
    longest: int
    """Tokens of the longest sample."""
    ttft_s: float | None
    total_s: float
    failures: tuple[int, int]
    placements: tuple[Placement, ...]
    placed_after_s: tuple[float, ...]
    runs: tuple[Run, ...]
    exact: bool = True
    resume_no: int = 0
    num_samples: int = 1
    marks: tuple[Key, ...] = ()
    """Of the beginnings of its prompt (`router/prefixes.py`)."""
    batch: bool = False
    promised_ttft_s: float = 0.0
    promised_tpot_s: float = 0.0
    """As in `Record`: 0 where nothing was promised."""
    accepted_at_s: float = 0.0
    """On the router's clock, like the times of runs and legs."""
    legs: tuple[Leg, ...] = ()
    """Its dispatches, the first `MAX_LEGS`."""
    finish_reasons: tuple[str, ...] = ()
    """One a sample that came to its end."""
    error_code: str = ""
    tenant: str = ""

    @property
    def ended_at_s(self) -> float:
        return self.accepted_at_s + self.total_s

    @property
    def tpot_s(self) -> float | None:
        """What each token after the first took, of the longest sample; None if there was none."""
        if self.ttft_s is None or self.longest < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.longest - 1)

    @property
    def predicted_ttft_s(self) -> float | None:
        """When its first token was predicted, at the time its workers were chosen; None if they never were."""
        if not self.placements:
            return None
        return self.placed_after_s[0] + self.placements[0].predicted_ttft_s


class Journal:
    """Active requests by id, and a bounded memory of finished ones."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self.recent: deque[Summary] = deque(maxlen=MAX_RECENT)
        self.num_outcomes: dict[Outcome, int] = {"completed": 0, "failed": 0, "cancelled": 0}
        self.num_tokens = 0
        """Accepted from workers, of all requests there were."""

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def get(self, request_id: str) -> Record | None:
        return self._records.get(request_id)

    def open(self, request: Request, now_s: float) -> Record:
        assert request.request_id not in self._records, f"request id {request.request_id} is in use"
        record = Record(request, now_s, [Sample() for _ in range(request.n)], request.sampling)
        if request.resumed is not None:
            record.tokens_root = request.resumed.root
            record.samples = [Sample(list(had.token_ids), had.finish_reason) for had in request.resumed.so_far]
        self._records[request.request_id] = record
        return record

    def drop(self, record: Record) -> None:
        """A request that was refused before anything was done for it."""
        del self._records[record.request_id]

    def find(self, fence: Fence, process: str, epoch: bytes) -> tuple[Record, DispatchRecord] | None:
        """The live dispatch of this fence at this process, or None: the message is late, or somebody else's."""
        record = self._records.get(fence.request_id)
        dispatch = record.dispatches.get(fence) if record is not None else None
        if record is None or dispatch is None or dispatch.process != process or dispatch.epoch != epoch:
            return None
        return record, dispatch

    def accept(self, record: Record, dispatch: DispatchRecord, message: Tokens) -> Accepted | Duplicate | Gap | None:
        """Takes a frame of a live fence. None: it names a sample or a position that the dispatch does not own."""
        if not dispatch.covers(message.index):
            return None
        from_prefill = dispatch.fence.role == "prefill"
        end = message.position + len(message.token_ids)
        if from_prefill and end > 1:
            return None
        sample = record.samples[message.index]
        have = len(sample.tokens)
        if sample.finished:
            return Duplicate(max(have, end), final=True)
        if message.position > have:
            return Gap(have)
        new = message.token_ids[have - message.position :]
        reason = message.finish_reason if end >= have else None
        room = record.sampling.max_tokens - have
        if len(new) >= room:
            new, reason = new[:room], reason if reason is not None and len(new) == room else "length"
        if not new and reason is None:
            return Duplicate(have, final=False)
        logprobs: Sequence[TokenLogprobs] = message.logprobs
        if len(logprobs) == len(message.token_ids):
            logprobs = logprobs[have - message.position :][: len(new)]
        else:
            logprobs = ()
        sample.tokens += new
        sample.finish_reason = reason
        self.num_tokens += len(new)
        return Accepted(have, tuple(new), tuple(logprobs), reason, max(end, len(sample.tokens)), reason is not None)

    def close(self, record: Record, outcome: Outcome, error: str, now_s: float, error_code: str = "") -> Summary:
        """Ends a request; its dispatches must have been released before."""
        assert not record.dispatches, "a closed request holds dispatches"
        del self._records[record.request_id]
        self.num_outcomes[outcome] += 1
        first_s = record.first_token_at_s
        summary = Summary(
            request_id=record.request_id,
            outcome=outcome,
            error=error,
            num_prompt_tokens=len(record.request.prompt),
            num_generated_tokens=sum(len(sample.tokens) for sample in record.samples),
            longest=max(len(sample.tokens) for sample in record.samples),
            ttft_s=None if first_s is None else first_s - record.accepted_at_s,
            total_s=now_s - record.accepted_at_s,
            failures=(record.failures["prefill"], record.failures["decode"]),
            placements=tuple(record.placements),
            placed_after_s=tuple(record.placed_after_s),
            runs=tuple(record.runs),
            exact=record.exact,
            resume_no=0 if record.request.resumed is None else record.request.resumed.resume_no,
            num_samples=record.request.n,
            marks=marks(record.keys),
            batch=record.request.batch,
            promised_ttft_s=record.promised_ttft_s,
            promised_tpot_s=record.tpot_s,
            accepted_at_s=record.accepted_at_s,
            legs=tuple(
                Leg(sent.fence, sent.process, sent.sent_at_s, sent.ended_at_s, sent.end, sent.failed)
                for sent in islice(record.sent.values(), MAX_LEGS)
            ),
            finish_reasons=tuple(sample.finish_reason for sample in record.samples if sample.finish_reason is not None),
            error_code=error_code,
            tenant=record.request.tenant,
        )
        self.recent.append(summary)
        return summary
