"""`tandem bench router`: the prefix index and whole decisions, by workers and blocks, beside NVIDIA Dynamo's.

Owns what is compared with what, the order and the goals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from statistics import median

from tandem.bench.peers import Peer
from tandem.bench.report import Metric, Say, metric
from tandem.bench.rounds import times_a_peer
from tandem.bench.router import decision, index
from tandem.bench.router.decision import Decided
from tandem.bench.router.index import Found
from tandem.errors import ConfigError

HITS_TO_DYNAMO = 1.5
EVENTS_TO_DYNAMO = 1.0
QUERIES = 10_000
DECISIONS_TO_DYNAMO = 1.5
DECISIONS = 5_000
DECISION_P99_US = ((64, 250.0), (1 << 20, 1000.0))
"""Goals, by up to how many workers."""
MAX_PEER_ENTRIES = 1_000_000
"""Past this the events that a peer takes, with their tokens, take minutes to make."""
_SETTLED = "longest hit of 128 blocks"


def named(names: Sequence[str]) -> bool:
    """Whether Dynamo is among them. Raises ConfigError for any other."""
    for name in names:
        if name != "dynamo":
            raise ConfigError(f"{name!r} is no peer that the router can be measured against (dynamo is)")
    return bool(names)


def run(workers: int, entries: int, holders: int, against: bool, *, rounds: int, say: Say) -> Iterator[Metric]:
    """Measures `rounds` rounds, each with names of its own, ours and the peer's in turns, and yields what was found. Raises
    TandemError for a peer that isn't installed, or that fails."""
    with ExitStack() as running:
        contenders: dict[str, Peer] = {"tandem": running.enter_context(index.ours())}
        if against:
            contenders["dynamo"] = running.enter_context(index.dynamo())
        found: dict[str, list[Found]] = {name: [] for name in contenders}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name in list(contenders)[:: -1 if number % 2 else 1]:
                found[name].append(index.measure(contenders[name], workers, entries, holders, QUERIES, number))
        label = f"dynamo {contenders['dynamo'].version}, RadixTree through Python" if against else ""
    yield from metrics(found["tandem"], found.get("dynamo", []), label)
    if against and entries > MAX_PEER_ENTRIES:
        say(f"dynamo's whole decisions are not measured with more than {MAX_PEER_ENTRIES:,} blocks")
        against = False
    yield from _decisions(workers, entries, holders, against, rounds, say)


def _decisions(workers: int, entries: int, holders: int, against: bool, rounds: int, say: Say) -> Iterator[Metric]:
    with ExitStack() as running:
        contenders: dict[str, Peer] = {"tandem": running.enter_context(decision.ours())}
        if against:
            contenders["dynamo"] = running.enter_context(decision.dynamo())
        found: dict[str, list[Decided]] = {name: [] for name in contenders}
        for number in range(rounds):
            say(f"whole decisions, round {number + 1} of {rounds}")
            for name in list(contenders)[:: -1 if number % 2 else 1]:
                found[name].append(decision.measure(contenders[name], workers, entries, holders, DECISIONS, number))
        label = f"dynamo {contenders['dynamo'].version}, select, reserve and free" if against else ""
    yield from decision_metrics(found["tandem"], found.get("dynamo", []), label, workers)


def decision_metrics(ours: Sequence[Decided], theirs: Sequence[Decided], label: str, workers: int) -> Iterator[Metric]:
    """Of whole decisions."""
    note = "2,048 tokens: keys, line, index, policy, fleet, messages; and freed again"
    per_s = [decided.per_s for decided in ours]
    yield metric("decisions", per_s, "a second", reference=note)
    yield metric("decision_p50", [decided.p50 for decided in ours], "us")
    goal = next(goal for limit, goal in DECISION_P99_US if workers <= limit)
    p99 = [decided.p99 for decided in ours]
    yield metric("decision_p99", p99, "us", goal=f"<= {goal:g}", ok=median(p99) <= goal)
    if theirs:
        yield metric("dynamo_decisions", [decided.per_s for decided in theirs], "a second", reference=label)
        yield metric("dynamo_decision_p99", [decided.p99 for decided in theirs], "us", reference=label)
        yield times_a_peer(
            "decisions_to_dynamo", per_s, label, [decided.per_s for decided in theirs], DECISIONS_TO_DYNAMO
        )


def metrics(ours: Sequence[Found], theirs: Sequence[Found], label: str) -> Iterator[Metric]:
    """From what was found round by round; `theirs` is empty without a peer."""
    shape = f"{ours[0].entries} entries"
    hits = [found.hits_per_s for found in ours]
    yield metric("index_hits", hits, "queries/s", reference=f"{_SETTLED}, {shape}")
    yield metric("index_hit_p50", [found.hit_p50 for found in ours], "us", reference=f"{_SETTLED}, {shape}")
    yield metric("index_hit_p99", [found.hit_p99 for found in ours], "us", reference=f"{_SETTLED}, {shape}")
    yield metric(
        "index_misses", [found.misses_per_s for found in ours], "queries/s", reference="128 blocks that nobody has"
    )
    events = [found.events_per_s for found in ours]
    yield metric(
        "index_events", events, "events/s", reference="of 32 blocks, by ZeroMQ from another process, until applied"
    )
    sizes = [found.bytes_per_entry for found in ours]
    yield metric(
        "index_bytes",
        sizes,
        "bytes an entry",
        reference="resident memory" + (f"; beside it {label}" if theirs else ""),
        reference_values=[found.bytes_per_entry for found in theirs],
        goal="<= 88",
        ok=median(sizes) <= 88,
    )
    if theirs:
        yield metric("dynamo_hits", [found.hits_per_s for found in theirs], "queries/s", reference=label)
        yield metric("dynamo_hit_p99", [found.hit_p99 for found in theirs], "us", reference=label)
        yield metric("dynamo_misses", [found.misses_per_s for found in theirs], "queries/s", reference=label)
        note = f"{label}, in its process, from JSON"
        yield metric("dynamo_events", [found.events_per_s for found in theirs], "events/s", reference=note)
        yield times_a_peer("index_hits_to_dynamo", hits, label, [found.hits_per_s for found in theirs], HITS_TO_DYNAMO)
