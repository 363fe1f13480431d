"""`tandem bench pool` uses a real node and real files, compares what it says, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvpool.arena import Arena
from tandem.bench import peers, pool
from tandem.bench.block_peers import HOST_STORES
from tandem.bench.kv_source import fill
from tandem.bench.pool import Load, disk_metrics, host_metrics, restart_metric
from tandem.bench.pool_disk import DiskWorld, drop_page_cache
from tandem.bench.pool_host import CHAIN_BLOCKS, HostTier, chain
from tandem.bench.report import Metric
from tandem.cli.main import main
from tandem.errors import TandemError
from tests.bench.test_runs import REPOSITORY, bench

SMALL = ("--block-bytes", "65536", "--batch", "16", "--values", "40", "--restart-blocks", "150")
HOST_RATES = {
    "memcpy": [20.0] * 3,
    "host_put": [12.0, 13.0, 12.5],
    "host_get": [15.4, 16.0, 15.0],
    "host_get_alone": [13.0] * 3,
}
DISK_RATES = {"raw_write": [2.0] * 3, "raw_read": [4.0] * 3, "disk_write": [1.5] * 3, "disk_read": [3.0] * 3}


def by_name(found: Iterator[Metric]) -> dict[str, Metric]:
    results = list(found)
    assert len({result.metric for result in results}) == len(results)
    return {result.metric: result for result in results}


# --- what is said ---------------------------------------------------------------------------------------------------


def test_the_host_tier_is_held_against_lmcache() -> None:
    theirs = {"lmcache_host_put": [12.0, 13.0, 12.5], "lmcache_host_get": [14.0] * 3}
    first = {"host_put": 3.0, "lmcache_host_put": 4.0}
    found = by_name(host_metrics(HOST_RATES | theirs, first, {"lmcache_host": "lmcache_host 0.5.6"}))
    assert all(result.ok for result in found.values())
    assert found["host_put_to_lmcache_host"].goal == ">= 1"
    assert found["host_get_to_lmcache_host"].value == pytest.approx(1.1)
    assert (found["host_put_first"].value, found["host_put_first"].ratio) == (3.0, 0.75)
    slower = {"host_put": [12.4] * 3, "host_get": [15.3] * 3}
    found = by_name(host_metrics(HOST_RATES | theirs | slower, first, {"lmcache_host": "lmcache_host 0.5.6"}))
    missed = [name for name, result in found.items() if not result.ok]
    assert missed == ["host_put_to_lmcache_host", "host_get_to_lmcache_host"]


def test_the_host_tier_alone_is_beside_memory() -> None:
    found = by_name(host_metrics(HOST_RATES, {"host_put": 3.0}, {}))
    assert set(found) == {"memcpy", "host_put", "host_get", "host_get_alone", "host_put_first"}
    assert found["host_get"].ratio == pytest.approx(0.77)
    assert found["host_put_first"].reference_value is None


def test_mooncake_is_compared_without_a_promise() -> None:
    theirs = {"mooncake_remote_put": [99.0] * 3, "mooncake_remote_get": [99.0] * 3}
    found = by_name(host_metrics(HOST_RATES | theirs, {"host_put": 3.0}, {"mooncake_remote": "mooncake_remote 0.3"}))
    assert found["host_get_to_mooncake_remote"].value < 0.2
    assert all(result.ok for result in found.values())


def test_the_disk_tier_is_held_against_plain_io_and_lmcache() -> None:
    theirs = {"lmcache_disk_put": [0.6] * 3, "lmcache_disk_get": [1.2] * 3}
    labels = {"lmcache_disk": "lmcache_disk 0.5.6"}
    found = by_name(disk_metrics(DISK_RATES | theirs, labels))
    assert all(result.ok for result in found.values())
    assert found["disk_write"].ratio == found["disk_read"].ratio == 0.75
    assert found["disk_read_to_lmcache_disk"].value == pytest.approx(2.5)
    for name, value in (("disk_write", 1.49), ("disk_read", 2.99)):
        found = by_name(disk_metrics(DISK_RATES | theirs | {name: [value] * 3}, labels))
        assert {metric for metric, result in found.items() if not result.ok} == {name, f"{name}_to_lmcache_disk"}


def test_a_restart_has_two_seconds() -> None:
    found = restart_metric(100_000, [1.0, 1.99, 5.0], [0.5, 0.5, 0.5])
    assert (found.value, found.goal, found.ok, found.reference_value) == (1.99, "< 2 s", True, 0.5)
    assert not restart_metric(100_000, [2.0], [0.5]).ok


# --- tiers ----------------------------------------------------------------------------------------------------------


def test_chains_are_of_two_thousand_tokens_and_of_their_round() -> None:
    blocks = chain("a", CHAIN_BLOCKS + 2)
    assert blocks[1][1] == blocks[0][0]
    assert blocks[CHAIN_BLOCKS][1] == blocks[0][1]
    assert blocks[CHAIN_BLOCKS + 1][1] == blocks[CHAIN_BLOCKS][0]
    assert not {key for key, _ in blocks} & {key for key, _ in chain("b", CHAIN_BLOCKS + 2)}


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(80, 16384)
    fill(arena.array, 1)
    yield arena
    arena.close()


def test_the_host_tier_is_a_node_that_keeps_every_round(arena: Arena) -> None:
    tier = HostTier(arena, 40, 16)
    try:
        for _ in range(3):
            assert tier.put() > 0
            for in_flight in (1, 2):
                arena.array[40:] = 1
                assert tier.get(in_flight) > 0
                assert (arena.array[40:] != 0).any()
    finally:
        tier.close()
    assert not psutil.Process().children()


def test_the_disk_tier_reads_back_what_it_wrote_and_notices_what_it_did_not(arena: Arena, tmp_path: Path) -> None:
    world = DiskWorld(arena, 40, tmp_path / "tier")
    try:
        for _ in range(2):
            assert world.write() > 0
            assert world.read() > 0
        with (tmp_path / "tier" / "segment-00000").open("r+b") as segment:
            segment.write(bytes(64 * 16384))
        drop_page_cache(tmp_path / "tier")
        with pytest.raises(TandemError, match="the DISK tier said LoadFailed"):
            world.read()
    finally:
        world.close()


# --- the command ----------------------------------------------------------------------------------------------------


def test_bench_pool_measures_every_tier_and_leaves_nothing(tmp_path: Path) -> None:
    code, lines, stderr = bench("pool", *SMALL, "--rounds", "1", "--dir", str(tmp_path), timeout_s=60)
    assert lines, stderr
    assert lines[0]["pool"]["tiers"] == ["host", "disk", "restart"]
    found = {line["metric"]: line for line in lines[1:]}
    host = {"memcpy", "host_put", "host_get", "host_get_alone", "host_put_first"}
    assert host | {"disk_write", "disk_read", "restart"} == set(found), stderr
    assert all(line["value"] > 0 for line in found.values())
    assert found["disk_write"]["reference_value"] > 0
    assert found["restart"]["reference_value"] > 0
    assert code == (0 if all(line["ok"] for line in found.values()) else 1)
    assert not any(tmp_path.iterdir())


def test_a_store_that_is_not_installed_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "_REPOSITORY", tmp_path)
    for name in HOST_STORES:
        with pytest.raises(TandemError, match=rf"{name}_\w+ is not installed .*`make peers`"):
            list(pool.run(Load(4096, 4, 8, 8), ["host"], [name], tmp_path, rounds=1, say=lambda line: None))
    assert not any(tmp_path.iterdir())
    assert not psutil.Process().children()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "nixl"), "'nixl' is no peer that this can be measured against (lmcache, mooncake are)"),
        (("--tiers", "device"), "'device' is no tier (host, disk, restart are)"),
        (("--dir", "/no/such/folder"), "--dir /no/such/folder: there is no such folder"),
        (("--values", "1000000000"), "--values is 737280000000000, more than the"),
    ],
)
def test_bench_pool_refuses_what_it_can_not_measure(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "pool", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("number", "tier"), [(signal.SIGTERM, "disk"), (signal.SIGINT, "restart")])
def test_bench_pool_leaves_nothing_when_it_is_interrupted(number: signal.Signals, tier: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tandem.cli", "bench", "pool", *SMALL, "--tiers", tier, "--dir", str(tmp_path)]
    running = subprocess.Popen(
        [*command, "--rounds", "1000"],
        cwd=REPOSITORY, env=os.environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert running.stderr is not None
    with running, running.stderr as progress:
        for line in progress:
            if "round 1 of" in line:
                break
        assert any(tmp_path.iterdir())
        children = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(number)
        assert running.wait(20) != 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not any(tmp_path.iterdir())
