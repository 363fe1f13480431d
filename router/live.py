"""What somebody who watches a router is told: the cluster and its last requests, as messages of a bounded size.

Owns what has been told already, and the totals. Pure; it reads the core's state when asked, changes nothing and
keeps nothing of what nobody asked for: all who watch share one `Live`. Never a prompt, a text or a token.

    whole      everything: the first message of each who begins to watch
    changes    what is other than in the changes before: requests that went on; cluster and totals each time, they are small

Seconds are on the router's clock, whose `now_s` comes with each message; those of a request count from its acceptance.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence

from router.journal import Record, Summary
from router.live_views import (
    ORDER,
    ClusterView,
    Message,
    PrefixView,
    RequestView,
    TotalsView,
    active_view,
    by_number,
    ended_view,
    link_views,
    process_view,
    shown_of,
)
from router.prefixes import Prefix, Prompt, shared_prefixes
from router.reports import num_cached_tokens
from router.router import RouterCore

MAX_REQUESTS = 50
MAX_PREFIXES = 14
MAX_HOLDERS = 8
WINDOW_S = 60.0
"""Totals are of the requests that ended within so long, of those that the journal remembers."""
RATE_S = 5.0
"""Tokens a second are averaged over so long."""
PREFIXES_S = 2.0
"""The tree is made anew at most so often: it looks at all that the journal remembers."""
NAME_BYTES = 4
"""Of a key, shown as its name."""


class Live:
    """One router as it is told to all who watch it."""

    def __init__(self, core: RouterCore, model: str) -> None:
        self._core = core
        self._model = model
        self._number = 0
        self._told: dict[str, RequestView] = {}
        self._drawn: deque[tuple[float, int]] = deque()
        self._prefixes: list[PrefixView] = []
        self._prefixes_at_s = 0.0
        self._totals: TotalsView | None = None

    def changes(self, now_s: float) -> Message:
        """What is other than at the last call of this."""
        self._number += 1
        self._drawn.append((now_s, self._core.journal.num_tokens))
        while len(self._drawn) > 1 and self._drawn[1][0] <= now_s - RATE_S:
            self._drawn.popleft()
        views = self._requests(now_s)
        changed = [view for view in views.values() if self._told.get(view.id) != view]
        lost = [view.id for view in self._told.values() if not view.outcome and self._is_lost(view.id, views)]
        self._told = views
        is_old = now_s >= self._prefixes_at_s + PREFIXES_S
        if is_old:
            self._look_at_prefixes(now_s)
        return self._message(now_s, changed, lost, self._prefixes if is_old else None, whole=False)

    def whole(self, now_s: float) -> Message:
        """Everything, for one who knows nothing yet. What is told to the others stays as it is."""
        if now_s >= self._prefixes_at_s + PREFIXES_S:
            self._look_at_prefixes(now_s)
        return self._message(now_s, list(self._requests(now_s).values()), [], self._prefixes, whole=True)

    def forget(self) -> None:
        """Nobody watches any more."""
        self._told = {}
        self._drawn.clear()
        self._prefixes, self._prefixes_at_s = [], 0.0

    def _message(
        self,
        now_s: float,
        requests: list[RequestView],
        lost: list[str],
        prefixes: list[PrefixView] | None,
        *,
        whole: bool,
    ) -> Message:
        return Message(
            number=self._number,
            epoch=self._core.settings.epoch.hex(),
            now_s=now_s,
            whole=whole,
            admin=True,
            cluster=self._cluster(now_s),
            totals=self._totals_of(self._core.journal.recent, now_s),
            requests=requests,
            lost=lost,
            prefixes=prefixes,
        )

    # --- requests ------------------------------------------------------------------------------------------------------

    def _requests(self, now_s: float) -> dict[str, RequestView]:
        """The last that were accepted, the first of them first."""
        journal = self._core.journal
        both: Iterable[Record | Summary] = (*journal, *list(journal.recent)[-MAX_REQUESTS:])
        last = heapq.nlargest(MAX_REQUESTS, both, key=lambda one: one.accepted_at_s)
        views = [ended_view(one) if isinstance(one, Summary) else active_view(one) for one in reversed(last)]
        return {view.id: view for view in views}

    def _is_lost(self, request_id: str, views: dict[str, RequestView]) -> bool:
        """Whether an active request ended so long ago, among so many others, that nothing of it is remembered."""
        return (
            request_id not in views
            and self._core.journal.get(request_id) is None
            and all(summary.request_id != request_id for summary in self._core.journal.recent)
        )

    def _totals_of(self, recent: Iterable[Summary], now_s: float) -> TotalsView:
        ended = [summary for summary in recent if summary.ended_at_s >= now_s - WINDOW_S]
        ttft_s = sorted(summary.ttft_s for summary in ended if summary.ttft_s is not None)
        tpot_s = sorted(
            (summary.total_s - summary.ttft_s) / (summary.longest - 1)
            for summary in ended
            if summary.ttft_s is not None and summary.outcome == "completed" and summary.longest > 1
        )
        prompt_tokens = sum(summary.num_prompt_tokens for summary in ended if summary.runs)
        cached_tokens = sum(num_cached_tokens(summary) for summary in ended if summary.runs)
        tokens_per_s = None
        if len(self._drawn) > 1:
            (since_s, before), (until_s, now) = self._drawn[0], self._drawn[-1]
            tokens_per_s = (now - before) / (until_s - since_s) if until_s > since_s else None
        return TotalsView(
            num_requests=len(ended),
            num_failed=sum(summary.outcome == "failed" for summary in ended),
            ttft_p50_s=_quantile(ttft_s, 0.5),
            ttft_p95_s=_quantile(ttft_s, 0.95),
            tpot_p50_s=_quantile(tpot_s, 0.5),
            tpot_p95_s=_quantile(tpot_s, 0.95),
            found=cached_tokens / prompt_tokens if prompt_tokens else None,
            tokens_per_s=tokens_per_s,
        )

    # --- the cluster ---------------------------------------------------------------------------------------------------

    def _cluster(self, now_s: float) -> ClusterView:
        core = self._core
        group, outcomes = core.membership.served_group, core.journal.num_outcomes
        num_dispatches: dict[str, int] = {}
        for record in core.journal:
            for dispatch in record.dispatches.values():
                num_dispatches[dispatch.process] = num_dispatches.get(dispatch.process, 0) + 1
        members = sorted(core.membership, key=lambda member: (ORDER[member.role], by_number(member.name)))
        shown = shown_of(members)
        return ClusterView(
            router=core.settings.router,
            model=self._model,
            ready=core.ready,
            block_tokens=group.block_size if group else 0,
            slab_bytes=core.fleet.slab_bytes,
            num_active=len(core.journal),
            num_waiting=core.num_waiting,
            num_completed=outcomes["completed"],
            num_failed=outcomes["failed"],
            num_cancelled=outcomes["cancelled"],
            num_processes=len(members),
            processes=[
                process_view(member, member.hello.group == group, num_dispatches.get(member.name, 0), now_s)
                for member in shown
            ],
            links=link_views(shown),
        )

    def _look_at_prefixes(self, now_s: float) -> None:
        self._prefixes_at_s = now_s
        group = self._core.membership.served_group
        block_tokens = group.block_size if group else 1
        prompts = [
            Prompt(summary.marks, num_cached_tokens(summary) // block_tokens)
            for summary in self._core.journal.recent
            if summary.runs and summary.marks
        ]
        self._prefixes = [self._prefix(prefix) for prefix in shared_prefixes(prompts, MAX_PREFIXES)]

    def _prefix(self, prefix: Prefix) -> PrefixView:
        names = self._core.fleet.names
        holders = [names[number] for number in self._core.index.longest((prefix.key,)).holders if number < len(names)]
        return PrefixView(
            name=prefix.key[:NAME_BYTES].hex(),
            parent=prefix.parent,
            begin=prefix.begin,
            end=prefix.end,
            num_requests=prefix.num_requests,
            found=round(prefix.found, 4),
            holders=sorted(filter(None, holders), key=by_number)[:MAX_HOLDERS],
        )


def _quantile(ordered: Sequence[float], part: float) -> float | None:
    """The smallest that is not less than `part` of them."""
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 5)
