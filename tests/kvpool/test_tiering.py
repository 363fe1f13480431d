"""When blocks go down to the disk and come up again, over a disk that does what the test says. Expiry, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpool.block_pool import BlockPool, BlockRecord
from kvpool.expiry import MAX_REMOVED, PORTION_PAUSE_S, Expiry
from kvpool.keys import Key
from kvpool.source import FetchServer
from kvpool.tiering import GATHER_BLOCKS, GATHER_S, MAX_TRIES, PATIENCE_S, RETRY_S, UP_PATIENCE_S, Tiering, WritePolicy
from kvpool.tiers.disk.requests import Loaded, LoadFailed, LoadRequest, NotStored, Result, Stored
from protos.control import Done, Fetch, Miss, Ready

SIZE = 16
ROOT = b"r" * 16
SINK = b"sink@1"


def key(number: int) -> Key:
    return number.to_bytes(16, "big")


def number(of: Key) -> int:
    return int.from_bytes(of, "big")


def parent(n: int) -> Key:
    return key(n - 1) if n % 100 else ROOT


class FakeDisk:
    """Keeps keys. Requests wait until `finish`."""

    def __init__(self, num_blocks: int = 256) -> None:
        self.pool = BlockPool(num_blocks, SIZE, "DISK")
        self.stored_at_s: dict[Key, float] = {}
        self._after: dict[Key, list[Key]] = {}
        self.room = 1000
        self.refuse = False
        self.bad: set[Key] = set()
        self.stores: list[BlockRecord] = []
        self.loads: list[LoadRequest] = []
        self.store_calls: list[list[int]] = []
        self._results: list[Result] = []

    def put(self, numbers: Iterable[int], unix_s: float = 0.0) -> None:
        for n in numbers:
            block_ids = self.pool.allocate(1)
            assert block_ids is not None
            self.pool.publish(block_ids[0], key(n), parent(n), SIZE, bytes(8))
            self.pool.release(block_ids)
            self.stored_at_s[key(n)] = unix_s
            self._after.setdefault(parent(n), []).append(key(n))

    def held(self) -> list[int]:
        return sorted(number(k) for k in self.stored_at_s)

    def contains(self, k: Key) -> bool:
        return k in self.stored_at_s

    def children(self, k: Key, limit: int = 16) -> list[Key]:
        return sorted({child for child in self._after.get(k, []) if child in self.stored_at_s}, reverse=True)[:limit]

    def stored_before(self, unix_s: float) -> list[Key]:
        return [k for k, at_s in self.stored_at_s.items() if at_s < unix_s]

    def remove(self, keys: Iterable[Key]) -> None:
        gone = list(keys)
        for k in gone:
            gone += self.children(k, 1000)
        for k in reversed(gone):
            self.stored_at_s.pop(k, None)
        self.pool.evict(list(reversed(gone)))

    def store_room(self) -> int:
        return self.room

    def store(self, blocks: Sequence[BlockRecord]) -> None:
        self.store_calls.append([number(request.key) for request in blocks])
        self.stores += blocks

    def load(self, wanted: Sequence[LoadRequest]) -> None:
        self.loads += wanted

    def finish(self) -> None:
        for request in self.stores:
            if self.refuse:
                self._results.append(NotStored(request.key, request.block_id, "it is full"))
            else:
                self.put([number(request.key)])
                self._results.append(Stored(request.key, request.block_id))
        for wanted in self.loads:
            if wanted.key in self.bad:
                self.remove([wanted.key])
            if not self.contains(wanted.key):
                self._results.append(LoadFailed(wanted.key, wanted.block_id, "its bytes on disk are wrong"))
                continue
            n = number(wanted.key)
            self._results.append(
                Loaded(wanted.key, wanted.block_id, parent(n), SIZE, bytes(8), b"writer-1", b"owner--1")
            )
        self.stores, self.loads = [], []

    def poll(self) -> list[Result]:
        results, self._results = self._results, []
        return results


class World:
    def __init__(
        self,
        num_blocks: int = 64,
        policy: WritePolicy = "write-through",
        hits: int = 2,
        read_ahead_blocks: int = 0,
        is_paced: bool = False,
    ) -> None:
        self.host = BlockPool(num_blocks, SIZE, "HOST")
        self.disk = FakeDisk()
        self.up: list[int] = []
        self.absent: list[int] = []
        self.used: list[int] = []
        self.now_s = 100.0
        self.tiering = Tiering(
            self.host,
            self.disk,  # type: ignore[arg-type]
            policy=policy,
            hits=hits,
            read_ahead_blocks=read_ahead_blocks,
            is_paced=is_paced,
            on_up=self._on_up,
            on_absent=lambda keys: self.absent.extend(map(number, keys)),
            on_used=lambda keys, at_s: self.used.extend(map(number, keys)),
        )

    def _on_up(self, keys: list[Key]) -> None:
        assert all(self.host.contains(k) for k in keys)
        self.up += map(number, keys)

    def arrive(self, *numbers: int) -> None:
        """Fetched into HOST from a worker, evicting what must go."""
        blocks = self.host.allocate(len(numbers))
        assert blocks is not None
        self._tell_evicted()
        for block_id, n in zip(blocks, numbers, strict=True):
            self.host.publish(block_id, key(n), parent(n), SIZE, bytes(8), writer=b"writer-1", owner=b"owner--1")
        self.tiering.arrived([key(n) for n in numbers])
        self.host.release(blocks)

    def _tell_evicted(self) -> None:
        gone = [k for event in self.host.take_events() for k in getattr(event, "block_hashes", [])]
        self.tiering.evicted([k for k in gone if not self.host.contains(k) and not self.disk.contains(k)])

    def tick(self, after_s: float = 0.0) -> float | None:
        self.now_s += after_s
        return self.tiering.tick(self.now_s)

    def finish(self) -> None:
        self.disk.finish()
        self.tiering.poll(self.now_s)
        self._tell_evicted()

    def settle(self) -> None:
        """Until nothing happens any more."""
        for _ in range(100):
            self.tick(RETRY_S)
            self.finish()
            if not self.disk.loads and not self.disk.stores and self.tick(0.0) is None:
                break
        else:
            raise AssertionError("it never ends")

    def check(self) -> None:
        """Nothing is held by anything, though nothing is going on."""
        self.host.check()
        stats = self.host.stats()
        assert stats.free + stats.cached == self.host.num_blocks
        assert stats.pinned == 0
        assert self.disk.pool.stats().num_leases == 0


# --- down ------------------------------------------------------------------------------------------------------------------


def test_write_through_gathers_and_writes_everything_once() -> None:
    world = World()
    world.arrive(1, 2, 3)
    assert world.tick() == pytest.approx(world.now_s + GATHER_S)
    assert world.disk.store_calls == []
    world.arrive(4)
    world.tick(GATHER_S)
    assert world.disk.store_calls == [[1, 2, 3, 4]]
    world.finish()
    assert world.tick(GATHER_S) is None
    world.arrive(5)
    world.settle()
    assert world.disk.held() == [1, 2, 3, 4, 5]
    assert world.disk.store_calls == [[1, 2, 3, 4], [5]]
    world.check()


def test_a_full_batch_does_not_wait() -> None:
    world = World()
    world.arrive(*range(1, GATHER_BLOCKS + 1))
    world.tick()
    assert world.disk.store_calls == [list(range(1, GATHER_BLOCKS + 1))]


def test_blocks_go_down_with_all_that_is_known_of_them() -> None:
    world = World()
    world.arrive(1)
    world.tick()
    world.tick(GATHER_S)
    [request] = world.disk.stores
    record = world.host.lookup(key(1))
    assert record is not None
    assert (request.block_id, request.parent, request.num_tokens) == (record.block_id, parent(1), SIZE)
    assert (request.writer, request.owner) == (b"writer-1", b"owner--1")


def test_what_is_being_written_stays_and_is_not_used_by_that() -> None:
    world = World(num_blocks=4)
    world.arrive(1)
    world.arrive(100)
    world.tick(GATHER_S)
    world.tick(GATHER_S)
    assert world.host.stats().allocatable == 2
    world.finish()
    world.host.release(world.host.match([key(100)]))  # the one that is used
    victims = [number(record.key) for record in world.host.coldest(2)]
    assert victims == [1, 100]
    world.check()


def test_what_is_on_disk_already_is_not_written_again() -> None:
    world = World()
    world.disk.put([1])
    world.arrive(1, 2)
    world.settle()
    assert world.disk.store_calls == [[2]]


def test_after_hits_writes_what_was_used_often_enough() -> None:
    world = World(policy="after-hits", hits=2)
    world.arrive(1, 2)
    world.tiering.used([key(1)])
    world.settle()
    assert world.disk.held() == []
    world.tiering.used([key(1), key(2)])
    world.settle()
    assert world.disk.held() == [1]
    world.tiering.used([key(2)])
    world.settle()
    assert world.disk.held() == [1, 2]
    world.check()


def test_uses_do_not_survive_eviction() -> None:
    world = World(num_blocks=1, policy="after-hits", hits=2)
    world.arrive(1)
    world.tiering.used([key(1)])
    world.arrive(2)
    world.arrive(1)
    world.tiering.used([key(1)])
    world.settle()
    assert world.disk.held() == []


def test_write_back_waits_until_host_is_short_of_room() -> None:
    world = World(num_blocks=64, policy="write-back")
    world.arrive(*range(1, 51))
    world.settle()
    assert world.disk.held() == []
    world.arrive(*range(51, 60))
    world.settle()
    assert world.disk.held() == list(range(1, 60))
    world.check()


def test_write_back_loses_nothing_if_the_disk_keeps_up() -> None:
    world = World(num_blocks=64, policy="write-back")
    for chain in range(40):
        world.arrive(*range(100 * chain, 100 * chain + 4))
        world.settle()
    assert world.tiering.num_not_stored == 0
    everything = {100 * chain + n for chain in range(40) for n in range(4)}
    in_host = {n for n in everything if world.host.contains(key(n))}
    assert in_host | set(world.disk.held()) == everything
    world.check()


def test_writing_back_does_not_make_the_coldest_the_hottest() -> None:
    world = World(num_blocks=16, policy="write-back")
    for chain in range(16):
        world.arrive(100 * chain)
    world.settle()
    order = [number(record.key) for record in world.host.coldest(16)]
    assert order == [100 * chain for chain in range(16)]


def test_what_write_back_has_to_drop_is_counted() -> None:
    world = World(num_blocks=4, policy="write-back")
    for chain in range(8):
        world.arrive(100 * chain)
    assert world.tiering.num_not_stored == 4


@pytest.mark.parametrize("policy", ["write-through", "write-back"])
def test_a_flush_writes_what_waits(policy: WritePolicy) -> None:
    world = World(policy=policy)
    world.arrive(1, 2)
    assert world.tiering.flush(world.now_s)
    world.finish()
    assert not world.tiering.flush(world.now_s)
    assert world.disk.held() == [1, 2]
    world.check()


def test_what_the_write_rate_has_no_room_for_waits_as_long_as_host_holds_it() -> None:
    world = World(num_blocks=8)
    world.disk.room = 0
    world.arrive(1, 2, 3)
    world.tick()
    again_s = world.tick(GATHER_S)
    assert again_s is not None
    assert again_s > world.now_s, "no busy loop"
    assert world.disk.store_calls == []
    world.disk.room = 2
    world.tick(GATHER_S)
    world.tick(GATHER_S)
    assert world.disk.store_calls[0] == [1, 2], "the beginning of the chain first"
    world.finish()
    world.disk.room = 0
    world.arrive(*range(101, 109))  # 3, which waits, has to go
    assert not world.host.contains(key(3))
    assert world.tiering.num_not_stored == 1
    world.disk.room = 100
    world.settle()
    assert world.disk.held() == [1, 2, *range(101, 109)]
    world.check()


def test_what_the_disk_refuses_is_tried_again_but_not_for_ever() -> None:
    world = World()
    world.disk.refuse = True
    world.arrive(1)
    world.tick()
    for tries in range(1, MAX_TRIES + 1):
        world.tick(GATHER_S)
        assert len(world.disk.store_calls) == tries
        world.finish()
        world.tick()
        world.tick(RETRY_S / 2)
        assert len(world.disk.store_calls) == tries, "not at once"
        world.now_s += RETRY_S
    world.settle()
    assert len(world.disk.store_calls) == MAX_TRIES
    assert world.tiering.num_not_stored == 1
    world.check()


def test_a_refusal_that_passes_loses_nothing() -> None:
    world = World()
    world.disk.refuse = True
    world.arrive(1, 2)
    world.tick()
    world.tick(GATHER_S)
    world.finish()
    world.disk.refuse = False
    world.settle()
    assert world.disk.held() == [1, 2]
    assert world.tiering.num_not_stored == 0
    world.check()


@pytest.mark.parametrize("is_paced", [False, True])
def test_what_goes_to_disk_in_a_moment_is_waited_for_unless_the_rate_is_limited(is_paced: bool) -> None:
    world = World(num_blocks=4, is_paced=is_paced)
    world.arrive(1, 2)
    world.tick()
    assert world.tiering.has_room(2, world.now_s)
    assert world.tiering.has_room(3, world.now_s) == is_paced
    world.tick(GATHER_S)
    assert world.host.allocate(3) is None, "they are being written"
    world.finish()
    assert world.tiering.has_room(4, world.now_s)


def test_a_disk_of_which_nothing_is_heard_is_not_waited_for() -> None:
    world = World(num_blocks=4)
    world.disk.room = 0
    world.arrive(1, 2)
    world.tick()
    assert not world.tiering.has_room(4, world.now_s)
    world.tick(PATIENCE_S)
    assert world.tiering.has_room(4, world.now_s)


def test_what_the_disk_keeps_goes_before_what_only_host_has() -> None:
    world = World(num_blocks=4)
    world.arrive(100)
    world.disk.room = 0
    world.tick()
    world.arrive(200)
    world.disk.put([300, 400])
    world.tiering.bring_up([key(300), key(400)])
    world.finish()
    assert [number(record.key) for record in world.host.coldest(2)] == [300, 400]
    world.disk.remove([key(300)])
    world.tiering.evicted_below([key(300)])
    assert [number(record.key) for record in world.host.coldest(2)] == [400, 100]


def test_what_the_disk_loses_is_written_again_while_host_has_it() -> None:
    world = World()
    world.arrive(1, 2, 3)
    world.settle()
    world.disk.remove([key(2)])
    world.tiering.evicted_below([key(2), key(3)])
    world.settle()
    assert world.disk.held() == [1, 2, 3]
    assert world.disk.store_calls[1:] == [[2, 3]]


def test_what_made_room_on_disk_is_not_written_again() -> None:
    world = World()
    world.disk.put(range(1000, 1255))
    world.arrive(1)
    world.settle()
    del world.disk.stored_at_s[key(1)]  # its place is another's now
    world.tiering.evicted_below([key(1)])
    world.settle()
    assert world.disk.store_calls == [[1]]


# --- up --------------------------------------------------------------------------------------------------------------------


def test_what_is_on_disk_comes_up_once_however_many_ask() -> None:
    world = World()
    world.disk.put([1, 2])
    assert world.tiering.bring_up([key(1), key(2), key(3)]) == {key(1), key(2)}
    assert world.tiering.bring_up([key(2)]) == {key(2)}
    assert [number(request.key) for request in world.disk.loads] == [1, 2]
    world.finish()
    assert world.up == [1, 2]
    record = world.host.lookup(key(2))
    assert record is not None
    assert (record.parent, record.num_tokens, record.writer, record.owner) == (
        parent(2), SIZE, b"writer-1", b"owner--1",
    )  # fmt: skip
    assert world.tiering.bring_up([key(1)]) == set(), "it is up"
    world.settle()
    world.check()


def test_needed_blocks_come_first_and_what_has_no_room_comes_after_them() -> None:
    world = World(num_blocks=8)
    world.disk.put(range(1, 9))
    wanted = [key(n) for n in range(1, 9)]
    assert world.tiering.bring_up(wanted) == set(wanted)
    assert [number(request.key) for request in world.disk.loads] == [1, 2, 3, 4], "half of HOST"
    world.settle()
    assert world.up == list(range(1, 9))
    assert world.absent == []


def test_what_finds_no_room_for_long_does_not_come() -> None:
    world = World(num_blocks=8)
    world.arrive(*range(101, 109))
    held = world.host.match([key(n) for n in range(101, 109)])
    world.disk.put(range(1, 3))
    assert world.tiering.bring_up([key(1), key(2)]) == {key(1), key(2)}
    world.tick()
    world.tick(UP_PATIENCE_S / 2)
    assert world.absent == []
    world.tick(UP_PATIENCE_S)
    assert world.absent == [1, 2]
    world.host.release(held)
    world.tick()
    assert not world.disk.loads, "nobody waits for them any more"
    assert world.tiering.bring_up([key(2)]) == {key(2)}
    world.settle()
    assert world.up == [2]
    world.check()


def test_the_smallest_pool_can_bring_a_block_up() -> None:
    world = World(num_blocks=1)
    world.disk.put([1])
    assert world.tiering.bring_up([key(1)]) == {key(1)}


def test_a_block_with_wrong_bytes_does_not_come() -> None:
    world = World()
    world.disk.put([1, 2])
    world.disk.bad = {key(2)}
    world.tiering.bring_up([key(1), key(2)])
    world.finish()
    assert (world.up, world.absent) == ([1], [2])
    assert not world.host.contains(key(2))
    assert world.tiering.bring_up([key(2)]) == set(), "nor the next time"
    world.settle()
    world.check()


def test_a_block_that_a_worker_delivered_first_stays_as_it_is() -> None:
    world = World()
    world.disk.put([1])
    world.tiering.bring_up([key(1)])
    world.arrive(1)
    world.finish()
    world.settle()
    assert world.host.stats().cached == 1
    world.check()


def test_what_follows_is_read_ahead_after_all_that_is_needed() -> None:
    world = World(num_blocks=128, read_ahead_blocks=4)
    world.disk.put([*range(1, 20), *range(101, 104)])
    world.tiering.bring_up([key(1), key(2)])
    world.tiering.bring_up([key(101)])
    world.tick()
    assert [number(request.key) for request in world.disk.loads] == [1, 2, 101, 3, 4, 5, 6, 102, 103]


def test_reading_ahead_goes_on_when_its_blocks_are_used() -> None:
    world = World(num_blocks=64, read_ahead_blocks=4)
    world.disk.put(range(1, 20))
    world.tiering.bring_up([key(1)])
    world.settle()
    assert sorted(world.up) == [1, 2, 3, 4, 5]
    world.tiering.used([key(2), key(3)])
    world.settle()
    assert sorted(world.up) == [1, 2, 3, 4, 5, 6, 7], "as far ahead of 3 as before of 1"


def test_reading_ahead_takes_no_room_from_what_is_nowhere_else() -> None:
    world = World(num_blocks=64, policy="after-hits", read_ahead_blocks=8)
    world.disk.put(range(1, 20))
    world.arrive(*range(101, 162))  # three blocks are free; these are not on disk
    world.tiering.bring_up([key(1)])
    world.tick()
    assert [number(request.key) for request in world.disk.loads] == [1, 2, 3], "one for 1, two ahead"


def test_reading_ahead_takes_the_room_of_what_can_be_read_again() -> None:
    world = World(num_blocks=32, read_ahead_blocks=8)
    world.disk.put(range(1, 20))
    world.arrive(*range(101, 133))
    world.settle()
    world.tiering.bring_up([key(1)])
    world.tick()
    assert len(world.disk.loads) == 1 + 3, "up to an eighth of HOST, with what is coming"


def test_what_is_used_in_host_is_not_what_the_disk_gives_up_next() -> None:
    world = World()
    world.disk.put([100, 200, 300])
    world.arrive(100)
    world.settle()
    world.tiering.used([key(100)])
    world.settle()
    assert [number(record.key) for record in world.disk.pool.coldest(3)] == [200, 300, 100]
    assert world.used == [100]
    world.check()


# --- with the source's side ------------------------------------------------------------------------------------------------


class ServedWorld(World):
    """With sinks that fetch."""

    def __init__(self, num_blocks: int = 64, read_ahead_blocks: int = 0) -> None:
        super().__init__(num_blocks, read_ahead_blocks=read_ahead_blocks)
        self.server = FetchServer(self.host, b"epoch-01", lease_s=5.0, grace_s=2.0, below=self.tiering)
        self.ready: dict[bytes, list[int]] = {}
        self.missed: dict[bytes, list[int]] = {}
        self.tiering._on_up = lambda keys: self._hear(self.server.on_published(self.host.take_published(), self.now_s))
        self.tiering._on_absent = lambda keys: self._hear(self.server.on_absent(keys, self.now_s))

    def fetch(self, sink: bytes, numbers: Sequence[int], *, wait: bool = False) -> bytes:
        fetch_id = sink.ljust(16, b"-")
        self._hear(
            self.server.on_message(sink, Fetch(fetch_id, "r", [key(n) for n in numbers], wait, 60.0), self.now_s)
        )
        return fetch_id

    def _hear(self, answers: list[tuple[bytes, Ready | Miss]]) -> None:
        for sink, message in answers:
            if isinstance(message, Ready):
                self.ready.setdefault(sink, []).extend(number(block.key) for block in message.blocks)
            else:
                self.missed.setdefault(sink, []).extend(map(number, message.keys))


def test_a_fetch_that_does_not_wait_is_answered_from_disk() -> None:
    world = ServedWorld()
    world.disk.put([1, 2])
    world.arrive(3)
    world.host.take_published()
    world.fetch(b"a", [1, 2, 3, 4])
    assert world.ready == {b"a": [3]}
    assert world.missed == {b"a": [4]}
    world.finish()
    assert world.ready == {b"a": [3, 1, 2]}


def test_two_sinks_that_wait_for_one_block_both_get_it_before_it_can_be_evicted() -> None:
    world = ServedWorld(num_blocks=2)
    world.disk.put([1])
    world.fetch(b"a", [1])
    world.fetch(b"b", [1])
    world.finish()
    assert world.ready == {b"a": [1], b"b": [1]}
    assert world.host.stats().leased == 1


def test_a_block_that_turns_out_bad_is_a_miss_for_all_who_wait() -> None:
    world = ServedWorld()
    world.disk.put([1, 2])
    world.disk.bad = {key(2)}
    world.fetch(b"a", [1, 2])
    world.fetch(b"b", [2], wait=True)
    world.finish()
    assert world.ready == {b"a": [1]}
    assert world.missed == {b"a": [2], b"b": [2]}
    assert world.server.num_parked == 0


def test_a_disk_that_does_not_answer_is_a_miss_after_the_grace_time() -> None:
    world = ServedWorld()
    world.disk.put([1])
    world.fetch(b"a", [1])
    world._hear(world.server.tick(world.now_s + 2.0))
    assert world.missed == {b"a": [1]}
    world.finish()
    assert world.ready == {}
    world.settle()
    world.check()


def test_a_fetch_larger_than_host_gets_all_if_it_lets_go_of_what_it_had() -> None:
    world = ServedWorld(num_blocks=8)
    world.disk.put(range(1, 21))
    fetch_id = world.fetch(b"a", range(1, 21))
    for batch in range(20):
        world.finish()
        world._hear(world.server.on_message(b"a", Done(fetch_id, batch), world.now_s))
        world.tick()
    assert world.ready[b"a"] == list(range(1, 21))
    assert b"a" not in world.missed


def test_a_fetch_larger_than_host_that_lets_go_of_nothing_misses_the_rest() -> None:
    world = ServedWorld(num_blocks=8)
    world.disk.put(range(1, 21))
    world.fetch(b"a", range(1, 21))
    for _ in range(4):
        world.finish()
    world.tick()
    world.tick(UP_PATIENCE_S)
    assert world.ready[b"a"] == list(range(1, 9))
    assert world.missed[b"a"] == list(range(9, 21))


def test_a_sink_that_is_gone_leaves_nothing_behind() -> None:
    world = ServedWorld()
    world.disk.put([1])
    world.fetch(b"a", [1])
    world.server.forget_sink(b"a")
    world.finish()
    world.settle()
    assert (world.server.num_fetches, world.server.num_parked) == (0, 0)
    world.check()


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: nothing leaks, and every fetch is answered."""

    @initialize(
        policy=st.sampled_from(["write-through", "after-hits", "write-back"]),
        num_blocks=st.integers(1, 24),
        ahead=st.sampled_from([0, 3, 50]),
    )
    def begin(self, policy: WritePolicy, num_blocks: int, ahead: int) -> None:
        self.world = ServedWorld(num_blocks, ahead)
        self.world.tiering._policy = policy
        self.asked: dict[bytes, list[int]] = {}

    @rule(chain=st.integers(0, 3), first=st.integers(0, 10), length=st.integers(1, 8))
    def arrive(self, chain: int, first: int, length: int) -> None:
        numbers = range(100 * chain + first, 100 * chain + first + length)
        fresh = [n for n in numbers if not self.world.host.contains(key(n))]
        if fresh and self.world.host.stats().allocatable >= len(fresh):
            self.world.arrive(*fresh)
            self.world._hear(self.world.server.on_published(self.world.host.take_published(), self.world.now_s))

    @rule(chain=st.integers(0, 3), first=st.integers(0, 10), length=st.integers(1, 12), wait=st.booleans())
    def fetch(self, chain: int, first: int, length: int, wait: bool) -> None:
        numbers = list(range(100 * chain + first, 100 * chain + first + length))
        sink = b"sink-%d" % len(self.asked)
        self.asked[sink] = numbers
        self.world.fetch(sink, numbers, wait=wait)

    @rule(after_s=st.sampled_from([0.0, GATHER_S, RETRY_S, 3.0]))
    def tick(self, after_s: float) -> None:
        self.world.tick(after_s)
        self.world._hear(self.world.server.tick(self.world.now_s))

    @rule()
    def finish(self) -> None:
        self.world.finish()

    @rule(refuse=st.booleans(), room=st.sampled_from([0, 1, 1000]), bad=st.sets(st.integers(0, 20).map(key)))
    def change_disk(self, refuse: bool, room: int, bad: set[Key]) -> None:
        self.world.disk.refuse, self.world.disk.room, self.world.disk.bad = refuse, room, bad

    @invariant()
    def pools_agree(self) -> None:
        self.world.host.check()
        self.world.disk.pool.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.disk.room = 1000
        world.settle()
        world.now_s += 100.0
        world._hear(world.server.tick(world.now_s))
        for sink, numbers in self.asked.items():
            answered = world.ready.get(sink, []) + world.missed.get(sink, [])
            assert sorted(answered) == sorted(numbers), f"{sink!r} is not answered once for each key"
        world.settle()
        assert (world.server.num_fetches, world.server.num_parked) == (0, 0)
        world.check()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# --- time to live ----------------------------------------------------------------------------------------------------------

TTL_S = 100.0


def test_what_nobody_uses_ends_after_its_time() -> None:
    disk = FakeDisk()
    disk.put([1, 2], unix_s=1000.0)
    disk.put([101], unix_s=1050.0)
    expiry = Expiry(disk, TTL_S)
    expiry.tick(0.0, 1100.0)
    assert disk.held() == [1, 2, 101]
    at_s = expiry.tick(20.0, 1120.0)
    assert disk.held() == [101]
    assert expiry.tick(at_s, 1151.0) > at_s
    assert disk.held() == []


def test_a_use_anywhere_lets_a_block_live_on_with_what_comes_before_it() -> None:
    disk = FakeDisk()
    disk.put([1, 2, 3, 4, 101], unix_s=1000.0)
    expiry = Expiry(disk, TTL_S)
    expiry.used([key(3)], 50.0)
    expiry.tick(101.0, 1101.0)
    assert disk.held() == [1, 2, 3]
    expiry.tick(149.0, 1149.0)
    assert disk.held() == [1, 2, 3]
    expiry.tick(165.0, 1165.0)
    assert disk.held() == []


def test_what_was_stored_lately_keeps_what_comes_before_it() -> None:
    disk = FakeDisk()
    disk.put([1, 2], unix_s=1000.0)
    disk.put([3], unix_s=1090.0)
    expiry = Expiry(disk, TTL_S)
    expiry.tick(0.0, 1101.0)
    assert disk.held() == [1, 2, 3]
    expiry.tick(100.0, 1191.0)
    assert disk.held() == []


def test_many_end_in_portions() -> None:
    disk = FakeDisk(num_blocks=3000)
    disk.put(range(0, 300_000, 100), unix_s=0.0)
    expiry = Expiry(disk, TTL_S)
    assert expiry.tick(0.0, 1000.0) == PORTION_PAUSE_S
    assert len(disk.held()) == 3000 - MAX_REMOVED
    expiry.used([key(299_900)], 0.005)
    expiry.tick(0.01, 1000.0)
    expiry.tick(0.02, 1000.0)
    assert disk.held() == [299_900]


def test_uses_are_forgotten_in_time_and_bounded() -> None:
    disk = FakeDisk(num_blocks=10)
    disk.put([1], unix_s=0.0)
    expiry = Expiry(disk, TTL_S)
    for n in range(1, 500):
        expiry.used([key(n)], 0.0)
    assert len(expiry._used_s) <= 20
    expiry.tick(200.0, 0.0)
    assert not expiry._used_s
