"""The router bench: its load, what it says of what it found, and the command with a small index."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvpool.keys import prompt_keys
from router.planner import root_of
from tandem.bench.report import Metric
from tandem.bench.router.decision import BLOCK_SIZE, GROUP, Decided, FullRouter
from tandem.bench.router.index import Found
from tandem.bench.router.load import ASKED_BLOCKS, IndexLoad
from tandem.bench.router.run import decision_metrics, metrics, named
from tandem.errors import ConfigError
from tests.bench.test_runs import bench


def found(**changes: float) -> Found:
    values = {
        "hits_per_s": 150.0, "hit_p50": 6.0, "hit_p99": 7.0, "misses_per_s": 500.0, "events_per_s": 90.0, "bytes_per_entry": 80.0,
    } | changes  # fmt: skip
    return Found(**values, entries=1000)


def by_name(results: Iterator[Metric]) -> dict[str, Metric]:
    return {result.metric: result for result in results}


def test_the_load_is_as_large_as_asked_and_its_queries_are_there() -> None:
    load = IndexLoad(workers=8, entries=150_000, holders=3, seed=5)
    held: dict[int, set[bytes]] = {worker: set() for worker in range(8)}
    num_entries = 0
    for event in load.events():
        if event.parent is not None:
            assert event.parent in held[event.worker], "a chain has no gap"
        held[event.worker].update(event.keys)
        num_entries += len(event.keys)
    assert 150_000 <= num_entries < 150_032
    for query in load.hits(20):
        assert len(query) == ASKED_BLOCKS
        longest = max(next(i for i, key in enumerate(query) if key not in keys) for keys in held.values())
        assert longest == 96
    assert not any(query[0] in keys for query in load.misses(20) for keys in held.values())


def test_ours_is_held_against_its_peer_and_its_promises() -> None:
    results = by_name(metrics([found()] * 3, [found(hits_per_s=100.0)] * 3, "dynamo 1"))
    assert results["index_hits_to_dynamo"].value == pytest.approx(1.5)
    assert all(result.ok for result in results.values())
    results = by_name(metrics([found(bytes_per_entry=89.0)], [found(hits_per_s=101.0)], "dynamo 1"))
    assert {name for name, result in results.items() if not result.ok} == {"index_bytes", "index_hits_to_dynamo"}
    assert "dynamo_hits" not in by_name(metrics([found()], [], ""))


def test_whole_decisions_have_a_goal_by_the_number_of_workers_and_against_the_peer() -> None:
    ours, theirs = Decided(per_s=9_000.0, p50=100.0, p99=300.0), Decided(per_s=5_000.0, p50=170.0, p99=200.0)
    assert {result.metric: result.ok for result in decision_metrics([ours], [], "", 64)} == {
        "decisions": True, "decision_p50": True, "decision_p99": False,
    }  # fmt: skip
    results = by_name(decision_metrics([ours], [theirs], "dynamo", 1024))
    assert all(result.ok for result in results.values())
    assert results["decisions_to_dynamo"].value == 1.8
    slower = by_name(decision_metrics([theirs], [ours], "dynamo", 1024))
    assert not slower["decisions_to_dynamo"].ok


def test_a_full_router_finds_what_its_workers_hold_and_frees_what_it_sent() -> None:
    router = FullRouter(workers=8, entries=30_000, holders=2, seed=1)
    assert router.core.index.num_entries >= 30_000
    keys = prompt_keys(root_of(GROUP), router.prompts[0], BLOCK_SIZE).full
    hits = router.core.index.longest(keys)
    assert sorted(int(hits.counts[holder].sum()) for holder in hits.holders) == [64, 96]
    assert router.decide(0) > 0.0
    assert router.core.fleet.num_dispatched() == 0
    assert router.core.num_closing == 0


def test_other_peers_are_refused() -> None:
    assert named(["dynamo"])
    assert not named([])
    with pytest.raises(ConfigError, match="'sglang' is no peer"):
        named(["sglang"])


def test_bench_router_measures_an_index_in_a_process_of_its_own() -> None:
    code, lines, stderr = bench("router", "--entries", "100000", "--workers", "4", "--rounds", "1", timeout_s=60)
    results = {line["metric"]: line for line in lines[1:]}
    assert lines[0]["router"] == {"workers": 4, "entries": 100_000, "holders": 8}, stderr
    assert {"index_hits", "index_hit_p99", "index_misses", "index_events", "index_bytes"} <= set(results)
    assert {"decisions", "decision_p50", "decision_p99"} <= set(results)
    assert all(line["value"] > 0 for line in results.values())
    assert code == (0 if all(line["ok"] for line in results.values()) else 1)
