"""What comes to a simulated cluster: a trace, as often and as fast as is asked for.

Owns the jobs made of a trace. A larger cluster gets several copies of it side by side, so that each conversation keeps its own
pace: copies begin at different points, and share only what so many requests of the trace share that it must be everybody's (its
system prompt). How fast the copies pass is what sets the rate.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from random import Random

from kvpool.keys import Key
from tandem.sim.replay import Job
from tandem.sim.trace import BLOCK_TOKENS, TraceRequest

SHARED_PART = 0.1
"""A block that so many of all requests have is everybody's."""


def jobs_of(
    requests: Sequence[TraceRequest], per_s: float, copies: int = 1, seed: int = 1, most: int | None = None
) -> list[Job]:
    """Jobs in the order of their arrival, `per_s` a second on average; only the first `most`, if given."""
    counts = Counter(block for request in requests for block in set(request.hash_ids))
    shared = {block for block, count in counts.items() if count >= SHARED_PART * len(requests)}
    long_s = max(requests[-1].arrival_s, 1e-3)
    faster = per_s * long_s / (copies * len(requests))
    rng = Random(seed)
    arrivals_s, step_s = _spread(requests, rng)
    arrivals: list[tuple[float, int, TraceRequest]] = []
    for copy in range(copies):
        shift_s = rng.random() * long_s if copy else 0.0
        for request, came_s in zip(requests, arrivals_s, strict=True):
            arrivals.append(((came_s + shift_s) % (long_s + step_s + 1e-3) / faster, copy, request))
    arrivals.sort(key=itemgetter(0))
    names = {block: hashlib.blake2b(str(block).encode(), digest_size=16).digest() for block in counts}
    named: list[dict[int, Key]] = [{block: names[block] for block in shared} for _ in range(copies)]
    jobs: list[Job] = []
    for arrival_s, copy, request in arrivals[:most]:
        keys, own = named[copy], copy.to_bytes(2, "big")
        blocks = request.hash_ids[: request.input_length // BLOCK_TOKENS]
        for block in blocks:
            if block not in keys:
                keys[block] = names[block][:14] + own
        chain = tuple([keys[block] for block in blocks])
        jobs.append(Job(arrival_s, request.input_length, max(1, request.output_length), chain, 0))
    return _counted(jobs)


def _spread(requests: Sequence[TraceRequest], rng: Random) -> tuple[list[float], float]:
    """When they came, in their order, and how far apart times are at least. Mooncake rounded its times to three seconds;
    those of one time are spread over the time to the next."""
    times = sorted({request.arrival_s for request in requests})
    step_s = min((later - sooner for sooner, later in pairwise(times)), default=0.0)
    return sorted(request.arrival_s + rng.random() * step_s for request in requests), step_s


def _counted(jobs: Sequence[Job]) -> list[Job]:
    """With what of each is new: the promise is the same for all policies."""
    seen: set[Key] = set()
    counted: list[Job] = []
    for job in jobs:
        num = 0
        for key in job.keys:
            if key not in seen:
                break
            num += 1
        seen.update(job.keys)
        uncached = max(1, job.num_tokens - num * BLOCK_TOKENS)
        counted.append(Job(job.arrival_s, job.num_tokens, job.answer_tokens, job.keys, uncached))
    return counted
