"""What a request lacks, as dispatches: where each goes, what it says.

Owns the step from a record with samples that nobody generates to the dispatches that will: keys, placement, sources, fences and
messages. Pure. It enters what it dispatches into record and ledger, and takes nothing out again; whether a request may be
planned now, waits or ends is the router's (`router/router.py`, which also tells the three forms of dispatches).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvpool.keys import Key, prompt_keys, root_key, tokens_as_bytes
from protos.control import Dispatch, DispatchRole, FirstTokens, RoutingGroup, Source, StepPrices
from router.actions import Action, Send
from router.journal import DispatchRecord, Record
from router.ledger import Ledger
from router.membership import Member, Membership
from router.policy import Candidate, Placement, Policy
from router.prefix_index import Place, PrefixIndex


class Planner:
    """Dispatches for the records it is given. Reads membership and index; writes to ledger and record."""

    def __init__(
        self,
        *,
        membership: Membership,
        index: PrefixIndex,
        ledger: Ledger,
        policy: Policy,
        rng: random.Random,
        hold_s: float,
    ) -> None:
        self._membership = membership
        self._index = index
        self._ledger = ledger
        self._policy = policy
        self._rng = rng
        self._hold_s = hold_s

    def dispatch(self, record: Record, group: RoutingGroup, now_s: float) -> list[Action]:
        """Dispatches every unfinished sample that no live decode dispatch generates; nothing if there is none.

        `group` is the served one and has a decode worker.
        """
        root = _root(group)
        if record.keys_root != root:
            record.keys_root = root
            record.keys = prompt_keys(root, record.request.prompt, group.block_size).full
        uncovered = record.uncovered()
        if not uncovered:
            return []
        prefill = record.prefill()
        if prefill is not None:
            return self._dispatch_decode(
                record, self._place(record, group, record.request.prompt, True), prefill, now_s
            )
        whole = len(uncovered) == len(record.unfinished()) and all(
            len(record.samples[i].tokens) <= 1 for i in uncovered
        )
        if whole and not record.first_tokens_known():
            return self._dispatch_whole(record, group, now_s)
        actions: list[Action] = []
        for index in uncovered:
            actions += self._dispatch_continuation(record, group, index, now_s)
        return actions

    def first_tokens(self, record: Record) -> list[Action]:
        """FirstTokens for the decode dispatch that waits for them, when all are known and one is to be continued."""
        if not record.first_tokens_known() or not record.unfinished():
            return []
        waiting = [dispatch for dispatch in record.live("decode") if dispatch.waits and not dispatch.first_tokens_sent]
        return [send_first_tokens(record, dispatch) for dispatch in waiting]

    def _dispatch_whole(self, record: Record, group: RoutingGroup, now_s: float) -> list[Action]:
        """All samples from the prompt on: hand-over, or prefill here."""
        placement = self._place(record, group, record.request.prompt, record.prefill_here_only)
        record.placements.append(placement)
        if placement.prefill is None:
            return [self._send(record, placement.decode, "decode", placement, now_s, prefill_here=True)]
        action = self._send(record, placement.prefill, "prefill", placement, now_s)
        prefill = record.prefill()
        assert prefill is not None
        return [action, *self._dispatch_decode(record, placement, prefill, now_s)]

    def _dispatch_decode(
        self, record: Record, placement: Placement, prefill: DispatchRecord, now_s: float
    ) -> list[Action]:
        """The decode side of a hand-over from the live dispatch `prefill`."""
        return [
            self._send(record, placement.decode, "decode", placement, now_s, prefill=prefill),
            *self.first_tokens(record),
        ]

    def _dispatch_continuation(self, record: Record, group: RoutingGroup, index: int, now_s: float) -> list[Action]:
        tokens = (*record.request.prompt, *record.samples[index].tokens)
        placement = self._place(record, group, tokens, True)
        record.placements.append(placement)
        return [self._send(record, placement.decode, "decode", placement, now_s, tokens, index, prefill_here=True)]

    def _place(self, record: Record, group: RoutingGroup, tokens: Sequence[int], prefill_here_only: bool) -> Placement:
        keys = record.keys
        if len(tokens) != len(record.request.prompt):
            keys = prompt_keys(_root(group), tokens, group.block_size).full
        decodes = self._membership.workers("decode")
        placement = self._policy.place(
            num_tokens=len(tokens),
            block_size=group.block_size,
            slab_bytes=next((m.hello.capacity.slab_bytes for m in decodes), 0),
            hits=self._reachable(self._index.longest_hits(keys), group),
            prefills=[self._candidate(m) for m in self._preferred(record, self._membership.workers("prefill"))],
            decodes=[self._candidate(m) for m in self._preferred(record, decodes)],
            rng=self._rng,
            prefill_here_only=prefill_here_only,
        )
        assert placement is not None, "planned without a decode worker"
        return placement

    @staticmethod
    def _preferred(record: Record, members: list[Member]) -> list[Member]:
        """Without those that failed this request, unless nobody else is there."""
        return [m for m in members if (m.name, m.epoch) not in record.avoid] or members

    def _reachable(self, hits: dict[Place, int], group: RoutingGroup) -> dict[Place, int]:
        def serves(place: Place) -> bool:
            member = self._membership.get(place.process)
            return member is not None and member.hello.group == group

        return {place: num_blocks for place, num_blocks in hits.items() if serves(place)}

    def _candidate(self, member: Member) -> Candidate:
        load = self._ledger.load(member.name)
        report = member.heartbeat.load if member.heartbeat is not None else None
        return Candidate(
            process=member.name,
            waiting_tokens=load.waiting_tokens,
            num_sequences=load.num_sequences,
            prices=report.prices if report else StepPrices(),
            fetch_bytes_per_s=report.fetch_bytes_per_s if report else 0.0,
            decode_step_s=report.decode_step_s if report else 0.0,
        )

    def _send(
        self,
        record: Record,
        process: str,
        role: DispatchRole,
        placement: Placement,
        now_s: float,
        tokens: Sequence[int] | None = None,
        index: int | None = None,
        *,
        prefill: DispatchRecord | None = None,
        prefill_here: bool = False,
    ) -> Action:
        """One dispatch: recorded in journal and ledger, and the message. `index` None is all samples."""
        member = self._membership.get(process)
        assert member is not None, f"{process} was placed and is no member"
        token_ids = record.request.prompt if tokens is None else tokens
        places = placement.prefill_sources if role == "prefill" else placement.decode_sources
        sources = [source for place in places if (source := self._source(place)) is not None]
        if prefill is not None:
            sources = [source for source in sources if source.process != prefill.process]
            at_prefill = self._source(Place(prefill.process, "DEVICE"))
            sources += [at_prefill] if at_prefill is not None else []
        fence = record.new_fence(role)
        num_samples = record.request.n if index is None else 1
        record.dispatches[fence] = record.sent[fence] = DispatchRecord(
            fence=fence,
            process=process,
            epoch=member.epoch,
            index=index or 0,
            n=num_samples,
            progress_at_s=now_s,
            predicted_ttft_s=placement.predicted_ttft_s,
            waits=prefill is not None,
        )
        uncached = max(1, len(token_ids) - placement.hit_tokens)
        self._ledger.dispatched(process, fence, uncached, num_samples)
        assert record.keys_root is not None
        message = Dispatch(
            fence=fence,
            root=record.keys_root,
            token_ids=tokens_as_bytes(token_ids),
            num_prompt_tokens=len(record.request.prompt),
            sampling=record.sampling,
            n=num_samples,
            sources=sources,
            deadline_s=max(0.0, record.request.deadline_s - now_s),
            index=index or 0,
            prefill_here=prefill_here,
            wait_source=prefill.process if prefill is not None else "",
            hold_s=self._hold_s,
            priority=record.request.priority,
            held_blocks=[placement.hits.get(Place(source.process, source.tier), 0) for source in sources],
        )
        return Send(process, member.epoch, message)

    def _source(self, place: Place) -> Source | None:
        member = self._membership.get(place.process)
        return member.source(place.tier) if member is not None else None


def send_first_tokens(record: Record, dispatch: DispatchRecord) -> Action:
    """All first tokens are known. A worker that has them already ignores them."""
    dispatch.first_tokens_sent = True
    token_ids = [-1 if sample.finished else sample.tokens[0] for sample in record.samples]
    dispatch.ended.update(index for index, token in enumerate(token_ids) if token == -1)
    return Send(dispatch.process, dispatch.epoch, FirstTokens(fence=dispatch.fence, token_ids=token_ids))


def _root(group: RoutingGroup) -> Key:
    return root_key(
        model_fingerprint=group.model_fingerprint,
        kv_format=group.kv_format,
        numerics_class=group.numerics_class,
        adapter=b"",
        tenant_salt=b"",
    )
