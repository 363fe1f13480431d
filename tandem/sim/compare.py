"""Policies side by side on one trace: at a rate, or at parts of what the cluster can take.

Owns what is compared and what is said of it. 100 % of a cluster's capacity is where least loaded serves 90 % of the requests as
promised. Policies of others are tuned on the first half of the trace, if asked for; ours is not. The bound is a clairvoyant who
computes what no request before had, at once, on an idle worker, and fetches the rest in no time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from router.admission import Slo
from router.policy.base import Policy
from router.policy.seconds import PredictedSeconds
from router.policy.weigh import Terms
from tandem.errors import ConfigError
from tandem.sim.load import jobs_of
from tandem.sim.policies.registry import POLICIES, policy_named
from tandem.sim.presets import Preset
from tandem.sim.replay import SLO, Job, Outcome, Replay, noise_of
from tandem.sim.trace import BLOCK_TOKENS, TraceRequest, infinite_cache_hit_rate

OURS = "tandem"
COPY_WORKERS = 8
"""A cluster of so many workers gets one copy of the trace, larger ones as many as they are larger."""
CAPACITY_GOODPUT = 0.9
MIN_RATE, MAX_RATE = 0.005, 1e6
"""Requests a second that a capacity is searched within: at least for each worker, at most in all."""
REMOVABLE = ("queue", "fetch", "others", "stream", "tpot", "room", "order", "hold")
"""What can be taken out of ours, to see what it is worth: terms of the cost, the order by due time, and the line for room."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one policy. Seconds, parts of 1, bytes."""

    policy: str
    setting: str
    rate: float
    load: float | None
    goodput: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p50: float
    tpot_p90: float
    tpot_p99: float
    hit_rate: float
    hits: dict[str, float]
    """By where they were, of all prompt tokens."""
    moved_bytes: dict[str, float]
    prefilled_here: float
    """Part of the prompts that their decode worker computed."""
    imbalance: float
    """The busiest prefill worker's time over the mean."""
    prediction_error: float
    """Median, of the time to first token; 0 for the bound."""
    requests_per_s: float
    """Simulated in a second of one core's time."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy as it is run: how it is made, whether requests wait in our line, and in what order workers compute."""

    name: str
    setting: str
    make: Callable[[], Policy]
    hold: bool
    ordered: bool


def contenders(names: Sequence[str], without: Sequence[str] = ()) -> list[Contender]:
    """`tandem` is ours, `bound` is no policy, `all` is everybody. `without` adds ours with each of these parts taken out.
    Raises ConfigError for a name that isn't known."""
    found: list[Contender] = []
    for name in [OURS, *POLICIES] if list(names) == ["all"] else names:
        if name == OURS:
            found.append(ours())
        else:
            found.append(Contender(name, "", policy_named(name).make, hold=False, ordered=False))
    for part in REMOVABLE if list(without) == ["each"] else without:
        if part not in REMOVABLE:
            raise ConfigError(f"--without {part!r} is no part of the policy ({', '.join(REMOVABLE)} are)")
        found.append(ours(part))
    return found


def ours(without: str = "") -> Contender:
    """The production policy, all of it or without one part."""
    terms = Terms()
    if without in {field.name for field in fields(Terms)}:
        terms = replace(terms, **{without: 0.0})
    setting = f"without {without}" if without else ""
    hold = without not in ("hold", "order")
    return Contender(OURS, setting, lambda: PredictedSeconds(terms), hold=hold, ordered=without != "order")


def outcome(contender: Contender, preset: Preset, workers: int, jobs: Sequence[Job], seed: int, say: Say) -> Outcome:
    """One run."""
    replay = Replay(preset, workers, contender.make(), jobs, hold=contender.hold, ordered=contender.ordered, seed=seed)
    done = 0

    def count(num: int) -> None:
        nonlocal done
        done += num
        if done % 50_000 < num:
            say(f"{contender.name}: {done:,} of {len(jobs):,} requests")

    return replay.run(count)


def load_of(
    requests: Sequence[TraceRequest], rate: float, workers: int, seed: int, most: int | None = None
) -> list[Job]:
    """For a cluster of so many workers; only the first `most` that come, if given."""
    return jobs_of(requests, rate, max(1, workers // COPY_WORKERS), seed, most)


def capacity_rate(
    requests: Sequence[TraceRequest], preset: Preset, workers: int, seed: int, say: Say, most: int | None = None
) -> float:
    """Requests a second at which least loaded serves 90 % as promised, of the first `most` if given; within 2 %. Raises
    ConfigError if there is none."""
    contender = contenders(["least-loaded"])[0]

    def goodput(rate: float) -> float:
        jobs = load_of(requests, rate, workers, seed, most)
        return float(outcome(contender, preset, workers, jobs, seed, say).within.mean())

    if workers > COPY_WORKERS:  # about as much a worker as a small cluster, which is soon searched
        small = capacity_rate(requests, preset, COPY_WORKERS, seed, say, most)
        low, step = small * workers / COPY_WORKERS, 1.15
    else:
        low, step = 0.32 * workers, 2.0
    while goodput(low) < CAPACITY_GOODPUT:
        if low < 2 * MIN_RATE * workers:
            raise ConfigError(
                f"least loaded keeps fewer than {CAPACITY_GOODPUT:.0%} of its promises at {low:g} requests/s"
            )
        low /= step
    high = step * low
    while goodput(high) >= CAPACITY_GOODPUT:
        low, high = high, step * high
        if high > MAX_RATE:
            raise ConfigError(f"a cluster that takes {MAX_RATE:g} requests a second is not simulated")
    while high > 1.02 * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if goodput(middle) >= CAPACITY_GOODPUT else (low, middle)
        say(f"capacity of {workers} workers: {low:.2f} to {high:.2f} requests/s")
    return low


def tuned(
    contender: Contender,
    requests: Sequence[TraceRequest],
    preset: Preset,
    workers: int,
    rate: float,
    seed: int,
    say: Say,
) -> Contender:
    """With the parameters that serve most as promised in the trace's first half."""
    if contender.name == OURS:
        return contender
    settings = POLICIES[contender.name].settings
    if len(settings) == 1:
        return contender
    half = load_of(requests[: max(1, len(requests) // 2)], rate, min(workers, 2 * COPY_WORKERS), seed)
    best, best_goodput = contender, -1.0
    for setting in settings:
        tried = replace(contender, setting=setting.label, make=setting.make)
        goodput = float(outcome(tried, preset, min(workers, 2 * COPY_WORKERS), half, seed, say).within.mean())
        say(f"{contender.name} {setting.label or 'as published'}: {goodput:.3f}")
        if goodput > best_goodput:
            best, best_goodput = tried, goodput
    return best


def compare(
    requests: Sequence[TraceRequest],
    preset: Preset,
    workers: int,
    who: Sequence[Contender],
    *,
    rates: Sequence[float],
    loads: Sequence[float],
    tune: bool,
    seed: int,
    say: Say,
    most: int | None = None,
) -> Iterator[Result]:
    """Every contender at every rate, and at every part of the capacity; the bound first. Of larger loads only the first `most`
    requests, if given."""
    asked: list[tuple[float, float | None]] = [(rate, None) for rate in rates]
    if loads:
        full = capacity_rate(requests, preset, workers, seed, say, most)
        asked += [(load * full, load) for load in loads]
    for rate, load in asked:
        jobs = load_of(requests, rate, workers, seed, most)
        yield bound(preset, jobs, rate, load, seed)
        for contender in who:
            small = rate * min(1.0, 2 * COPY_WORKERS / workers)
            chosen = tuned(contender, requests, preset, workers, small, seed, say) if tune else contender
            say(f"{workers} workers, {rate:.2f} requests/s: {chosen.name} {chosen.setting}")
            began = time.process_time()
            found = outcome(chosen, preset, workers, jobs, seed, say)
            yield _result(chosen, found, rate, load, len(jobs) / (time.process_time() - began))


def bound(preset: Preset, jobs: Sequence[Job], rate: float, load: float | None, seed: int, slo: Slo = SLO) -> Result:
    """What nobody can beat."""
    prices = preset.prices
    uncached = np.array([job.uncached_tokens for job in jobs], dtype=np.float64)
    tokens = np.array([job.num_tokens for job in jobs], dtype=np.float64)
    steps = np.ceil(uncached / preset.prefill_step_tokens)
    compute_s = steps * prices.base_s + uncached * prices.token_s
    compute_s += prices.pair_s * uncached * (tokens - uncached + (uncached + 1) / 2)
    ttft_s = compute_s * noise_of(len(jobs), seed) + preset.overhead_s
    within = ttft_s <= slo.ttft_s + slo.ttft_per_token_s * uncached
    p50, p90, p99 = np.percentile(ttft_s, [50, 90, 99], method="lower").tolist()
    alone_s = prices.base_s + prices.sequence_s
    hit_rate = float(1.0 - uncached.sum() / tokens.sum())
    return Result(
        "bound", "", rate, load, float(within.mean()), p50, p90, p99, alone_s, alone_s, alone_s, hit_rate,
        {}, {}, 0.0, 1.0, 0.0, 0.0,
    )  # fmt: skip


def _result(contender: Contender, found: Outcome, rate: float, load: float | None, per_s: float) -> Result:
    ttft_s = np.nan_to_num(found.ttft_s, nan=np.inf)
    ttft = np.percentile(ttft_s, [50, 90, 99], method="lower").tolist()
    tpot = np.percentile(np.nan_to_num(found.tpot_s, nan=np.inf), [50, 90, 99], method="lower").tolist()
    hits = {place: tokens / found.prompt_tokens for place, tokens in found.hit_tokens.items()}
    busy = found.prefill_busy
    return Result(
        policy=contender.name,
        setting=contender.setting,
        rate=rate,
        load=load,
        goodput=float(found.within.mean()),
        ttft_p50=ttft[0],
        ttft_p90=ttft[1],
        ttft_p99=ttft[2],
        tpot_p50=tpot[0],
        tpot_p90=tpot[1],
        tpot_p99=tpot[2],
        hit_rate=sum(hits.values()),
        hits=hits,
        moved_bytes=found.moved_bytes,
        prefilled_here=found.num_here / len(found.within),
        imbalance=float(busy.max() / max(busy.mean(), 1e-9)),
        prediction_error=float(np.nanmedian(np.abs(found.predicted_s - found.ttft_s) / found.ttft_s)),
        requests_per_s=per_s,
    )


def sanity(requests: Sequence[TraceRequest]) -> dict[str, float]:
    """What a trace is like: how many, how long, and what a cache that never forgets finds."""
    return {
        "requests": len(requests),
        "prompt_tokens": sum(request.input_length for request in requests) / len(requests),
        "answer_tokens": sum(request.output_length for request in requests) / len(requests),
        "block_hit_rate": infinite_cache_hit_rate(requests),
        "block_tokens": BLOCK_TOKENS,
    }
