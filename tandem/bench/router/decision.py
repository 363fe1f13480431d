"""The whole decision: from a prompt's tokens to the dispatches that would be sent, and back; beside NVIDIA Dynamo's selection.

Owns the measuring. Ours is the router's core (`router/router.py`) as it is in the router process, in a child process on one core:
a request is submitted (its keys, the line, the index, the policy over all workers, what is counted at them, the messages) and
cancelled again. Half of what is asked for is at some of the workers, a quarter more at one of them, as `load.py` says.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from random import Random
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from kvpool.keys import Key, prompt_keys, tokens_as_bytes
from protos.control import (
    PROTOCOL_VERSION,
    Abort,
    Aborted,
    Capacity,
    Counters,
    Endpoints,
    Heartbeat,
    Hello,
    Load,
    Role,
    RoutingGroup,
    Sampling,
    StepPrices,
)
from protos.kv_events import BlockStored, EventBatch
from router.actions import Action, Send
from router.journal import Request
from router.planner import root_of
from router.router import RouterCore, Settings
from tandem.bench.peers import Peer, Ready, installed
from tandem.bench.report import percentile
from tandem.bench.router.load import ASKED_BLOCKS, PROMPT_BLOCKS, PROMPTS, TAIL_BLOCKS
from tandem.errors import TandemError

BLOCK_SIZE = 16
GROUP = RoutingGroup(b"m" * 32, "bf16", b"n" * 32, BLOCK_SIZE)
_PREFILLS_OF_8 = 5
_PRICES = StepPrices(base_s=5e-3, token_s=5e-5, pair_s=1e-9, sequence_s=1e-4, context_s=1e-7)
_NUM_BLOCKS = 20_000
_EVERY_S = 1e-3
_HEARTBEATS_EVERY = 100
_WARM_UP = 300
_START_S = 120.0
_ANSWER_S = 600.0


class Decide(Struct, tag="decide", tag_field="t"):
    """Parent → child: fill a new router and ask it."""

    workers: int
    entries: int
    holders: int
    decisions: int
    seed: int


class Decided(Struct, tag="decided", tag_field="t"):
    """Child → parent. Microseconds."""

    per_s: Annotated[float, Meta(gt=0)]
    p50: float
    p99: float


def ours() -> Peer:
    """Our router's core in a process of its own."""
    return Peer(
        "the router",
        [sys.executable, "-m", __name__],
        start_s=_START_S,
        answer_s=_ANSWER_S,
        advice="",
        begins="started",
    )


def dynamo() -> Peer:
    """NVIDIA Dynamo's selection service through its Python binding: select and reserve, then free. Raises TandemError if it isn't
    installed."""
    return Peer(
        "dynamo",
        installed("dynamo", "dynamo", "dynamo_select_peer.py"),
        start_s=_START_S,
        answer_s=_ANSWER_S,
        begins="started",
    )


def measure(peer: Peer, workers: int, entries: int, holders: int, decisions: int, seed: int) -> Decided:
    """Raises TandemError."""
    return peer.ask(Decide(workers, entries, holders, decisions, seed), Decided, f"decided with {workers} workers")


class FullRouter:
    """A router's core with `workers` members (five of eight compute prompts) that hold `entries` blocks."""

    def __init__(self, workers: int, entries: int, holders: int, seed: int) -> None:
        self._random = Random(seed)
        self._now_s = 0.0
        settings = Settings("router", b"epoch123", max_index_keys=2 * entries + 1)
        self.core = RouterCore(settings, self._random)
        self._members: list[tuple[str, bytes]] = []
        self._seqs = [0] * workers
        self._taken = [0] * workers
        for number in range(workers):
            self._join(number, "prefill" if 8 * number < _PREFILLS_OF_8 * (workers - 1) else "decode")
        self.prompts = [self._tokens(ASKED_BLOCKS) for _ in range(PROMPTS)]
        root, num_entries = root_of(GROUP), 0
        for tokens in self.prompts:
            keys = prompt_keys(root, tokens_as_bytes(tokens), BLOCK_SIZE).full
            at = self._random.sample(range(workers), min(holders, workers))
            for number in at:
                num_entries += self._store(number, keys[:PROMPT_BLOCKS])
            num_entries += self._store(at[0], keys[PROMPT_BLOCKS : PROMPT_BLOCKS + TAIL_BLOCKS])
        while num_entries < entries:
            data = self._random.randbytes(16 * TAIL_BLOCKS)
            others = [data[16 * i : 16 * i + 16] for i in range(TAIL_BLOCKS)]
            num_entries += self._store(self._random.randrange(workers), others)
        self.beat()

    def _join(self, number: int, role: Role) -> None:
        name, epoch = f"{role}-{number}", number.to_bytes(8, "big")
        at = "tcp://127.0.0.1:1"
        capacity = Capacity(num_blocks=_NUM_BLOCKS, slab_bytes=1 << 21, max_running=256, max_step_tokens=8192)
        hello = Hello(PROTOCOL_VERSION, name, role, epoch, 1, Endpoints(at, at, at), capacity, GROUP)
        self.core.on_message(name, epoch, hello, self._now_s)
        self.core.on_replay_end(name, epoch, complete=True)
        self._members.append((name, epoch))

    def _store(self, number: int, keys: Sequence[Key]) -> int:
        name, epoch = self._members[number]
        for first in range(0, len(keys), TAIL_BLOCKS):
            parent = keys[first - 1] if first else None
            stored = BlockStored(list(keys[first : first + TAIL_BLOCKS]), parent, [], BLOCK_SIZE, medium="DEVICE")
            self.core.on_events(name, epoch, self._seqs[number], EventBatch(0.0, [stored], epoch=epoch), self._now_s)
            self._seqs[number] += 1
        return len(keys)

    def _tokens(self, num_blocks: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(32_000) for _ in range(num_blocks * BLOCK_SIZE))

    def beat(self) -> None:
        """A heartbeat of every worker: it has nothing to do."""
        for number, (name, epoch) in enumerate(self._members):
            load = Load(num_dispatches=self._taken[number], free_blocks=_NUM_BLOCKS, prices=_PRICES)
            beat = Heartbeat(name, epoch, 0, 0.0, self._seqs[number] - 1, load, Counters())
            self.core.on_message(name, epoch, beat, self._now_s)

    def decide(self, number: int) -> float:
        """One request, dispatched and cancelled; what that took, in microseconds."""
        self._now_s += _EVERY_S
        prompt = self.prompts[self._random.randrange(PROMPTS)]
        request = Request(str(number), prompt, Sampling(max_tokens=256), 1, self._now_s + 600.0)
        began = time.perf_counter_ns()
        sent = self.core.submit(request, self._now_s)
        freed = self.core.cancel(request.request_id, self._now_s)
        took_us = (time.perf_counter_ns() - began) / 1e3
        self._answer(sent, freed)
        if number % _HEARTBEATS_EVERY == 0:
            self.beat()
        return took_us

    def _answer(self, sent: Sequence[Action], freed: Sequence[Action]) -> None:
        """What the workers say to it."""
        numbers = {name: number for number, (name, _) in enumerate(self._members)}
        for action in sent:
            if isinstance(action, Send):
                self._taken[numbers[action.process]] += 1
        aborted = [action for action in freed if isinstance(action, Send) and isinstance(action.message, Abort)]
        if not aborted or len(aborted) != len(sent):
            raise TandemError(f"a request was sent as {sent} and freed as {freed}")
        for action in aborted:
            assert isinstance(action.message, Abort)
            self.core.on_message(action.process, action.epoch, Aborted(action.message.fence), self._now_s)


def _decided(request: Decide) -> Decided:
    router = FullRouter(request.workers, request.entries, request.holders, request.seed)
    for number in range(_WARM_UP):
        router.decide(number)
    took = [router.decide(number) for number in range(_WARM_UP, _WARM_UP + request.decisions)]
    if router.core.fleet.num_dispatched():
        raise TandemError(f"{router.core.fleet.num_dispatched()} dispatches were not freed")
    return Decided(per_s=1e6 * len(took) / sum(took), p50=percentile(took, 50), p99=percentile(took, 99))


def _child() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.stdout.buffer.write(msgspec.json.encode(Ready("tandem")) + b"\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(msgspec.json.encode(_decided(msgspec.json.decode(line, type=Decide))) + b"\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _child()
