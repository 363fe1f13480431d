"""Blocks on their way to this worker: which fetch brings which, and which sequences wait for it.

Owns fetches from start to end, and what is known of blocks that arrived and are not used yet. It decides nothing and
touches no block: `Onboarding` says what is fetched and uses what came. A block that is on its way for one sequence is not
fetched again for another: that one takes a reference on the same block and waits for the same fetch. When that fetch ends
without the block, the other one fetches for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from kvpool.block_pool import BlockId
from kvpool.keys import Key
from kvpool.sink import FetchedBatch, FetchPlan, WantedBlock
from protos.control import ReadyBlock, Source
from tandem.engine.output import Outbox
from tandem.engine.sequence import Sequence, State

Arrived = tuple[ReadyBlock, FetchedBatch]
"""A fetched block, and the batch that it came with."""


@dataclass(slots=True)
class _Fetch:
    owner: Sequence
    wait_source: str
    keys: tuple[Key, ...]
    sharers: list[Sequence] = field(default_factory=list)
    arrived: dict[BlockId, Arrived] = field(default_factory=dict)


class Fetches:
    """Every fetch that has not ended, by its id. `new_fetch_id` gives 16 bytes that are unique in this process."""

    def __init__(self, block_size: int, outbox: Outbox, new_fetch_id: Callable[[], bytes]) -> None:
        self._block_size = block_size
        self._outbox = outbox
        self._new_fetch_id = new_fetch_id
        self._fetches: dict[bytes, _Fetch] = {}
        self._under_way: dict[Key, tuple[BlockId, bytes]] = {}

    def start(
        self,
        sequence: Sequence,
        wanted: Many[WantedBlock],
        sources: tuple[Source, ...],
        *,
        wait_source: str,
        deadline_s: float,
        held: tuple[int, ...],
    ) -> None:
        """`sequence`, which has no fetch of its own, fetches `wanted`; the rest is as in `FetchPlan`. Others may share its
        full blocks."""
        assert sequence.fetch_id is None
        fetch_id = sequence.fetch_id = self._new_fetch_id()
        shared = [
            block for block in wanted if block.num_tokens == self._block_size and block.key not in self._under_way
        ]
        self._fetches[fetch_id] = _Fetch(sequence, wait_source, tuple(block.key for block in shared))
        for block in shared:
            self._under_way[block.key] = (block.block_id, fetch_id)
        self._outbox.fetch(
            FetchPlan(
                fetch_id=fetch_id,
                request_id=sequence.job.dispatch.fence.request_id,
                wanted=tuple(wanted),
                sources=sources,
                wait_source=wait_source,
                deadline_s=deadline_s,
                order=sequence.job.arrival,
                first_block=sequence.num_computed_tokens // self._block_size,
                held=held,
            )
        )

    def cancel(self, sequence: Sequence) -> None:
        """Asks for the end of its own fetch. That comes when nothing is written any more; till then it keeps its blocks."""
        assert sequence.fetch_id is not None
        self._outbox.cancel(sequence.fetch_id)

    def preempt(self, sequence: Sequence) -> None:
        """Cancels its own fetch and has it wait in line again: it gives its blocks back when that fetch has ended."""
        sequence.state = State.WAITING
        self.cancel(sequence)

    def under_way(self, key: Key, wait_source: str) -> tuple[BlockId, bytes] | None:
        """The block that a running fetch is filling with `key`, and that fetch, if whoever waits for nobody but
        `wait_source` may wait for it."""
        found = self._under_way.get(key)
        if found is None or self._fetches[found[1]].wait_source not in ("", wait_source):
            return None
        return found

    def share(self, fetch_id: bytes, sequence: Sequence) -> None:
        """`sequence` waits for that fetch too."""
        if fetch_id not in sequence.shared_fetch_ids:
            sequence.shared_fetch_ids.add(fetch_id)
            self._fetches[fetch_id].sharers.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """`sequence` waits for nobody else's fetch any more."""
        for fetch_id in sequence.shared_fetch_ids:
            self._fetches[fetch_id].sharers.remove(sequence)
        sequence.shared_fetch_ids.clear()

    def arrive(self, fetch_id: bytes, batch: FetchedBatch) -> None:
        """Verified blocks lie where the plan said. An unknown id is ignored."""
        fetch = self._fetches.get(fetch_id)
        if fetch is not None:
            arrived = ((block, batch) for block in batch.blocks)
            fetch.arrived.update(zip(batch.block_ids, arrived, strict=True))

    def end(self, fetch_id: bytes) -> list[Sequence]:
        """The fetch is over: what came is noted with those who wait, who are returned, its owner first."""
        fetch = self._fetches.pop(fetch_id, None)
        if fetch is None:
            return []
        for key in fetch.keys:
            del self._under_way[key]
        fetch.owner.fetch_id = None
        for sequence in (fetch.owner, *fetch.sharers):
            sequence.arrived |= fetch.arrived
            sequence.shared_fetch_ids.discard(fetch_id)
        return [fetch.owner, *fetch.sharers]
