"""The pool node with a DISK tier, as a process: what it keeps, says, brings up, forgets and refuses."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from kvpool.tiers.disk.directory import Directory
from kvpool.tiers.disk.journal import Entry
from protos import control
from protos.control import Fetch, Peers, RoutingGroup
from tandem.clock import now_s
from tandem.zmq_io import identity
from tests.kvpool.child import REPOSITORY
from tests.kvpool.disk_blocks import CHAIN, key_of, parent_of
from tests.kvpool.named_blocks import SIZE
from tests.kvpool.node_world import GROUP, SLAB, Node, Watcher, Worker, World

FIRST = list(range(24))
MORE = list(range(CHAIN, CHAIN + 24))


def keys_of(numbers: list[int]) -> set[bytes]:
    return {key_of(number) for number in numbers}


def start(world: World, *, slots: int = 128, **options: object) -> Node:
    return world.start_node(**world.disk_options(world.path / "disk", slots=slots, **options))


def fill_host(world: World, node: Node, worker: Worker) -> None:
    """Pushes everything else out of HOST, where `FIRST` was, and down."""
    watcher = Watcher(world, node.source)
    others = list(range(1000, 1032))
    worker.put(others)
    world.wait(lambda: watcher.held["HOST"] == keys_of(others))
    node.wait_for_counters(stored_blocks=len(FIRST) + len(others))
    watcher.close()


def test_blocks_that_are_only_on_disk_come_up_for_whoever_fetches_them(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world)
    worker.put(FIRST)
    node.wait_for_counters(stored_blocks=len(FIRST))
    fill_host(world, node, worker)
    watcher = Watcher(world, node.source)
    world.wait(lambda: watcher.num_replies)  # in the middle of a replay they are in both still
    assert keys_of(FIRST) <= watcher.held["DISK"]
    assert not keys_of(FIRST) & watcher.held["HOST"]
    reader = Worker(world, "decode-1")
    assert reader.fetch(node.source, FIRST[:16]) == set(FIRST[:16])
    load, counters = node.heartbeat().load, node.heartbeat().counters
    assert load.disk_blocks >= load.disk_used_blocks >= len(FIRST)
    assert counters.loaded_blocks >= 16
    assert counters.fetch_misses == 0
    assert keys_of(FIRST[:16]) <= watcher.held["HOST"], "they are announced there again"
    node.wait_for_counters(stored_blocks=56)
    world.wait(lambda: worker.kept == keys_of([*FIRST, *range(1000, 1032)]))


def test_two_readers_of_one_block_on_disk_and_one_of_none(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world, pool__disk__read_ahead_blocks=0)
    worker.put(FIRST)
    node.wait_for_counters(stored_blocks=len(FIRST))
    fill_host(world, node, worker)
    readers = [Worker(world, f"reader-{number}") for number in range(3)]
    fetches = [reader.start_fetch(node.source, [0, 1]) for reader in readers[:2]]
    nothing = readers[2].start_fetch(node.source, [500_000])
    world.wait(lambda: readers[2].is_over(nothing))
    world.wait(lambda: all(reader.is_over(one) for reader, one in zip(readers, fetches, strict=False)))
    assert [reader.take(one) for reader, one in zip(readers, fetches, strict=False)] == [keys_of([0, 1])] * 2
    assert readers[2].take(nothing) == set()
    assert node.heartbeat().counters.loaded_blocks == 2


def test_a_worker_hears_at_once_of_what_is_kept(world: World) -> None:
    world.heartbeat_s = 10.0  # without it, and without a disk, nothing else makes the node look up
    worker = Worker(world, "decode-0")
    world.start_node()
    waits: list[float] = []
    for number in range(6):
        began_s = now_s()
        worker.put([number])
        world.wait(lambda number=number: key_of(number) in worker.kept)
        waits.append(now_s() - began_s)
    assert min(waits) < 0.05, waits


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_node_that_starts_again_announces_and_serves_what_its_disk_holds(world: World, end: int) -> None:
    worker = Worker(world, "decode-0")
    node = start(world)
    worker.put(FIRST)
    if end == signal.SIGKILL:
        node.wait_for_counters(stored_blocks=len(FIRST))
    else:
        world.wait(lambda: worker.kept == keys_of(FIRST))  # some may not be on disk yet: a clean stop sees to that
    node.kill(end)
    worker.kept.clear()

    node = start(world)
    watcher = Watcher(world, node.source)
    world.wait(lambda: watcher.held["DISK"] == keys_of(FIRST))
    assert watcher.held["HOST"] == set()
    world.wait(lambda: worker.kept == keys_of(FIRST))
    assert node.heartbeat().counters.fetched_blocks == 0, "kept without a transfer"
    reader = Worker(world, "decode-1")
    assert reader.fetch(node.source, FIRST) == set(FIRST)


def test_a_clean_stop_writes_back_what_host_holds(world: World) -> None:
    worker = Worker(world, "decode-0")
    options = {"pool__disk__policy": "write-back", "host_blocks": 64}
    node = start(world, **options)
    worker.put(FIRST)
    world.wait(lambda: worker.kept == keys_of(FIRST))
    assert node.heartbeat().counters.stored_blocks == 0, "there is room in HOST"
    node.kill(signal.SIGTERM)
    node = start(world, **options)
    watcher = Watcher(world, node.source)
    world.wait(lambda: watcher.held["DISK"] == keys_of(FIRST))


def test_after_hits_only_what_is_fetched_goes_to_disk(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world, pool__disk__policy="after-hits", pool__disk__hits=2)
    worker.put(FIRST)
    world.wait(lambda: worker.kept == keys_of(FIRST))
    reader = Worker(world, "decode-1")
    assert reader.fetch(node.source, FIRST[:8]) == set(FIRST[:8])
    assert reader.fetch(node.source, FIRST[:4]) == set(FIRST[:4])
    watcher = Watcher(world, node.source)
    world.wait(lambda: watcher.held["DISK"] == keys_of(FIRST[:4]))
    assert node.heartbeat().counters.stored_blocks == 4


def test_workers_are_told_when_the_last_copy_is_gone_and_when_there_is_one_again(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world, slots=32)
    watcher = Watcher(world, node.source)
    worker.put(FIRST)
    world.wait(lambda: worker.kept == keys_of(FIRST))
    for first in range(1000, 1000 + 5 * CHAIN, CHAIN):
        worker.put(list(range(first, first + 16)))
        everything = keys_of([*FIRST, *range(1000, first + 16)])
        world.wait(lambda everything=everything: worker.kept == watcher.all & everything)
    world.wait(lambda: not keys_of(FIRST) & (watcher.all | worker.kept))
    worker.forget()
    worker.put(FIRST)
    world.wait(lambda: keys_of(FIRST) <= worker.kept)


def test_what_one_worker_delivered_is_kept_for_all_that_announce_it(world: World) -> None:
    workers = [Worker(world, f"decode-{number}") for number in range(2)]
    node = start(world)
    workers[0].put(FIRST, corrupt=FIRST)
    node.wait_for_counters(fetch_corrupt=8)
    assert workers[0].kept == set()
    workers[1].put(FIRST)
    world.wait(lambda: workers[0].kept == workers[1].kept == keys_of(FIRST))


def test_a_block_that_rots_on_disk_is_a_miss_and_gone_for_good(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world, pool__disk__read_ahead_blocks=0)
    worker.put(FIRST)
    node.wait_for_counters(stored_blocks=len(FIRST))
    node.kill()
    segment = world.path / "disk" / "segment-00000"
    with segment.open("r+b") as file:
        file.seek(
            SLAB * len(FIRST) - 1 - 100
        )  # of the last of them, if slots are taken in order; else of some other one
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    world.workers.remove(worker)  # nobody brings it back

    node = start(world, pool__disk__read_ahead_blocks=0)
    watcher = Watcher(world, node.source)
    world.wait(lambda: watcher.held["DISK"] == keys_of(FIRST))
    reader = Worker(world, "decode-1")
    good = reader.fetch(node.source, FIRST)
    assert len(good) == len(FIRST) - 1
    node.wait_for_counters(corrupt_blocks=1)
    [bad] = set(FIRST) - good
    world.wait(lambda: key_of(bad) not in watcher.all)
    assert reader.fetch(node.source, [bad]) == set()
    node.kill()
    node = start(world)
    assert Worker(world, "decode-2").fetch(node.source, [bad]) == set()
    world.workers.append(worker)


def test_idle_blocks_end_in_both_tiers_and_stay_away_after_a_restart(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world, pool__ttl_s=1.0)
    watcher = Watcher(world, node.source)
    worker.put(FIRST)
    world.wait(lambda: worker.kept == keys_of(FIRST))
    world.wait(lambda: not watcher.all | worker.kept)
    node.kill()
    node = start(world)  # no time to live any more: what is gone is gone nevertheless
    world.tell_peers(node, [])
    watcher = Watcher(world, node.source)
    world.wait(lambda: watcher.num_replies)
    assert watcher.all == set()


def test_what_expired_while_the_node_was_down_is_not_announced(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world)
    worker.put(FIRST)
    node.wait_for_counters(stored_blocks=len(FIRST))
    stored_at_s = (world.path / "disk" / "journal").stat().st_mtime
    node.kill()
    worker.close()
    world.wait(lambda: _unix_s(world.path) > stored_at_s + 2.5)
    node = start(world, pool__ttl_s=1.0)
    assert node.heartbeat().events_seq < 0, "nothing was ever announced"


def _unix_s(path: Path) -> float:
    """By the clock of files."""
    (path / "now").write_bytes(b"")
    return (path / "now").stat().st_mtime


def test_a_tenant_over_its_quota_gives_room_in_both_tiers(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world, slots=32, pool__quota=0.5)
    watcher = Watcher(world, node.source)
    worker.put(FIRST[:8], owner=b"tenant-a")
    world.wait(lambda: len(watcher.held["DISK"]) == 8)
    for first in range(1000, 1000 + 64, 8):  # what is being written can't make room, so one after the other
        numbers = list(range(first, first + 8))
        worker.put(numbers, owner=b"tenant-b")
        world.wait(lambda numbers=numbers: keys_of(numbers) <= watcher.held["DISK"])
    assert keys_of(FIRST[:8]) <= watcher.held["DISK"]
    assert keys_of(FIRST[:8]) <= watcher.held["HOST"]


# --- what can't work -----------------------------------------------------------------------------------------------------


def last_words(world: World, node: Node) -> str:
    world.wait(lambda: node.is_over)
    return node.log.read_text().strip().splitlines()[-1]


def refused(world: World, **options: object) -> str:
    """Starts a node that must not start; what it says in the end."""
    node = world.start_node(wait=False, **options)
    world.wait(lambda: node.is_over or node.name in world.heard)
    if not node.is_over:
        world.tell_peers(node)
    return last_words(world, node)


def test_a_missing_directory_is_named(world: World) -> None:
    options = world.disk_options(world.path / "there")
    (world.path / "there").rmdir()
    assert f"{world.path}/there: no such directory" in refused(world, **options)


def test_a_directory_that_is_too_small_is_named_with_what_is_needed_and_there(world: World) -> None:
    options = world.disk_options(world.path / "disk")
    options["pool__disk__bytes"] = 2**60
    words = refused(world, **options)
    assert f"{world.path}/disk" in words
    assert "bytes are needed for " in words
    assert "are available: configure fewer bytes, or make room" in words


def test_the_directory_of_another_node_is_refused_and_that_one_goes_on(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world)
    worker.put(FIRST)
    node.wait_for_counters(stored_blocks=len(FIRST))
    words = refused(world, name="pool-1", **world.disk_options(world.path / "disk", slots=128))
    assert f"{world.path}/disk: in use by another pool node, process {node.pid}" in words
    assert Worker(world, "reader").fetch(node.source, FIRST) == set(FIRST)


def test_another_groups_directory_is_refused_and_nothing_lost(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world)
    worker.put(FIRST)
    node.wait_for_counters(stored_blocks=len(FIRST))
    node.kill()
    other = world.start_node(wait=False, **world.disk_options(world.path / "disk", slots=128))
    world.wait(lambda: "pool-0" in world.heard)
    world.send(other, Peers([], RoutingGroup(b"other model 0000", "format", b"n" * 16, SIZE), SLAB))
    assert "another model, KV format or numerics class" in last_words(world, other)
    node = start(world)
    assert Worker(world, "reader").fetch(node.source, FIRST) == set(FIRST)


def test_another_versions_directory_is_refused(world: World) -> None:
    start(world).kill()
    journal = world.path / "disk" / "journal"
    data = bytearray(journal.read_bytes())
    data[8] += 1
    journal.write_bytes(data)
    words = refused(world, **world.disk_options(world.path / "disk", slots=128))
    assert f"{journal}: has format version" in words


def test_memory_that_holds_no_slab_is_refused(world: World) -> None:
    node = world.start_node(wait=False)
    world.wait(lambda: node.name in world.heard)
    world.send(node, Peers([], GROUP, 2**21))
    assert f"pool.host_bytes is {2**20}, less than one slab of {2**21} bytes" in last_words(world, node)


def test_more_memory_than_the_machine_has_is_refused(world: World) -> None:
    words = refused(world, pool__host_bytes=2**55)
    assert f"pool.host_bytes is {2**55}, more than the " in words


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_an_address_that_is_not_ours_is_refused_and_the_node_ends(world: World, transport: str) -> None:
    options = {"transfer__host": "203.0.113.7", "transfer__transports": f'["{transport}"]'}
    words = refused(world, **world.disk_options(world.path / "disk", **options))
    assert "'203.0.113.7'" in words


def test_a_node_that_can_not_start_exits_with_one_sentence(world: World) -> None:
    options = world.disk_options(world.path / "there")
    (world.path / "there").rmdir()
    environment = {f"TANDEM_{key.upper()}": str(value) for key, value in options.items()}
    environment |= {"TANDEM_ROUTER__CONTROL_PORT": str(world.port), "TANDEM_POOL__HOST_BYTES": str(2**20)}
    popen = subprocess.Popen(
        [sys.executable, "-m", "kvpool", "--name", "pool-0"],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    world.wait(lambda: "pool-0" in world.heard)
    world.send(_Named(world), Peers([], GROUP, SLAB))  # type: ignore[arg-type]
    world.wait(lambda: popen.poll() is not None)
    assert popen.returncode == 1
    assert popen.stderr is not None
    with popen.stderr:
        lines = popen.stderr.read().strip().splitlines()
    assert lines[-1] == f"pool-0: {world.path}/there: no such directory: make it, or mount the disk that it is on"
    assert not any("Traceback" in line for line in lines)


class _Named:
    """As much of a node as `World.send` needs."""

    def __init__(self, world: World) -> None:
        self.heard = world.heard["pool-0"]


# --- a disk that fails later -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"can't mount here: {done.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_disk_whose_files_are_cut_is_disabled_and_the_others_go_on(world: World) -> None:
    worker = Worker(world, "decode-0")
    directories = [world.path / "a", world.path / "b"]
    node = world.start_node(**world.disk_options(*directories, slots=64, pool__disk__read_ahead_blocks=0))
    watcher = Watcher(world, node.source)
    heads = [number * CHAIN for number in range(100, 124)]  # a chain would go whole with its beginning
    worker.put(heads)
    node.wait_for_counters(stored_blocks=len(heads))
    fill_host(world, node, worker)
    os.truncate(directories[0] / "segment-00000", 0)
    reader = Worker(world, "decode-1")
    came = reader.fetch(node.source, heads)
    assert 0 < len(came) < len(heads)
    node.wait_for_counters(disk_faults=1)
    world.wait(lambda: worker.kept == watcher.all)
    assert not keys_of(heads) - keys_of(list(came)) & worker.kept
    worker.put(MORE)
    world.wait(lambda: keys_of(MORE) <= watcher.held["DISK"])
    assert reader.fetch(node.source, MORE) == set(MORE)
    lines = [line for line in node.log.read_text().splitlines() if "is disabled" in line]
    assert len(lines) == 1
    assert str(directories[0]) in lines[0]


def test_a_node_whose_only_disk_fails_goes_on_in_memory(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world, pool__disk__read_ahead_blocks=0, transfer__grace_s=30.0)
    watcher = Watcher(world, node.source)
    worker.put(FIRST)
    node.wait_for_counters(stored_blocks=len(FIRST))
    fill_host(world, node, worker)
    os.truncate(world.path / "disk" / "segment-00000", 0)
    reader = Worker(world, "decode-1")
    began_s = now_s()
    assert reader.fetch(node.source, FIRST) == set()
    assert now_s() - began_s < 2.5, "it said so, and did not let the reader wait"
    node.wait_for_counters(disk_faults=1)
    world.wait(lambda: not watcher.held["DISK"])
    worker.put(MORE)
    world.wait(lambda: keys_of(MORE) <= worker.kept)
    assert reader.fetch(node.source, MORE) == set(MORE)
    assert worker.kept == watcher.held["HOST"]


def test_a_disk_that_others_filled_costs_no_block_in_memory(world: World, small_disk: Path) -> None:
    worker = Worker(world, "decode-0")
    node = world.start_node(**world.disk_options(small_disk, slots=64))
    with (small_disk / "others").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(small_disk).f_bavail == 0
    worker.put(FIRST)
    world.wait(lambda: worker.kept == keys_of(FIRST))
    (small_disk / "others").unlink()
    node.wait_for_counters(stored_blocks=len(FIRST))
    assert node.heartbeat().counters.disk_faults == 0
    assert node.heartbeat().counters.not_stored_blocks == 0


def test_a_removed_directory_stops_nothing(world: World) -> None:
    worker = Worker(world, "decode-0")
    node = start(world)
    for file in (world.path / "disk").iterdir():
        file.unlink()
    (world.path / "disk").rmdir()
    worker.put(FIRST)
    world.wait(lambda: worker.kept == keys_of(FIRST))
    assert Worker(world, "reader").fetch(node.source, FIRST) == set(FIRST)
    node.kill(signal.SIGTERM)


# --- one thread, and replicas ----------------------------------------------------------------------------------------------


def test_heartbeats_go_on_while_a_hundred_thousand_blocks_are_found(world: World, group_digest: bytes) -> None:
    num_blocks = 100_000
    (world.path / "disk").mkdir()
    directory = Directory(
        world.path / "disk", num_bytes=num_blocks * 4096, memory=np.zeros((1, 4096), np.uint8), group=group_digest,
        native=None,
    )  # fmt: skip
    directory.record(
        [
            Entry(n, n, 1, key_of(n), parent_of(n), SIZE, b"checksum", b"w" * 8, b"o" * 8)
            for n in range(num_blocks)
        ]
    )  # fmt: skip
    directory.close()
    node = world.start_node(
        wait=False,
        pool__disk__dirs=f'["{world.path}/disk"]',
        pool__disk__bytes=num_blocks * 4096,
    )
    world.wait(lambda: node.name in world.heard and node.heard.num_heartbeats > 3)
    node.heard.longest_silence_s = 0.0
    world.tell_peers(node, [], slab_bytes=4096)
    node.wait_until_open()
    watcher = Watcher(world, node.source)
    world.wait(lambda: len(watcher.held["DISK"]) == num_blocks)
    node.heartbeat()
    assert node.heard.longest_silence_s < 1.0
    assert Worker(world, "reader", slab_bytes=4096).fetch(node.source, [1, 2]) == set(), "they were never written"


@pytest.fixture
def group_digest() -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(GROUP)).digest()


def test_two_copies_are_on_two_machines_and_one_is_enough(world: World) -> None:
    worker = Worker(world, "decode-0", machine="m1")
    nodes = [
        world.start_node(f"pool-{n}", wait=False, transfer__machine_id=f"m{n}", pool__replicas=2) for n in (1, 2, 3)
    ]
    world.wait(lambda: len(world.heard) == 3)
    for _ in range(2):  # at first nobody is open yet
        for node in nodes:
            world.tell_peers(node)
        for node in nodes:
            node.wait_until_open()
    worker.put(FIRST)
    holders = [node for node in nodes if _holds(world, node, FIRST)]
    assert len(holders) == 2
    assert holders[0].name == "pool-1", "the one on its own machine"
    holders[0].kill()
    worker.close()
    reader = Worker(world, "decode-1", machine="m9")
    assert reader.fetch(holders[1].source, FIRST) == set(FIRST)
    [link] = reader.service.links()
    assert (link.process, link.transport) == (holders[1].name, "tcp")


def test_a_worker_that_another_node_keeps_for_is_told_and_loses_no_lease(world: World) -> None:
    worker = Worker(world, "decode-0", machine="m2")
    options = {"transfer__lease_s": 60.0}
    far = world.start_node("pool-1", transfer__machine_id="m1", **options)
    worker.put(FIRST)
    world.wait(lambda: worker.kept == keys_of(FIRST))
    line = world.context.socket(zmq.DEALER)
    line.linger = 0
    line.setsockopt(zmq.IDENTITY, identity(worker.source.process, worker.epoch))
    line.connect(far.source.endpoints.fetch)
    line.send(control.encode(Fetch(b"f" * 16, "r", [key_of(0)], False, 60.0)))
    world.wait(lambda: line.poll(0))
    line.close()
    near = world.start_node("pool-2", transfer__machine_id="m2", **options)
    world.tell_peers(far)
    world.wait(lambda: not worker.kept)
    assert far.heartbeat().load.leased_blocks == 1, "it is alive, and may be reading"
    worker.forget()
    worker.put(FIRST)
    world.wait(lambda: worker.kept == keys_of(FIRST))
    assert near.heartbeat().load.cached_blocks == len(FIRST)
    world.tell_peers(far, [])
    world.wait(lambda: "decode-0 is lost" in far.log.read_text())
    assert far.heartbeat().load.leased_blocks == 1, "it may be cut off from the router, and read"


def _holds(world: World, node: Node, numbers: list[int]) -> bool:
    """Whether it keeps them, once it has said so by a heartbeat that came after some node had them all."""
    world.wait(lambda: _cached(world) >= 2 * len(numbers))
    return node.heartbeat().load.cached_blocks == len(numbers)


def _cached(world: World) -> int:
    beats = [heard.heartbeat for heard in world.heard.values()]
    return sum(beat.load.cached_blocks for beat in beats if beat is not None)
