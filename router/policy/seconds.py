"""Where a request goes, by predicted seconds (design §4.2): the policy of a router that knows.

Owns the cost; nothing else. Every worker of the served group is weighed, in one pass over the fleet's table.

    prefill at w     max(queue, fetch) + compute          for the best of: what w holds, what its machine's pool node adds, what
                                                          the three best other places add; or nothing fetched at all
      + others       those who come while it waits and computes wait for its compute, too; at a decode worker its streams do
    decode at w      answer tokens x step with the stream in it
      + others       its streams x answer tokens x how much longer the step gets
      + tpot         streams that would step slower than promised
      + room         until blocks and a place in the step are free
    hand-over        what is not there yet when prefill ends; nothing where decode prefills by itself

A short uncached suffix, or a long hit at a decode worker, is prefilled there: that is the cheaper sum. A prefix that many want is
fetched by others as soon as the queue at its holder costs more than the fetch, and is held there from then on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

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
from router.policy.base import Ask, Candidates, Placement, Prediction, sources
from router.prefix_index import Hits

Floats = NDArray[np.float64]

NUM_SOURCES = 3
"""Places that are weighed to fetch from, beside the machine's own pool node."""
NUM_PREFILLS = 3
"""Prefill workers that are weighed with every decode worker."""
MAX_KEPT = 128
"""Candidates that are kept to be explained."""
MAX_BUSY = 0.9
"""Utilisation past which the formula for a queue's followers says no more."""


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


class PredictedSeconds:
    """Stateless but for its constants."""

    def __init__(self, terms: Terms | None = None) -> None:
        self._terms = terms or Terms()

    def place(self, ask: Ask, hits: Hits, fleet: Fleet, now_s: float, rng: random.Random) -> Placement | None:
        decodes = _without(fleet.decodes, ask)
        if not len(decodes):
            return None
        prefills = fleet.prefills[:0] if ask.prefill_here_only else _without(fleet.prefills, ask)
        workers = fleet.workers
        if len(workers) != len(prefills) + len(decodes):
            workers = np.concatenate((prefills, decodes))
        return self._among(ask, hits, fleet, workers, len(prefills), now_s, rng)

    def between(self, ask: Ask, hits: Hits, fleet: Fleet, prefill: int, decode: int, now_s: float) -> Placement:
        """The placement of a choice that was made elsewhere: its prediction and its sources."""
        workers = np.array([decode] if prefill == decode else [prefill, decode], dtype=np.int64)
        return self._among(ask, hits, fleet, workers, len(workers) - 1, now_s, random.Random(0), True)

    def _among(
        self,
        ask: Ask,
        hits: Hits,
        fleet: Fleet,
        workers: Numbers,
        num: int,
        now_s: float,
        rng: random.Random,
        hand_over: bool = False,
    ) -> Placement:
        """The best of `workers`, the first `num` of which are prefill workers; a hand-over in any case if so asked."""
        decodes = workers[num:]
        rows = fleet.table[:, workers]
        prefill = self._prefill(ask, hits, fleet, workers, num, rows, now_s)
        stream_s, others_s, room_s = self._decode(ask, rows[:, num:])
        decode_s = stream_s + others_s + room_s
        here_s = prefill.cost_s[num:] + decode_s
        best, best_s = _cheapest(here_s, rng)
        prefill_at = None
        if num:
            at, with_decode, total_s = self._hand_over(ask, fleet, workers, num, prefill, decode_s, rng)
            if total_s <= best_s or hand_over:
                prefill_at, best = at, with_decode
        where = num + best if prefill_at is None else prefill_at
        handover_s = 0.0
        if prefill_at is not None:
            handover_s = max(0.0, float(total_s - prefill.cost_s[prefill_at] - decode_s[best]))
        chosen = Prediction(
            hit_tokens=int(prefill.hit_tokens[where]),
            queue_s=float(prefill.queue_s[where]),
            fetch_s=float(prefill.fetch_s[where]),
            compute_s=float(prefill.compute_s[where]),
            overhead_s=fleet.overhead_s,
            handover_s=handover_s,
            stream_s=float(stream_s[best]),
            others_s=float(prefill.others_s[where] + others_s[best]),
            room_s=float(room_s[best]),
        )
        decode_number = int(decodes[best])
        prefill_number = None if prefill_at is None else int(workers[prefill_at])
        at_number = decode_number if prefill_number is None else prefill_number
        local = int(prefill.local_blocks[where])
        wanted = sources(hits, fleet, local, (at_number,)) if chosen.fetch_s else ()
        for_decode = wanted
        if prefill_number is not None:
            have = int(prefill.local_blocks[num + best])
            for_decode = sources(hits, fleet, have, (decode_number, prefill_number))
        return Placement(
            prefill=prefill_number,
            decode=decode_number,
            prefill_sources=() if prefill_number is None else wanted,
            decode_sources=for_decode,
            chosen=chosen,
            names=fleet.names,
            candidates=_kept(workers, num, prefill, stream_s + others_s + room_s),
        )

    def _prefill(
        self, ask: Ask, hits: Hits, fleet: Fleet, workers: Numbers, num: int, rows: Floats, now_s: float
    ) -> _Prefill:
        """What a prefill costs at each of `workers`, the first `num` of which are prefill workers."""
        terms = self._terms
        queue_s, behind = fleet.waits_s(workers, ask.due_s, now_s)
        step_s = rows[BASE_S].copy()
        generating = rows[SEQUENCES, num:]
        step_s[num:] += generating * rows[SEQUENCE_S, num:] + rows[CONTEXT, num:] * rows[CONTEXT_S, num:]
        if hits.holders:
            totals = hits.counts.sum(axis=1)
            local = totals[workers]
            blocks, fetch_s = self._options(ask, hits, fleet, workers, rows, totals, local, now_s)
        else:
            local = np.zeros(len(workers), dtype=np.int64)
            blocks, fetch_s = local[None, :], np.zeros((1, len(workers)))
        hit = np.minimum(blocks * float(ask.block_size), ask.num_tokens - 1.0)
        suffix = ask.num_tokens - hit
        compute_s = np.ceil(suffix / rows[STEP_TOKENS]) * step_s
        compute_s += suffix * (rows[TOKEN_S] + rows[PAIR_S] * (hit + (suffix + 1.0) / 2))
        ready_s = np.maximum(terms.queue * queue_s, terms.fetch * fetch_s) + compute_s
        others_s = self._others(fleet, num, suffix, ready_s, compute_s, behind, generating, now_s)
        cost_s = ready_s + others_s
        if len(cost_s) == 1:
            return _Prefill(cost_s[0], queue_s, fetch_s[0], compute_s[0], others_s[0], hit[0], local)
        option = cost_s.argmin(axis=0)
        at = (option, np.arange(len(workers)))
        return _Prefill(cost_s[at], queue_s, fetch_s[at], compute_s[at], others_s[at], hit[at], local)

    def _options(
        self,
        ask: Ask,
        hits: Hits,
        fleet: Fleet,
        workers: Numbers,
        rows: Floats,
        totals: NDArray[np.int64],
        local: NDArray[np.int64],
        now_s: float,
    ) -> tuple[Floats, Floats]:
        """For each worker, `[num_options, num_workers]`: leading blocks that it would have, and the seconds to fetch them.
        First without a fetch, then from its machine's pool node, then from the best other places."""
        best = self._best_places(hits, fleet, totals, now_s)
        places = np.empty((1 + len(best), len(workers)), dtype=np.int64)
        places[0] = fleet.homes[workers]
        places[1:] = best[:, None]
        offered = totals[places]
        extra = offered - local
        rate = fleet.rates[workers, places]
        rate = np.where(rate > 0, rate, rows[FETCH_RATE])
        senders = fleet.table[SENDS_UNTIL]
        slab = float(ask.slab_bytes)
        fetch_s = np.maximum(senders[places] - now_s, 0.0) + extra * slab / rate
        fetch_s += self._terms.fetch_setup_s + hits.counts[:, 2][places] * slab / fleet.table[DISK_RATE][places]
        useless = (extra <= 0) | ~fleet.reachable[places]
        zeros = np.zeros((1, len(workers)))
        blocks = np.concatenate((local[None, :], np.where(useless, local, offered)))
        return blocks, np.concatenate((zeros, np.where(useless, 0.0, fetch_s)))

    @staticmethod
    def _best_places(hits: Hits, fleet: Fleet, totals: NDArray[np.int64], now_s: float) -> Numbers:
        """Who holds most; of those who hold as much, who is free to send soonest."""
        holders = np.array(hits.holders, dtype=np.int64)
        if len(holders) <= NUM_SOURCES:
            return holders
        busy_s = np.maximum(fleet.table[SENDS_UNTIL, holders] - now_s, 0.0)
        order = np.lexsort((busy_s, -(totals[holders] * fleet.reachable[holders])))
        return holders[order[:NUM_SOURCES]]

    def _others(
        self,
        fleet: Fleet,
        num: int,
        suffix: Floats,
        ready_s: Floats,
        compute_s: Floats,
        behind: Floats,
        generating: Floats,
        now_s: float,
    ) -> Floats:
        """Seconds that others wait for this prefill: prompts that are due later, and that come while it is in line, for as long
        as the queue then takes to empty; and, at a decode worker, its streams: one may come any time, and only a short suffix
        rides along in a step that is made anyway."""
        per_s, seconds_per_s = fleet.arrivals(now_s)
        share = max(1, num or len(behind))
        each_per_s = max(per_s / share, self._terms.min_arrivals_per_s)
        busy = min(MAX_BUSY, seconds_per_s / share)
        followers = each_per_s * (ready_s - compute_s / 2) / (1.0 - busy) + behind
        part = np.maximum(1.0 - self._terms.short_suffix_tokens / suffix[:, num:], 0.0)
        followers[:, num:] += np.maximum(generating, part)
        return self._terms.others * followers * compute_s

    def _decode(self, ask: Ask, rows: Floats) -> tuple[Floats, Floats, Floats]:
        """What the stream costs at each decode worker: its own tokens, what others wait, and the wait for room."""
        terms = self._terms
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
        lacking = ask.num_blocks - rows[FREE_BLOCKS]
        crowded = sequences + ask.num_samples - rows[MAX_RUNNING]
        room_s = np.zeros_like(step_s)
        if lacking.max() > 0 or crowded.max() > 0:
            # Streams end and give back what they hold in the time that an answer takes, evenly.
            answer_s = num_steps * before_s
            held = np.maximum(context / ask.block_size, 1.0)
            room_s = np.maximum(lacking / held, crowded / np.maximum(sequences, 1.0)).clip(0.0) * answer_s * terms.room
            room_s[sequences == 0] = 0.0
        return terms.stream * num_steps * step_s, others_s, room_s

    def _hand_over(
        self,
        ask: Ask,
        fleet: Fleet,
        workers: Numbers,
        num: int,
        prefill: _Prefill,
        decode_s: Floats,
        rng: random.Random,
    ) -> tuple[int, int, float]:
        """The cheapest pair of a prefill and a decode worker, as positions, and its cost: the best few prefill workers with
        each decode worker. The transfer overlaps the prefill; what is longer is waited for."""
        cost_s = prefill.cost_s[:num]
        if num > 4 * NUM_PREFILLS:
            # Ties among many are broken by where the search for the smallest begins.
            shift = rng.randrange(num)
            few = np.argpartition(np.roll(cost_s, -shift), NUM_PREFILLS)[:NUM_PREFILLS]
            few = (few + shift) % num
        else:
            few = np.arange(num)
        sinks = workers[num:]
        rate = fleet.rates[sinks[None, :], workers[few][:, None]]
        rate = np.where(rate > 0, rate, fleet.table[FETCH_RATE, sinks])
        num_blocks = -(-ask.num_tokens // ask.block_size)
        missing = np.maximum(num_blocks - prefill.local_blocks[num:], 0)
        late_s = missing * float(ask.slab_bytes) / rate - prefill.compute_s[few][:, None]
        total_s = np.maximum(late_s, 0.0) + (cost_s[few][:, None] + decode_s + self._terms.handover_s)
        at, best_s = _cheapest(total_s.ravel(), rng)
        row, column = divmod(at, len(sinks))
        return int(few[row]), column, best_s


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Of each worker: the best of its options. `cost_s` is what counts."""

    cost_s: Floats
    queue_s: Floats
    fetch_s: Floats
    compute_s: Floats
    others_s: Floats
    hit_tokens: Floats
    local_blocks: NDArray[np.int64]


def _without(numbers: Numbers, ask: Ask) -> Numbers:
    """Without those that failed the request, unless nobody else is there."""
    if not ask.avoid:
        return numbers
    others = np.array([number for number in numbers.tolist() if number not in ask.avoid], dtype=np.int64)
    return others if len(others) else numbers


def _cheapest(cost_s: Floats, rng: random.Random) -> tuple[int, float]:
    """Where the smallest is, one of them at random if there are several."""
    best_s = float(cost_s.min())
    at = np.flatnonzero(cost_s <= best_s * (1 + 1e-9))
    return int(at[0] if len(at) == 1 else at[rng.randrange(len(at))]), best_s


def _kept(workers: Numbers, num: int, prefill: _Prefill, decode_s: Floats) -> Candidates:
    stream_s = np.zeros(len(workers))
    stream_s[num:] = decode_s
    keep: slice | Numbers = slice(None)
    if len(workers) > MAX_KEPT:
        keep = np.argpartition(prefill.cost_s + stream_s, MAX_KEPT)[:MAX_KEPT]
    return Candidates(
        numbers=workers[keep],
        queue_s=prefill.queue_s[keep],
        fetch_s=prefill.fetch_s[keep],
        compute_s=prefill.compute_s[keep],
        others_s=prefill.others_s[keep],
        stream_s=stream_s[keep],
        hit_tokens=prefill.hit_tokens[keep],
    )
