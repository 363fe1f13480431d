"""Messages between Tandem's own processes: ZeroMQ frames of MessagePack, as `msgspec` tagged unions (design §11).

Owns the shape and the bounds of every internal message; sends nothing itself. A message is a map with its name under
`"t"`. Fields are only ever added, with defaults, so that neighbouring protocol versions understand each other; a change
that can't be made so raises `PROTOCOL_VERSION`, and a hello of another version is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""A larger frame is dropped before it is decoded (the ZeroMQ sockets are set to it too)."""

MAX_GRAMMAR_BYTES = 2**20
"""No configuration allows a larger grammar."""

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Endpoint = Annotated[str, Meta(max_length=512)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=32)]
KeyBytes = Annotated[bytes, Meta(min_length=16, max_length=16)]
Keys = Annotated[list[KeyBytes], Meta(max_length=65_536)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Small = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
"""A duration. NaN and infinity are refused by the bounds."""
PerSecond = Annotated[float, Meta(ge=0, le=1e18)]
U64 = Annotated[bytes, Meta(min_length=8, max_length=8)]
"""An unsigned 64-bit number as 8 bytes big-endian (MessagePack decoders disagree about integers above 2**63)."""

Role = Literal["prefill", "decode", "pool", "router"]
DispatchRole = Literal["prefill", "decode"]
Tier = Literal["DEVICE", "HOST", "DISK"]


class Fence(Struct, frozen=True, array_like=True):
    """Which dispatch of which role a message belongs to. Compared for equality only."""

    request_id: Name
    resume_no: Count
    role: DispatchRole
    attempt: Count


class RoutingGroup(Struct, frozen=True):
    """What must be equal for two processes to exchange KV: the fields of the root key that a process decides."""

    model_fingerprint: Digest
    kv_format: Name
    numerics_class: Digest
    block_size: Annotated[int, Meta(ge=1, le=65_535)]


class Endpoints(Struct, frozen=True):
    """Where a process listens. `fetch` (ROUTER), `events` (PUB) and `replay` (ROUTER) are ZeroMQ endpoints. `shm`, `ucx` and
    `tcp` are where each transport reaches the arena, as that transport spells it; empty where it is off. `key` is the public
    CURVE key that the ZeroMQ sockets prove, empty where they are plain."""

    fetch: Endpoint
    events: Endpoint
    replay: Endpoint
    shm: Endpoint = ""
    machine_id: Annotated[str, Meta(max_length=128)] = ""
    ucx: Endpoint = ""
    tcp: Endpoint = ""
    key: Annotated[str, Meta(max_length=40)] = ""


class Source(Struct, frozen=True):
    """A place that serves blocks by key (a KVSource), as a dispatch names it."""

    process: Name
    epoch: U64
    tier: Tier
    endpoints: Endpoints


class Capacity(Struct, frozen=True):
    """What a process can hold and do, fixed for its epoch."""

    num_blocks: Count = 0
    slab_bytes: Count = 0
    max_model_len: Count = 0
    max_running: Count = 0
    max_step_tokens: Count = 0
    recompute_limit_tokens: Count = 0


# --- between a router and a worker or pool node ------------------------------------------------------------------------


class Hello(Struct, tag="hello", tag_field="t"):
    """First message of a process to a router, and again after each reconnect or `Welcome` of a new router epoch."""

    version: int
    process: Name
    role: Role
    epoch: U64
    pid: Small
    endpoints: Endpoints
    capacity: Capacity
    group: RoutingGroup | None
    """None only for a pool node before it knows which model it holds."""
    model: Annotated[str, Meta(max_length=256)] = ""
    number: Count = 0
    """Counts this process' hellos to this router, from 1."""
    former_epochs: Annotated[list[U64], Meta(max_length=64)] = []
    """Those that this same process had before and has given up, the last ones: whoever knows it by one of them need not wait for
    proof of its death."""


class Welcome(Struct, tag="welcome", tag_field="t"):
    """The router's answer to a hello, repeated as its heartbeat. Deadlines are durations. `answers` is the number of the last
    hello that it has taken in, 0 for a process that is no member; None from routers that don't say."""

    version: int
    router: Name
    epoch: U64
    heartbeat_s: Seconds
    liveness_s: Seconds
    answers: Count | None = None


class Refused(Struct, tag="refused", tag_field="t"):
    """The router's answer to a hello it can't accept (protocol version, role, duplicate name); the process says so and stops."""

    reason: Annotated[str, Meta(max_length=1024)]


class StepPrices(Struct, frozen=True, array_like=True):
    """What a worker's step costs, as it has learned: seconds for each step, each prefilled token, each pair of a prefilled token
    and one that it attends to, each sequence that decodes, and each token that such a sequence attends to. What it has not
    met yet is 0."""

    base_s: Seconds = 0.0
    token_s: Seconds = 0.0
    pair_s: Seconds = 0.0
    sequence_s: Seconds = 0.0
    context_s: Seconds = 0.0

    def prefill_s(self, num_tokens: int, num_before: int) -> float:
        """Of computing `num_tokens` after `num_before`."""
        return self.base_s + num_tokens * (self.token_s + self.pair_s * (num_before + (num_tokens + 1) / 2))


class Load(Struct, frozen=True):
    """A worker's view of its own load. `num_dispatches` counts the dispatches it had taken in from this router's epoch, so
    that the router can add those the report doesn't include yet."""

    num_dispatches: Count = 0
    num_waiting: Small = 0
    num_running: Small = 0
    waiting_tokens: Count = 0
    """Tokens whose KV the waiting and running sequences still have to compute or fetch."""
    waiting_pairs: Count = 0
    """Pairs of such a token and one that it attends to."""
    num_generating: Small = 0
    """Sequences that generate, or will when what they fetch is there, forks to come included."""
    context_tokens: Count = 0
    """Tokens that those attend to."""
    free_blocks: Count = 0
    """Blocks that can be allocated now: free and cached without a reference or lease."""
    cached_blocks: Count = 0
    leased_blocks: Count = 0
    empty_blocks: Count = 0
    """Blocks that hold nothing."""
    disk_blocks: Count = 0
    """What a pool node's DISK tier has room for, and how many it holds."""
    disk_used_blocks: Count = 0
    prefill_tokens_per_s: PerSecond = 0.0
    """Measured, smoothed; 0 before the first measurement."""
    decode_step_s: Seconds = 0.0
    fetch_bytes_per_s: PerSecond = 0.0
    disk_bytes_per_s: PerSecond = 0.0
    """How fast a pool node reads its DISK tier."""
    prices: StepPrices = StepPrices()


class Counters(Struct, frozen=True):
    """Totals since the epoch began, for metrics, audits and tests."""

    steps: Count = 0
    prefill_tokens: Count = 0
    decode_tokens: Count = 0
    prefix_hit_tokens: Count = 0
    fetched_blocks: Count = 0
    fetched_bytes: Count = 0
    fetch_misses: Count = 0
    fetch_corrupt: Count = 0
    served_blocks: Count = 0
    recomputed_tokens: Count = 0
    preemptions: Count = 0
    aborted_waiting: Count = 0
    """Aborted jobs, by what they were doing: waiting for room, fetching, computing the prompt, generating."""
    aborted_fetching: Count = 0
    aborted_prefill: Count = 0
    aborted_decode: Count = 0
    released_holds: Count = 0
    """Prefill jobs that ended with their hold: handed over, or given up after it."""
    finished: Count = 0
    evicted_blocks: Count = 0
    expired_leases: Count = 0
    dropped_blocks: Count = 0
    """Evicted without a copy anywhere, though a pool node keeps copies of ours."""
    shared_blocks: Count = 0
    """Blocks that one fetch brought for several sequences."""
    unprotected_streams: Count = 0
    """How often a stream went on although the pool did not take its blocks."""
    held_back_steps: Count = 0
    """Steps that streams sat out until the pool had their blocks."""
    stored_blocks: Count = 0
    """Of a pool node's DISK tier: written to it, read from it, not written although they should be, and found damaged."""
    loaded_blocks: Count = 0
    not_stored_blocks: Count = 0
    corrupt_blocks: Count = 0
    disk_faults: Count = 0
    """Its directories that are disabled because they failed."""
    granted_leases: Count = 0


class Link(Struct, frozen=True, array_like=True):
    """What a process fetched from another one by one transport since its epoch began, and how fast that goes now."""

    process: Name
    transport: Name
    num_bytes: Count
    bytes_per_s: PerSecond


class Heartbeat(Struct, tag="heartbeat", tag_field="t"):
    """Sent by the transfer thread every `heartbeat_s`, whether or not a step is running."""

    process: Name
    epoch: U64
    step_id: Count
    step_age_s: Seconds
    """Seconds since the running step began; 0 when the engine is idle."""
    events_seq: int
    """Sequence number of the last KV event batch published, -1 before the first."""
    load: Load
    counters: Counters
    links: Annotated[list[Link], Meta(max_length=16_384)] = []
    draining: bool = False
    """It takes no more dispatches and will leave: what it has ends there, or is given back with Failed `draining`."""
    peers: Count = 0
    """Number of the last list of peers that it has from this router."""


class Grammar(Struct, frozen=True):
    """What an answer's text must match as a whole (`tandem/grammar`)."""

    kind: Literal["json_schema", "regex", "lark"]
    text: Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_BYTES)]


class Sampling(Struct, frozen=True):
    """Everything that decides which token is drawn; validated by the router, trusted inside.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; repetition_penalty 1, presence and frequency 0 are off.
    `logit_bias` is a list of `(token_id, bias)`. `num_logprobs` -1 is none, 0 is the chosen token's alone. Stop strings are
    not here: text exists only in the router (docs/decisions/0002).
    """

    max_tokens: Annotated[int, Meta(ge=1)]
    temperature: float = 0.0
    top_k: Count = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = []
    num_logprobs: int = -1
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    stop_token_ids: list[int] = []
    """Tokens that end the stream and are not part of it; the model's end-of-sequence ids included unless ignored."""
    min_tokens: Count = 0
    """Stop tokens can't be drawn before this many tokens."""
    grammar: Grammar | UnsetType = UNSET
    """Absent where there is none, so that nothing travels and no digest changes."""


class Dispatch(Struct, tag="dispatch", tag_field="t"):
    """Router → worker: take this role of this request.

    `token_ids` are the tokens whose KV must exist before a token is drawn: the prompt, or, when a stream is taken up again
    after a crash, the prompt and its accepted tokens (then `n == 1`, with the sample's `index`). Their keys follow from `root`.
    Role `prefill`: get KV for all of `token_ids`, draw one token for each of `n` samples, report them, keep the blocks
    findable for `hold_s` or until aborted.
    Role `decode` with `prefill_here`: compute what is not found, draw the next token of each sample here, go on. No
    `FirstTokens` follows.
    Role `decode` without it: get KV for all of `token_ids` from `sources`, where `wait_source` is computing it right now;
    the first token of each sample comes in `FirstTokens`; then go on from there.
    The fence is unique per dispatch: the router counts `attempt` up for each dispatch of a role of a request.
    """

    fence: Fence
    root: KeyBytes
    token_ids: bytes
    num_prompt_tokens: Annotated[int, Meta(ge=1)]
    sampling: Sampling
    n: Annotated[int, Meta(ge=1, le=64)]
    sources: Annotated[list[Source], Meta(max_length=64)]
    """In the order to ask."""
    deadline_s: Seconds
    """Seconds from receipt until the request's deadline."""
    index: Count = 0
    """The first sample's index; samples are `index … index + n - 1`."""
    prefill_here: bool = False
    wait_source: str = ""
    """Name of the source that computes the missing keys right now; only it is asked to wait. Empty: nobody waits."""
    hold_s: Seconds = 10.0
    due_s: Annotated[float, Meta(ge=-1e9, le=1e9)] = 0.0
    """Seconds from receipt until its first token is due, less than 0 if it is late: prompts are computed in this order."""
    held_blocks: Annotated[list[Count], Meta(max_length=64)] = []
    """How many leading blocks each of `sources` is believed to hold; empty: not known."""


class FirstTokens(Struct, tag="first_tokens", tag_field="t"):
    """Router → decode worker: the tokens that prefill drew, one per sample, in index order; -1 for a sample that ended there."""

    fence: Fence
    token_ids: list[int]


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """`chosen` is the drawn token's log-probability, `top` the best `(token_id, logprob)`, best first."""

    chosen: float
    top: list[tuple[int, float]]


FinishReason = Literal["stop", "length"]


class Tokens(Struct, tag="tokens", tag_field="t"):
    """Worker → router: tokens of one sample. `position` is the index of the first in the generated stream (0 = first generated
    token). Kept by the worker until acknowledged. The last one of a sample carries `finish_reason`; it may hold no token."""

    fence: Fence
    index: Count
    position: Count
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    durable_position: Count = 0
    """Generated tokens whose KV a pool node holds."""


class Ack(Struct, tag="ack", tag_field="t"):
    """Router → worker: every token of this sample before `position` has been accepted. `final` ends the sample on the worker
    (it finished, or the router found a stop string)."""

    fence: Fence
    index: Count
    position: Count
    final: bool = False


class Resend(Struct, tag="resend", tag_field="t"):
    """Router → worker: a gap was seen; send again from `position`."""

    fence: Fence
    index: Count
    position: Count


class Started(Struct, tag="started", tag_field="t"):
    """Worker → router, once per dispatch: the step that is about to run is the first to compute something of it. Sent before that
    step, so that should the step be the worker's last one, it is known what it computed."""

    fence: Fence


class FetchedFrom(Struct, frozen=True):
    """How much of a role's KV came from one source."""

    process: Name
    tier: Tier
    transport: Name
    num_blocks: Count
    num_bytes: Count


class RoleReport(Struct, tag="role_report", tag_field="t"):
    """Worker → router, once per dispatch, when the role's KV is complete (prefill: with the first tokens; decode: at its start).

    Seconds are durations on the worker. `local_hit_tokens + fetched_tokens + computed_tokens == len(token_ids)`, but for
    the last prompt token, which is computed again when its whole prompt was found.
    """

    fence: Fence
    local_hit_tokens: Count
    fetched_tokens: Count
    computed_tokens: Count
    fetched: list[FetchedFrom]
    queue_s: Seconds
    fetch_s: Seconds
    compute_s: Seconds


class Failed(Struct, tag="failed", tag_field="t"):
    """Worker → router: this dispatch ended without finishing; all it held here is released. `code` is a `TandemError.code`;
    `draining` is nobody's failure."""

    fence: Fence
    code: Name
    message: Annotated[str, Meta(max_length=4096)]


class Aborted(Struct, tag="aborted", tag_field="t"):
    """Worker → router: the abort of this fence is done, nothing of it is held any more."""

    fence: Fence


class Abort(Struct, tag="abort", tag_field="t"):
    """Router → worker: drop this dispatch (the client left, the request ended, the hand-over is complete). Idempotent."""

    fence: Fence
    reason: Annotated[str, Meta(max_length=256)] = ""


class Peers(Struct, tag="peers", tag_field="t"):
    """Router → pool node and worker: who else serves blocks of its group, whole lists, on each change, and to whom a heartbeat
    shows that it has not heard the last one. A router counts its lists from 1; an earlier one that comes late is nothing."""

    workers: Annotated[list[Source], Meta(max_length=4096)]
    group: RoutingGroup | None = None
    slab_bytes: Count = 0
    pools: Annotated[list[Source], Meta(max_length=4096)] = []
    number: Count = 0


class Audit(Struct, tag="audit", tag_field="t"):
    """Router → every process: say what you own. Answered with `Owned` of the same number."""

    number: Count


class TierHoldings(Struct, frozen=True):
    """What one tier of a process holds: blocks by class (they add up to `num_blocks`), those with a lease or a pin, and its
    announced keys, as many as there are and all of them XORed."""

    tier: Tier
    num_blocks: Count
    free: Count
    referenced: Count
    cached: Count
    lent: Count
    retired: Count
    leased: Count
    pinned: Count
    num_leases: Count
    lease_left_s: Seconds
    """Until the last of its leases ends by itself."""
    lease_overdue_s: Seconds
    """Since the first of them should have."""
    num_keys: Count
    digest: KeyBytes
    fault: Annotated[str, Meta(max_length=512)] = ""
    """What of its bookkeeping is wrong."""


class FollowedHoldings(Struct, frozen=True, array_like=True):
    """What a pool node takes a worker to hold after that worker's batch of events `seq`."""

    process: Name
    epoch: U64
    seq: int
    num_keys: Count
    digest: KeyBytes


MAX_AUDITED_FENCES = 16_384


class Owned(Struct, tag="owned", tag_field="t"):
    """Worker or pool node → router: what it owns, all but the dispatches at the moment of its batch of events `events_seq`."""

    number: Count
    events_seq: int = -1
    tiers: Annotated[list[TierHoldings], Meta(max_length=3)] = []
    num_jobs: Count = 0
    """Dispatches that are not over, of all routers."""
    fences: Annotated[list[Fence], Meta(max_length=MAX_AUDITED_FENCES)] = []
    """This router's among them, and those of which it has not acknowledged everything."""
    num_stray_blocks: Count = 0
    """Referenced blocks that no job and no fetch knows of."""
    followed: Annotated[list[FollowedHoldings], Meta(max_length=4096)] = []
    segment: Count = 0
    """The inode of its arena's memory, 0 without one, and those of all arenas that it maps."""
    mapped: Annotated[list[Count], Meta(max_length=8192)] = []


class Leave(Struct, tag="leave", tag_field="t"):
    """Router → worker: finish what you have, and end, as after SIGTERM. Idempotent."""

    reason: Annotated[str, Meta(max_length=256)] = ""


class Goodbye(Struct, tag="goodbye", tag_field="t"):
    """Worker → router: a clean stop; everything it owned is gone."""

    process: Name
    epoch: U64


ToRouter = Hello | Heartbeat | Started | Tokens | RoleReport | Failed | Aborted | Owned | Goodbye
FromRouter = Welcome | Refused | Dispatch | FirstTokens | Ack | Resend | Abort | Peers | Audit | Leave


# --- between a sink and a source (design §5) ---------------------------------------------------------------------------


class Fetch(Struct, tag="fetch", tag_field="t"):
    """Sink → source: these keys, please. With `wait`, keys that are unknown are parked until `deadline_s` (a duration)."""

    fetch_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    request_id: Annotated[str, Meta(max_length=128)]
    keys: Keys
    wait: bool
    deadline_s: float
    group: Count = 0
    shard: Count = 0


NOBODY = bytes(8)
"""The writer or owner of a block of which nobody said it."""


class ReadyBlock(Struct, frozen=True, array_like=True):
    """`location` is opaque to the sink; `checksum` was made by the block's producer, the incarnation `writer`. `owner` is the
    begin of its chain's root: one for each tenant, adapter and model; quotas count by it."""

    key: KeyBytes
    location: Count
    num_tokens: Annotated[int, Meta(ge=1, le=65_535)]
    checksum: U64
    parent: Annotated[bytes, Meta(max_length=16)]
    writer: U64 = NOBODY
    owner: U64 = NOBODY


class Ready(Struct, tag="ready", tag_field="t"):
    """Source → sink: these blocks may be read for `lease_s` seconds. The lease began `waited_s` after the source received the
    request, so the sink counts both from when it sent its request and never believes in a lease that is over."""

    fetch_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    batch: Count
    epoch: U64
    lease_s: Seconds
    blocks: Annotated[list[ReadyBlock], Meta(max_length=65_536)]
    waited_s: Seconds = 0.0


class Miss(Struct, tag="miss", tag_field="t"):
    """Source → sink: it does not have these and will not (evicted, unknown after the grace time, or the prefill failed)."""

    fetch_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    keys: Keys


class Parked(Struct, tag="parked", tag_field="t"):
    """Source → sink, which asked again: it knows of this fetch, and has nothing new. Who says nothing can't be reached."""

    fetch_id: Annotated[bytes, Meta(min_length=16, max_length=16)]


class Done(Struct, tag="done", tag_field="t"):
    """Sink → source: the reads of this batch are over; its lease ends."""

    fetch_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    batch: Count


class Cancel(Struct, tag="cancel", tag_field="t"):
    """Sink → source: forget this fetch; all its leases end (sent only when no read of it is in flight)."""

    fetch_id: Annotated[bytes, Meta(min_length=16, max_length=16)]


class Kept(Struct, tag="kept", tag_field="t"):
    """Pool node → worker: it holds a copy of these blocks, which the worker has announced."""

    keys: Keys


class Lost(Struct, tag="lost", tag_field="t"):
    """Pool node → worker: it holds no copy of these blocks any more."""

    keys: Keys


ToSource = Fetch | Done | Cancel | Kept | Lost
ToSink = Ready | Miss | Parked

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)
_from_router: msgspec.msgpack.Decoder[FromRouter] = msgspec.msgpack.Decoder(FromRouter)
_to_source: msgspec.msgpack.Decoder[ToSource] = msgspec.msgpack.Decoder(ToSource)
_to_sink: msgspec.msgpack.Decoder[ToSink] = msgspec.msgpack.Decoder(ToSink)


def encode(message: ToRouter | FromRouter | ToSource | ToSink) -> bytes:
    """The MessagePack form of any control message."""
    return _encoder.encode(message)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through
        raise msgspec.DecodeError(f"not a message: {error}") from error


def decode_to_router(data: bytes) -> ToRouter:
    """Raises msgspec.DecodeError (ValidationError included) on anything that is not such a message."""
    return _decode(_to_router, data)


def decode_from_router(data: bytes) -> FromRouter:
    """As `decode_to_router`, for what routers send."""
    return _decode(_from_router, data)


def decode_to_source(data: bytes) -> ToSource:
    """As `decode_to_router`, for what sinks send to sources."""
    return _decode(_to_source, data)


def decode_to_sink(data: bytes) -> ToSink:
    """As `decode_to_router`, for what sources send to sinks."""
    return _decode(_to_sink, data)
