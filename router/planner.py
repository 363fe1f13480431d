"""What a request lacks, as dispatches: where each goes, what it says.

Owns the step from a record with samples that nobody generates to the dispatches that will: keys, placement, sources, fences and
messages. Pure. It enters what it dispatches into record and fleet, and takes nothing out again; whether a request may be
planned now, waits or ends is the router's (`router/router.py`, which also tells the three forms of dispatches).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from kvpool.keys import Key, prompt_keys, root_key, tokens_as_bytes
from protos.control import Dispatch, DispatchRole, FirstTokens, RoutingGroup, Source
from router.actions import Action, Send
from router.approximate import Approximate
from router.fleet import Fleet, Work
from router.journal import DispatchRecord, Record
from router.membership import Membership
from router.policy.base import Ask, Placement, Policy, SourcePlace, full_for_s
from router.prefix_index import PrefixIndex

EXPECTED_ANSWER_TOKENS = 256.0
"""Before the first answer has ended."""


class Planner:
    """Dispatches for the records it is given. Reads membership and index; writes to fleet, record and what workers that publish
    nothing are taken to hold."""

    def __init__(
        self,
        *,
        membership: Membership,
        index: PrefixIndex,
        approximate: Approximate,
        fleet: Fleet,
        policy: Policy,
        rng: random.Random,
        hold_s: float,
    ) -> None:
        self._membership = membership
        self._index = index
        self._approximate = approximate
        self._fleet = fleet
        self._policy = policy
        self._rng = rng
        self._hold_s = hold_s

    def keys(self, record: Record, group: RoutingGroup) -> tuple[Key, ...]:
        """Of the prompt's full blocks, in the served group, for its tenant."""
        root = root_of(group, record.request.tenant_salt)
        if record.keys_root != root:
            record.keys_root = root
            record.drawing_root = root_of(group)
            record.prompt_bytes = record.prompt_bytes or tokens_as_bytes(record.request.prompt)
            record.keys = prompt_keys(root, record.prompt_bytes, group.block_size).full
        return record.keys

    def uncached_tokens(self, record: Record, group: RoutingGroup) -> int:
        """Of the prompt, what no place is known to hold."""
        longest = self._index.longest(self.keys(record, group)).longest
        return max(1, len(record.request.prompt) - longest * group.block_size)

    def dispatch(self, record: Record, group: RoutingGroup, now_s: float, wait: bool = True) -> list[Action] | float:
        """Dispatches every unfinished sample that no live decode dispatch generates; nothing if there is none. If it may `wait`
        and its workers have no room for it: for how many seconds that is predicted to be so.

        `group` is the served one and has a decode worker.
        """
        self.keys(record, group)
        uncovered = record.uncovered()
        if not uncovered:
            return []
        prefill = record.prefill()
        if prefill is not None:
            return self._dispatch_decode(
                record, self._place(record, group, record.request.prompt, now_s, here=True), prefill, now_s
            )
        whole = len(uncovered) == len(record.unfinished()) and all(
            len(record.samples[i].tokens) <= 1 for i in uncovered
        )
        if whole and not record.first_tokens_known():
            placement = self._place(record, group, record.request.prompt, now_s, record.prefill_here_only, wait)
            if wait and (full_s := full_for_s(placement.chosen)) > 0.0:
                return full_s
            return self._dispatch_whole(record, placement, now_s)
        actions: list[Action] = []
        for index in uncovered:
            tokens = (*record.request.prompt, *record.samples[index].tokens)
            placement = self._place(record, group, tokens, now_s, here=True, may_wait=wait and not actions)
            if wait and not actions and (full_s := full_for_s(placement.chosen)) > 0.0:
                return full_s
            record.placed(placement, now_s)
            actions.append(
                self._send(record, placement.decode, "decode", placement, now_s, tokens, index, prefill_here=True)
            )
        return actions

    def first_tokens(self, record: Record) -> list[Action]:
        """FirstTokens for the decode dispatch that waits for them, when all are known and one is to be continued."""
        if not record.first_tokens_known() or not record.unfinished():
            return []
        waiting = [dispatch for dispatch in record.live("decode") if dispatch.waits and not dispatch.first_tokens_sent]
        return [send_first_tokens(record, dispatch) for dispatch in waiting]

    def _dispatch_whole(self, record: Record, placement: Placement, now_s: float) -> list[Action]:
        """All samples from the prompt on: hand-over, or prefill here."""
        record.placed(placement, now_s)
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

    def _place(
        self,
        record: Record,
        group: RoutingGroup,
        tokens: Sequence[int],
        now_s: float,
        here: bool,
        may_wait: bool = False,
    ) -> Placement:
        keys = record.keys
        if len(tokens) != len(record.request.prompt):
            keys = prompt_keys(root_of(group, record.request.tenant_salt), tokens, group.block_size).full
        num_samples = record.request.n if len(tokens) == len(record.request.prompt) else 1
        ask = Ask(
            num_tokens=len(tokens),
            block_size=group.block_size,
            slab_bytes=self._fleet.slab_bytes,
            keys=keys,
            answer_tokens=num_samples * self._answer_tokens(record),
            num_samples=num_samples,
            due_s=record.due_s,
            tpot_s=record.tpot_s,
            prefill_here_only=here,
            may_wait=may_wait,
            avoid=self._failed(record),
        )
        placement = self._policy.place(ask, self._index.longest(keys), self._fleet, now_s, self._rng)
        assert placement is not None, "planned without a decode worker"
        return placement

    def _answer_tokens(self, record: Record) -> float:
        """Of one sample, expected."""
        return min(record.sampling.max_tokens, self._fleet.answer_tokens or EXPECTED_ANSWER_TOKENS)

    def _failed(self, record: Record) -> frozenset[int]:
        """The workers that have failed this request."""
        if not record.avoid:
            return frozenset()
        members = (
            self._membership.get(name) for name, epoch in record.avoid if self._membership.is_member(name, epoch)
        )
        numbers = (self._fleet.number(member.name) for member in members if member is not None)
        return frozenset(number for number in numbers if number is not None)

    def _send(
        self,
        record: Record,
        number: int,
        role: DispatchRole,
        placement: Placement,
        now_s: float,
        tokens: Sequence[int] | None = None,
        index: int | None = None,
        *,
        prefill: DispatchRecord | None = None,
        prefill_here: bool = False,
    ) -> Action:
        """One dispatch: recorded in journal and fleet, and the message. `index` None is all samples."""
        process = self._fleet.names[number]
        member = self._membership.get(process)
        assert member is not None, f"{process} was placed and is no member"
        token_ids = record.request.prompt if tokens is None else tokens
        places = placement.prefill_sources if role == "prefill" else placement.decode_sources
        known = [(source, place) for place in places if (source := self._source(place)) is not None]
        if prefill is not None:
            at_prefill = SourcePlace(self._fleet.number(prefill.process) or 0, "DEVICE", 0)
            known = [(source, place) for source, place in known if source.process != prefill.process]
            source = self._source(at_prefill)
            known += [(source, at_prefill)] if source is not None else []
        fence = record.new_fence(role)
        num_samples = record.request.n if index is None else 1
        record.dispatches[fence] = record.sent[fence] = DispatchRecord(
            fence=fence,
            process=process,
            epoch=member.epoch,
            index=index or 0,
            n=num_samples,
            progress_at_s=now_s,
            predicted_ttft_s=now_s - record.accepted_at_s + placement.predicted_ttft_s,
            sent_at_s=now_s,
            waits=prefill is not None,
        )
        self._fleet.dispatched(number, fence, self._work(record, role, placement, token_ids, num_samples), now_s)
        self._approximate.routed(number, record.keys, now_s)
        assert record.keys_root is not None
        record.drawn_by(record.drawing_root)
        message = Dispatch(
            fence=fence,
            root=record.keys_root,
            token_ids=record.prompt_bytes if tokens is None else tokens_as_bytes(tokens),
            num_prompt_tokens=len(record.request.prompt),
            sampling=record.sampling,
            n=num_samples,
            sources=[source for source, _ in known],
            deadline_s=max(0.0, record.request.deadline_s - now_s),
            index=index or 0,
            prefill_here=prefill_here,
            wait_source=prefill.process if prefill is not None else "",
            hold_s=self._hold_s,
            due_s=record.due_s - now_s,
            held_blocks=[place.num_blocks for _, place in known],
        )
        return Send(process, member.epoch, message)

    def _work(
        self, record: Record, role: DispatchRole, placement: Placement, tokens: Sequence[int], num_samples: int
    ) -> Work:
        """What this dispatch means to its worker. The prompt is computed by the one that draws the first token."""
        computes = role == "prefill" or placement.prefill is None
        generates = role == "decode"
        suffix = len(tokens) - placement.hit_tokens if computes else 0
        answer = self._answer_tokens(record)
        wanted = placement.prefill_sources if role == "prefill" else placement.decode_sources
        source = wanted[0] if wanted and computes and placement.chosen.fetch_s else None
        block_size = self._membership.served_group.block_size if self._membership.served_group is not None else 1
        num_blocks = -int(-(len(tokens) + generates * answer) // block_size)
        return Work(
            num_tokens=suffix,
            num_pairs=suffix * (placement.hit_tokens + (suffix + 1) / 2),
            num_sequences=num_samples if generates else 0,
            context_tokens=num_samples * (len(tokens) + answer / 2) if generates else 0.0,
            num_blocks=num_blocks,
            source=-1 if source is None else source.number,
            num_bytes=0.0 if source is None else float(source.num_blocks * self._fleet.slab_bytes),
            due_s=record.due_s,
        )

    def _source(self, place: SourcePlace) -> Source | None:
        member = self._membership.get(self._fleet.names[place.number])
        return member.source(place.tier) if member is not None else None


def send_first_tokens(record: Record, dispatch: DispatchRecord) -> Action:
    """All first tokens are known. A worker that has them already ignores them."""
    dispatch.first_tokens_sent = True
    token_ids = [-1 if sample.finished else sample.tokens[0] for sample in record.samples]
    dispatch.ended.update(index for index, token in enumerate(token_ids) if token == -1)
    return Send(dispatch.process, dispatch.epoch, FirstTokens(fence=dispatch.fence, token_ids=token_ids))


@lru_cache(maxsize=4096)
def root_of(group: RoutingGroup, tenant_salt: bytes = b"") -> Key:
    """The key before every prompt of the group, of the tenants that have this salt."""
    return root_key(
        model_fingerprint=group.model_fingerprint,
        kv_format=group.kv_format,
        numerics_class=group.numerics_class,
        adapter=b"",
        tenant_salt=tenant_salt,
    )
