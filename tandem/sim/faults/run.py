"""Seeds in, results out.

Owns the course of one run: requests come and faults strike, then everything heals, and all must come to rest; and what is said of
a run. A seed that failed is run again with its story kept, which is the same run.
"""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

from tandem import clock
from tandem.sim.faults.checks import check_always, check_blocks, unrest
from tandem.sim.faults.clients import Clients, Totals
from tandem.sim.faults.cluster import Cluster
from tandem.sim.faults.faults import Faults
from tandem.sim.faults.shape import Shape
from tandem.sim.faults.story import LogToStory, Story
from tandem.sim.faults.world import BEGIN_S, Violation, World

WARM_UP_S = 2.0
"""Before the first request."""
CHECK_S = 1.0
REST_CHECK_S = 0.5


@dataclass(slots=True)
class Result:
    """How one seed went. `violation` is empty if all held."""

    seed: int
    violation: str = ""
    totals: Totals = field(default_factory=Totals)
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    """How often what was to be tried did happen."""
    virtual_s: float = 0.0
    rest_s: float = 0.0
    """How long it took to come to rest."""
    seconds: float = 0.0
    num_events: int = 0
    digest: str = ""
    story: list[str] = field(default_factory=list)


def run_seed(seed: int, num_requests: int, shape: Shape | None = None, *, keep_story: bool = False) -> Result:
    """One run. Never raises for what happens in it."""
    shape = shape or Shape()
    story = Story(kept=keep_story)
    world = World(seed, story)
    result = Result(seed)
    began_s = perf_counter()
    with LogToStory(story) as log, clock.replaced(world.local_now_s):
        log.time_s = lambda: world.now_s - BEGIN_S
        log.who = lambda: world.current.name if world.current is not None else ""
        clients = Clients(world, shape)
        cluster = Cluster(world, shape, clients.show, clients.lost)
        clients.connect(cluster)
        faults = Faults(world, cluster, clients)
        try:
            _run(world, cluster, clients, faults, num_requests, result)
        except Violation as violation:
            result.violation = str(violation)
        except Exception as error:  # production code raised: a violation too
            where = "".join(traceback.format_exception(error)[-6:])
            result.violation = f"{type(error).__name__}: {error}\n{where}"
        finally:
            if result.violation:
                world.tell(f"VIOLATION {result.violation}")
            cluster.close()
    result.totals, result.faults = clients.totals, faults.counts
    result.virtual_s = world.now_s - BEGIN_S
    result.seconds = perf_counter() - began_s
    result.num_events = world.num_events
    result.digest = story.digest
    result.story = story.lines
    network, memories = cluster.network, cluster.memories
    result.seen = Counter(
        lost=network.num_lost,
        doubled=network.num_doubled,
        reordered=network.num_reordered,
        corrupted=memories.num_corrupted,
        late_writes=memories.num_late_writes,
        reads=cluster.reads.num_reads,
        resumed=clients.totals.num_resumed,
    )
    return result


def _run(world: World, cluster: Cluster, clients: Clients, faults: Faults, num_requests: int, result: Result) -> None:
    rng = world.generator("arrivals")
    shape = cluster.shape
    end_s = world.now_s + WARM_UP_S
    world.run_until(end_s)
    at_s = end_s
    for number in range(num_requests):
        at_s += rng.expovariate(shape.requests_per_s)
        world.at(at_s, clients.ask)
        if shape.requests_per_fault and number % shape.requests_per_fault == shape.requests_per_fault // 2:
            world.at(at_s, faults.strike)
    while world.now_s < at_s:
        world.run_until(min(at_s, world.now_s + CHECK_S))
        check_always(cluster)
    healed_s = world.now_s
    faults.heal()
    while True:
        world.run_until(world.now_s + REST_CHECK_S)
        check_always(cluster)
        left = list(unrest(cluster, clients))
        if not left:
            break
        if world.now_s - healed_s > shape.rest_s:
            raise Violation(f"after {shape.rest_s:g} s without faults: " + "; ".join(left))
    result.rest_s = world.now_s - healed_s
    check_blocks(cluster)


def run_seeds(
    first_seed: int, num_seeds: int, num_requests: int, shape: Shape | None = None, *, tell: bool = False
) -> Iterator[Result]:
    """One after the other. The story of a seed that failed comes with its result; with `tell` every story does."""
    for seed in range(first_seed, first_seed + num_seeds):
        result = run_seed(seed, num_requests, shape, keep_story=tell)
        if result.violation and not tell:
            result.story = run_seed(seed, num_requests, shape, keep_story=True).story
        gc.collect()
        yield result
