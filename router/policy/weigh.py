"""The cost of every worker for one request, in one pass over the fleet's table.

Owns the formulas (`router/policy/seconds.py` says what they mean), in numpy. `weigh` is the native one
(`router/native/weigh.cpp`) where it was built: the same in a tenth of the time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.fleet import (
    BASE_S,
    CONTEXT,
    CONTEXT_S,
    DISK_RATE,
    FETCH_RATE,
    FREE_BLOCKS,
    MAX_RUNNING,
    PAIR_S,
    SENDS_UNTIL,
    SEQUENCE_S,
    SEQUENCES,
    STEP_TOKENS,
    TOKEN_S,
    Fleet,
    Numbers,
)
from router.policy.base import Ask
from router.prefix_index import Hits

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

NUM_SOURCES = 3
"""Places that are weighed to fetch from, beside the machine's own pool node."""
NUM_PREFILLS = 3
"""Prefill workers that are weighed with every decode worker."""
MAX_BUSY = 0.9
"""Utilisation past which the formula for a queue's followers says no more."""
COST, QUEUE_S, FETCH_S, COMPUTE_S, OTHERS_S, HIT_TOKENS, LOCAL_BLOCKS, STREAM_S, DELAY_S, ROOM_S = range(10)
NUM_PARTS = 10
"""Rows of what was weighed: of a prefill there, by its best option, what counts, its parts, and the blocks that are there
already; of the stream there, at decode workers only, its own tokens, what others wait, and the wait for room."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Constants of the cost, and which of its terms count: 0 takes one out, to see what it is worth."""

    fetch_setup_s: float = 0.001
    handover_s: float = 0.005
    """Two more hops, and the last blocks' transfer that no compute overlaps."""
    short_suffix_tokens: float = 64.0
    """So many tokens ride along in one step, as a stream's own first step would."""
    min_arrivals_per_s: float = 1.0
    """Prompts that may come to a worker, however quiet it has been."""
    queue: float = 1.0
    fetch: float = 1.0
    others: float = 1.0
    stream: float = 1.0
    tpot: float = 10.0
    """Seconds for each second by which a stream's tokens are late."""
    room: float = 1.0


class Weighed(NamedTuple):
    """`parts` is `[NUM_PARTS, num_workers]`. Then the cheapest decode worker that prefills by itself, and the cheapest pair of a
    prefill and a decode worker (-1 without prefill workers): their places in `workers`, and the costs."""

    parts: Floats
    here: int
    here_s: float
    prefill: int
    decode: int
    pair_s: float


def weigh_ref(
    ask: Ask,
    hits: Hits,
    fleet: Fleet,
    workers: Numbers,
    num: int,
    now_s: float,
    terms: Terms,
    drawn: tuple[float, float],
) -> Weighed:
    """Weighs `workers`, the first `num` of which are prefill workers and the rest, at least one, decode workers. Ties are broken
    by the two numbers drawn from [0, 1)."""
    rows = fleet.table[:, workers]
    parts = np.zeros((NUM_PARTS, len(workers)))
    _prefill(parts, ask, hits, fleet, workers, num, rows, now_s, terms)
    parts[STREAM_S:, num:] = _decode(ask, rows[:, num:], terms)
    decode_s = parts[STREAM_S:, num:].sum(axis=0)
    here, here_s = _cheapest(parts[COST, num:] + decode_s, drawn[0])
    if not num:
        return Weighed(parts, here, here_s, -1, -1, np.inf)
    return Weighed(parts, num + here, here_s, *_pair(parts, ask, fleet, workers, num, decode_s, terms, drawn))


def _prefill(
    parts: Floats,
    ask: Ask,
    hits: Hits,
    fleet: Fleet,
    workers: Numbers,
    num: int,
    rows: Floats,
    now_s: float,
    terms: Terms,
) -> None:
    """What a prefill costs at each of `workers`."""
    queue_s, behind = fleet.waits_s(workers, ask.due_s, now_s)
    step_s = rows[BASE_S].copy()
    generating = rows[SEQUENCES, num:]
    step_s[num:] += generating * rows[SEQUENCE_S, num:] + rows[CONTEXT, num:] * rows[CONTEXT_S, num:]
    # Where streams go on, a step runs already: half of it is still to come.
    queue_s[num:] = np.maximum(queue_s[num:], (generating > 0) * step_s[num:] / 2)
    if hits.holders:
        totals = hits.counts.sum(axis=1)
        local = totals[workers]
        blocks, fetch_s = _options(ask, hits, fleet, workers, rows, totals, local, now_s, terms)
    else:
        local = np.zeros(len(workers), dtype=np.int64)
        blocks, fetch_s = local[None, :], np.zeros((1, len(workers)))
    hit = np.minimum(blocks * float(ask.block_size), ask.num_tokens - 1.0)
    suffix = ask.num_tokens - hit
    compute_s = np.ceil(suffix / rows[STEP_TOKENS]) * step_s
    compute_s += suffix * (rows[TOKEN_S] + rows[PAIR_S] * (hit + (suffix + 1.0) / 2))
    ready_s = np.maximum(terms.queue * queue_s, terms.fetch * fetch_s) + compute_s
    # Others wait for this prefill: prompts that are due later, and that come while it is in line, for as long as the queue then
    # takes to empty; and, at a decode worker, its streams: one may come any time, and only a short suffix rides along in a step
    # that is made anyway.
    each_per_s, busy = _arrivals(fleet, len(workers), num, now_s, terms)
    followers = each_per_s * (ready_s - compute_s / 2) / (1.0 - busy) + behind
    part = np.maximum(1.0 - terms.short_suffix_tokens / suffix[:, num:], 0.0)
    followers[:, num:] += np.maximum(generating, part)
    others_s = terms.others * followers * compute_s
    cost_s = ready_s + others_s
    at = (cost_s.argmin(axis=0), np.arange(len(workers)))
    parts[COST], parts[QUEUE_S], parts[FETCH_S], parts[COMPUTE_S] = cost_s[at], queue_s, fetch_s[at], compute_s[at]
    parts[OTHERS_S], parts[HIT_TOKENS], parts[LOCAL_BLOCKS] = others_s[at], hit[at], local


def _arrivals(fleet: Fleet, num_workers: int, num: int, now_s: float, terms: Terms) -> tuple[float, float]:
    """Prompts a second that come to each worker which computes them, and the part of its time that they take."""
    per_s, seconds_per_s = fleet.arrivals(now_s)
    share = max(1, num or num_workers)
    return max(per_s / share, terms.min_arrivals_per_s), min(MAX_BUSY, seconds_per_s / share)


def _options(
    ask: Ask,
    hits: Hits,
    fleet: Fleet,
    workers: Numbers,
    rows: Floats,
    totals: NDArray[np.int64],
    local: NDArray[np.int64],
    now_s: float,
    terms: Terms,
) -> tuple[Floats, Floats]:
    """For each worker, `[num_options, num_workers]`: leading blocks that it would have, and the seconds to fetch them. First
    without a fetch, then from its machine's pool node, then from the best other places."""
    best = _best_places(hits, fleet, totals, now_s)
    places = np.empty((1 + len(best), len(workers)), dtype=np.int64)
    places[0] = fleet.homes[workers]
    places[1:] = best[:, None]
    offered = totals[places]
    extra = offered - local
    rate = fleet.rates[workers, places]
    rate = np.where(rate > 0, rate, rows[FETCH_RATE])
    slab = float(ask.slab_bytes)
    useless = (extra <= 0) | ~fleet.reachable[places]
    disk_rate = np.where(useless, 1.0, fleet.table[DISK_RATE][places])
    fetch_s = np.maximum(fleet.table[SENDS_UNTIL][places] - now_s, 0.0) + extra * slab / rate
    fetch_s += terms.fetch_setup_s + hits.counts[:, 2][places] * slab / disk_rate
    zeros = np.zeros((1, len(workers)))
    blocks = np.concatenate((local[None, :], np.where(useless, local, offered)))
    return blocks, np.concatenate((zeros, np.where(useless, 0.0, fetch_s)))


def _best_places(hits: Hits, fleet: Fleet, totals: NDArray[np.int64], now_s: float) -> Numbers:
    """Who holds most; of those who hold as much, who is free to send soonest."""
    holders = np.array(hits.holders, dtype=np.int64)
    busy_s = np.maximum(fleet.table[SENDS_UNTIL, holders] - now_s, 0.0)
    order = np.lexsort((holders, busy_s, -(totals[holders] * fleet.reachable[holders])))
    return holders[order[:NUM_SOURCES]]


def _decode(ask: Ask, rows: Floats, terms: Terms) -> tuple[Floats, Floats, Floats]:
    """What the stream costs at each decode worker: its own tokens, what others wait, and the wait for room."""
    sequences, context = rows[SEQUENCES], rows[CONTEXT]
    own_context = ask.num_samples * (ask.num_tokens + ask.answer_tokens / 2)
    longer_s = ask.num_samples * rows[SEQUENCE_S] + own_context * rows[CONTEXT_S]
    before_s = rows[BASE_S] + sequences * rows[SEQUENCE_S] + context * rows[CONTEXT_S]
    step_s = before_s + longer_s
    num_steps = ask.answer_tokens / ask.num_samples
    others_s = sequences * (num_steps * terms.others) * longer_s
    if ask.tpot_s:
        late_s = np.maximum(step_s - ask.tpot_s, 0.0)
        others_s += (sequences + ask.num_samples) * (num_steps * terms.tpot) * late_s
    lacking = np.maximum(ask.num_blocks - rows[FREE_BLOCKS], 0.0)
    crowded = np.maximum(sequences + ask.num_samples - rows[MAX_RUNNING], 0.0)
    # Streams end and give back what they hold in the time that an answer takes, evenly.
    held = np.maximum(context / ask.block_size, 1.0)
    room_s = np.maximum(lacking / held, crowded / np.maximum(sequences, 1.0)) * (num_steps * before_s) * terms.room
    room_s[sequences <= 0] = 0.0
    return terms.stream * num_steps * step_s, others_s, room_s


def _pair(
    parts: Floats,
    ask: Ask,
    fleet: Fleet,
    workers: Numbers,
    num: int,
    decode_s: Floats,
    terms: Terms,
    drawn: tuple[float, float],
) -> tuple[int, int, float]:
    """The cheapest pair, as positions, and its cost: the best few prefill workers with each decode worker. The transfer overlaps
    the prefill; what is longer is waited for. Ties among many are broken by where the search for the best few begins."""
    shift = int(drawn[1] * num)
    few = (np.argsort(np.roll(parts[COST, :num], -shift), kind="stable")[:NUM_PREFILLS] + shift) % num
    sinks = workers[num:]
    rate = fleet.rates[sinks[None, :], workers[few][:, None]]
    rate = np.where(rate > 0, rate, fleet.table[FETCH_RATE, sinks])
    num_blocks = -(-ask.num_tokens // ask.block_size)
    missing = np.maximum(num_blocks - parts[LOCAL_BLOCKS, num:], 0.0)
    late_s = missing * float(ask.slab_bytes) / rate - parts[COMPUTE_S, few][:, None]
    total_s = np.maximum(late_s, 0.0) + (parts[COST, few][:, None] + decode_s + terms.handover_s)
    at, best_s = _cheapest(total_s.ravel(), drawn[0])
    row, column = divmod(at, len(sinks))
    return int(few[row]), num + column, best_s


def _cheapest(cost_s: Floats, drawn: float) -> tuple[int, float]:
    """Where the smallest is, one of them by the number drawn if there are several."""
    best_s = float(cost_s.min())
    at = np.flatnonzero(cost_s <= best_s * (1 + 1e-9))
    return int(at[int(drawn * len(at))]), best_s


def _native() -> Any:
    try:
        from router import _weigh
    except ImportError as error:
        log.warning("placement is slow: its native part was not built (%s)", error)
        return None
    return _weigh.weigh


_WEIGH = _native()


def weigh(
    ask: Ask,
    hits: Hits,
    fleet: Fleet,
    workers: Numbers,
    num: int,
    now_s: float,
    terms: Terms,
    drawn: tuple[float, float],
) -> Weighed:
    """As `weigh_ref`."""
    if _WEIGH is None:
        return weigh_ref(ask, hits, fleet, workers, num, now_s, terms, drawn)
    parts = np.zeros((NUM_PARTS, len(workers)))
    here, here_s, prefill, decode, pair_s = _WEIGH(
        (fleet.table, fleet.due_s, fleet.work_s, fleet.rates, fleet.reachable, fleet.homes),
        workers,
        num,
        hits.counts,
        hits.holders,
        parts,
        (
            ask.num_tokens, ask.block_size, ask.slab_bytes, ask.answer_tokens, ask.num_samples, ask.num_blocks, ask.due_s,
            ask.tpot_s, now_s,
        ),
        (
            terms.fetch_setup_s, terms.handover_s, terms.short_suffix_tokens, terms.queue, terms.fetch, terms.others,
            terms.stream, terms.tpot, terms.room,
        ),
        *_arrivals(fleet, len(workers), num, now_s, terms),
        *drawn,
        NUM_SOURCES,
        NUM_PREFILLS,
    )  # fmt: skip
    return Weighed(parts, here, here_s, prefill, decode, pair_s)
