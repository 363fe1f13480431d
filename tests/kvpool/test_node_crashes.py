"""A pool node that is killed, and files that are damaged, seen from the wire: what it announces afterwards is right or a miss.

What the DISK tier itself promises of crashes is in `test_disk_crashes`; here whole processes are killed while workers announce
and fetch, and everything is read back as a worker would.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tandem.clock import now_s
from tests.kvpool.disk_blocks import CHAIN, key_of
from tests.kvpool.node_world import Node, Watcher, Worker, World
from tests.kvpool.test_disk_crashes import damage

SLOTS = 192
"""Fewer than what is written between two looks, so that slots are used again."""


def announced(world: World, node: Node) -> Watcher:
    """What the node says that it holds, all of it."""
    watcher = Watcher(world, node.source)
    world.wait(lambda: watcher.num_replies)
    return watcher


def read_back(world: World, node: Node, reader: Worker, number_of: dict[bytes, int]) -> tuple[set[int], set[int]]:
    """Fetches all that the node announces: what came right, and what was a miss. `take` looks at the bytes."""
    watcher = announced(world, node)
    numbers = sorted(number_of[key] for key in watcher.all)
    good = reader.fetch(node.source, numbers)
    missed = set(numbers) - good
    # A miss is one for good: its bytes were wrong, or it followed such a block.
    world.wait(lambda: not {key_of(number) for number in missed} & watcher.all)
    watcher.close()
    reader.forget()
    return good, missed


def run_kills(world: World, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    options = world.disk_options(world.path / "a", world.path / "b", slots=SLOTS // 2, host_blocks=64)
    reader = Worker(world, "reader")
    number_of: dict[bytes, int] = {}
    first = total = 0
    for round_no in range(num_kills):
        world.nodes.clear()
        node = world.start_node(workers=[], **options)
        good, _ = read_back(world, node, reader, number_of)
        total += len(good)
        # The load: new chains all the time, some of them announced before, and somebody who reads.
        worker = Worker(world, f"decode-{round_no}")
        world.tell_peers(node, [worker])
        kill_at_s = now_s() + rng.uniform(0.0, 0.2)
        fetch = b""
        while now_s() < kill_at_s:
            numbers = list(range(first, first + rng.randrange(1, CHAIN)))
            if rng.random() < 0.2:
                numbers = [number for number in numbers if number >= 3 * CHAIN]
                numbers = [number - 3 * CHAIN for number in numbers]
            else:
                first += CHAIN
            number_of |= {key_of(number): number for number in numbers}
            worker.put([number for number in numbers if not worker.pool.contains(key_of(number))])
            if fetch and reader.is_over(fetch):
                reader.take(fetch)
                fetch = b""
            if not fetch:
                fetch = reader.start_fetch(node.source, rng.sample(range(first + CHAIN), 4))
            world.step()
        node.kill()
        if fetch and round_no % 8:
            reader.service.drop_peer(node.name, node.source.epoch, now_s())  # as a worker does when the router says so
        if fetch:
            world.wait(lambda fetch=fetch: reader.is_over(fetch))  # and by itself
            reader.take(fetch)
        node.close()
        worker.close()
        reader.forget()
        reader.pool.check()
        stats = reader.pool.stats()
        assert stats.free == stats.num_blocks, "a fetch left something"
    assert total > 20 * num_kills, "hardly anything was on disk"


def test_a_killed_node_comes_back_with_right_blocks_or_without_them(world: World) -> None:
    run_kills(world, 6, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_that_is_killed_200_times_never_serves_wrong_bytes(world: World) -> None:
    run_kills(world, 200, seed=2)


def may_open(world: World, node: Node) -> bool:
    """Whether it does; else it is over."""
    world.wait(lambda: node.name in world.heard)
    world.tell_peers(node, [])
    world.wait(lambda: node.is_over or node.heard.hello.group)
    return not node.is_over


def run_damages(world: World, num_damages: int, seed: int) -> None:
    rng = random.Random(seed)
    whole, broken = world.path / "whole", world.path / "broken"
    numbers = [chain * CHAIN + place for chain in range(8) for place in range(6)]
    number_of = {key_of(number): number for number in numbers}
    worker, reader = Worker(world, "decode-0"), Worker(world, "reader")
    node = world.start_node(**world.disk_options(whole, slots=64))
    worker.put(numbers)
    node.wait_for_counters(stored_blocks=len(numbers))
    node.kill()
    num_refused = num_complete = 0
    # There is room for all: who reads while blocks are written misses nothing for that.
    options = {"slots": 64, "host_blocks": 64}
    for _ in range(num_damages):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        _damage(broken, rng)
        node.close()
        world.nodes.clear()
        node = world.start_node(wait=False, **world.disk_options(broken, **options))
        if not may_open(world, node):
            words = node.log.read_text().strip().splitlines()[-1]
            assert words.startswith(f"{node.name}: {broken / 'journal'}: "), words
            num_refused += 1
            continue
        good, _ = read_back(world, node, reader, number_of)
        num_complete += len(good) == len(numbers)
        # And it is as good as new: what is missing is kept again, and everything reads back.
        worker.kept.clear()
        world.tell_peers(node, [worker])
        world.wait(lambda: worker.kept == set(number_of))
        assert reader.fetch(node.source, numbers) == set(numbers)
        reader.forget()
        node.kill()
        for one in (worker, reader):
            one.service.drop_peer(node.name, node.source.epoch, now_s())  # as the router would say
    assert num_refused < num_damages / 3, "only a damaged header may be refused"
    assert num_complete < num_damages * 0.8, "the damages did nothing"


def _damage(directory: Path, rng: random.Random) -> None:
    files = [directory / "journal", directory / "segment-00000"]
    for _ in range(rng.choice([1, 1, 3])):
        damage(rng.choice(files), rng)


def test_a_node_on_damaged_files_serves_right_blocks_or_misses(world: World) -> None:
    run_damages(world, 10, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_on_200_damaged_files_serves_right_blocks_or_misses(world: World) -> None:
    run_damages(world, 200, seed=4)
