"""What a pool node still has to get from a worker, and who keeps what: pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvpool.follower import EventFollower
from kvpool.keeper import FIRST_PAUSE_S, LONGEST_PAUSE_S, MAX_TRIES, SPARE_QUEUED, Keeper, keepers_of
from kvpool.keys import Key
from protos.control import Endpoints, Source
from protos.kv_events import BlockRemoved, BlockStored, EventBatch

EPOCH = b"e" * 8
ROOT = b"r" * 16


def key(number: int) -> Key:
    return number.to_bytes(16, "big")


class World:
    """A keeper, what the node holds, and a worker that announces."""

    def __init__(self) -> None:
        self.follower = EventFollower(EPOCH)
        self.held: set[Key] = set()
        self.keeper = Keeper(self.follower, self.held.__contains__)
        self._seq = 0

    def announce(self, *numbers: int) -> None:
        self._publish(BlockStored([key(n) for n in numbers], ROOT, [], 16, None, "DEVICE"))

    def evict(self, *numbers: int) -> None:
        self._publish(BlockRemoved([key(n) for n in numbers], "DEVICE"))

    def _publish(self, event: BlockStored | BlockRemoved) -> None:
        self.follower.on_live(self._seq, EventBatch(0.0, [event], None, EPOCH), 0.0)
        self._seq += 1
        self.keeper.take_in()

    def batch(self, now_s: float = 0.0, busy: Sequence[int] = (), most: int = 64) -> list[int]:
        pairs = self.keeper.next_batch({key(n) for n in busy}, most, now_s)
        assert all(parent == self.follower.announced[k] for k, parent in pairs)
        return [int.from_bytes(k, "big") for k, _ in pairs]

    def kept(self) -> list[int]:
        return [int.from_bytes(k, "big") for k in self.keeper.take_kept()]


def test_blocks_are_wanted_in_the_order_they_were_announced() -> None:
    world = World()
    world.announce(5, 3)
    world.announce(9)
    assert world.batch(most=2) == [5, 3]
    assert world.batch() == [9]
    assert world.batch() == []


def test_what_some_tier_holds_is_kept_without_a_fetch_as_soon_as_it_is_announced() -> None:
    world = World()
    world.held.add(key(1))
    world.announce(1, 2)
    assert world.kept() == [1]
    assert world.batch() == [2]


def test_what_came_here_meanwhile_is_kept_and_not_fetched() -> None:
    world = World()
    world.announce(1, 2)
    world.held.add(key(1))
    assert world.batch() == [2]
    assert world.kept() == [1]


def test_what_is_fetched_from_somebody_else_waits_its_turn() -> None:
    world = World()
    world.announce(1, 2, 3)
    assert world.batch(busy=[2]) == [1, 3]
    assert world.batch() == [2]


def test_what_the_worker_evicts_is_not_wanted_any_more() -> None:
    world = World()
    world.announce(1, 2)
    world.evict(1)
    assert world.batch() == [2]


def test_what_is_fetched_is_kept_and_what_is_missing_tried_again() -> None:
    world = World()
    world.announce(1, 2)
    assert world.batch() == [1, 2]
    world.keeper.on_fetched([key(1)], [key(2)], 0.0)
    assert world.kept() == [1]
    assert world.batch() == [2], "a batch of which something came is no reason for a pause"


def test_what_there_was_no_room_for_is_next() -> None:
    world = World()
    world.announce(1, 2, 3)
    assert world.batch(most=2) == [1, 2]
    world.keeper.put_back([key(1), key(2)])
    assert world.batch() == [1, 2, 3]


def test_what_another_worker_delivered_is_kept_for_this_one_too() -> None:
    world = World()
    world.announce(1)
    world.keeper.on_others([key(1), key(7)], [])
    assert world.kept() == [1], "and of others' blocks nothing is said"


def test_a_worker_that_delivers_nothing_is_left_alone_longer_each_time() -> None:
    world = World()
    world.announce(1)
    now_s, pauses = 0.0, []
    for _ in range(MAX_TRIES):
        assert world.batch(now_s) == [1]
        world.keeper.on_fetched([], [key(1)], now_s)
        pauses.append(world.keeper.paused_until_s - now_s)
        assert world.batch(world.keeper.paused_until_s - 0.001) == []
        now_s = world.keeper.paused_until_s
    assert pauses[0] == FIRST_PAUSE_S
    assert all(later >= earlier for earlier, later in itertools.pairwise(pauses))
    assert now_s > 10.0, "a worker that is out of reach for some seconds loses none of its blocks"
    assert max(pauses) <= LONGEST_PAUSE_S
    assert world.batch(now_s) == [], "given up"
    world.announce(1)
    assert world.batch(now_s) == [1], "announced anew it is tried anew"


def test_success_ends_the_pauses() -> None:
    world = World()
    world.announce(1, 2)
    world.keeper.on_fetched([], [key(1)], 0.0)
    world.keeper.on_fetched([], [key(1)], 1.0)
    world.keeper.on_fetched([key(1)], [], 2.0)
    world.keeper.on_fetched([], [key(2)], 3.0)
    assert world.keeper.paused_until_s == 3.0 + FIRST_PAUSE_S


def test_what_no_worker_delivers_is_given_up_by_all_of_them() -> None:
    worlds = [World(), World()]
    for world in worlds:
        world.announce(1, 2, 3)
    rounds, now_s = 0, 0.0
    while any(batches := [world.batch(now_s) for world in worlds]):
        rounds += 1
        now_s += 100.0
        assert rounds < 100, "two workers offer each other what neither delivers"
        for world, other, batch in zip(worlds, reversed(worlds), batches, strict=True):
            missing = [key(number) for number in batch]
            world.keeper.on_fetched([], missing, now_s - 100.0)
            other.keeper.on_others([], missing)
    assert rounds == MAX_TRIES


def test_a_worker_that_announces_and_evicts_for_ever_fills_no_queue() -> None:
    world = World()
    for number in range(0, 4 * SPARE_QUEUED, 64):
        world.announce(*range(number, number + 64))
        world.evict(*range(number, number + 64))
    assert len(world.keeper._queue) <= SPARE_QUEUED + 64


# --- who keeps what ------------------------------------------------------------------------------------------------------


def source(name: str, machine: str) -> Source:
    return Source(name, EPOCH, "HOST", Endpoints("", "", "", machine_id=machine))


machines = st.sampled_from(["m0", "m1", "m2", "m3", "m4"])
pools = st.dictionaries(st.integers(0, 20), machines, max_size=12).map(
    lambda found: [source(f"pool-{number}", machine) for number, machine in found.items()]
)
workers = st.builds(source, st.integers(0, 1000).map(lambda number: f"decode-{number}"), machines)
copies = st.integers(0, 2)


@given(worker=workers, pools=pools, num_copies=copies, data=st.data())
def test_all_nodes_agree_on_who_keeps_what(
    worker: Source, pools: list[Source], num_copies: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(pools))
    assert keepers_of(worker, shuffled, num_copies) == keepers_of(worker, pools, num_copies)


@given(worker=workers, pools=pools, num_copies=copies)
def test_copies_are_on_machines_of_their_own_and_the_first_one_is_near(
    worker: Source, pools: list[Source], num_copies: int
) -> None:
    chosen = keepers_of(worker, pools, num_copies)
    machine_of = {pool.process: pool.endpoints.machine_id for pool in pools}
    chosen_machines = [machine_of[name] for name in chosen]
    assert len(set(chosen_machines)) == len(chosen) == min(num_copies, len(set(machine_of.values())))
    if num_copies and worker.endpoints.machine_id in machine_of.values():
        assert chosen_machines[0] == worker.endpoints.machine_id


@given(worker=workers, pools=pools.filter(len), num_copies=copies, data=st.data())
def test_a_node_that_leaves_moves_only_what_it_kept(
    worker: Source, pools: list[Source], num_copies: int, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(pools))
    before = keepers_of(worker, pools, num_copies)
    after = keepers_of(worker, [pool for pool in pools if pool is not gone], num_copies)
    if gone.process in before:
        assert [name for name in before if name != gone.process] == [name for name in after if name in before]
        assert len(set(after) - set(before)) <= 1
    else:
        assert after == before


def test_workers_without_a_near_node_spread_over_all() -> None:
    pools = [source(f"pool-{n}", f"m{n}") for n in range(4)]
    firsts = [keepers_of(source(f"decode-{n}", "elsewhere"), pools, 1)[0] for n in range(400)]
    assert all(60 <= firsts.count(pool.process) <= 140 for pool in pools)
