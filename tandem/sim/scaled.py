"""A load that swells and ebbs, through the production router, with workers that come and go as the production scaler wants.

Owns the life of simulated workers: a start that takes its time, leaving after what they have is done, a role changed in place.
The scaler and the reconciling are `tandem.scaling`'s, the router's side is `replay`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from protos.control import Capacity, Load, Role
from router.admission import Slo
from router.policy.seconds import PredictedSeconds
from tandem.scaling.reconcile import Leave, Start, State, Worker, reconcile
from tandem.scaling.scaler import Counts, Limits, Look, Name, Scaler
from tandem.scaling.sizing import Promise, WorkerKind
from tandem.scaling.traffic import Totals
from tandem.sim.cache import new_cache
from tandem.sim.presets import Preset
from tandem.sim.replay import _GROUP, REPORT, SLO, WAKE, Job, Outcome, Replay
from tandem.sim.trace import BLOCK_TOKENS
from tandem.sim.workers import PoolNode

LOOK, STARTED = WAKE + 1, WAKE + 2
INTERVAL_S = 5.0
START_S = 20.0
SETTLE_S = 120.0
PROMISE = Promise(SLO.ttft_s, SLO.ttft_per_token_s, SLO.tpot_s)
HOLD_S, RAMP_S = 300.0, 60.0


@dataclass(frozen=True, slots=True)
class Change:
    """The wanted counts became these, and why."""

    at_s: float
    wanted: Counts
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scaled:
    """What came of a run. `prefill_s` and `decode_s` count each worker of the role from its begin, its start included, to its
    end; `most` is how many there were at once, those that were leaving included."""

    outcome: Outcome
    prefill_s: float
    decode_s: float
    most: Counts
    changes: tuple[Change, ...]
    num_started: int
    num_moved: int
    num_left: int

    @property
    def worker_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def mean(self) -> Counts:
        """So many workers, all the time, would have been there for as long, about."""
        seconds = self.outcome.seconds
        total = max(2, round(self.worker_s / seconds))
        prefill = min(total - 1, max(1, round(self.prefill_s / seconds)))
        return Counts(prefill, total - prefill)


@dataclass(slots=True)
class _Life:
    """One worker of all there ever were. `number` is its row in the fleet, -1 while it starts."""

    name: str
    role: Name
    pool: int
    state: State
    began_s: float
    number: int = -1
    then: Name | None = None
    ended_s: float | None = None


class ScaledReplay(Replay):
    """As `Replay`, with workers by `wanted`, and `scaler`, if there is one, asked every `INTERVAL_S`."""

    def __init__(
        self,
        preset: Preset,
        wanted: Counts,
        jobs: Sequence[Job],
        scaler: Scaler | None,
        *,
        start_s: float = START_S,
        seed: int = 1,
        slo: Slo = SLO,
    ) -> None:
        self._wanted = wanted
        self._scaler = scaler
        self._start_s = start_s
        self._lives: list[_Life] = []
        self._by_number: dict[int, _Life] = {}
        self._free_places: list[int] = []
        self._changes: list[Change] = []
        self._num_moved = 0
        self._most: dict[Name, int] = {"prefill": wanted.prefill, "decode": wanted.decode}
        spread = replace(preset, prefill_part=wanted.prefill / wanted.total)
        super().__init__(spread, wanted.total, PredictedSeconds(), jobs, hold=True, seed=seed, slo=slo)
        if scaler is not None:
            self._push(0.0, LOOK, 0)

    def run_scaled(self, say: Callable[[int], None] = lambda done: None) -> Scaled:
        """Until every request has ended."""
        outcome = self.run(say)
        seconds: dict[Name, float] = {"prefill": 0.0, "decode": 0.0}
        for life in self._lives:
            seconds[life.role] += (outcome.seconds if life.ended_s is None else life.ended_s) - life.began_s
        return Scaled(
            outcome=outcome,
            prefill_s=seconds["prefill"],
            decode_s=seconds["decode"],
            most=Counts(self._most["prefill"], self._most["decode"]),
            changes=tuple(self._changes),
            num_started=sum(life.began_s > 0.0 for life in self._lives) - self._num_moved,
            num_moved=self._num_moved,
            num_left=sum(life.ended_s is not None for life in self._lives) - self._num_moved,
        )

    def _add_worker(self, worker: int, role: Role, machine: str, pool: int, now_s: float) -> int:
        number = super()._add_worker(worker, role, machine, pool, now_s)
        if worker >= len(self._lives):
            assert role in ("prefill", "decode")
            name: Name = "prefill" if role == "prefill" else "decode"
            self._lives.append(_Life(self._fleet.names[number], name, pool, State.RUNNING, now_s, number))
            self._by_number[number] = self._lives[-1]
        return number

    def _on_other(self, kind: int, what: int, now_s: float) -> None:
        if kind == STARTED:
            self._started(self._lives[what], what, now_s)
            return
        assert self._scaler is not None
        plan = self._scaler.plan(self._look(now_s), self._wanted, now_s)
        if plan.wanted != self._wanted:
            self._wanted = plan.wanted
            self._changes.append(Change(now_s, plan.wanted, plan.reasons))
            self._act(now_s)
        self._push(now_s + INTERVAL_S, LOOK, 0)

    def _look(self, now_s: float) -> Look:
        traffic, preset = self._fleet.traffic, self._preset
        waiting = [worker.waiting(now_s) for worker in self._prefills.values()]
        kv_tokens = preset.device_blocks * BLOCK_TOKENS
        return Look(
            totals={
                "router": Totals(
                    traffic.num_requests,
                    traffic.num_samples,
                    traffic.prompt_tokens,
                    traffic.uncached_tokens,
                    traffic.uncached_pairs,
                    traffic.uncached_squares,
                    traffic.here_tokens,
                    traffic.here_pairs,
                )
            },
            answer_tokens=self._fleet.answer_tokens,
            prefill=WorkerKind(preset.prices, preset.prefill_step_tokens, preset.max_running, kv_tokens),
            decode=WorkerKind(preset.prices, preset.decode_step_tokens, preset.max_running, kv_tokens),
            waiting_requests=len(self._admission),
            waiting_tokens=sum(tokens for tokens, _ in waiting),
            waiting_pairs=sum(pairs for _, pairs in waiting),
        )

    def _act(self, now_s: float) -> None:
        here = [life for life in self._lives if life.ended_s is None]
        workers = [Worker(life.name, life.role, life.state, self._load_of(life), life.then) for life in here]
        by_name = {life.name: life for life in here}
        for action in reconcile(self._wanted, workers):
            match action:
                case Start(role=role):
                    self._begin(role, self._free_place(now_s), now_s)
                case Leave(name=name, then=then):
                    self._leave(by_name[name], then, now_s)
        for role in self._most:
            num = sum(life.role == role and life.ended_s is None for life in self._lives)
            self._most[role] = max(self._most[role], num)

    def _load_of(self, life: _Life) -> float:
        if life.number < 0:
            return 0.0
        if life.number in self._prefills:
            return self._prefills[life.number].waiting(self._now_s)[0]
        return self._decodes[life.number].context_tokens()

    def _leave(self, life: _Life, then: Name | None, now_s: float) -> None:
        life.then = then
        if life.state is State.STARTING:
            self._ended(life, now_s)  # it has nothing
            return
        life.state = State.LEAVING
        self._fleet.drain(life.name)

    def _ended(self, life: _Life, now_s: float) -> None:
        life.ended_s = now_s
        if life.number >= 0:
            self._index.forget(life.name)
        if life.then is not None:
            self._num_moved += 1
            self._begin(life.then, life.pool, now_s)
        else:
            self._free_places.append(life.pool)

    def _begin(self, role: Name, pool: int, now_s: float) -> None:
        number = len(self._lives)
        self._lives.append(_Life(f"{role}-{number}", role, pool, State.STARTING, now_s))
        self._push(now_s + self._start_s, STARTED, number)

    def _started(self, life: _Life, worker: int, now_s: float) -> None:
        if life.ended_s is not None:
            return
        machine = self._fleet.names[life.pool].removeprefix("pool-")
        life.number = self._add_worker(worker, life.role, machine, life.pool, now_s)
        life.state = State.RUNNING
        self._by_number[life.number] = life
        self._push(now_s, REPORT, life.number)
        if len(self._admission):
            self._release(now_s)

    def _free_place(self, now_s: float) -> int:
        """The pool node of a machine that has room for a worker; a new machine where none has."""
        if not self._free_places:
            preset = self._preset
            machine = f"machine-{len(self._pools)}"
            pool = self._fleet.join(f"pool-{machine}", "pool", machine, Capacity(), _GROUP, now_s)
            self._pools[pool] = PoolNode(pool, new_cache(preset.host_blocks), new_cache(preset.disk_blocks))
            self._join(pool, "HOST")
            self._fleet.reported(
                self._fleet.names[pool], Load(disk_bytes_per_s=preset.disk_bytes_per_s), (), 0.0, now_s
            )
            self._free_places = [pool] * preset.machine_workers
        return self._free_places.pop()

    def _report(self, number: int, now_s: float) -> None:
        life = self._by_number[number]
        if life.ended_s is not None:
            return
        if life.state is State.LEAVING and self._is_done(number):
            self._ended(life, now_s)
            return
        super()._report(number, now_s)

    def _is_done(self, number: int) -> bool:
        """Whether a worker has finished all it had."""
        if self._fleet.dispatched_to(self._fleet.names[number]):
            return False
        if number in self._prefills:
            worker = self._prefills[number]
            return worker.running is None and not worker.line
        decode = self._decodes[number]
        return not (decode.num_streams or decode.waiting or decode.num_pending or decode.prompts)


def waves_of(num_waves: int, hold_s: float = HOLD_S, ramp_s: float = RAMP_S) -> list[tuple[float, float]]:
    """`(seconds, times the base rate)` of a load that doubles and halves so often: it holds, rises in `ramp_s`, holds, falls."""
    points, at_s = [(0.0, 1.0)], 0.0
    for _ in range(num_waves):
        for length_s, times in ((hold_s, 1.0), (ramp_s, 2.0), (hold_s, 2.0), (ramp_s, 1.0)):
            at_s += length_s
            points.append((at_s, times))
    points.append((at_s + hold_s, 1.0))
    return points


def shaped(jobs: Sequence[Job], per_s: float, points: Sequence[tuple[float, float]]) -> list[Job]:
    """As many of `jobs`, which come evenly, as come when the rate is `per_s` times what `points` say, at the times at which they
    do: straight lines between the points."""
    times = np.array([at for at, _ in points])
    rates = per_s * np.array([times_ for _, times_ in points])
    areas = np.diff(times) * (rates[1:] + rates[:-1]) / 2.0
    sums = np.array([0.0, *accumulate(areas)])
    long_s = jobs[-1].arrival_s / (len(jobs) - 1) if len(jobs) > 1 else 1.0
    found: list[Job] = []
    for job in jobs:
        come = job.arrival_s / long_s  # so many should have come by then
        part = int(np.searchsorted(sums, come, side="right")) - 1
        if part >= len(areas):
            break
        slope = (rates[part + 1] - rates[part]) / (times[part + 1] - times[part])
        rest = come - sums[part]
        since = (
            rest / rates[part]
            if abs(slope) < 1e-12
            else ((math.sqrt(rates[part] ** 2 + 2.0 * slope * rest) - rates[part]) / slope)
        )
        found.append(replace(job, arrival_s=float(times[part] + since)))
    return found


def summary_of(found: Scaled) -> dict[str, float]:
    """What is said of a run: parts of 1, seconds, hours; counts are the most there were at once."""
    outcome = found.outcome
    ttft_s = np.where(np.isnan(outcome.ttft_s), np.inf, outcome.ttft_s)
    return {
        "prefill": found.most.prefill,
        "decode": found.most.decode,
        "as_promised": float(outcome.within.mean()),
        "ttft_p50_s": float(np.quantile(ttft_s, 0.5)),
        "ttft_p90_s": float(np.quantile(ttft_s, 0.9)),
        "tpot_p90_s": float(np.quantile(outcome.tpot_s, 0.9)),
        "worker_hours": found.worker_s / 3600.0,
        "changes": len(found.changes),
        "started": found.num_started,
        "moved": found.num_moved,
        "left": found.num_left,
    }


def scaler_of(limits: Limits, *, start_s: float = START_S, settle_s: float = SETTLE_S) -> Scaler:
    """As production makes it, with the simulator's promise."""
    return Scaler(PROMISE, limits, interval_s=INTERVAL_S, settle_s=settle_s, start_s=start_s)
