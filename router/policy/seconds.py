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

import numpy as np

from router.fleet import Fleet, Numbers
from router.policy.base import Ask, Candidates, Placement, Prediction, full_for_s
from router.policy.sources import sources
from router.policy.weigh import (
    COMPUTE_S,
    COST,
    DELAY_S,
    FETCH_S,
    HIT_TOKENS,
    LOCAL_BLOCKS,
    OTHERS_S,
    QUEUE_S,
    ROOM_S,
    STREAM_S,
    Terms,
    Weighed,
    weigh,
)
from router.prefix_index import Hits

MAX_KEPT = 128
"""Candidates that are kept to be explained."""


class PredictedSeconds:
    """Stateless but for its constants."""

    def __init__(self, terms: Terms | None = None) -> None:
        self._terms = terms or Terms()

    def place(self, ask: Ask, hits: Hits, fleet: Fleet, now_s: float, rng: random.Random) -> Placement | None:
        workers, num = fleet.workers, len(fleet.prefills)
        if num == len(workers):
            return None
        if ask.prefill_here_only or ask.avoid:
            prefills = fleet.prefills[:0] if ask.prefill_here_only else _without(fleet.prefills, ask)
            workers, num = np.concatenate((prefills, _without(fleet.decodes, ask))), len(prefills)
        weighed = weigh(ask, hits, fleet, workers, num, now_s, self._terms, (rng.random(), rng.random()))
        return self._placement(ask, hits, fleet, workers, num, weighed, weighed.pair_s <= weighed.here_s)

    def between(self, ask: Ask, hits: Hits, fleet: Fleet, prefill: int, decode: int, now_s: float) -> Placement:
        """The placement of a choice that was made elsewhere: its prediction and its sources."""
        workers = np.array([decode] if prefill == decode else [prefill, decode], dtype=np.int64)
        num = len(workers) - 1
        weighed = weigh(ask, hits, fleet, workers, num, now_s, self._terms, (0.0, 0.0))
        return self._placement(ask, hits, fleet, workers, num, weighed, hand_over=num > 0)

    @staticmethod
    def _placement(
        ask: Ask, hits: Hits, fleet: Fleet, workers: Numbers, num: int, weighed: Weighed, hand_over: bool
    ) -> Placement:
        """What was found cheapest, as a placement."""
        parts = weighed.parts
        decode = weighed.decode if hand_over else weighed.here
        where = weighed.prefill if hand_over else decode
        at, stream = parts[:, where].tolist(), parts[:, decode].tolist()
        decode_s = stream[STREAM_S] + stream[DELAY_S] + stream[ROOM_S]
        chosen = Prediction(
            hit_tokens=int(at[HIT_TOKENS]),
            queue_s=at[QUEUE_S],
            fetch_s=at[FETCH_S],
            compute_s=at[COMPUTE_S],
            overhead_s=fleet.overhead_s,
            handover_s=max(0.0, weighed.pair_s - at[COST] - decode_s) if hand_over else 0.0,
            stream_s=stream[STREAM_S],
            others_s=at[OTHERS_S] + stream[DELAY_S],
            room_s=stream[ROOM_S],
        )
        at_number, decode_number = int(workers[where]), int(workers[decode])
        if ask.may_wait and full_for_s(chosen) > 0.0:
            return Placement(at_number if hand_over else None, decode_number, (), (), chosen, fleet.names)
        wanted = sources(hits, fleet, int(at[LOCAL_BLOCKS]), (at_number,)) if chosen.fetch_s else ()
        for_decode = wanted
        if hand_over:
            for_decode = sources(hits, fleet, int(stream[LOCAL_BLOCKS]), (decode_number, at_number))
        return Placement(
            prefill=at_number if hand_over else None,
            decode=decode_number,
            prefill_sources=wanted if hand_over else (),
            decode_sources=for_decode,
            chosen=chosen,
            names=fleet.names,
            candidates=_kept(workers, weighed),
        )


def _without(numbers: Numbers, ask: Ask) -> Numbers:
    """Without those that failed the request, unless nobody else is there."""
    if not ask.avoid:
        return numbers
    others = np.array([number for number in numbers.tolist() if number not in ask.avoid], dtype=np.int64)
    return others if len(others) else numbers


def _kept(workers: Numbers, weighed: Weighed) -> Candidates:
    parts = weighed.parts
    stream_s = parts[STREAM_S] + parts[DELAY_S] + parts[ROOM_S]
    if len(workers) > MAX_KEPT:
        keep = np.argpartition(parts[COST] + stream_s, MAX_KEPT)[:MAX_KEPT]
        workers, parts, stream_s = workers[keep], parts[:, keep], stream_s[keep]
    return Candidates(
        numbers=workers,
        queue_s=parts[QUEUE_S],
        fetch_s=parts[FETCH_S],
        compute_s=parts[COMPUTE_S],
        others_s=parts[OTHERS_S],
        stream_s=stream_s,
        hit_tokens=parts[HIT_TOKENS],
    )
