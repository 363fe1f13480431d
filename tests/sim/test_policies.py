"""The policies of others do what their publications say, on both sides of each threshold."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kvpool.keys import Key
from protos.control import Capacity, Fence, Load, StepPrices
from router.fleet import CONTEXT, FETCH_RATE, FREE_BLOCKS, OUTSTANDING, SENDS_UNTIL, UNCOMPUTED, Fleet, Work
from router.policy.base import Ask, Placement, Policy
from router.prefix_index import Hits
from tandem.errors import ConfigError
from tandem.sim.policies.dynamo import Dynamo, DynamoTerms
from tandem.sim.policies.llm_d import LlmD, LlmDTerms
from tandem.sim.policies.mooncake import Mooncake, MooncakeTerms
from tandem.sim.policies.preble import Preble, PrebleTerms
from tandem.sim.policies.registry import POLICIES, policy_named
from tandem.sim.policies.session_hash import SessionHash
from tandem.sim.policies.sglang import SentTree, Sglang, SglangTerms
from tandem.sim.presets import PRESETS
from tandem.sim.replay import Job, Replay

BLOCK = 100
PRICES = StepPrices(base_s=0.001, token_s=1e-3, pair_s=0.0, sequence_s=1e-3, context_s=1e-6)
NAMES = [
    "random",
    "round-robin",
    "least-loaded",
    "power-of-two",
    "session-hash",
    "sglang",
    "dynamo",
    "llm-d",
    "preble",
    "mooncake",
]


def key(*path: object) -> Key:
    return repr(path).encode()[:16].ljust(16, b".")


def keys(name: str, num: int) -> tuple[Key, ...]:
    return tuple(key(name, at) for at in range(num))


class World:
    """Prefill workers p0…, decode workers d0… and a pool node for each prefill worker's machine."""

    def __init__(self, num_prefills: int = 4, num_decodes: int = 3, num_blocks: int = 1000) -> None:
        self.fleet = Fleet()
        self.rng = random.Random(7)
        self.now_s = 10.0
        capacity = Capacity(num_blocks=num_blocks, slab_bytes=1, max_running=64, max_step_tokens=1_000_000)
        for role, num in (("prefill", num_prefills), ("decode", num_decodes)):
            for at in range(num):
                name = f"{role[0]}{at}"
                machine = f"machine-{name}" if role == "prefill" else ""
                self.fleet.join(name, "prefill" if role == "prefill" else "decode", machine, capacity, "group", 0.0)
                load = Load(free_blocks=num_blocks, prices=PRICES, fetch_bytes_per_s=1e9)
                self.fleet.reported(name, load, (), 0.0, self.now_s)
        for at in range(num_prefills):
            self.fleet.join(f"pool{at}", "pool", f"machine-p{at}", Capacity(), "group", 0.0)
        self.fleet.serve("group")

    def number(self, name: str) -> int:
        number = self.fleet.number(name)
        assert number is not None
        return number

    def set(self, column: int, **values: float) -> None:
        for name, value in values.items():
            self.fleet.table[column, self.number(name)] = value

    def hits(self, **blocks: tuple[int, int, int] | int) -> Hits:
        counts = np.zeros((64, 3), dtype=np.int32)
        for name, held in blocks.items():
            counts[self.number(name)] = (held, 0, 0) if isinstance(held, int) else held
        return Hits(counts, sorted(self.number(name) for name in blocks), int(counts.sum(axis=1).max()))

    def place(self, policy: Policy, hits: Hits | None = None, num_tokens: int = 1000, **ask: Any) -> Placement:
        fields: dict[str, Any] = {"block_size": BLOCK, "slab_bytes": 1000, "keys": keys("a", num_tokens // BLOCK)} | ask
        asked = Ask(num_tokens=num_tokens, **fields)
        placement = policy.place(asked, hits or self.hits(), self.fleet, self.now_s, self.rng)
        assert placement is not None
        return placement

    def prefill(self, policy: Policy, hits: Hits | None = None, **ask: Any) -> str | None:
        number = self.place(policy, hits, **ask).prefill
        return None if number is None else self.fleet.names[number]

    def decode(self, policy: Policy, hits: Hits | None = None, **ask: Any) -> str:
        return self.fleet.names[self.place(policy, hits, **ask).decode]

    def send(self, name: str, num_tokens: int) -> None:
        fence = Fence(f"r{self.rng.random()}", 0, "prefill", 0)
        work = Work(num_tokens=num_tokens, num_pairs=0.0)
        self.fleet.dispatched(self.number(name), fence, work, self.now_s)


# --- all of them ---------------------------------------------------------------------------------------------------------------


def test_the_registry_has_every_policy_and_each_setting_once() -> None:
    assert list(POLICIES) == NAMES
    for name, published in POLICIES.items():
        assert published.name == name
        labels = [setting.label for setting in published.settings]
        assert labels[0] == ""
        assert len(set(labels)) == len(labels)
        assert all(setting.make() is not setting.make() for setting in published.settings)
    assert policy_named("sglang") is POLICIES["sglang"]
    with pytest.raises(ConfigError, match=r"'sglnag' is not known \(random, "):
        policy_named("sglnag")


def test_published_parameters_are_the_defaults_and_the_labels_say_what_differs() -> None:
    labels = {name: {setting.label for setting in POLICIES[name].settings} for name in NAMES}
    assert dataclasses.astuple(SglangTerms())[:3] == (0.3, 64.0, 1.5)
    assert "cache_threshold=0.5 balance_abs=32 balance_rel=1.1" in labels["sglang"]
    assert dataclasses.astuple(DynamoTerms()) == (1.0, 0.0, 0.0, 1.0, 0.75, 0.25)
    assert "temperature=0.2" in labels["dynamo"]
    assert dataclasses.astuple(LlmDTerms()) == (3.0, 2.0, 2.0, 16)
    assert "prefix_weight=2 queue_weight=1 kv_weight=0" in labels["llm-d"]
    assert labels["random"] == {""}


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_uses_the_workers_that_there_are(name: str) -> None:
    world = World()
    make = POLICIES[name].make
    assert world.prefill(make()) in {"p0", "p1", "p2", "p3"}
    assert world.decode(make()) in {"d0", "d1", "d2"}
    here = world.place(make(), prefill_here_only=True)
    assert here.prefill is None
    bad = frozenset(world.number(worker) for worker in ("p0", "p2", "p3", "d0", "d2"))
    assert {world.prefill(make(), avoid=bad) for _ in range(20)} == {"p1"}
    assert {world.decode(make(), avoid=bad) for _ in range(20)} == {"d1"}
    everybody = frozenset(range(64))
    assert world.prefill(make(), avoid=everybody) in {"p0", "p1", "p2", "p3"}
    assert world.place(make(), num_tokens=30, keys=()).decode >= 0
    assert World(0, 2).place(make()).prefill is None
    ask = Ask(num_tokens=5, block_size=16, slab_bytes=1)
    alone = World(2, 0)
    assert make().place(ask, alone.hits(), alone.fleet, 0.0, random.Random(1)) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_serves_a_trace_to_its_end_and_the_same_way_again(name: str) -> None:
    rng = random.Random(3)
    jobs: list[Job] = []
    for turn in range(160):
        talk = rng.randrange(20)
        blocks = [key("everybody"), *keys(f"talk{talk}", 1 + turn // 12)]
        jobs.append(Job(turn * 0.35, len(blocks) * 512 + 90, 40, tuple(blocks), 512))

    def run() -> Any:
        return Replay(PRESETS["h100-llama-70b"], 8, POLICIES[name].make(), jobs, hold=False, ordered=False).run()

    once, again = run(), run()
    assert np.isfinite(once.ttft_s).all()
    assert np.isfinite(once.tpot_s).all()
    np.testing.assert_array_equal(once.ttft_s, again.ttft_s)


# --- those that know no prefixes ----------------------------------------------------------------------------------------------


def test_random_takes_every_worker_as_often() -> None:
    world = World()
    policy = POLICIES["random"].make()
    world.set(OUTSTANDING, p0=1000, d0=1000)
    placements = [world.place(policy) for _ in range(600)]
    assert min(Counter(placement.prefill for placement in placements).values()) > 110
    assert min(Counter(placement.decode for placement in placements).values()) > 150


def test_round_robin_takes_one_after_the_other_in_each_pool() -> None:
    world = World()
    policy = POLICIES["round-robin"].make()
    placements = [world.place(policy) for _ in range(12)]
    assert [world.fleet.names[placement.prefill or 0] for placement in placements] == ["p0", "p1", "p2", "p3"] * 3
    assert [world.fleet.names[placement.decode] for placement in placements] == ["d0", "d1", "d2"] * 4


def test_least_loaded_takes_who_has_fewest_and_any_of_several() -> None:
    world = World()
    policy = POLICIES["least-loaded"].make()
    world.set(OUTSTANDING, p0=3, p1=2, p2=2, p3=9, d0=1, d1=0, d2=1)
    assert {world.prefill(policy) for _ in range(40)} == {"p1", "p2"}
    assert {world.decode(policy) for _ in range(40)} == {"d1"}


def test_power_of_two_never_takes_the_worst_and_takes_the_second_best_at_times() -> None:
    world = World()
    policy = POLICIES["power-of-two"].make()
    world.set(OUTSTANDING, p0=1, p1=2, p2=3, p3=4)
    taken = Counter(world.prefill(policy) for _ in range(1200))
    assert set(taken) == {"p0", "p1", "p2"}
    assert taken["p0"] == pytest.approx(600, abs=80)
    assert taken["p1"] == pytest.approx(400, abs=80)


def test_session_hash_keeps_a_conversation_and_moves_few_when_a_worker_comes() -> None:
    def owners(world: World) -> list[str | None]:
        policy = SessionHash()
        return [world.prefill(policy, keys=(key("all"), key(talk), *keys("b", talk % 5))) for talk in range(400)]

    four, five = owners(World(4)), owners(World(5))
    again = owners(World(4))
    assert four == again
    assert min(Counter(four).values()) > 60
    moved = [(old, new) for old, new in zip(four, five, strict=True) if old != new]
    assert {new for _, new in moved} == {"p4"}
    assert 40 < len(moved) < 140
    one_block = [World(4).prefill(SessionHash(), keys=(key("all"),)) for _ in range(5)]
    assert len(set(one_block)) == 1


# --- SGLang ------------------------------------------------------------------------------------------------------------------


def test_sglang_follows_a_match_above_its_threshold_and_the_shortest_queue_at_or_below() -> None:
    for matched, follows in ((3, False), (4, True)):
        world = World()
        policy = Sglang()
        world.set(OUTSTANDING, p0=5, p1=5, p2=0, p3=5)
        assert world.prefill(policy, keys=keys("a", matched), num_tokens=matched * BLOCK) == "p2"
        world.set(OUTSTANDING, p0=5, p1=0, p2=9, p3=5)
        assert world.prefill(policy) == ("p2" if follows else "p1")


def test_sglang_leaves_a_match_only_when_both_measures_say_imbalanced() -> None:
    for most, least, leaves in ((64, 0, False), (65, 0, True), (193, 128, True), (300, 200, False), (301, 200, True)):
        world = World()
        policy = Sglang()
        world.set(OUTSTANDING, p0=1, p1=1, p2=0, p3=1)
        assert world.prefill(policy) == "p2"
        world.set(OUTSTANDING, p0=most, p1=least, p2=most, p3=most)
        assert world.prefill(policy) == ("p1" if leaves else "p2"), (most, least)


def test_sglang_sends_to_whom_a_prefix_went_last_also_when_that_was_for_balance() -> None:
    world = World()
    policy = Sglang()
    world.set(OUTSTANDING, p0=0, p1=1, p2=1, p3=1)
    assert world.prefill(policy) == "p0"
    world.set(OUTSTANDING, p0=200, p1=0, p2=1, p3=1)
    assert world.prefill(policy) == "p1"
    world.set(OUTSTANDING, p0=0, p1=20, p2=20, p3=20)
    assert world.prefill(policy) == "p1"
    world.set(OUTSTANDING, p0=0, p1=200, p2=20, p3=20)
    assert world.prefill(policy) == "p0"
    world.set(OUTSTANDING, p0=20, p1=0, p2=20, p3=20)
    assert world.prefill(policy) == "p0"


def test_sglang_forgets_all_that_a_worker_was_sent_that_is_gone() -> None:
    world = World()
    policy = Sglang()
    world.set(OUTSTANDING, p0=0, p1=1, p2=1, p3=1)
    for name in ("a", "b"):
        assert world.prefill(policy, keys=keys(name, 10)) == "p0"
    world.fleet.forget("p0")
    assert world.prefill(policy, keys=keys("a", 10)) in {"p1", "p2", "p3"}
    world.fleet.join("p0", "prefill", "machine-p0", Capacity(), "group", 0.0)
    world.set(OUTSTANDING, p0=9)
    assert world.prefill(policy, keys=keys("b", 10)) in {"p1", "p2", "p3"}


def test_sglang_takes_the_better_of_two_for_decode() -> None:
    world = World()
    policy = Sglang()
    world.set(OUTSTANDING, d0=0, d1=1, d2=2)
    assert {world.decode(policy) for _ in range(60)} == {"d0", "d1"}


def test_what_was_sent_is_bounded_for_each_worker_and_leaves_leave_first() -> None:
    tree = SentTree()
    tree.insert(keys("a", 4), "p0", 6)
    tree.insert(keys("b", 4), "p0", 6)
    tree.insert(keys("a", 3), "p1", 6)
    assert len(tree) == 9
    assert tree.longest(keys("b", 4)) == (4, "p0")
    assert tree.longest(keys("a", 4)) == (3, "p1")
    tree.forget("p1")
    assert tree.longest(keys("a", 4)) == (2, "p0")
    tree.forget("p0")
    assert len(tree) == 0
    assert tree.longest(keys("b", 4)) == (0, None)


# --- Dynamo ------------------------------------------------------------------------------------------------------------------


def test_dynamo_weighs_a_hit_against_the_prompts_that_are_active_in_blocks() -> None:
    world = World()
    for active, taken in ((399, "p1"), (401, "p0")):
        world.set(UNCOMPUTED, p0=0, p1=active, p2=900, p3=900)
        assert world.prefill(Dynamo(), world.hits(p1=4)) == taken


def test_dynamo_credits_lower_tiers_less() -> None:
    world = World()
    world.set(UNCOMPUTED, p2=5000, p3=5000)
    hits = world.hits(p0=2, pool1=(0, 4, 0))
    assert world.prefill(Dynamo(), hits) == "p1"
    assert world.prefill(Dynamo(), world.hits(p0=4, pool1=(0, 4, 0))) == "p0"
    assert world.prefill(Dynamo(), world.hits(p0=2, pool1=(0, 0, 7))) == "p0"
    assert world.prefill(Dynamo(), world.hits(p0=2, pool1=(0, 0, 9))) == "p1"
    # What it has itself is not counted again at its machine's pool node.
    assert world.prefill(Dynamo(), world.hits(p0=5, p1=4, pool1=(0, 4, 0))) == "p0"


def test_dynamo_decay_lowers_the_credit_of_a_busy_holder() -> None:
    world = World()
    world.set(UNCOMPUTED, p0=500, p1=0, p2=900, p3=900)
    hits = world.hits(p0=6)
    assert world.prefill(Dynamo(), hits) == "p0"
    # An excess of half a prompt: 1 / (1 + 0.5 * 0.5) of six blocks is less than the five that it has more to do.
    assert world.prefill(Dynamo(DynamoTerms(decay=0.5)), hits) == "p1"
    assert world.prefill(Dynamo(DynamoTerms(decay=0.3)), hits) == "p0"


def test_dynamo_draws_by_softmax_of_the_costs_over_their_range() -> None:
    world = World(2)
    world.set(UNCOMPUTED, p0=0, p1=700)
    policy = Dynamo(DynamoTerms(temperature=1.0))
    taken = Counter(world.prefill(policy) for _ in range(2000))
    assert taken["p0"] / 2000 == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)
    assert {world.prefill(Dynamo()) for _ in range(20)} == {"p0"}
    world.set(UNCOMPUTED, p1=0)
    assert {world.prefill(Dynamo()) for _ in range(40)} == {"p0", "p1"}


def test_dynamo_decodes_where_fewest_blocks_are_active_whatever_they_hold() -> None:
    world = World()
    world.set(CONTEXT, d0=5000, d1=4000, d2=4500)
    world.set(OUTSTANDING, d0=0, d1=9, d2=0)
    assert world.decode(Dynamo(), world.hits(d0=10)) == "d1"


def test_dynamo_weighs_prefill_against_decode_where_one_worker_does_both() -> None:
    world = World(0, 2)
    world.set(CONTEXT, d0=700, d1=0)
    hits = world.hits(d0=5)
    assert world.decode(Dynamo(), hits) == "d1"
    assert world.decode(Dynamo(DynamoTerms(overlap_weight=2.0)), hits) == "d0"


# --- llm-d -------------------------------------------------------------------------------------------------------------------


def test_llm_d_adds_up_its_weighted_scores() -> None:
    world = World(3)
    world.set(OUTSTANDING, p0=10, p1=5, p2=0)
    # Queues score 0, 1/2 and 1: three times the part that is held outweighs twice that from a third or two thirds on.
    assert world.prefill(LlmD(), world.hits(p0=7)) == "p0"
    assert world.prefill(LlmD(), world.hits(p0=6)) == "p2"
    assert world.prefill(LlmD(), world.hits(p1=4)) == "p1"
    assert world.prefill(LlmD(), world.hits(p1=3)) == "p2"
    assert world.prefill(LlmD(LlmDTerms(1, 2, 0)), world.hits(p0=10)) == "p2"


def test_llm_d_scores_equal_queues_alike_and_used_memory_lower() -> None:
    world = World(2, 2)
    world.set(OUTSTANDING, d0=8, d1=8)
    world.set(CONTEXT, d0=40_000, d1=60_000)
    world.set(FREE_BLOCKS, d0=600, d1=400)
    assert world.decode(LlmD()) == "d0"
    # Two fifths are free rather than three: twice a fifth; three times the part held is more from two blocks of ten on.
    assert world.decode(LlmD(), world.hits(d1=2)) == "d1"
    assert world.decode(LlmD(), world.hits(d1=1)) == "d0"


def test_llm_d_computes_a_short_rest_where_it_decodes() -> None:
    world = World()
    hits = world.hits(d1=10)
    for num_tokens, here in ((1015, True), (1016, False)):
        placement = world.place(LlmD(), hits, num_tokens=num_tokens)
        assert placement.decode == world.number("d1")
        assert (placement.prefill is None) == here
    assert world.place(LlmD(LlmDTerms(noncached_tokens=0)), hits, num_tokens=1001).prefill is not None


# --- Preble ------------------------------------------------------------------------------------------------------------------


def busy(world: World, policy: Policy, name: str, num: int, num_tokens: int = 1000) -> None:
    """It is sent so many prompts that nobody else may take."""
    others = frozenset(range(64)) - {world.number(name)}
    for at in range(num):
        world.place(policy, num_tokens=num_tokens, keys=keys(f"{name}-{at}", num_tokens // BLOCK), avoid=others)


def test_preble_exploits_when_more_is_cached_than_not() -> None:
    for held, exploits in ((5, False), (6, True)):
        world = World()
        policy = Preble()
        busy(world, policy, "p1", 4)
        taken = world.prefill(policy, world.hits(p1=held), keys=keys("x", 10))
        assert (taken == "p1") == exploits


def test_preble_exploits_the_least_loaded_of_those_that_hold_most() -> None:
    world = World()
    policy = Preble()
    busy(world, policy, "p1", 2)
    busy(world, policy, "p2", 1)
    hits = world.hits(p1=8, p2=8, p3=7)
    assert world.prefill(policy, hits) == "p2"


def test_preble_explores_by_load_and_what_the_prompt_costs_and_forgets_after_its_window() -> None:
    world = World(2)
    policy = Preble()
    busy(world, policy, "p0", 1, num_tokens=300)
    # 0.3 s of load at p0, where 0.4 s of the prompt are held.
    assert world.prefill(policy, world.hits(p0=4), keys=keys("x", 10)) == "p0"
    assert world.prefill(policy, keys=keys("y", 10)) == "p1"
    busy(world, policy, "p0", 10)
    assert {world.prefill(policy, keys=keys(f"z{at}", 1), num_tokens=BLOCK) for at in range(5)} == {"p1"}
    world.now_s += 181.0
    assert {world.prefill(policy, keys=keys(f"w{at}", 1), num_tokens=BLOCK) for at in range(20)} == {"p0", "p1"}


def test_preble_spares_blocks_that_others_use() -> None:
    def explored(used_at: str) -> str | None:
        world = World(2, num_blocks=10)
        policy = Preble()
        for name in ("p0", "p1"):
            others = frozenset(range(64)) - {world.number(name)}
            for at in range(4):
                fresh = keys("hot" if name == used_at else f"{name}{at}", 10)
                world.place(policy, num_tokens=1000, keys=fresh, avoid=others)
        return world.prefill(policy, keys=keys("new", 10))

    assert explored("p0") == "p1"
    assert explored("p1") == "p0"


def test_preble_leaves_the_heaviest_worker_when_it_has_too_much_more_than_the_lightest() -> None:
    for heavy, leaves in ((15, False), (16, True)):
        world = World(2)
        policy = Preble(PrebleTerms(requests_before_balance=1))
        busy(world, policy, "p0", heavy)
        busy(world, policy, "p1", 10)
        assert world.prefill(policy, world.hits(p0=9)) == ("p1" if leaves else "p0")


# --- Mooncake ----------------------------------------------------------------------------------------------------------------


def test_mooncake_takes_the_least_queue_and_prefill() -> None:
    for queue, taken in ((490, "p1"), (510, "p0")):
        world = World(2)
        world.send("p1", queue)
        assert world.prefill(Mooncake(MooncakeTerms(1e9)), world.hits(p0=1, p1=6)) == taken
        # What the machine's pool node has counts as its own.
        assert world.prefill(Mooncake(MooncakeTerms(1e9)), world.hits(p0=1, pool1=(0, 6, 0))) == taken


def test_mooncake_transfers_from_its_threshold_on() -> None:
    for held, transfers in ((4, True), (5, False)):
        world = World(2)
        world.send("p1", 300)
        # With a transfer p0 computes what p1 would, without its queue; else it computes more than that queue.
        hits = world.hits(p0=held, p1=8 + (held == 5))
        assert world.prefill(Mooncake(MooncakeTerms(2.0)), hits) == ("p0" if transfers else "p1")


def test_mooncake_counts_what_a_transfer_takes_and_waits_for() -> None:
    def taken(**changes: float) -> str | None:
        world = World(2)
        world.send("p1", 300)
        if "rate" in changes:
            world.fleet.table[FETCH_RATE] = changes["rate"]
        if "busy_s" in changes:
            world.set(SENDS_UNTIL, p1=world.now_s + changes["busy_s"])
        return world.prefill(Mooncake(), world.hits(p1=8))

    # 0.3 s of queue against eight blocks of 1,000 bytes.
    assert taken() == "p0"
    assert taken(rate=8000 / 0.29) == "p0"
    assert taken(rate=8000 / 0.32) == "p1"
    assert taken(busy_s=0.29) == "p0"
    assert taken(busy_s=0.32) == "p1"


def test_the_others_decode_where_load_is_least() -> None:
    rules: Sequence[Policy] = (Mooncake(), Preble(), SessionHash())
    for policy in rules:
        world = World()
        world.set(OUTSTANDING, d0=2, d1=1, d2=3)
        assert world.decode(policy, world.hits(d0=10)) == "d1"
