"""The sink's side of a fetch: whom to ask for which keys, when to read, what to believe (design §5).

Owns one fetch from its plan to its end. A pure core: messages, read results and time in, actions out; it never touches
bytes, sockets or the pool. The destinations belong to the caller throughout; what is committed is verified, what is
missing is the caller's to compute or to plan again.

A fetch asks sources in order. Each key goes to the first source, and, when that one misses it or fails, to the next one
after it, at once and by itself: one fetch may have several **asks** open, each one `Fetch` message to one source with an
id of its own. Where several sources are worth reading from at once, runs of keys take turns between those that hold them.
Only `wait_source` is asked to wait; of what it has not answered for a while it is asked again, since the question or the answer
may be lost, and then it says at least that it knows. A source that dies, doesn't answer, or sends what can't be true is not
asked again by this fetch. A batch is read in portions, so that what is needed first comes first and a slow peer shows.

An ask, as a table. WAITING holds nothing at the source; READING holds a lease for each batch that is being read; ABORTING
ends only when no transport can still write into our memory, or when we know that it might: then the destinations are
tainted, their keys are missing, and the caller must retire the blocks. Everything not in the table is a bug.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvpool.block_pool import BlockId
from kvpool.keys import Key
from protos.control import Cancel, Done, Fetch, Miss, Parked, Ready, ReadyBlock, Source, ToSink, ToSource

LEASE_MARGIN = 0.2
"""This part of a lease is not used: a read that begins must be able to end in it."""
MAX_WAITED_S = 3600.0


@dataclass(slots=True)
class WantedBlock:
    """One block of a plan; `block_id` is a private destination in our arena, the caller's until committed."""

    key: Key
    parent: Key
    num_tokens: int
    block_id: BlockId


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What to get from whom. `wait_source` names the process that is computing missing keys now, empty for none;
    `deadline_s` is absolute, on the caller's clock. `fetch_id` is 16 bytes, unique in this process.

    Of several fetches the one with the lowest `order` reads first. `wanted[i]` is block `first_block + i` of its chain, and
    `held[j]` is how many leading blocks of it `sources[j]` is believed to hold; empty: not known.
    """

    fetch_id: bytes
    request_id: str
    wanted: tuple[WantedBlock, ...]
    sources: tuple[Source, ...]
    wait_source: str
    deadline_s: float
    order: int = 0
    first_block: int = 0
    held: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FetchedBatch:
    """Verified blocks in our memory, and where they came from: `blocks[i]` is in `block_ids[i]`."""

    source: Source
    transport: str
    blocks: tuple[ReadyBlock, ...]
    block_ids: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """The end of a fetch: every wanted key is in `committed` or in `missing` (each in the plan's order). `tainted` blocks
    may still be written by a transport: retire them. All other destinations of missing keys are the caller's to reuse."""

    fetch_id: bytes
    committed: tuple[Key, ...]
    missing: tuple[Key, ...]
    tainted: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Send this to the source. A `Fetch` opens an ask whose answers carry its id."""

    source: Source
    message: ToSource


@dataclass(frozen=True, slots=True)
class StartRead:
    """Read `locations[i]` into `block_ids[i]`; answer with `on_read`, or with `on_read_late` if it could not begin before
    `usable_until_s`. `read_id` is unique within the fetch."""

    source: Source
    read_id: int
    locations: tuple[int, ...]
    block_ids: tuple[BlockId, ...]
    usable_until_s: float


@dataclass(frozen=True, slots=True)
class AbortRead:
    """Give this read up; answer with `on_aborted`, and with `on_read` no more."""

    source: Source
    read_id: int


@dataclass(frozen=True, slots=True)
class Committed:
    """These blocks are verified: make them visible."""

    batch: FetchedBatch


Action = Send | StartRead | AbortRead | Committed | FetchEnded


class AskState(enum.Enum):
    WAITING = enum.auto()
    READING = enum.auto()
    ABORTING = enum.auto()
    OVER = enum.auto()


class AskEvent(enum.Enum):
    READY = enum.auto()
    """A batch to read."""
    PART = enum.auto()
    """Some keys were missed, or one of several reads ended; others are still open."""
    LAST_READ = enum.auto()
    """No read is left, but keys are."""
    SETTLED = enum.auto()
    """Neither keys nor reads are left."""
    GIVEN_UP = enum.auto()
    """Source lost, silent or wrong, or the fetch is over, and reads are running."""
    GIVEN_UP_QUIET = enum.auto()
    """The same, but nothing of it can write into our memory."""


TRANSITIONS: dict[tuple[AskState, AskEvent], AskState] = {
    (AskState.WAITING, AskEvent.READY): AskState.READING,
    (AskState.WAITING, AskEvent.PART): AskState.WAITING,
    (AskState.WAITING, AskEvent.SETTLED): AskState.OVER,
    (AskState.WAITING, AskEvent.GIVEN_UP_QUIET): AskState.OVER,
    (AskState.READING, AskEvent.READY): AskState.READING,
    (AskState.READING, AskEvent.PART): AskState.READING,
    (AskState.READING, AskEvent.LAST_READ): AskState.WAITING,
    (AskState.READING, AskEvent.SETTLED): AskState.OVER,
    (AskState.READING, AskEvent.GIVEN_UP): AskState.ABORTING,
    (AskState.READING, AskEvent.GIVEN_UP_QUIET): AskState.OVER,
    (AskState.ABORTING, AskEvent.PART): AskState.ABORTING,
    (AskState.ABORTING, AskEvent.SETTLED): AskState.OVER,
}


@dataclass(slots=True)
class _Read:
    batch: int
    blocks: list[ReadyBlock]
    block_ids: tuple[BlockId, ...]


@dataclass(slots=True)
class _Ask:
    wire_id: bytes
    source_index: int
    next_sources: tuple[int, ...]
    """Whom to ask for what this source doesn't have, in order."""
    waits: bool
    sent_s: float
    progress_s: float
    unanswered: bool
    """It was asked again, and has not said anything since."""
    open: dict[Key, None]
    """Keys that the source has not answered."""
    reads: dict[int, _Read] = field(default_factory=dict)
    reads_of_batch: dict[int, int] = field(default_factory=dict)
    state: AskState = AskState.WAITING
    tainted: bool = False

    def move(self, event: AskEvent) -> None:
        self.state = TRANSITIONS[self.state, event]


class FetchMachine:
    """One fetch. Call `start` once; then feed it until an action is `FetchEnded`, after which everything is ignored.

    A read is of at most `max_read_blocks` blocks. `parallel` are the indices into the plan's sources that are worth reading
    from at once. A source has `silence_s` for each answer; then it is given up, one that is asked to wait after a second
    question. How long a read may take is the caller's to judge.
    """

    def __init__(
        self,
        plan: FetchPlan,
        *,
        max_read_blocks: int,
        silence_s: float,
        parallel: Collection[int] = (),
    ) -> None:
        self._plan = plan
        self._max_read_blocks = max_read_blocks
        self._silence_s = silence_s
        unique: dict[tuple[str, bytes], int] = {}
        for index, source in enumerate(plan.sources):
            unique.setdefault((source.process, source.epoch), index)
        self._order = tuple(unique.values())
        self._parallel = [i for i in self._order if i in parallel and i < len(plan.held)]
        self._bad_sources: set[int] = set()
        self._wanted = {block.key: block for block in plan.wanted}
        assert len(self._wanted) == len(plan.wanted), "a plan names a key twice"
        self._asks: dict[bytes, _Ask] = {}
        self._num_asks = 0
        self._asks_by_read: dict[int, _Ask] = {}
        self._next_read_id = 0
        self._committed: set[Key] = set()
        self._missing: set[Key] = set()
        self._tainted: set[BlockId] = set()
        self._stopping = False
        self._ended = False
        self.num_missed_keys = 0
        self.num_corrupt_blocks = 0

    @property
    def plan(self) -> FetchPlan:
        return self._plan

    @property
    def ended(self) -> bool:
        return self._ended

    def wants(self, read_id: int) -> bool:
        """Whether a read that it asked for still has a use: it ends by `on_read`, `on_read_late` or `on_aborted`."""
        return read_id in self._asks_by_read

    def start(self, now_s: float) -> list[Action]:
        """Asks the first source, or those that share the work."""
        actions: list[Action] = []
        for route, keys in self._routes().items():
            actions += self._ask(keys, route, now_s)
        return self._finish(actions)

    def on_message(self, message: ToSink, now_s: float) -> list[Action]:
        """An answer. Answers to asks that are over are ignored: their leases were ended or expire."""
        ask = self._asks.get(message.fetch_id)
        if ask is None or ask.state in (AskState.ABORTING, AskState.OVER):
            return []
        ask.progress_s, ask.unanswered = now_s, False
        match message:
            case Parked():
                return []
            case Miss():
                return self._finish(self._on_miss(ask, message, now_s))
            case Ready():
                return self._finish(self._on_ready(ask, message, now_s))

    def on_read(self, read_id: int, checksums: NDArray[np.uint64] | None, transport: str, now_s: float) -> list[Action]:
        """A read ended: the checksums of what landed, in the read's order, or None if it failed."""
        ask = self._asks_by_read.pop(read_id, None)
        if ask is None or ask.state is AskState.ABORTING:
            return []
        ask.progress_s = now_s
        read = ask.reads.pop(read_id)
        if checksums is None:
            wrong = list(range(len(read.blocks)))
        else:
            expected = np.frombuffer(b"".join([block.checksum for block in read.blocks]), dtype=">u8")
            wrong = np.flatnonzero(expected != checksums).tolist()
            self.num_corrupt_blocks += len(wrong)
        actions: list[Action] = []
        if len(wrong) < len(read.blocks):
            actions.append(Committed(self._batch(ask, read, wrong, transport)))
        actions += self._end_of_read(ask, read.batch)
        if not wrong:
            self._settle(ask, AskEvent.LAST_READ)
            return self._finish(actions)
        actions += self._give_source_up(ask.source_index, now_s)
        actions += self._ask([read.blocks[i].key for i in wrong], ask.next_sources, now_s)
        return self._finish(actions)

    def on_read_late(self, read_id: int, now_s: float) -> list[Action]:
        """A read could not begin while its lease was good: it was not done, and the same source is asked again."""
        ask = self._asks_by_read.pop(read_id, None)
        if ask is None or ask.state is AskState.ABORTING:
            return []
        ask.progress_s = now_s
        read = ask.reads.pop(read_id)
        actions = self._end_of_read(ask, read.batch)
        self._settle(ask, AskEvent.LAST_READ)
        keys = [block.key for block in read.blocks]
        return self._finish([*actions, *self._ask(keys, (ask.source_index, *ask.next_sources), now_s)])

    def on_aborted(self, read_id: int, quiet: bool, now_s: float) -> list[Action]:
        """A read was given up; unless `quiet`, its destinations may still be written."""
        ask = self._asks_by_read.pop(read_id, None)
        if ask is None:
            return []
        read = ask.reads.pop(read_id)
        keys = [block.key for block in read.blocks]
        actions: list[Action] = []
        if not quiet:
            ask.tainted = True
            self._tainted.update(read.block_ids)
            self._missing.update(keys)
            keys = []
        if ask.reads:
            ask.move(AskEvent.PART)
        else:
            ask.move(AskEvent.SETTLED)
            if not ask.tainted:
                actions.append(Send(self._source_of(ask), Cancel(ask.wire_id)))
        actions += self._ask(keys, ask.next_sources, now_s)
        return self._finish(actions)

    def on_source_lost(self, process: str, epoch: bytes, now_s: float) -> list[Action]:
        """That incarnation is gone or can't be reached: its keys go to the next source."""
        for index in self._order:
            source = self._plan.sources[index]
            if (source.process, source.epoch) == (process, epoch):
                return self._finish(self._give_source_up(index, now_s))
        return []

    def cancel(self, now_s: float) -> list[Action]:
        """Ends the fetch with what it has."""
        self._stopping = True
        actions: list[Action] = []
        for index in self._order:
            actions += self._give_source_up(index, now_s)
        return self._finish(actions)

    def tick(self, now_s: float) -> list[Action]:
        """Gives sources up that don't answer, and the fetch at its deadline."""
        if now_s >= self._plan.deadline_s:
            return [] if self._stopping else self.cancel(now_s)
        actions: list[Action] = []
        for ask in list(self._asks.values()):
            if self._silent_at(ask) > now_s:
                continue
            if ask.waits and not ask.unanswered:
                # The same id: for a source that knows it nothing changes, and the time for which it keeps unknown keys goes on.
                ask.progress_s, ask.unanswered = now_s, True
                actions.append(self._fetch(ask, now_s))
            else:
                actions += self._give_source_up(ask.source_index, now_s)
        return self._finish(actions)

    def next_deadline(self) -> float:
        """When `tick` may have something to do."""
        return min([self._plan.deadline_s, *(self._silent_at(ask) for ask in self._asks.values())])

    # --- inside ------------------------------------------------------------------------------------------------------

    def _source_of(self, ask: _Ask) -> Source:
        return self._plan.sources[ask.source_index]

    def _routes(self) -> dict[tuple[int, ...], list[Key]]:
        """The order of sources for each key."""
        if len(self._parallel) < 2:
            return {self._order: list(self._wanted)}
        routes: dict[tuple[int, ...], list[Key]] = {}
        keys = list(self._wanted)
        for turn, start in enumerate(range(0, len(keys), self._max_read_blocks)):
            run = keys[start : start + self._max_read_blocks]
            end = self._plan.first_block + start + len(run)
            holders = [i for i in self._parallel if self._plan.held[i] >= end]
            route = self._order
            if holders:
                first = holders[turn % len(holders)]
                route = (first, *(i for i in self._order if i != first))
            routes.setdefault(route, []).extend(run)
        return routes

    def _silent_at(self, ask: _Ask) -> float:
        if ask.state is not AskState.WAITING:
            return self._plan.deadline_s
        return ask.progress_s + self._silence_s

    def _ask(self, keys: Iterable[Key], route: tuple[int, ...], now_s: float) -> list[Action]:
        """Asks the first source of the route that is any good; without one the keys are missing."""
        keys = list(keys)
        route = tuple(index for index in route if index not in self._bad_sources)
        if not keys:
            return []
        if self._stopping or not route:
            self._missing.update(keys)
            return []
        source = self._plan.sources[route[0]]
        wire_id = hashlib.sha256(self._plan.fetch_id + self._num_asks.to_bytes(4, "big")).digest()[:16]
        self._num_asks += 1
        waits = source.process == self._plan.wait_source
        ask = _Ask(wire_id, route[0], route[1:], waits, now_s, now_s, False, dict.fromkeys(keys))
        self._asks[wire_id] = ask
        return [self._fetch(ask, now_s)]

    def _fetch(self, ask: _Ask, now_s: float) -> Send:
        """Asks for what is open."""
        left_s = max(0.0, self._plan.deadline_s - now_s)
        fetch = Fetch(ask.wire_id, self._plan.request_id, list(ask.open), ask.waits, left_s)
        return Send(self._source_of(ask), fetch)

    def _on_miss(self, ask: _Ask, miss: Miss, now_s: float) -> list[Action]:
        missed = [key for key in dict.fromkeys(miss.keys) if key in ask.open]
        for key in missed:
            del ask.open[key]
        self.num_missed_keys += len(missed)
        self._settle(ask, AskEvent.PART)
        return self._ask(missed, ask.next_sources, now_s)

    def _on_ready(self, ask: _Ask, ready: Ready, now_s: float) -> list[Action]:
        source = self._source_of(ask)
        keys = [block.key for block in ready.blocks]
        true = ready.epoch == source.epoch and len(set(keys)) == len(keys) and all(key in ask.open for key in keys)
        for block in ready.blocks if true else ():
            wanted = self._wanted[block.key]
            true = true and block.num_tokens == wanted.num_tokens and block.parent == wanted.parent
        waited_s = ready.waited_s if 0.0 <= ready.waited_s <= MAX_WAITED_S else 0.0
        if not true or not ready.lease_s > 0.0 or ready.batch in ask.reads_of_batch:
            return self._give_source_up(ask.source_index, now_s)
        for key in keys:
            del ask.open[key]
        usable_until_s = ask.sent_s + waited_s + ready.lease_s * (1.0 - LEASE_MARGIN)
        if now_s >= usable_until_s:
            # The lease may be over by the source's clock before the read is: let it go and ask the same source again.
            self._settle(ask, AskEvent.PART)
            again = self._ask(keys, (ask.source_index, *ask.next_sources), now_s)
            return [Send(source, Done(ask.wire_id, ready.batch)), *again]
        if not keys:
            return [Send(source, Done(ask.wire_id, ready.batch))]
        actions: list[Action] = []
        for start in range(0, len(keys), self._max_read_blocks):
            blocks = ready.blocks[start : start + self._max_read_blocks]
            into = tuple([self._wanted[block.key].block_id for block in blocks])
            read_id = self._next_read_id
            self._next_read_id += 1
            ask.reads[read_id] = _Read(ready.batch, blocks, into)
            ask.reads_of_batch[ready.batch] = ask.reads_of_batch.get(ready.batch, 0) + 1
            self._asks_by_read[read_id] = ask
            locations = tuple([block.location for block in blocks])
            actions.append(StartRead(source, read_id, locations, into, usable_until_s))
        ask.move(AskEvent.READY)
        return actions

    def _batch(self, ask: _Ask, read: _Read, wrong: list[int], transport: str) -> FetchedBatch:
        blocks, block_ids = read.blocks, read.block_ids
        if wrong:
            right = [i for i in range(len(blocks)) if i not in set(wrong)]
            blocks, block_ids = [blocks[i] for i in right], tuple(block_ids[i] for i in right)
        self._committed.update([block.key for block in blocks])
        return FetchedBatch(self._source_of(ask), transport, tuple(blocks), block_ids)

    def _end_of_read(self, ask: _Ask, batch: int) -> list[Action]:
        """Its batch is over with its last read."""
        ask.reads_of_batch[batch] -= 1
        if ask.reads_of_batch[batch]:
            return []
        del ask.reads_of_batch[batch]
        return [Send(self._source_of(ask), Done(ask.wire_id, batch))]

    def _settle(self, ask: _Ask, event: AskEvent) -> None:
        """Moves an ask after something of it ended: `event`, unless that was the last of its reads or of all."""
        if ask.reads:
            ask.move(AskEvent.PART)
        elif ask.open:
            ask.move(event)
        else:
            ask.move(AskEvent.SETTLED)

    def _give_source_up(self, index: int, now_s: float) -> list[Action]:
        self._bad_sources.add(index)
        source = self._plan.sources[index]
        actions: list[Action] = []
        for ask in [ask for ask in self._asks.values() if ask.source_index == index]:
            if ask.state not in (AskState.WAITING, AskState.READING):
                continue
            orphans = list(ask.open)
            ask.open.clear()
            if ask.reads:
                ask.move(AskEvent.GIVEN_UP)
                actions += [AbortRead(source, read_id) for read_id in ask.reads]
            else:
                ask.move(AskEvent.GIVEN_UP_QUIET)
                actions.append(Send(source, Cancel(ask.wire_id)))
            actions += self._ask(orphans, ask.next_sources, now_s)
        return actions

    def _finish(self, actions: list[Action]) -> list[Action]:
        """Forgets asks that are over, and ends the fetch when every key is accounted for."""
        for wire_id in [wire_id for wire_id, ask in self._asks.items() if ask.state is AskState.OVER]:
            del self._asks[wire_id]
        if self._ended or self._asks:
            return actions
        self._ended = True
        order = [block.key for block in self._plan.wanted]
        assert self._committed | self._missing == set(order), "a key is neither committed nor missing"
        ended = FetchEnded(
            self._plan.fetch_id,
            tuple(key for key in order if key in self._committed),
            tuple(key for key in order if key in self._missing),
            tuple(sorted(self._tainted)),
        )
        return [*actions, ended]
