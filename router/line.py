"""When a request goes: the line of those that wait for room at workers, and what is predicted of it.

Owns which promise a request has, its place in the line (`router/admission.py` is the order alone), and the refusal of what
can't be kept. Where a request goes is the planner's. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from protos.control import RoutingGroup
from router.actions import Action
from router.admission import Admission, Held, Slo
from router.fleet import Fleet
from router.journal import Journal, Record
from router.planner import EXPECTED_ANSWER_TOKENS, Planner
from tandem.errors import Overloaded


class Line:
    """Records that wait, by request id. Reads the fleet; dispatches through the planner."""

    def __init__(self, planner: Planner, fleet: Fleet, journal: Journal, *, interactive: Slo, batch: Slo) -> None:
        self._planner = planner
        self._fleet = fleet
        self._journal = journal
        self._interactive = interactive
        self._batch = batch
        self._admission = Admission()

    def __len__(self) -> int:
        return len(self._admission)

    def __iter__(self) -> Iterator[str]:
        return iter(self._admission)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._admission

    def enter(self, record: Record, group: RoutingGroup, now_s: float) -> None:
        """It waits from now on. One that was dispatched before keeps its place."""
        uncached = self._planner.uncached_tokens(record, group)
        if not record.counted:
            record.counted = True
            self._fleet.traffic.arrived(len(record.request.prompt), uncached, record.request.n)
        slo = self._slo(record)
        record.tpot_s = slo.tpot_s
        record.promised_ttft_s = record.promised_ttft_s or slo.first_token_s(uncached)
        held = self._admission.add(
            record.request_id,
            record.request.tenant,
            slo.first_token_s(uncached),
            self._work_s(uncached, len(record.request.prompt)),
            self._num_computing(),
            now_s,
            record.due_s if record.sent else None,
        )
        record.due_s = held.due_s

    def remove(self, request_id: str) -> None:
        """It doesn't wait any more. Unknown ones are ignored."""
        self._admission.remove(request_id)

    def release(self, group: RoutingGroup, now_s: float) -> list[Action]:
        """Dispatches those for which there is room. `group` is the served one and has a decode worker."""
        actions: list[Action] = []

        def dispatch(held: Held) -> float:
            record = self._journal.get(held.request_id)
            assert record is not None, "the line holds an ended request"
            record.due_s = held.due_s
            sent = self._planner.dispatch(record, group, now_s)
            if isinstance(sent, float):
                return sent
            actions.extend(sent)
            return 0.0

        self._admission.release(now_s, dispatch)
        return actions

    def check_slo(self, record: Record, group: RoutingGroup, now_s: float) -> None:
        """Raises Overloaded if a request that came now is predicted to miss its SLO: by what is due before it, at as many as
        compute."""
        if not len(self._fleet.workers):
            return
        uncached = self._planner.uncached_tokens(record, group)
        slo_s = self._slo(record).first_token_s(uncached)
        due_s = self._admission.due_s(record.request.tenant, slo_s, now_s)
        waits_s, _ = self._fleet.waits_s(self._fleet.workers, due_s, now_s)
        own_s = self._work_s(uncached, len(record.request.prompt))
        queued_s = self._admission.ahead_s(due_s) / max(1, self._num_computing())
        late_s = float(waits_s.min()) + queued_s + own_s + self._fleet.overhead_s - slo_s
        if late_s > 0.0:
            retry_s = math.ceil(10.0 * late_s) / 10.0
            raise Overloaded(
                f"its first token is predicted after {slo_s + late_s:.2f} s, the SLO is {slo_s:g} s; retry in {retry_s:g} s",
                retry_s,
            )

    def check_place(self, most: int) -> None:
        """Raises Overloaded if as many requests are active as may be, with the seconds after which one of them is predicted to
        have ended: they end about evenly."""
        if len(self._journal) < most:
            return
        answer = self._fleet.answer_tokens or EXPECTED_ANSWER_TOKENS
        steps = [self._fleet.step_s(number) for number in self._fleet.decodes.tolist()]
        each_s = answer * (sum(steps) / len(steps)) if steps else 1.0
        retry_s = max(0.1, each_s / max(1, len(self._journal)))
        raise Overloaded(
            f"{len(self._journal)} requests are active, the limit is {most}; retry in {retry_s:.1f} s", retry_s
        )

    def _slo(self, record: Record) -> Slo:
        return self._batch if record.request.batch else self._interactive

    def _num_computing(self) -> int:
        """Workers that compute prompts."""
        return len(self._fleet.prefills) or len(self._fleet.decodes)

    def _work_s(self, num_tokens: int, num_prompt_tokens: int) -> float:
        """What it takes to compute the last `num_tokens` of a prompt, at the first worker: they are taken to be alike."""
        workers = self._fleet.workers
        pairs = num_tokens * (num_prompt_tokens - num_tokens / 2)
        return self._fleet.compute_s(int(workers[0]), num_tokens, pairs) if len(workers) else 0.0
