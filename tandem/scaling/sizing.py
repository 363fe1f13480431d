"""How many workers of a role a load needs, so that the SLO is kept: formulas, each with its sentence.

Owns the arithmetic. Everything it needs of a worker is what the worker has learned of itself (`tandem/engine/step_model.py`): the
prices of a step, and its room. Pure, and monotone: more load never needs fewer workers.

    prefill   a queue before n workers. For nine requests in ten, waiting and computing the mean prompt stay within the promised
              time: Erlang's C for the part that waits, exponential waiting times, longer by (1 + spread) / 2 for prompts of
              unequal length (Allen & Cunneen; Gross & Harris, *Fundamentals of Queueing Theory*)
    decode    a step is base + κ · streams seconds, κ one stream's own price with the context that it attends to. Streams are as
              many as come times how long they last at the promised pace, and nine times in ten not more than their mean and 1.3
              of its root. As many workers as keep a step, with the prompts that are computed there, within the promise, and
              have the room
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from protos.control import StepPrices
from tandem.scaling.traffic import Shape

QUANTILE = 0.9
ROOT = 1.2816
"""Of the standard normal distribution at that quantile."""
TPOT_PART = 0.9
"""Of the promised time for each token that a step may take: the rest is for hand-over and unequal workers."""
MIN_WAIT_PART = 0.25
"""Of the promised time to the first token that may be waited, also where the prompt alone takes longer than that."""
BUSIEST = 0.95
"""No worker is planned to be busy for more of its time."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What requests are promised. Seconds; `ttft_per_token_s` for each uncached prompt token."""

    ttft_s: float = 0.3
    ttft_per_token_s: float = 0.3e-3
    tpot_s: float = 0.05


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """A worker of one role, as the typical one says of itself: prices of a step, tokens of a step, streams it takes, and tokens
    of KV it holds. 0 for room: not known, no limit."""

    prices: StepPrices
    step_tokens: float = 512.0
    max_running: float = 0.0
    kv_tokens: float = 0.0

    @property
    def knows_prefill(self) -> bool:
        return self.prices.token_s > 0.0

    @property
    def knows_decode(self) -> bool:
        return self.prices.sequence_s > 0.0 or self.prices.context_s > 0.0


@dataclass(frozen=True, slots=True)
class Need:
    """So many workers, and why: a sentence for people."""

    workers: int
    why: str


def prompt_s(kind: WorkerKind, num_tokens: float, num_pairs: float) -> float:
    """Seconds in which a worker computes so much of a prompt."""
    steps = math.ceil(num_tokens / kind.step_tokens) if num_tokens > 0 else 0
    return steps * kind.prices.base_s + num_tokens * kind.prices.token_s + num_pairs * kind.prices.pair_s


def prefill_need(
    per_s: float, shape: Shape, kind: WorkerKind, promise: Promise, backlog_per_s: float, most: int
) -> Need:
    """Of prefill workers, for `per_s` requests a second of that shape and `backlog_per_s` seconds of work a second to make good
    what is late. At least 1, at most `most`."""
    each_s = prompt_s(kind, shape.uncached_tokens, shape.uncached_pairs)
    per_s *= 1.0 - shape.here
    load = per_s * each_s + backlog_per_s
    slo_s = promise.ttft_s + promise.ttft_per_token_s * shape.uncached_tokens
    may_wait_s = max(slo_s - each_s, MIN_WAIT_PART * slo_s)
    what = (
        f"{per_s:.2f} prompts/s × {each_s:.3f} s to compute {shape.uncached_tokens:,.0f} uncached tokens"
        + (f" + {backlog_per_s:.2f} s/s of backlog" if backlog_per_s >= 0.005 else "")
        + f" = {load:.2f} workers' time"
    )
    for workers in range(1, most + 1):
        wait_s = waits_s(workers, load, each_s * (1.0 + shape.spread) / 2.0)
        if load <= BUSIEST * workers and wait_s <= may_wait_s:
            return Need(
                workers, f"{what}; {workers} let 9 in 10 wait {wait_s:.2f} s at most, {may_wait_s:.2f} s are left"
            )
    return Need(most, f"{what}; {most} are too few for {may_wait_s:.2f} s of waiting, and the most there may be")


def waits_s(workers: int, load: float, each_s: float) -> float:
    """What 9 in 10 requests wait at most before so many workers, with `load` workers' time of work and `each_s` a request."""
    if load >= workers:
        return math.inf
    blocked = 1.0
    for number in range(1, workers + 1):
        blocked = load * blocked / (number + load * blocked)
    waiting = blocked / (1.0 - load / workers * (1.0 - blocked))
    if waiting <= 1.0 - QUANTILE:
        return 0.0
    return each_s * math.log(waiting / (1.0 - QUANTILE)) / (workers - load)


def decode_need(
    per_s: float, shape: Shape, answer_tokens: float, kind: WorkerKind, promise: Promise, most: int
) -> Need:
    """Of decode workers, for `per_s` requests a second with answers of `answer_tokens`. At least 1, at most `most`."""
    prices = kind.prices
    context = shape.prompt_tokens + answer_tokens / 2.0
    step_s = TPOT_PART * promise.tpot_s
    each_s = prices.sequence_s + prices.context_s * context
    streams = per_s * shape.samples * answer_tokens * step_s
    most_streams = streams + ROOT * math.sqrt(streams)
    here = per_s * (
        shape.here * shape.uncached_tokens * prices.token_s + shape.here_pairs * shape.uncached_pairs * prices.pair_s
    )
    what = f"{per_s * shape.samples * answer_tokens:,.0f} tokens/s keep {most_streams:.1f} streams of {context:,.0f} tokens"
    if here >= 0.005:
        what += f", and prompts computed there {here:.2f} of a worker's time"
    free = 1.0 - prices.base_s / step_s
    needs = {
        f"a step within {1000 * step_s:.0f} ms": (most_streams * each_s / step_s + here) / free
        if free > 0.0
        else math.inf,
        f"{kind.max_running:.0f} streams a worker": most_streams / kind.max_running if kind.max_running else 0.0,
        f"room for {kind.kv_tokens:,.0f} tokens": (
            most_streams * (shape.prompt_tokens + answer_tokens) / kind.kv_tokens if kind.kv_tokens else 0.0
        ),
    }
    limit = max(needs, key=lambda name: needs[name])
    wanted = needs[limit]
    if wanted > most:
        return Need(most, f"{what}; {limit} wants {wanted:.1f}, and {most} are the most there may be")
    return Need(max(1, math.ceil(wanted - 1e-9)), f"{what}; {limit} wants {wanted:.2f} workers")
