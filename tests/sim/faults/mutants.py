"""Ten ways to break production code, each a small patch that the simulation must notice.

`MUTANTS` maps what is broken to a function that breaks it through pytest's `monkeypatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvpool.block_pool import BlockPool
from kvpool.keys import Key
from kvpool.sink import Action as FetchAction
from kvpool.sink import FetchMachine
from kvpool.sink import Send as FetchSend
from protos.control import Done, Fence
from router.actions import Action, Emit
from router.journal import DispatchRecord, Journal, Record
from router.membership import Membership
from router.prefix_index import PrefixIndex
from router.router import RouterCore
from tandem.engine.durability import Durability
from tandem.engine.sequence import Sequence as EngineSequence
from tandem.errors import TandemError
from tandem.unacknowledged import Unacknowledged

Patch = pytest.MonkeyPatch


def accept_a_stale_fence(patch: Patch) -> None:
    """The journal takes a frame of a dispatch that is over for one of the live dispatch of its role."""
    find = Journal.find

    def find_any(self: Journal, fence: Fence, process: str, epoch: bytes) -> tuple[Record, DispatchRecord] | None:
        found = find(self, fence, process, epoch)
        record = self.get(fence.request_id)
        if found is None and record is not None and (live := record.live(fence.role)):
            return record, live[0]
        return found

    patch.setattr(Journal, "find", find_any)


def accept_an_old_epoch(patch: Patch) -> None:
    """A process that died is taken for the one that has its name now."""
    patch.setattr(Membership, "is_member", lambda self, name, epoch: self.get(name) is not None)


def free_before_done(patch: Patch) -> None:
    """The sink says that it is done when it begins to read."""
    on_ready = FetchMachine._on_ready

    def done_at_once(self: FetchMachine, ask: Any, ready: Any, now_s: float) -> list[FetchAction]:
        actions = on_ready(self, ask, ready, now_s)
        return [*actions, FetchSend(self._source_of(ask), Done(ask.wire_id, ready.batch))]

    patch.setattr(FetchMachine, "_on_ready", done_at_once)


def free_under_a_lease(patch: Patch) -> None:
    """A lease holds nothing against eviction."""
    grant = BlockPool.grant

    def grant_nothing(self: BlockPool, keys: Sequence[Key], duration_s: float, now_s: float) -> Any:
        lease = grant(self, keys, duration_s, now_s)
        if lease is not None:
            self.end_lease(lease.lease_id)
        return lease

    patch.setattr(BlockPool, "grant", grant_nothing)


def reuse_after_a_cancelled_receive(patch: Patch) -> None:
    """Memory into which a transport may still write is taken for the sequence's again."""
    on_aborted = FetchMachine.on_aborted
    patch.setattr(
        FetchMachine, "on_aborted", lambda self, read_id, quiet, now_s: on_aborted(self, read_id, True, now_s)
    )


def send_a_second_terminal_message(patch: Patch) -> None:
    """Whoever cancels a request that is over is told so."""
    cancel = RouterCore.cancel
    end = RouterCore._end

    def end_twice(self: RouterCore, record: Record, error: TandemError | None, now_s: float) -> list[Action]:
        actions = end(self, record, error, now_s)
        last = next(action for action in actions if isinstance(action, Emit) and action.request_id == record.request_id)
        return [*actions, last] if len(record.sent) > 2 else actions

    patch.setattr(RouterCore, "_end", end_twice)
    patch.setattr(RouterCore, "cancel", cancel)


def lose_a_resend(patch: Patch) -> None:
    """A worker forgets what it sent when anything is acknowledged, so that it has nothing to send again."""
    patch.setattr(Unacknowledged, "from_position", lambda self, router, fence, index, position: [])
    patch.setattr(Unacknowledged, "due", lambda self, now_s: [])


def ignore_an_event_gap(patch: Patch) -> None:
    """The index goes on with the next batch it hears."""
    on_batch = PrefixIndex.on_batch

    def on_any_batch(self: PrefixIndex, process: str, epoch: bytes, seq: int, batch: Any, now_s: float) -> int | None:
        feed = self._feeds.get(process)
        if feed is not None and feed.replay_since_s is None:
            feed.next_seq = max(feed.next_seq, seq)
        return on_batch(self, process, epoch, seq, batch, now_s)

    patch.setattr(PrefixIndex, "on_batch", on_any_batch)


def index_a_partial_block(patch: Patch) -> None:
    """The last block of a hand-over is announced like a full one."""
    from kvpool.outbox import Outbox

    published = Outbox.published
    patch.setattr(Outbox, "published", lambda self, key, parent, announced: published(self, key, parent, True))


def over_report_the_durable_position(patch: Patch) -> None:
    """Blocks that are only published count as kept."""

    def position(self: Durability, sequence: EngineSequence) -> int:
        size = self._block_size
        return max(0, sequence.num_published_blocks * size - sequence.job.dispatch.num_prompt_tokens)

    patch.setattr(Durability, "position", position)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    mutant.__name__: mutant
    for mutant in (
        accept_a_stale_fence,
        accept_an_old_epoch,
        free_before_done,
        free_under_a_lease,
        reuse_after_a_cancelled_receive,
        send_a_second_terminal_message,
        lose_a_resend,
        ignore_an_event_gap,
        index_a_partial_block,
        over_report_the_durable_position,
    )
}
