"""Streams stay within reach of what the pool has, wait for it a while, and go on without it."""

from __future__ import annotations

from protos.control import Fence, Tokens
from tandem.engine.durability import MAX_LAG_BLOCKS, PATIENCE_S
from tests.engine import fake_model
from tests.engine.test_engine import BLOCK, World, all_free, dispatch

PROMPT = [1, 2, 3, 4, 5]
A, B = Fence("a", 0, "decode", 0), Fence("b", 0, "decode", 0)
KEEPER = 3


def started(*names: str, max_tokens: int = 60) -> World:
    """A world in which these streams run and a pool node keeps the prompt's first block."""
    world = World()
    for i, name in enumerate(names):
        world.engine.on_dispatch(0, dispatch(name, [*PROMPT, i], max_tokens=max_tokens), world.now_s)
    world.step()
    keep(world)
    return world


def keep(world: World) -> None:
    """The pool node has everything that is published."""
    for sequence in world.engine.scheduler.holding:
        world.pool.mark_kept(sequence.chain.keys[: sequence.num_published_blocks], KEEPER)


def durable(world: World, fence: Fence) -> list[int]:
    return [m.durable_position for m in world.said if isinstance(m, Tokens) and m.fence == fence]


def test_a_stream_runs_two_blocks_ahead_of_the_pool_and_then_waits() -> None:
    world = started("a")
    for _ in range(60):
        world.step()
        if not world.engine.has_work:
            break
    (sequence,) = world.engine.scheduler.holding
    assert sequence.num_published_blocks - sequence.num_kept_blocks == MAX_LAG_BLOCKS + 1
    assert world.engine.counters().held_back_steps > 0
    at = len(world.stream(A))
    for _ in range(10):
        world.step()
    assert len(world.stream(A)) == at, "it waits"
    keep(world)
    world.step()
    assert len(world.stream(A)) == at + 1


def test_the_reported_position_never_exceeds_what_the_pool_holds() -> None:
    world = started("a", max_tokens=40)
    kept = 1
    while not world.engine.is_idle:
        world.step()
        for message in world.said[-1:]:
            if isinstance(message, Tokens):
                assert message.durable_position <= max(0, kept * BLOCK - len(PROMPT) - 1)
                assert message.position - message.durable_position <= (MAX_LAG_BLOCKS + 2) * BLOCK
        if world.engine.scheduler.holding:
            sequence = world.engine.scheduler.holding[0]
            kept = sequence.num_published_blocks
            keep(world)
    assert max(durable(world, A)) >= 40 - (MAX_LAG_BLOCKS + 1) * BLOCK
    assert world.stream(A) == fake_model.continuation([*PROMPT, 0], 40)
    assert world.engine.counters().unprotected_streams == 0


def test_without_any_progress_of_the_pool_streams_go_on_unprotected_and_that_is_counted_once() -> None:
    world = started("a", "b")
    while world.engine.has_work:
        world.step()
    began = world.now_s
    while not world.engine.has_work:
        world.step()
    assert 0.9 * PATIENCE_S <= world.now_s - began <= 1.2 * PATIENCE_S
    world.run()
    assert world.stream(A) == fake_model.continuation([*PROMPT, 0], 60)
    assert world.stream(B) == fake_model.continuation([*PROMPT, 1], 60)
    assert world.engine.counters().unprotected_streams == 2
    assert all_free(world)


def test_progress_protects_again() -> None:
    world = started("a", max_tokens=100)
    while world.engine.counters().unprotected_streams == 0:
        world.step()
    keep(world)
    world.step()
    while world.engine.has_work and len(world.stream(A)) < 99:
        world.step()
    assert len(world.stream(A)) < 99, "it waits for the pool once more"


def test_a_pool_that_takes_from_others_is_waited_for() -> None:
    world = started("a", "b")
    while world.engine.has_work:
        world.step()
    first, second = world.engine.scheduler.holding
    for _ in range(8):
        world.pool.mark_kept(first.chain.keys[: first.num_kept_blocks + 1], KEEPER)
        for _ in range(int(PATIENCE_S / 0.02)):
            world.step()
    assert world.engine.counters().unprotected_streams == 0
    assert len(world.stream(A)) > len(world.stream(B)), "what it took were the blocks of the first"
    assert second.held_back


def test_without_a_pool_nothing_waits() -> None:
    world = World()
    world.engine.on_dispatch(0, dispatch("a", PROMPT, max_tokens=60), world.now_s)
    world.run()
    assert world.engine.counters().held_back_steps == 0
    assert set(durable(world, A)) == {0}


def test_when_its_pool_node_leaves_a_stream_goes_on_at_once() -> None:
    world = started("a")
    while world.engine.has_work:
        world.step()
    world.pool.forget_keeper(KEEPER)
    world.step()
    world.step()
    assert world.engine.has_work
    world.run()
    assert world.engine.counters().unprotected_streams == 0


def test_a_prompt_that_the_pool_has_not_got_holds_nothing_back() -> None:
    world = World()
    world.engine.on_dispatch(0, dispatch("a", list(range(8 * BLOCK)), max_tokens=BLOCK), world.now_s)
    world.step()
    (sequence,) = world.engine.scheduler.holding
    world.pool.mark_kept(sequence.chain.keys[:1], KEEPER)
    world.run()
    assert world.engine.counters().held_back_steps == 0


def test_copies_that_are_gone_are_reported_no_more() -> None:
    world = started("a")
    for _ in range(20):
        world.step()
        keep(world)
    world.step()
    (sequence,) = world.engine.scheduler.holding
    assert durable(world, A)[-1] > 0
    world.pool.unmark_kept(sequence.chain.keys[1:2], KEEPER)
    world.step()
    assert sequence.num_kept_blocks == 1
    assert sequence.held_back, "it is too far ahead again"
    keep(world)
    world.step()
    assert durable(world, A)[-1] > 0
    world.pool.forget_keeper(KEEPER)
    world.step()
    assert durable(world, A)[-1] == 0
