"""Fetches that several sequences wait for, sequences that fetch ahead of their turn, and what follows when fetches fail."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.keys import KeyChain
from kvpool.sink import FetchedBatch, FetchEnded, FetchPlan
from protos.control import Endpoints as ControlEndpoints
from protos.control import Fence, ReadyBlock, Source, StepPrices, Tokens
from tests.engine import fake_model
from tests.engine.test_engine import BLOCK, ROOT, World, all_free, dispatch

POOL = Source("pool-0", b"p" * 8, "HOST", ControlEndpoints("tcp://a", "tcp://b", "tcp://c"))
LONG = [(3 * i + 1) % fake_model.VOCAB for i in range(6 * BLOCK)]


class Keeper:
    """Somebody who holds the KV of some prompts, and plays the transfer thread of `world`."""

    def __init__(self, world: World, *prompts: list[int]) -> None:
        self.world = world
        self.other = World()
        for i, prompt in enumerate(prompts):
            self.other.engine.on_dispatch(0, dispatch(f"held{i}", prompt, max_tokens=1), 0.0)
        self.other.run()
        self.plans: dict[bytes, FetchPlan] = {}
        self.num_plans = 0

    def step(self) -> None:
        out = self.world.step()
        self.num_plans += len(out.fetches)
        self.plans |= {plan.fetch_id: plan for plan in out.fetches}
        for fetch_id in out.cancels:
            self.end(fetch_id, 0)

    def end(self, fetch_id: bytes, num_blocks: int | None = None) -> None:
        """The fetch ends with the first `num_blocks` of what it wanted, as far as they are held here."""
        plan = self.plans.pop(fetch_id, None)
        if plan is None:
            return
        blocks, block_ids = [], []
        for wanted in plan.wanted[:num_blocks]:
            record = self.other.pool.lookup(wanted.key)
            if record is None:
                continue
            self.world.memory.cells[wanted.block_id] = self.other.memory.cells[record.block_id]
            blocks.append(
                ReadyBlock(wanted.key, record.block_id, record.num_tokens, record.checksum, wanted.parent, b"computer")
            )
            block_ids.append(wanted.block_id)
        if blocks:
            self.world.engine.on_blocks(fetch_id, FetchedBatch(POOL, "shm", tuple(blocks), tuple(block_ids)))
        keys = tuple(block.key for block in blocks)
        missing = tuple(wanted.key for wanted in plan.wanted if wanted.key not in keys)
        self.world.engine.on_fetch_ended(FetchEnded(fetch_id, keys, missing, ()), self.world.now_s)

    def run(self) -> None:
        for _ in range(1000):
            self.step()
            for fetch_id in list(self.plans):
                self.end(fetch_id)
            if self.world.engine.is_idle:
                return
        raise AssertionError("not idle")


def ask(world: World, name: str, prompt: list[int]) -> Fence:
    fence = Fence(name, 0, "decode", 0)
    world.engine.on_dispatch(0, dispatch(name, prompt, sources=[POOL]), world.now_s)
    return fence


def test_a_block_that_is_under_way_is_not_fetched_again() -> None:
    world = World()
    keeper = Keeper(world, LONG)
    longer, shorter = LONG, [*LONG[: 3 * BLOCK], 5]
    a, b = ask(world, "a", longer), ask(world, "b", shorter)
    keeper.step()
    (plan,) = keeper.plans.values()
    assert len(plan.wanted) == 5
    assert world.engine.counters().shared_blocks == 3
    keeper.end(plan.fetch_id)
    keeper.run()
    assert world.stream(a) == fake_model.continuation(longer, 5)
    assert world.stream(b) == fake_model.continuation(shorter, 5)
    assert world.engine.counters().prefill_tokens == BLOCK + 1, "one block and one token: the rest came"
    assert all_free(world)


def test_who_shares_fetches_the_rest_for_itself_at_the_same_time() -> None:
    world = World()
    branch = [*LONG[: 3 * BLOCK], *LONG[: 2 * BLOCK], 5]
    keeper = Keeper(world, LONG, branch)
    a, b = ask(world, "a", LONG), ask(world, "b", branch)
    keeper.step()
    first, second = keeper.plans.values()
    assert [len(first.wanted), len(second.wanted)] == [5, 2]
    assert (first.order, second.order) == (0, 1)
    keeper.end(second.fetch_id)
    keeper.step()
    assert not world.stream(b), "it waits for what the other one fetches"
    keeper.end(first.fetch_id)
    keeper.run()
    assert world.stream(a) == fake_model.continuation(LONG, 5)
    assert world.stream(b) == fake_model.continuation(branch, 5)
    assert keeper.num_plans == 2
    assert all_free(world)


def test_a_hand_over_that_shares_a_head_fetches_its_last_partial_block_once() -> None:
    world = World()
    prompt = [*LONG[: 3 * BLOCK], 5]
    keeper = Keeper(world)
    for name in ("held0", "held1"):  # a prefill role holds its last, partial block findable
        keeper.other.engine.on_dispatch(0, dispatch(name, prompt, role="prefill", hold_s=1000.0), 0.0)
    for _ in range(10):
        keeper.other.step()
    fences = [Fence(name, 0, "decode", 0) for name in ("a", "b")]
    longer = [*LONG[: 3 * BLOCK], 7]
    for fence, tokens in zip(fences, (longer, prompt), strict=True):
        world.engine.on_dispatch(0, dispatch(fence.request_id, tokens, here=False, sources=[POOL]), 0.0)
    keeper.step()
    first, second = keeper.plans.values()
    assert [len(first.wanted), len(second.wanted)] == [4, 1]
    keeper.end(second.fetch_id)  # its own block is here before the head that it shares
    keeper.end(first.fetch_id)
    keeper.step()
    assert not keeper.plans, "all of it is here"
    world.engine.on_first_tokens(0, fences[1], [fake_model.continuation(prompt, 1)[0]], world.now_s)
    world.engine.on_first_tokens(0, fences[0], [fake_model.continuation(longer, 1)[0]], world.now_s)
    keeper.run()
    tokens = [m.token_ids[0] for m in world.said if isinstance(m, Tokens) and m.fence == fences[1]]
    assert tokens == fake_model.continuation(prompt, 5)[1:]
    assert all_free(world)


@pytest.mark.parametrize("came", [0, 2])
def test_who_shared_a_fetch_that_failed_tries_for_itself(came: int) -> None:
    world = World()
    keeper = Keeper(world, LONG)
    a, b = ask(world, "a", LONG), ask(world, "b", [*LONG[: 3 * BLOCK], 5])
    keeper.step()
    (plan,) = keeper.plans.values()
    world.engine.on_abort(0, a, "the client left")
    keeper.plans[plan.fetch_id] = plan
    keeper.end(plan.fetch_id, came)
    keeper.step()
    (again,) = keeper.plans.values()
    assert [block.key for block in again.wanted] == [block.key for block in plan.wanted[came:3]]
    keeper.run()
    assert world.ends(a) == ["aborted"]
    assert world.stream(b) == fake_model.continuation([*LONG[: 3 * BLOCK], 5], 5)
    assert all_free(world)


def test_the_end_of_who_shares_leaves_the_fetch_alone() -> None:
    world = World()
    keeper = Keeper(world, LONG)
    a, b = ask(world, "a", LONG), ask(world, "b", LONG)
    keeper.step()
    world.engine.on_abort(0, b, "the client left")
    keeper.step()
    assert world.ends(b) == ["aborted"]
    assert len(keeper.plans) == 1
    keeper.run()
    assert world.stream(a) == fake_model.continuation(LONG, 5)
    assert all_free(world)


def test_taint_under_a_shared_fetch_sends_both_back_in_line() -> None:
    world = World()
    branch = [*LONG[: 3 * BLOCK], *LONG[: 2 * BLOCK], 5]
    keeper = Keeper(world, LONG, branch)
    a, b = ask(world, "a", LONG), ask(world, "b", branch)
    keeper.step()
    first, second = keeper.plans.values()
    del keeper.plans[first.fetch_id]
    tainted = (first.wanted[1].block_id, first.wanted[4].block_id)
    missing = tuple(block.key for block in first.wanted)
    world.engine.on_fetch_ended(FetchEnded(first.fetch_id, (), missing, tainted), world.now_s)
    world.pool.check()
    assert world.pool.stats().retired == 2
    keeper.run()
    assert second.fetch_id not in keeper.plans
    assert world.stream(a) == fake_model.continuation(LONG, 5)
    assert world.stream(b) == fake_model.continuation(branch, 5)
    assert world.pool.stats().retired == 2


def test_taint_under_two_shared_fetches_while_an_own_one_is_running() -> None:
    world = World()
    longer = [*LONG, *range(2 * BLOCK), 5]
    keeper = Keeper(world, longer)
    prompts = [[*LONG[: 3 * BLOCK], 5], [*LONG[: 5 * BLOCK], 5], longer]
    fences = [ask(world, name, prompt) for name, prompt in zip("abc", prompts, strict=True)]
    keeper.step()
    first, second, third = keeper.plans.values()
    assert [len(plan.wanted) for plan in (first, second, third)] == [3, 2, 3], "the last one shares both others'"
    for plan in (second, first, third):  # one source froze under all of them
        del keeper.plans[plan.fetch_id]
        missing = tuple(block.key for block in plan.wanted)
        ended = FetchEnded(plan.fetch_id, (), missing, (plan.wanted[0].block_id,))
        world.engine.on_fetch_ended(ended, world.now_s)
        world.pool.check()
    assert world.pool.stats().retired == 3
    keeper.run()
    for fence, prompt in zip(fences, prompts, strict=True):
        assert world.stream(fence) == fake_model.continuation(prompt, 5)
    assert world.pool.stats().retired == 3


def test_a_sequence_is_fetched_for_before_it_may_run() -> None:
    world = World(max_running=1)
    keeper = Keeper(world, LONG)
    a = ask(world, "a", [1, 2, 3])
    keeper.step()
    b = ask(world, "b", LONG)
    keeper.step()
    (plan,) = keeper.plans.values()
    keeper.end(plan.fetch_id)
    before = len(world.stream(a))
    keeper.step()
    assert len(world.stream(a)) == before + 1
    assert not world.stream(b), "its KV is here, its turn has not come"
    keeper.run()
    assert world.stream(b) == fake_model.continuation(LONG, 5)


def test_what_computing_gets_sooner_is_not_fetched() -> None:
    world = World()
    keeper = Keeper(world, LONG)
    world.engine.meter.prices = StepPrices(token_s=1e-6)
    world.engine.meter.fetch_bytes_per_s = 1.0
    a = ask(world, "a", LONG)
    keeper.run()
    assert keeper.num_plans == 0
    assert world.stream(a) == fake_model.continuation(LONG, 5)
    world.pool.clear_cached()
    world.engine.meter.prices = StepPrices(token_s=0.1)
    world.engine.meter.fetch_bytes_per_s = 1e9
    ask(world, "b", LONG)
    keeper.run()
    assert keeper.num_plans == 1


def test_a_preempted_sequence_asks_the_pool_for_what_it_lost() -> None:
    world = World()
    keeper = Keeper(world, LONG)
    world.engine.on_pools([POOL])
    world.engine.on_dispatch(0, dispatch("a", LONG), world.now_s)
    keeper.step()
    assert not keeper.plans
    (sequence,) = world.engine.scheduler.holding
    world.engine.scheduler.requeue(sequence)
    world.pool.clear_cached()
    keeper.step()
    (plan,) = keeper.plans.values()
    assert plan.sources == (POOL,)
    chain = KeyChain(ROOT, BLOCK, LONG)
    assert [block.key for block in plan.wanted] == chain.keys[: len(plan.wanted)]
    keeper.run()
    assert world.stream(Fence("a", 0, "decode", 0)) == fake_model.continuation(LONG, 5)


def test_the_life_before_a_preemption_does_not_count_as_fetching() -> None:
    world = World()
    keeper = Keeper(world, LONG)
    ask(world, "a", LONG)

    def fetch() -> float:
        keeper.step()
        (plan,) = keeper.plans.values()
        world.now_s += 0.01
        keeper.end(plan.fetch_id)
        return world.engine.loads()[0].fetch_bytes_per_s

    speed = fetch()
    keeper.step()
    world.now_s += 100.0
    (sequence,) = world.engine.scheduler.holding
    world.engine.scheduler.requeue(sequence)
    world.pool.clear_cached()
    assert fetch() >= 0.99 * speed


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_streams_are_the_models_truth_whatever_fetches_do(data: st.DataObject) -> None:
    """Prompts that share heads; fetches end early, late, in any order; jobs are aborted in between; memory is short."""
    world = World(num_blocks=data.draw(st.integers(8, 40)), max_running=data.draw(st.integers(1, 4)))
    heads = [LONG, [*LONG[: 2 * BLOCK], *range(4 * BLOCK)]]
    keeper = Keeper(world, *heads[: data.draw(st.integers(0, 2))])
    jobs: dict[Fence, list[int]] = {}
    aborted: set[Fence] = set()
    for i in range(data.draw(st.integers(1, 5))):
        head = data.draw(st.sampled_from(heads))
        prompt = [*head[: data.draw(st.integers(1, len(head)))], data.draw(st.integers(0, fake_model.VOCAB - 1))]
        jobs[ask(world, f"job{i}", prompt)] = prompt
        for _ in range(data.draw(st.integers(0, 3))):
            keeper.step()
            for fetch_id in data.draw(st.lists(st.sampled_from(sorted(keeper.plans) or [b""]), max_size=2)):
                keeper.end(fetch_id, data.draw(st.none() | st.integers(0, 4)))
            if data.draw(st.integers(0, 9)) == 0:
                fence = data.draw(st.sampled_from(list(jobs)))
                aborted.add(fence)
                world.engine.on_abort(0, fence, "the client left")
    keeper.run()
    for fence, prompt in jobs.items():
        stream = world.stream(fence)
        truth = fake_model.continuation(prompt, 5)
        assert stream == truth[: len(stream)]
        if fence not in aborted and world.ends(fence) != ["invalid_request"]:
            assert stream == truth
    assert all_free(world)


def test_what_nobody_holds_is_not_asked_for() -> None:
    world = World()
    keeper = Keeper(world, LONG)
    world.engine.on_dispatch(0, dispatch("a", LONG, sources=[POOL], held_blocks=[2]), world.now_s)
    keeper.step()
    (plan,) = keeper.plans.values()
    assert len(plan.wanted) == 2
    assert plan.held == (2,)
    keeper.run()
    assert world.stream(Fence("a", 0, "decode", 0)) == fake_model.continuation(LONG, 5)


def test_tokens_that_a_hand_over_brings_are_no_load() -> None:
    world = World()
    handed = dispatch("a", LONG, here=False, sources=[POOL], wait_source=POOL.process)
    world.engine.on_dispatch(7, handed, world.now_s)
    world.step()
    assert world.engine.loads()[7].waiting_tokens == 0
    world.engine.on_dispatch(7, dispatch("b", LONG[: 2 * BLOCK]), world.now_s)
    assert world.engine.loads()[7].waiting_tokens == 2 * BLOCK
