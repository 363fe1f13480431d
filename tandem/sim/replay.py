"""A trace through the production router and simulated workers, in virtual time.

Owns the events and what comes of each request. The router's side is the production code: prefix index, fleet, admission and
policy; a policy of others has no line in which requests wait, as it is published: what it places goes at once. All policies have
the same workers, tiers and network: whom they choose is what differs.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.keys import Key
from protos.control import Capacity, Fence, Load, Role, Tier
from protos.kv_events import BlockHash, BlockRemoved, BlockStored, Event, EventBatch
from router.admission import Admission, Held, Slo
from router.fleet import Fleet, Work
from router.policy.base import Ask, Placement, Policy, full_for_s
from router.prefix_index import Hits, PrefixIndex
from tandem.sim.cache import Cache, new_cache
from tandem.sim.presets import Preset
from tandem.sim.trace import BLOCK_TOKENS
from tandem.sim.workers import DecodeWorker, PoolNode, PrefillWorker, Prompt, Stream

SLO = Slo(ttft_s=0.3, ttft_per_token_s=0.3e-3, tpot_s=0.05)
NOISE = 0.05
"""Standard deviation of a prompt's compute time, as a part of it."""
_EPOCH = b"simulate"
_GROUP = "simulated"

ARRIVE, START, COMPUTED, SWITCH, HANDED, DUE, REPORT, WAKE = range(8)


@dataclass(frozen=True, slots=True)
class Job:
    """One request: `keys` name its full blocks. `uncached_tokens` are those that no request before it had."""

    arrival_s: float
    num_tokens: int
    answer_tokens: int
    keys: Sequence[Key]
    uncached_tokens: int


@dataclass(slots=True)
class _State:
    """Where a request is."""

    prefill: int = -1
    decode: int = -1
    fetched_blocks: int = 0
    disk_blocks: int = 0
    """Of those that it fetched, by where they were."""
    from_pool: bool = False
    fetched_at_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of each request, by number: NaN is never. Hits are tokens, by where they were."""

    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    predicted_s: NDArray[np.float64]
    """Its time to first token as predicted when it was placed."""
    within: NDArray[np.bool_]
    """Whether it was served as promised."""
    hit_tokens: dict[str, float]
    prompt_tokens: float
    moved_bytes: dict[str, float]
    num_here: int
    """Prompts that their decode worker computed."""
    prefill_busy: NDArray[np.float64]
    decode_busy: NDArray[np.float64]
    seconds: float
    """Virtual ones."""


def noise_of(num_jobs: int, seed: int, noise: float = NOISE) -> NDArray[np.float64]:
    """By how much each prompt takes longer to compute than its step times say, as a factor."""
    return np.random.default_rng(seed).lognormal(0.0, noise, num_jobs)


class Replay:
    """One run. The same arguments give the same outcome."""

    def __init__(
        self,
        preset: Preset,
        num_workers: int,
        policy: Policy,
        jobs: Sequence[Job],
        *,
        hold: bool,
        ordered: bool = True,
        seed: int = 1,
        noise: float = NOISE,
        heartbeat_s: float = 0.25,
        slo: Slo = SLO,
    ) -> None:
        self._preset = preset
        self._policy = policy
        self._jobs = jobs
        self._slo = slo
        self._rng = random.Random(seed)
        self._noise = noise_of(len(jobs), seed, noise).tolist()
        self._heartbeat_s = heartbeat_s
        self._admission = Admission()
        self._hold, self._ordered = hold, ordered
        self._index = PrefixIndex(max_keys=max(1024, 4 * sum(len(job.keys) for job in jobs) + 1024))
        self._fleet = Fleet()
        self._heap: list[tuple[float, int, int, int]] = []
        self._now_s = 0.0
        self._order = 0
        self._state = [_State() for _ in jobs]
        self._ttft_s = np.full(len(jobs), np.nan)
        self._tpot_s = np.full(len(jobs), np.nan)
        self._predicted_s = np.full(len(jobs), np.nan)
        self._first_s = [0.0] * len(jobs)
        self._hit_tokens: dict[str, float] = {"DEVICE": 0.0, "HOST": 0.0, "DISK": 0.0, "other DEVICE": 0.0}
        self._moved: dict[str, float] = {"fetch": 0.0, "hand-over": 0.0}
        self._num_here = 0
        self._num_ended = 0
        self._releasing = False
        self._wake_at_s: float | None = None
        self._seqs: dict[int, int] = {}
        self._taken: dict[int, int] = {}
        self._said_idle: dict[int, int] = {}
        """Dispatches that a worker had taken when it said that it is idle."""
        self._sends_until: dict[int, float] = {}
        self._prefills: dict[int, PrefillWorker] = {}
        self._decodes: dict[int, DecodeWorker] = {}
        self._pools: dict[int, PoolNode] = {}
        self._home: dict[int, int] = {}
        self._build(num_workers)
        self._first_arrival = self._order + 1
        """Of what happens at once, arrivals go before all that came of earlier ones."""
        self._order += len(jobs)

    def _build(self, num_workers: int) -> None:
        preset = self._preset
        num_prefill = min(num_workers - 1, max(1, round(num_workers * preset.prefill_part)))
        # Roles are spread over the machines, so that each pool node has both.
        spread = sorted(range(num_workers), key=lambda i: (i * num_prefill) % num_workers)
        prefills = set(spread[:num_prefill])
        for first in range(0, num_workers, preset.machine_workers):
            machine = f"machine-{first // preset.machine_workers}"
            pool = self._fleet.join(f"pool-{machine}", "pool", machine, Capacity(), _GROUP, 0.0)
            self._pools[pool] = PoolNode(pool, new_cache(preset.host_blocks), new_cache(preset.disk_blocks))
            self._join(pool, "HOST")
            self._fleet.reported(self._fleet.names[pool], Load(disk_bytes_per_s=preset.disk_bytes_per_s), (), 0.0, 0.0)
            for worker in range(first, min(first + preset.machine_workers, num_workers)):
                self._add_worker(worker, "prefill" if worker in prefills else "decode", machine, pool, 0.0)
        self._fleet.serve(_GROUP)
        for at, number in enumerate([*self._prefills, *self._decodes]):
            self._push(self._heartbeat_s * at / num_workers, REPORT, number)

    def _add_worker(self, worker: int, role: Role, machine: str, pool: int, now_s: float) -> int:
        """Worker `worker` of all that there ever were joins; returns its number in the fleet."""
        preset = self._preset
        steps = preset.prefill_step_tokens if role == "prefill" else preset.decode_step_tokens
        said = Capacity(
            num_blocks=preset.device_blocks,
            slab_bytes=preset.block_bytes,
            max_running=preset.max_running,
            max_step_tokens=steps,
        )
        number = self._fleet.join(f"{role}-{worker}", role, machine, said, _GROUP, now_s)
        self._join(number, "DEVICE")
        self._home[number] = pool
        cache = new_cache(preset.device_blocks)
        if role == "prefill":
            self._prefills[number] = PrefillWorker(number, preset.prices, steps, cache)
        else:
            self._decodes[number] = DecodeWorker(
                number, preset.prices, steps, preset.max_running, cache, preset.device_blocks
            )
        return number

    def _join(self, number: int, tier: Tier) -> None:
        name = self._fleet.names[number]
        self._index.join(name, number, _EPOCH, tier, 0.0)
        self._index.on_replay_end(name, _EPOCH)
        self._seqs[number] = self._taken[number] = 0
        self._sends_until[number] = 0.0

    # --- time ------------------------------------------------------------------------------------------------------------

    def _push(self, at_s: float, kind: int, what: int) -> None:
        assert at_s >= self._now_s, "into the past"
        self._order += 1
        heapq.heappush(self._heap, (at_s, self._order, kind, what))

    def _expect(self, number: int) -> None:
        """The job of that number is the next to arrive. One at a time, so that the heap stays small."""
        if number < len(self._jobs):
            at_s = self._jobs[number].arrival_s
            assert at_s >= self._now_s, "jobs must be in the order of their arrival"
            heapq.heappush(self._heap, (at_s, self._first_arrival + number, ARRIVE, number))

    def run(self, say: Callable[[int], None] = lambda done: None) -> Outcome:
        """Until every request has ended."""
        self._expect(0)
        heap, now_s, num_said = self._heap, self._now_s, 0
        while self._num_ended < len(self._jobs):
            now_s, _, kind, what = heapq.heappop(heap)
            self._now_s = now_s
            if kind == REPORT:  # most often
                self._report(what, now_s)
            elif kind == ARRIVE:
                self._expect(what + 1)
                self._arrive(what, now_s)
            elif kind == COMPUTED:
                worker = self._prefills[what % (1 << 20)]
                if worker.version == what >> 20 and worker.running is not None:
                    self._computed(worker, now_s)
            elif kind == START:
                self._start(self._prefills[what], now_s)
            elif kind == SWITCH:
                self._switch(self._prefills[what], now_s)
            elif kind == HANDED:
                self._handed(what, now_s)
            elif kind == DUE:
                number, version = divmod(what, 1 << 40)
                decode = self._decodes[number]
                if version == decode.version:
                    self._decode(decode, now_s)
                    if self._num_ended - num_said >= 1000:
                        say(self._num_ended - num_said)
                        num_said = self._num_ended
            elif kind == WAKE and self._wake_at_s is not None and now_s >= self._wake_at_s:
                self._wake_at_s = None
                self._release(now_s)
            elif kind > WAKE:
                self._on_other(kind, what, now_s)
        say(self._num_ended - num_said)
        return self._outcome(now_s)

    def _on_other(self, kind: int, what: int, now_s: float) -> None:
        """An event that is not of a replay with workers that stay."""
        raise AssertionError(f"nobody pushed events of kind {kind}")

    # --- the router's side -------------------------------------------------------------------------------------------------

    def _hits(self, job: Job) -> Hits:
        return self._index.longest(job.keys)

    def _arrive(self, number: int, now_s: float) -> None:
        job = self._jobs[number]
        if not self._ordered:
            self._dispatch(number, self._place(number, now_s, now_s), now_s, now_s)
            return
        uncached = max(1, job.num_tokens - self._hits(job).longest * BLOCK_TOKENS)
        self._fleet.traffic.arrived(job.num_tokens, uncached)
        prices = self._preset.prices
        work_s = uncached * prices.token_s + prices.pair_s * uncached * (job.num_tokens - uncached / 2)
        slo_s = self._slo.first_token_s(uncached)
        held = self._admission.add(str(number), "", slo_s, work_s, len(self._fleet.prefills), now_s)
        if self._hold:
            self._release(now_s)
        else:
            self._admission.remove(held.request_id)
            self._dispatch(number, self._place(number, held.due_s, now_s), held.due_s, now_s)

    def _place(self, number: int, due_s: float, now_s: float) -> Placement:
        job = self._jobs[number]
        ask = Ask(
            num_tokens=job.num_tokens,
            block_size=BLOCK_TOKENS,
            slab_bytes=self._preset.block_bytes,
            keys=job.keys,
            answer_tokens=self._fleet.answer_tokens or 256.0,
            due_s=due_s,
            tpot_s=self._slo.tpot_s,
            may_wait=self._hold,
        )
        placement = self._policy.place(ask, self._hits(job), self._fleet, now_s, self._rng)
        assert placement is not None
        return placement

    def _release(self, now_s: float) -> None:
        admission = self._admission

        def dispatch(held: Held) -> float:
            number = int(held.request_id)
            placement = self._place(number, held.due_s, now_s)
            full_s = full_for_s(placement.chosen)
            if full_s <= 0.0:
                self._dispatch(number, placement, held.due_s, now_s)
            return full_s

        if self._releasing:
            return  # what was just dispatched ended something
        self._releasing = True
        admission.release(now_s, dispatch)
        self._releasing = False
        wake_s = admission.next_try_s()
        if wake_s is not None and (self._wake_at_s is None or wake_s < self._wake_at_s):
            self._wake_at_s = wake_s
            self._push(wake_s, WAKE, 0)

    def _dispatch(self, number: int, placement: Placement, due_s: float, now_s: float) -> None:
        job, state = self._jobs[number], self._state[number]
        state.decode = placement.decode
        here = placement.prefill is None
        worker = placement.decode if placement.prefill is None else placement.prefill
        state.prefill = worker
        self._predicted_s[number] = now_s + placement.predicted_ttft_s + self._preset.overhead_s - job.arrival_s
        self._num_here += here
        self._fetch(number, worker, placement, now_s)
        hit = placement.hit_tokens
        suffix = job.num_tokens - hit
        answer = self._fleet.answer_tokens or 256.0
        pairs = suffix * (hit + (suffix + 1) / 2)
        streams = Work(
            num_sequences=1,
            context_tokens=job.num_tokens + answer / 2,
            num_blocks=int(-(-(job.num_tokens + answer) // BLOCK_TOKENS)),
            due_s=due_s,
        )
        if here:
            both = streams._replace(num_tokens=suffix, num_pairs=pairs)
            self._fleet.dispatched(worker, _fence(number, "decode"), both, now_s)
        else:
            work = Work(num_tokens=suffix, num_pairs=pairs, due_s=due_s)
            self._fleet.dispatched(worker, _fence(number, "prefill"), work, now_s)
            self._fleet.dispatched(placement.decode, _fence(number, "decode"), streams, now_s)
            self._taken[placement.decode] += 1
            self._decodes[placement.decode].expect(_stream(number, job))
        self._taken[worker] += 1
        if here:
            self._start_here(number, now_s)
            return
        prefill = self._prefills[worker]
        prompt = Prompt(number, due_s, state.fetched_at_s, suffix, pairs)
        prefill.add(prompt)
        if prefill.running is None:
            self._start(prefill, now_s)
        elif due_s < prefill.running.due_s:
            self._push(max(now_s, prompt.ready_s), SWITCH, worker)

    # --- the workers' side -------------------------------------------------------------------------------------------------

    def _fetch(self, number: int, worker: int, placement: Placement, now_s: float) -> None:
        """What the worker fetches from the first source that still has it."""
        job, state = self._jobs[number], self._state[number]
        wanted = placement.prefill_sources if placement.prefill is not None else placement.decode_sources
        state.fetched_at_s = now_s
        if not wanted:
            return
        local = self._cache(worker).match(job.keys)
        for place in wanted:
            source = place.number
            host = disk = 0
            if source in self._pools:
                pool = self._pools[source]
                host = pool.host.match(job.keys)
                disk = pool.disk.match(job.keys)
                have = max(host, disk)
            else:
                have = self._cache(source).match(job.keys)
            if have <= local:
                continue
            preset = self._preset
            at_home = self._home[worker] == source
            rate = preset.home_bytes_per_s if at_home else preset.net_bytes_per_s
            num_bytes = (have - local) * preset.block_bytes
            took_s = num_bytes / rate
            from_disk = max(0, have - max(host, local)) if source in self._pools else 0
            took_s = max(took_s, from_disk * preset.block_bytes / preset.disk_bytes_per_s)
            begin_s = max(now_s, self._sends_until[source])
            self._sends_until[source] = begin_s + took_s
            state.fetched_at_s = begin_s + took_s + 0.001
            state.fetched_blocks = have
            self._moved["fetch"] += num_bytes
            state.disk_blocks, state.from_pool = from_disk, source in self._pools
            return

    def _cache(self, number: int) -> Cache:
        return self._prefills[number].cache if number in self._prefills else self._decodes[number].cache

    def _computing(self, number: int, cache: Cache) -> tuple[int, float]:
        """Tokens to compute and their pairs, from what the worker has now."""
        job, state = self._jobs[number], self._state[number]
        local = cache.match(job.keys)
        have = max(local, state.fetched_blocks)
        fetched = max(0, state.fetched_blocks - local)
        from_disk = min(fetched, state.disk_blocks)
        self._hit_tokens["DEVICE"] += (have - fetched) * BLOCK_TOKENS
        self._hit_tokens["DISK"] += from_disk * BLOCK_TOKENS
        self._hit_tokens["HOST" if state.from_pool else "other DEVICE"] += (fetched - from_disk) * BLOCK_TOKENS
        hit = min(have * BLOCK_TOKENS, job.num_tokens - 1)
        suffix = job.num_tokens - hit
        return suffix, suffix * (hit + (suffix + 1) / 2)

    def _start(self, worker: PrefillWorker, now_s: float) -> None:
        """The first in line whose fetch is there."""
        if worker.running is not None:
            return
        prompt = worker.next(now_s)
        if prompt is None:
            ready_s = worker.ready_s()
            if ready_s is not None:
                self._push(ready_s, START, worker.number)
            return
        if prompt.left_s is None:
            prices = worker.prices
            suffix, pairs = prompt.num_tokens, prompt.num_pairs = self._computing(prompt.request, worker.cache)
            steps = -(-suffix // worker.step_tokens)
            seconds = steps * prices.base_s + suffix * prices.token_s + pairs * prices.pair_s
            prompt.left_s = seconds * self._noise[prompt.request]
            self._state[prompt.request].compute_s = prompt.left_s
        done_s = worker.begin(prompt, now_s)
        self._push(done_s, COMPUTED, worker.number + (worker.version << 20))

    def _switch(self, worker: PrefillWorker, now_s: float) -> None:
        """One that is due earlier can be computed: it is from the next chunk on."""
        if not worker.is_overtaken(now_s):
            return
        chunk_s = worker.next_chunk_s(now_s)
        if chunk_s > now_s + 1e-9:
            self._push(chunk_s, SWITCH, worker.number)
            return
        worker.add(worker.stop(now_s))
        self._start(worker, now_s)

    def _computed(self, worker: PrefillWorker, now_s: float) -> None:
        number = worker.stop(now_s).request
        job, state = self._jobs[number], self._state[number]
        self._answered(number, now_s)
        self._store(worker.number, worker.cache, job.keys, now_s)
        fence = _fence(number, "prefill")
        name = self._fleet.names[worker.number]
        self._fleet.computed(name, fence, now_s)
        self._fleet.ended(name, fence, now_s)
        decode = self._decodes[state.decode]
        missing = -(-job.num_tokens // BLOCK_TOKENS) - decode.cache.match(job.keys)
        num_bytes = max(0, missing) * self._preset.block_bytes
        self._moved["hand-over"] += num_bytes
        late_s = max(0.0, num_bytes / self._preset.net_bytes_per_s - state.compute_s)
        self._push(now_s + late_s + 0.005, HANDED, number)
        self._start(worker, now_s)
        if len(self._admission):
            self._release(now_s)

    def _answered(self, number: int, now_s: float) -> None:
        """Its first token is there."""
        self._first_s[number] = now_s
        self._ttft_s[number] = now_s + self._preset.overhead_s - self._jobs[number].arrival_s

    def _handed(self, number: int, now_s: float) -> None:
        """Its KV is at its decode worker."""
        job = self._jobs[number]
        decode = self._decodes[self._state[number].decode]
        decode.advance(now_s)
        stream = _stream(number, job)
        decode.expect(stream, -1)
        state = self._state[number]
        self._store(decode.number, decode.cache, job.keys, now_s, self._home[state.prefill] != self._home[state.decode])
        decode.join(stream)
        self._decode(decode, now_s)

    def _start_here(self, number: int, now_s: float) -> None:
        state = self._state[number]
        decode = self._decodes[state.decode]
        decode.advance(now_s)
        suffix, pairs = self._computing(number, decode.cache)
        prices = decode.prices
        seconds = (suffix * prices.token_s + pairs * prices.pair_s) * self._noise[number]
        wait_s = max(0.0, state.fetched_at_s - now_s)
        decode.compute(number, seconds + wait_s, -(-suffix // decode.step_tokens))
        decode.line_tokens += suffix
        decode.line_pairs += pairs
        self._decode(decode, now_s)

    def _decode(self, decode: DecodeWorker, now_s: float) -> None:
        """What has ended by now ends, what waits begins."""
        decode.advance(now_s)
        streams, prompts = decode.ended()
        self._num_ended += len(streams)
        name = self._fleet.names[decode.number]
        for stream in streams:
            number = stream.request
            num_more = self._jobs[number].answer_tokens - 1
            self._tpot_s[number] = (now_s - self._first_s[number]) / num_more if num_more > 0 else 0.0
            self._fleet.ended(name, _fence(number, "decode"), now_s)
            self._fleet.answered(self._jobs[number].answer_tokens)
        for number in prompts:
            self._answered(number, now_s)
            self._fleet.computed(name, _fence(number, "decode"), now_s)
            self._store(decode.number, decode.cache, self._jobs[number].keys, now_s)
            decode.join(_stream(number, self._jobs[number]))
        if not decode.prompts:
            decode.line_tokens, decode.line_pairs = 0, 0.0
        decode.start()
        decode.version += 1
        due_s = decode.due_s()
        if due_s is not None:
            self._push(due_s, DUE, (decode.number << 40) + decode.version)
        if (streams or prompts) and len(self._admission):
            self._release(now_s)

    def _store(self, number: int, cache: Cache, keys: Sequence[Key], now_s: float, offload: bool = True) -> None:
        """A worker has these blocks, and its machine's pool node copies what it doesn't hold: if it has not just done so."""
        new, gone = cache.store(keys)
        self._say(number, "DEVICE", new, gone, now_s)
        if not offload:
            return
        pool = self._pools[self._home[number]]
        new, gone = pool.host.store(keys)
        self._say(pool.number, "HOST", new, gone, now_s)
        if self._preset.disk_blocks:
            new, gone = pool.disk.store(keys)
            self._say(pool.number, "DISK", new, gone, now_s)

    def _say(self, number: int, tier: Tier, new: list[BlockHash], gone: list[BlockHash], now_s: float) -> None:
        """Its KV events."""
        events: list[Event] = []
        if new:
            events.append(BlockStored(new, None, [], BLOCK_TOKENS, medium=tier))
        if gone:
            events.append(BlockRemoved(gone, medium=tier))
        if events:
            batch = EventBatch(now_s, events, epoch=_EPOCH)
            self._index.on_batch(self._fleet.names[number], _EPOCH, self._seqs[number], batch, now_s)
            self._seqs[number] += 1

    def _report(self, number: int, now_s: float) -> None:
        """A heartbeat of a worker."""
        name = self._fleet.names[number]
        preset = self._preset
        age_s = 0.0
        if number in self._prefills:
            worker = self._prefills[number]
            is_idle = worker.running is None and not worker.line
            if is_idle and self._said_idle.get(number) == self._taken[number]:
                self._push(now_s + self._heartbeat_s, REPORT, number)
                return  # it would say the same again
            if is_idle:
                self._said_idle[number] = self._taken[number]
            age_s = now_s - worker.began_s if worker.running is not None else 0.0
            prompts = [*worker.line, worker.running] if worker.running is not None else worker.line
            age_s += sum(prompt.done_s for prompt in prompts)
            tokens, pairs = worker.waiting(now_s)
            load = Load(
                num_dispatches=self._taken[number],
                num_waiting=len(worker.line),
                waiting_tokens=tokens,
                waiting_pairs=int(pairs),
                free_blocks=preset.device_blocks,
                fetch_bytes_per_s=preset.net_bytes_per_s,
                prices=worker.prices,
            )
        else:
            decode = self._decodes[number]
            decode.advance(now_s)
            load = Load(
                num_dispatches=self._taken[number],
                num_waiting=len(decode.waiting),
                num_running=decode.num_streams,
                waiting_tokens=decode.line_tokens,
                waiting_pairs=int(decode.line_pairs),
                num_generating=decode.num_streams + len(decode.waiting) + decode.num_pending,
                context_tokens=decode.context_tokens(),
                free_blocks=max(0, decode.free_blocks - decode.pending_blocks),
                fetch_bytes_per_s=preset.net_bytes_per_s,
                prices=decode.prices,
            )
        self._fleet.reported(name, load, (), age_s, now_s)
        self._push(now_s + self._heartbeat_s, REPORT, number)

    def _outcome(self, now_s: float) -> Outcome:
        uncached = np.array([job.uncached_tokens for job in self._jobs])
        slo_at_s = self._slo.ttft_s + self._slo.ttft_per_token_s * uncached
        within = (self._ttft_s <= slo_at_s) & (self._tpot_s <= self._slo.tpot_s)
        return Outcome(
            ttft_s=self._ttft_s,
            tpot_s=self._tpot_s,
            predicted_s=self._predicted_s,
            within=within,
            hit_tokens=self._hit_tokens,
            prompt_tokens=float(sum(job.num_tokens for job in self._jobs)),
            moved_bytes=self._moved,
            num_here=self._num_here,
            prefill_busy=np.array([worker.busy_s for worker in self._prefills.values()]) / now_s,
            decode_busy=np.array([worker.busy_s for worker in self._decodes.values()]) / now_s,
            seconds=now_s,
        )


def _stream(number: int, job: Job) -> Stream:
    blocks = -(-(job.num_tokens + job.answer_tokens) // BLOCK_TOKENS)
    return Stream(number, job.num_tokens, max(0, job.answer_tokens - 1), blocks)


def _fence(number: int, role: str) -> Fence:
    return Fence(str(number), 0, "prefill" if role == "prefill" else "decode", 0)
