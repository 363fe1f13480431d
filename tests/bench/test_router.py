"""The router bench: its load, what it says of what it found, and the command with a small index."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tandem.bench.report import Metric
from tandem.bench.router.index import Found
from tandem.bench.router.load import ASKED_BLOCKS, IndexLoad
from tandem.bench.router.run import metrics, named
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
    assert all(line["value"] > 0 for line in results.values())
    assert code == (0 if all(line["ok"] for line in results.values()) else 1)
