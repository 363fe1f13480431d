"""`tandem bench transfer` compares what it says, in turns; a peer's words are believed only if its bytes were right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tandem.bench import peers, transfer
from tandem.bench.block_peers import MOVERS, BlockPeer, Move, Moved, RunningPeer
from tandem.bench.kv_source import SourceProcess, TransportName
from tandem.bench.peers import Peer
from tandem.bench.report import Metric
from tandem.bench.rounds import beside, in_rounds, times_a_peer
from tandem.bench.transfer import shape_of
from tandem.bench.transfer_limits import perftest_rate
from tandem.bench.transfer_report import SMALL_LOADS, Cost, Shape, SmallLoad, cost_metrics, metrics
from tandem.cli.main import main
from tandem.errors import ConfigError, TandemError
from tests.bench.test_runs import REPOSITORY, bench
from tests.kvpool.processes import wait_for

HALF = REPOSITORY / "benchmarks" / "peers"
ALL: tuple[TransportName, ...] = ("shm", "ucx", "tcp", "tls")
RATES = {
    "memcpy": [10.0, 12.0, 11.0],
    "shared_memory_numpy": [9.0, 9.0, 9.0],
    "raw_sockets": [4.0, 4.0, 4.0],
    "ucx_perftest": [6.0, 6.0, 6.0],
    "shm": [8.25, 9.0, 8.0],
    "shm_no_checksum": [9.35, 9.9, 9.0],
    "ucx": [4.8, 4.8, 4.8],
    "tcp": [3.4, 3.4, 3.4],
    "tls": [1.0, 1.0, 1.0],
    **{f"fetch_{name}": [2.0, 2.0, 2.0] for name in ALL},
}


def by_name(found: Iterator[Metric]) -> dict[str, Metric]:
    results = list(found)
    assert len({result.metric for result in results}) == len(results)
    return {result.metric: result for result in results}


# --- turns and comparisons ------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def turn(name: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            order.append(name)
            return {name: float(len(order)), f"{name}_too": 0.0}

        return run

    said: list[str] = []
    reached, first = in_rounds([turn("a"), turn("b")], 2, said.append)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert reached == {"a": [3.0, 6.0], "b": [4.0, 5.0], "a_too": [0.0, 0.0], "b_too": [0.0, 0.0]}
    assert first == {"a": 2.0, "b": 1.0, "a_too": 0.0, "b_too": 0.0}
    assert said == ["a round to warm up", "round 1 of 2", "round 2 of 2"]


def test_a_rate_is_held_against_its_part_of_the_reference() -> None:
    exact = beside("x", [3.0, 9.0, 6.0], "GB/s", reference="r", reference_values=[8.0, 8.0, 1.0], at_least=0.75)
    assert (exact.value, exact.reference_value, exact.ratio, exact.ok) == (6.0, 8.0, 0.75, True)
    assert not beside("x", [5.9], "GB/s", reference="r", reference_values=[8.0], at_least=0.75).ok
    assert beside("x", [0.1], "GB/s", reference="r", reference_values=[8.0]).ok


def test_a_peer_is_compared_round_by_round() -> None:
    found = times_a_peer("x", [2.0, 3.0, 10.0], "peer 1.0", [1.0, 3.0, 2.0], 2.0)
    assert (found.value, found.unit, found.ok, found.goal) == (2.0, "x", True, ">= 2")
    assert not times_a_peer("x", [1.9], "peer 1.0", [1.0], 2.0).ok


# --- what is said ---------------------------------------------------------------------------------------------------


def test_every_transport_is_beside_its_limit_and_at_its_goal() -> None:
    found = by_name(metrics(Shape(), ALL, RATES, {}))
    assert all(result.ok for result in found.values())
    goals = {name: (result.ratio, result.goal) for name, result in found.items() if result.goal}
    assert goals == {
        "shm": (pytest.approx(0.75), "ratio >= 0.75"),
        "shm_no_checksum": (pytest.approx(0.85), "ratio >= 0.85"),
        "tcp": (pytest.approx(0.85), "ratio >= 0.85"),
    }
    assert found["ucx"].reference_value == 6.0
    assert found["tls"].ratio == 0.25
    assert found["fetch_tcp"].reference_value == 3.4


@pytest.mark.parametrize(("name", "value"), [("shm", 8.2), ("shm_no_checksum", 9.3), ("tcp", 3.39)])
def test_a_transport_below_its_goal_is_not_ok(name: str, value: float) -> None:
    found = by_name(metrics(Shape(), ALL, RATES | {name: [value] * 3}, {}))
    assert [metric for metric, result in found.items() if not result.ok] == [name]


def test_a_peer_counts_with_its_better_direction() -> None:
    theirs = {
        "nixl_shm_read": [8.0] * 3, "nixl_shm_write": [7.0] * 3, "nixl_tcp_read": [1.0] * 3, "nixl_tcp_write": [2.9] * 3,
        "mooncake_tcp_read": [3.1] * 3, "mooncake_tcp_write": [2.0] * 3,
    }  # fmt: skip
    found = by_name(metrics(Shape(), ALL, RATES | theirs, {name: f"{name} 1.0" for name in theirs}))
    assert found["shm_no_checksum_to_nixl_shm"].value == pytest.approx(9.35 / 8)
    assert found["shm_no_checksum_to_nixl_shm"].ok
    assert found["ucx_to_nixl_tcp"].value == pytest.approx(4.8 / 2.9)
    assert found["ucx_to_nixl_tcp"].ok
    assert found["ucx_to_mooncake_tcp"].reference == "mooncake_tcp_read 1.0, round by round"
    assert not found["ucx_to_mooncake_tcp"].ok


def test_a_transport_that_is_not_asked_for_is_not_compared() -> None:
    rates = {name: rates for name, rates in RATES.items() if "ucx" not in name and "shm" not in name}
    labels = {"nixl_tcp_read": "nixl 1", "nixl_tcp_write": "nixl 1"}
    found = by_name(metrics(Shape(), ("tcp",), rates | dict.fromkeys(labels, [1.0] * 3), labels))
    assert set(found) == {"memcpy", "shared_memory_numpy", "raw_sockets", "tcp", "fetch_tcp", *labels}


def test_a_block_costs_what_both_sides_spend() -> None:
    some, many, alone = SMALL_LOADS
    assert (some.batch, many.batch, alone.batch, alone.in_flight) == (16, 64, 16, 1)
    costs: dict[tuple[TransportName, SmallLoad], list[Cost]] = {
        ("shm", some): [Cost(6, 4.1, 12)],
        ("shm", many): [Cost(6, 4, 12)],
        ("shm", alone): [Cost(60, 40, 120)],
    }
    found = by_name(cost_metrics(("shm",), costs))
    assert found["cpu_shm_batch_16_alone"].goal is None
    assert found["cpu_shm_batch_16"].value == 10.1
    assert not found["cpu_shm_batch_16"].ok
    assert found["cpu_shm_batch_64"].ok
    assert found["cpu_shm_batch_64"].reference_value == 12
    assert (found["cpu_shm_batch_64_sink"].value, found["cpu_shm_batch_64_source"].value) == (6, 4)


PERFTEST = """
|     Test     | # iterations | 50.0%ile | average | overall |  average |  overall |  average  |  overall  |
+--------------+--------------+----------+---------+---------+----------+----------+-----------+-----------+
[thread 0]              1000      5.608    56.342    56.342     1000.00    1000.00       17749       17749
{label}                 3000      5.608    56.342    56.342     6239.83    6000.00       17749       17749
"""


@pytest.mark.parametrize("label", ["      ", "Final:"])
def test_ucx_perftest_is_read_in_its_own_megabytes(label: str) -> None:
    assert perftest_rate(PERFTEST.format(label=label)) == pytest.approx(6000 * 2**20 / 1e9)


def test_a_perftest_without_a_result_is_an_error_with_its_words() -> None:
    with pytest.raises(TandemError, match="said no result: connection refused"):
        perftest_rate("connection refused\n")


def test_arenas_hold_at_least_a_batch() -> None:
    assert shape_of(4096, 64, 1 << 20, 5).num_blocks == 256
    with pytest.raises(ConfigError, match="hold 16 blocks of 65536, not 64"):
        shape_of(65536, 64, 1 << 20, 5)


# --- processes ------------------------------------------------------------------------------------------------------


def test_a_source_is_mapped_as_it_is_and_ends_with_its_parent() -> None:
    with SourceProcess(8, 4096, ["shm"]) as source:
        assert source.source.endpoints.shm
        array = source.map_arena().array
        assert array.shape == (8, 4096)
        assert not array.flags.writeable
        assert len({bytes(slab) for slab in array}) == 8
        assert source.cpu().process_s > 0
        process = psutil.Process(source.pid)
    assert not process.is_running()


MOVER = f"""
import random, sys
sys.path.insert(0, {str(HALF)!r})
from multiprocessing import Pipe
from threading import Thread
from blocks import Mover, answer_blocks, arguments, filled, serve
from child import own_stdout

options = arguments()
answers = own_stdout()
arena, theirs = (filled(options.num_blocks, options.slab_bytes, seed) for seed in (1, 2))
here, there = Pipe()
Thread(target=answer_blocks, args=(theirs, there), daemon=True).start()

class Engine:
    def read(self, remote, local):
        arena[local] = theirs[remote]
        return 0.5

    def write(self, remote, local):
        theirs[remote[1:]] = arena[local[1:]]
        return 0.25

serve(answers, "1.2", Mover(Engine(), arena, here, options.batch_blocks, random.Random(1)).operations())
"""
STORE = f"""
import sys
sys.path.insert(0, {str(HALF)!r})
import numpy as np
from blocks import arguments, filled, serve
from child import own_stdout
from stores import operations

options = arguments()
answers = own_stdout()
source = filled(options.num_blocks, options.slab_bytes, 1)
target = np.zeros_like(source)
kept = {{}}

class Store:
    def forget(self): kept.clear()
    def put(self, rows): kept.update((row, source[row].copy()) for row in rows)
    def wait_until_put(self): assert len(kept) == options.num_blocks
    def before_get(self): pass
    def get(self, rows):
        for row in rows:
            target[row] = kept[row]
        if options.way == "liar":
            target[rows[-1], -1] ^= 1

serve(answers, "3", operations(Store(), source, target, options.batch_blocks))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningPeer]]:
    """Starts a peer that runs the given source."""
    started: list[RunningPeer] = []

    def run(source: str, kind: BlockPeer) -> RunningPeer:
        script = tmp_path / "peer.py"
        script.write_text(source)
        options = ["--slab-bytes", "4096", "--batch-blocks", "3", "--num-blocks", "8", "--way", kind.way]
        started.append(RunningPeer(kind, Peer("fake", [sys.executable, str(script), *options])))
        return started[-1]

    yield run
    for peer in started:
        peer.process.close()


def test_a_peers_batches_are_timed_and_its_bytes_compared(start: Callable[..., RunningPeer]) -> None:
    peer = start(MOVER, BlockPeer("fake", "", "", "", ("read", "write")))
    assert peer.label == "fake 1.2"
    assert peer.seconds("read", 4) == [0.5] * 4
    assert peer.rate("read", 10**9, 2) == 2.0
    with pytest.raises(TandemError, match="the bytes that were moved differ"):
        peer.seconds("write", 1)


def test_a_store_gives_back_what_it_was_given(start: Callable[..., RunningPeer]) -> None:
    peer = start(STORE, BlockPeer("fake", "", "", "", ("put", "get")))
    for operation in ("put", "get", "put", "get"):
        assert len(peer.seconds(operation, 1)) == 1
    liar = start(STORE, BlockPeer("fake", "", "", "liar", ("put", "get")))
    liar.seconds("put", 1)
    with pytest.raises(TandemError, match="what came back differs from what was put"):
        liar.seconds("get", 1)


def test_a_peer_that_spins_is_stopped_between_its_turns(start: Callable[..., RunningPeer]) -> None:
    peer = start(MOVER, BlockPeer("fake", "", "", "", ("read",), spins=True))
    process = psutil.Process(peer.process.pid)
    wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
    assert peer.seconds("read", 1) == [0.5]
    wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
    peer.process.close()
    assert not process.is_running()


def test_an_answer_of_no_time_is_none(start: Callable[..., RunningPeer]) -> None:
    peer = start("print('{\"t\": \"ready\", \"version\": \"1\"}', flush=True); input(); "
                 "print('{\"t\": \"moved\", \"seconds\": [0]}', flush=True); input()",
                 BlockPeer("fake", "", "", "", ("read",)))  # fmt: skip
    with pytest.raises(TandemError, match="which is no answer"):
        peer.process.ask(Move("read", 1), Moved, "answered")


def test_a_peer_that_is_not_installed_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "_REPOSITORY", tmp_path)
    for name in MOVERS:
        with pytest.raises(TandemError, match=rf"{name}_\w+ is not installed .*`make peers`"):
            list(transfer.run(Shape(), ["shm"], [name], rounds=1, say=lambda line: None))
    assert not psutil.Process().children()


# --- the command ----------------------------------------------------------------------------------------------------

SMALL = ("--block-bytes", "65536", "--batch", "16", "--arena-mib", "4", "--batches", "2")


def test_bench_transfer_measures_every_transport_beside_its_limit() -> None:
    code, lines, stderr = bench("transfer", *SMALL, "--rounds", "1", timeout_s=60)
    assert lines, stderr
    assert lines[0]["transfer"] == {
        "transports": list(ALL), "block_bytes": 65536, "batch": 16, "arena_blocks": 64,
    }  # fmt: skip
    found = {line["metric"]: line for line in lines[1:]}
    assert set(RATES) <= set(found), stderr
    assert all(line["value"] > 0 for line in found.values())
    assert {f"cpu_{name}_batch_{batch}" for name in ALL for batch in (16, 64)} <= set(found)
    assert code == (0 if all(line["ok"] for line in found.values()) else 1)
    assert "round 1 of 1" in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "lmcache"), "'lmcache' is no peer that this can be measured against (nixl, mooncake are)"),
        (("--transports", "shm,rdma"), "'rdma' is no transport (shm, ucx, tcp, tls are)"),
        (("--transports", ","), "no transport is named"),
        (("--arena-mib", "1"), "arenas of 1048576 bytes hold 2 blocks of 368640, not 64"),
    ],
)
def test_bench_transfer_refuses_what_it_can_not_measure(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "transfer", *options, "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


def test_bench_transfer_leaves_nothing_when_it_is_killed_politely(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tandem.cli", "bench", "transfer", *SMALL, "--transports", "tcp,tls"]
    running = subprocess.Popen(
        [*command, "--rounds", "1000"],
        cwd=REPOSITORY, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert running.stderr is not None
    with running, running.stderr as progress:
        for line in progress:
            if "round 1 of" in line:
                break
        children = psutil.Process(running.pid).children(recursive=True)
        assert len(children) == 2
        assert any(path.name.startswith("tandem-bench-") for path in tmp_path.iterdir())
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) != 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not any(path.name.startswith("tandem-bench-") for path in tmp_path.iterdir())
