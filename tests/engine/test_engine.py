"""The engine's promises, on a model whose every token depends on every KV cell before it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.block_pool import BlockPool
from kvpool.keys import KeyChain, tokens_as_bytes
from kvpool.sink import FetchedBatch, FetchEnded
from protos.control import (
    Aborted,
    Dispatch,
    Failed,
    Fence,
    ReadyBlock,
    RoleReport,
    Sampling,
    Source,
    Started,
    StepPrices,
    Tokens,
)
from protos.control import Endpoints as ControlEndpoints
from tandem.engine.engine import Engine
from tandem.engine.limits import EngineLimits
from tandem.engine.output import Output
from tandem.engine.runner import Chunk
from tests.engine import fake_model

BLOCK = 4
ROOT = b"r" * 16
SOURCE = Source("prefill-0", b"e" * 8, "DEVICE", ControlEndpoints("tcp://a", "tcp://b", "tcp://c"))


class World:
    """An engine and a hand on its clock; collects what it says."""

    def __init__(
        self, num_blocks: int = 64, max_running: int = 8, max_step_tokens: int = 16, recompute: int = 8
    ) -> None:
        self.pool = BlockPool(num_blocks, BLOCK, "DEVICE")
        self.memory = fake_model.FakeMemory(num_blocks, BLOCK)
        self.runner = fake_model.FakeRunner(self.memory, BLOCK)
        self.now_s = 100.0
        ids = itertools.count()
        self.engine = Engine(
            pool=self.pool,
            memory=self.memory,
            runner=self.runner,
            limits=EngineLimits(
                max_model_len=num_blocks * BLOCK,
                vocab_size=fake_model.VOCAB,
                max_running=max_running,
                max_step_tokens=max_step_tokens,
                recompute_limit_tokens=recompute,
                fetch_timeout_s=5.0,
                block_size=BLOCK,
                slab_bytes=64,
            ),
            new_fetch_id=lambda: next(ids).to_bytes(16, "big"),
        )
        self.said: list[Any] = []
        self.outputs = Output()

    def step(self) -> Output:
        self.now_s += 0.01
        out = self.engine.step(self.now_s, lambda: self.now_s)
        self.said.extend(message for _, message in out.replies)
        self.pool.check()
        return out

    def run(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            self.step()
            if self.engine.is_idle:
                return
        raise AssertionError(f"not idle after {limit} steps")

    def stream(self, fence: Fence, index: int = 0) -> list[int]:
        tokens: list[int] = []
        for message in self.said:
            if isinstance(message, Tokens) and message.fence == fence and message.index == index:
                assert message.position == len(tokens)
                tokens.extend(message.token_ids)
        return tokens

    def ends(self, fence: Fence) -> list[str]:
        ends = []
        for message in self.said:
            if getattr(message, "fence", None) != fence:
                continue
            if isinstance(message, Tokens) and message.finish_reason:
                ends.append(message.finish_reason)
            elif isinstance(message, Failed):
                ends.append(message.code)
            elif isinstance(message, Aborted):
                ends.append("aborted")
        return ends


def dispatch(
    name: str,
    prompt: list[int],
    *,
    max_tokens: int = 5,
    role: str = "decode",
    here: bool = True,
    n: int = 1,
    **more: Any,
) -> Dispatch:
    return Dispatch(
        fence=Fence(name, 0, role, 0),  # type: ignore[arg-type]
        root=ROOT,
        token_ids=tokens_as_bytes(prompt),
        num_prompt_tokens=more.pop("num_prompt_tokens", len(prompt)),
        sampling=Sampling(max_tokens=max_tokens, stop_token_ids=more.pop("stop_token_ids", [])),
        n=n,
        sources=more.pop("sources", []),
        deadline_s=more.pop("deadline_s", 1000.0),
        prefill_here=here,
        **more,
    )


def all_free(world: World) -> bool:
    stats = world.pool.stats()
    return stats.free + stats.cached == stats.num_blocks and stats.leased == 0


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17, 40])
def test_a_stream_is_the_models_truth_at_every_prompt_length(length: int) -> None:
    world = World()
    prompt = [(7 * i) % fake_model.VOCAB for i in range(length)]
    world.engine.on_dispatch(0, dispatch("a", prompt, max_tokens=9), world.now_s)
    world.run()
    assert world.stream(Fence("a", 0, "decode", 0)) == fake_model.continuation(prompt, 9)
    assert world.ends(Fence("a", 0, "decode", 0)) == ["length"]
    assert all_free(world)


def test_a_second_request_finds_the_first_ones_blocks_and_computes_only_the_rest() -> None:
    world = World()
    prompt = list(range(20))
    world.engine.on_dispatch(0, dispatch("a", prompt), world.now_s)
    world.run()
    world.engine.on_dispatch(0, dispatch("b", [*prompt[:16], 50, 51]), world.now_s)
    world.run()
    report = next(m for m in world.said if isinstance(m, RoleReport) and m.fence.request_id == "b")
    assert (report.local_hit_tokens, report.computed_tokens) == (16, 2)
    assert world.stream(Fence("b", 0, "decode", 0)) == fake_model.continuation([*prompt[:16], 50, 51], 5)


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_token() -> None:
    world = World()
    prompt = list(range(16))
    for name in "ab":
        world.engine.on_dispatch(0, dispatch(name, prompt), world.now_s)
        world.run()
    assert world.stream(Fence("b", 0, "decode", 0)) == fake_model.continuation(prompt, 5)


def test_parallel_samples_share_the_prompt_and_never_write_into_each_other() -> None:
    world = World(num_blocks=16)
    prompt = list(range(18))
    world.engine.on_dispatch(0, dispatch("a", prompt, n=4, max_tokens=7), world.now_s)
    while not any(isinstance(m, Tokens) for m in world.said):
        world.step()
    assert world.pool.stats().referenced == 5  # one copy of the prompt
    world.run()
    for index in range(4):
        assert world.stream(Fence("a", 0, "decode", 0), index) == fake_model.continuation(prompt, 7)
    assert all_free(world)


def test_a_stop_token_ends_the_stream_and_is_not_part_of_it() -> None:
    world = World()
    prompt = [1, 2, 3]
    truth = fake_model.continuation(prompt, 6)
    world.engine.on_dispatch(0, dispatch("a", prompt, max_tokens=20, stop_token_ids=[truth[4]]), world.now_s)
    world.run()
    first = truth.index(truth[4])
    assert world.stream(Fence("a", 0, "decode", 0)) == truth[:first]
    assert world.ends(Fence("a", 0, "decode", 0)) == ["stop"]


def test_preempted_sequences_continue_with_the_same_tokens() -> None:
    world = World(num_blocks=12, max_running=6)
    prompts = [[i, i + 1, i + 2] for i in range(0, 50, 10)]
    for i, prompt in enumerate(prompts):
        world.engine.on_dispatch(0, dispatch(f"r{i}", prompt, max_tokens=30), world.now_s)
    world.run()
    assert world.engine.scheduler.num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert world.stream(Fence(f"r{i}", 0, "decode", 0)) == fake_model.continuation(prompt, 30)
    assert all_free(world)


def test_a_long_prompt_does_not_stop_running_streams() -> None:
    world = World(num_blocks=128)
    world.engine.on_dispatch(0, dispatch("short", [1, 2], max_tokens=12), world.now_s)
    world.step()
    world.engine.on_dispatch(0, dispatch("long", list(range(90)), max_tokens=2), world.now_s)
    for _ in range(4):
        before = len(world.stream(Fence("short", 0, "decode", 0)))
        world.step()
        assert len(world.stream(Fence("short", 0, "decode", 0))) == before + 1
    assert world.runner.max_rows <= 16


@pytest.mark.parametrize("due_s", [1.0, 60.0])
def test_the_prompt_that_is_due_first_is_computed_first(due_s: float) -> None:
    """Also when a long one that is due later has been begun."""
    world = World(num_blocks=128)
    long, short = Fence("long", 0, "decode", 0), Fence("short", 0, "decode", 0)
    world.engine.on_dispatch(0, dispatch("long", list(range(90)), max_tokens=1, due_s=30.0), world.now_s)
    world.step()
    world.engine.on_dispatch(0, dispatch("short", [5, 6, 7, 8, 9], max_tokens=1, due_s=due_s), world.now_s)
    world.run()
    first = next(message.fence for message in world.said if isinstance(message, Tokens))
    assert first == (short if due_s < 30.0 else long)
    assert world.stream(long) == fake_model.continuation(list(range(90)), 1)
    assert world.stream(short) == fake_model.continuation([5, 6, 7, 8, 9], 1)


@pytest.mark.parametrize(
    ("token_s", "sizes"),
    [(0.0, [14]), (1e-3, [8, 6]), (0.25e-3, [14])],
    ids=["not measured", "dear", "hidden in the base"],
)
def test_prompts_share_a_step_only_where_that_is_nearly_free(token_s: float, sizes: list[int]) -> None:
    world = World(num_blocks=128)
    world.engine.meter.prices = StepPrices(base_s=2e-3, token_s=token_s)
    steps: list[int] = []

    def run(chunks: Sequence[Chunk]) -> torch.Tensor:
        steps.append(sum(len(chunk.token_ids) for chunk in chunks))
        return fake_model.FakeRunner.run(world.runner, chunks)

    world.runner.run = run  # type: ignore[method-assign]
    fences = [Fence(name, 0, "decode", 0) for name in ("first", "second")]
    prompts = [list(range(8)), [9, 8, 7, 6, 5, 4]]
    for fence, prompt in zip(fences, prompts, strict=True):
        world.engine.on_dispatch(0, dispatch(fence.request_id, prompt, max_tokens=1, due_s=1.0), world.now_s)
    world.run()
    assert steps == sizes
    assert [world.stream(fence) for fence in fences] == [fake_model.continuation(prompt, 1) for prompt in prompts]


def test_the_load_says_what_is_left_to_compute_and_what_generates() -> None:
    world = World(num_blocks=128)
    world.engine.on_dispatch(0, dispatch("a", list(range(40)), max_tokens=9, n=2), world.now_s)
    load = world.engine.loads()[0]
    assert (load.waiting_tokens, load.waiting_pairs) == (40, 40 * 41 // 2)
    assert (load.num_generating, load.context_tokens) == (2, 80)
    world.step()
    load = world.engine.loads()[0]
    assert (load.waiting_tokens, load.waiting_pairs) == (24, 24 * 16 + 24 * 25 // 2)
    world.run()
    load = world.engine.loads()[0]
    assert (load.waiting_tokens, load.waiting_pairs, load.num_generating, load.context_tokens) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 10_000}, "at most 256"),
        ({"prompt": [5, 97]}, "97"),
        ({"prompt": []}, "0 tokens"),
        ({"n": 9}, "at most 8"),
    ],
)
def test_what_can_never_run_is_refused_with_the_limit(change: dict[str, Any], words: str) -> None:
    world = World()
    given = {"prompt": [1, 2], **change}
    prompt = given.pop("prompt")
    world.engine.on_dispatch(0, dispatch("a", prompt, num_prompt_tokens=max(1, len(prompt)), **given), world.now_s)
    world.step()
    (failed,) = [m for m in world.said if isinstance(m, Failed)]
    assert failed.code == "invalid_request"
    assert words in failed.message
    assert world.engine.is_idle


def test_prefill_draws_one_token_and_holds_its_blocks_until_they_are_handed_over() -> None:
    world = World()
    prompt = list(range(10))
    fence = Fence("a", 0, "prefill", 0)
    world.engine.on_dispatch(0, dispatch("a", prompt, role="prefill", here=False, n=2), world.now_s)
    for _ in range(5):
        world.step()
    assert world.stream(fence) == world.stream(fence, 1) == fake_model.continuation(prompt, 1)
    chain = KeyChain(ROOT, BLOCK, prompt)
    partial = chain.partial_key()
    assert partial is not None
    record = world.pool.lookup(partial)
    assert record is not None
    assert record.num_tokens == 2
    assert not record.announced
    assert not world.memory.cells[record.block_id, 2:].any()
    world.engine.on_abort(0, fence, "handed over")
    world.step()
    assert world.pool.lookup(partial) is None
    assert all(world.pool.contains(key) for key in chain.keys)
    assert all_free(world)


def test_a_hold_that_nobody_ends_runs_out() -> None:
    world = World()
    fence = Fence("a", 0, "prefill", 0)
    world.engine.on_dispatch(0, dispatch("a", [1, 2, 3], role="prefill", here=False, hold_s=2.0), world.now_s)
    world.step()
    world.now_s += 2.1
    world.step()
    assert world.ends(fence) == ["aborted"]
    assert all_free(world)


class Handover:
    """A prefill world and a decode world with nothing but hands between them."""

    def __init__(self, prompt: list[int], n: int = 1, before: Dispatch | None = None, **decode: Any) -> None:
        self.prefill, self.decode = World(), World(**decode)
        self.prompt = prompt
        self.fence = Fence("a", 0, "decode", 0)
        more = {"n": n, "max_tokens": 6}
        self.prefill.engine.on_dispatch(
            0, dispatch("a", prompt, role="prefill", here=False, **more), self.prefill.now_s
        )
        for _ in range(20):
            self.prefill.step()
        self.first = [self.prefill.stream(Fence("a", 0, "prefill", 0), i)[0] for i in range(n)]
        if before is not None:
            self.decode.engine.on_dispatch(0, before, self.decode.now_s)
        self.decode.engine.on_dispatch(
            0, dispatch("a", prompt, here=False, sources=[SOURCE], **more), self.decode.now_s
        )
        (self.plan,) = self.decode.step().fetches

    def copy(self, kept: set[int]) -> list[ReadyBlock]:
        """Moves the wanted blocks with these numbers."""
        blocks = []
        block_ids = []
        for wanted in (block for i, block in enumerate(self.plan.wanted) if i in kept):
            record = self.prefill.pool.lookup(wanted.key)
            assert record is not None
            self.decode.memory.cells[wanted.block_id] = self.prefill.memory.cells[record.block_id]
            blocks.append(
                ReadyBlock(wanted.key, record.block_id, wanted.num_tokens, record.checksum, wanted.parent, b"computer")
            )
            block_ids.append(wanted.block_id)
        batch = FetchedBatch(SOURCE, "shm", tuple(blocks), tuple(block_ids))
        self.decode.engine.on_blocks(self.plan.fetch_id, batch)
        return blocks

    def end(self, keep: int, tainted: tuple[int, ...] = (), lost: int = -1) -> None:
        """The fetch ends with its first `keep` blocks, but for number `lost`."""
        kept = set(range(keep)) - {lost}
        committed = self.copy(kept)
        self.decode.engine.on_fetch_ended(
            FetchEnded(
                fetch_id=self.plan.fetch_id,
                committed=tuple(block.key for block in committed),
                missing=tuple(w.key for i, w in enumerate(self.plan.wanted) if i not in kept),
                tainted=tainted,
            ),
            self.decode.now_s,
        )

    def first_tokens(self) -> None:
        self.decode.engine.on_first_tokens(0, self.fence, self.first, self.decode.now_s)


@pytest.mark.parametrize("length", [1, 4, 7, 8, 23])
@pytest.mark.parametrize("first_tokens_early", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_decode_continues_a_fetched_prompt_with_the_same_tokens(length: int, first_tokens_early: bool, n: int) -> None:
    prompt = [(5 * i + 1) % fake_model.VOCAB for i in range(length)]
    hand = Handover(prompt, n)
    if first_tokens_early:
        hand.first_tokens()
    hand.end(len(hand.plan.wanted))
    if not first_tokens_early:
        hand.decode.step()
        assert not hand.decode.stream(hand.fence)
        hand.first_tokens()
    hand.decode.run()
    truth = fake_model.continuation(prompt, 6)
    for index in range(n):
        streamed = [t for m in hand.decode.said if isinstance(m, Tokens) and m.index == index for t in m.token_ids]
        assert streamed == truth[1:]
    report = next(m for m in hand.decode.said if isinstance(m, RoleReport))
    assert (report.fetched_tokens, report.computed_tokens) == (length, 0)
    assert all_free(hand.decode)


def test_a_hole_in_what_arrived_is_recomputed_within_the_limit() -> None:
    hand = Handover(list(range(23)))
    hand.first_tokens()
    hand.end(6, lost=4)  # 16 of 23 tokens, then a hole
    hand.decode.run()
    streamed = [t for m in hand.decode.said if isinstance(m, Tokens) for t in m.token_ids]
    assert streamed == fake_model.continuation(list(range(23)), 6)[1:]
    assert hand.decode.engine.counters().recomputed_tokens == 7


def test_more_than_the_limit_missing_is_reported_not_recomputed() -> None:
    hand = Handover(list(range(23)))
    hand.end(3)  # 11 tokens missing, the limit is 8
    hand.decode.step()
    assert hand.decode.ends(hand.fence) == ["fetch_failed"]
    assert hand.decode.engine.counters().prefill_tokens == 0
    assert all_free(hand.decode)


@pytest.mark.parametrize("end", ["abort", "probe", "finish"])
def test_a_dispatch_that_comes_after_its_end_is_not_begun(end: str) -> None:
    world = World()
    late = dispatch("late", [1, 2, 3])
    if end == "abort":
        world.engine.on_abort(0, late.fence, "it has overtaken the dispatch")
    elif end == "probe":
        world.engine.on_probe(0, late.fence)
    else:
        world.engine.on_dispatch(0, late, world.now_s)
        world.run()
    world.engine.on_dispatch(0, late, world.now_s)
    world.step()
    assert world.engine.is_idle
    assert len(world.ends(late.fence)) == 1
    world.engine.on_dispatch(1, late, world.now_s)
    assert not world.engine.is_idle, "another router's is another one"


def test_an_abort_during_a_fetch_waits_for_the_sink_before_it_frees() -> None:
    hand = Handover(list(range(23)))
    hand.decode.engine.on_abort(0, hand.fence, "client gone")
    out = hand.decode.step()
    assert out.cancels == [hand.plan.fetch_id]
    assert hand.decode.pool.stats().referenced == 6
    hand.end(2)
    hand.decode.step()
    assert hand.decode.ends(hand.fence) == ["aborted"]
    assert all_free(hand.decode)


def test_tainted_memory_is_not_used_again() -> None:
    hand = Handover(list(range(6)))
    hand.first_tokens()
    hand.end(0, tainted=(hand.plan.wanted[0].block_id,))
    out = hand.decode.step()
    assert hand.decode.pool.stats().retired == 1
    (hand.plan,) = out.fetches  # it is tried again, into other memory
    hand.end(len(hand.plan.wanted))
    hand.decode.run()
    assert hand.decode.pool.stats().retired == 1


def test_a_younger_fetch_gives_its_room_to_an_older_stream_and_comes_back() -> None:
    prompt = list(range(23))
    hand = Handover(prompt, num_blocks=9, before=dispatch("old", [90, 91], max_tokens=30))
    world = hand.decode
    for _ in range(100):
        cancels = world.step().cancels
        if cancels:
            break
    assert cancels == [hand.plan.fetch_id]
    hand.end(1)
    plans = []
    for _ in range(100):
        plans += world.step().fetches
    (hand.plan,) = plans
    assert world.engine.scheduler.num_preemptions == 1, "the oldest was preempted as well"
    assert world.stream(Fence("old", 0, "decode", 0)) == fake_model.continuation([90, 91], 30)
    hand.first_tokens()
    hand.end(len(hand.plan.wanted))
    world.run()
    streamed = [t for m in world.said if isinstance(m, Tokens) and m.fence == hand.fence for t in m.token_ids]
    assert streamed == fake_model.continuation(prompt, 6)[1:]
    assert all_free(world)


@pytest.mark.parametrize("before_the_fork", [True, False])
def test_the_router_can_end_one_sample_of_several(before_the_fork: bool) -> None:
    hand = Handover(list(range(9)), n=2)
    if before_the_fork:
        hand.decode.engine.on_stop_sample(0, hand.fence, 0)
    hand.first_tokens()
    hand.end(len(hand.plan.wanted))
    if not before_the_fork:
        hand.decode.step()
        hand.decode.engine.on_stop_sample(0, hand.fence, 0)
    hand.decode.run()
    streams = {
        index: [t for m in hand.decode.said if isinstance(m, Tokens) and m.index == index for t in m.token_ids]
        for index in (0, 1)
    }
    assert len(streams[0]) == (0 if before_the_fork else 1)
    assert streams[1] == fake_model.continuation(list(range(9)), 6)[1:]
    assert hand.decode.ends(hand.fence) == ["length"]
    assert all_free(hand.decode)


def test_the_deadline_ends_a_request_whatever_it_waits_for() -> None:
    world = World()
    world.engine.on_dispatch(0, dispatch("a", [1, 2], here=False, deadline_s=3.0), world.now_s)
    world.step()
    world.now_s += 3.0
    world.step()
    assert world.ends(Fence("a", 0, "decode", 0)) == ["deadline_exceeded"]
    assert all_free(world)


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 3),  # which shared prefix
            st.integers(1, 24),  # prompt tokens
            st.integers(1, 12),  # max_tokens
            st.integers(1, 3),  # n
            st.integers(0, 25),  # steps before it arrives
            st.one_of(st.none(), st.integers(0, 30)),  # abort after so many steps
        ),
        min_size=1,
        max_size=10,
    ),
    num_blocks=st.integers(12, 40),
)
def test_any_mix_of_requests_gives_every_stream_its_own_truth(requests: list[tuple[Any, ...]], num_blocks: int) -> None:
    world = World(num_blocks=num_blocks, max_running=6, max_step_tokens=16)
    arrivals = sorted(enumerate(requests), key=lambda item: item[1][4])
    aborts: dict[int, list[Fence]] = {}
    step = 0
    while arrivals or not world.engine.is_idle:
        while arrivals and arrivals[0][1][4] <= step:
            i, (prefix, length, max_tokens, n, _, abort_after) = arrivals.pop(0)
            prompt = [(prefix * 31 + j * 7) % fake_model.VOCAB for j in range(length)]
            world.engine.on_dispatch(0, dispatch(f"r{i}", prompt, max_tokens=max_tokens, n=n), world.now_s)
            if abort_after is not None:
                aborts.setdefault(step + abort_after, []).append(Fence(f"r{i}", 0, "decode", 0))
        for fence in aborts.pop(step, []):
            world.engine.on_abort(0, fence, "test")
        world.step()
        step += 1
        assert step < 5_000
    for i, (prefix, length, max_tokens, n, _, abort_after) in enumerate(requests):
        fence = Fence(f"r{i}", 0, "decode", 0)
        truth = fake_model.continuation([(prefix * 31 + j * 7) % fake_model.VOCAB for j in range(length)], max_tokens)
        for index in range(n):
            got = world.stream(fence, index)
            assert got == truth[: len(got)]
            assert abort_after is not None or got == truth
        if abort_after is None:
            assert world.ends(fence) == ["length"] * n
    assert all_free(world)


def test_an_engine_that_only_waits_has_no_work() -> None:
    hand = Handover(list(range(23)), num_blocks=8)
    hand.decode.engine.on_dispatch(0, dispatch("b", list(range(30, 50))), hand.decode.now_s)
    hand.decode.step()
    assert [seq.job.dispatch.fence.request_id for seq in hand.decode.engine.scheduler.waiting] == ["b"]
    assert not hand.decode.engine.has_work
    assert hand.decode.step().is_empty


def test_a_hand_over_waits_as_long_as_the_request_may() -> None:
    hand = Handover(list(range(23)))
    assert hand.plan.wait_source == ""
    assert hand.plan.deadline_s < hand.decode.now_s + 6
    waiting = dispatch(
        "w", list(range(40, 60)), here=False, sources=[SOURCE], wait_source="prefill-0", deadline_s=500.0
    )
    hand.decode.engine.on_dispatch(0, waiting, hand.decode.now_s)
    (plan,) = hand.decode.step().fetches
    assert plan.wait_source == "prefill-0"
    assert plan.deadline_s > hand.decode.now_s + 490


def test_a_preempted_sequence_asks_for_its_kv_again_before_it_computes() -> None:
    old = dispatch("old", [90, 91], max_tokens=34)
    hand = Handover(list(range(23)), num_blocks=9, before=old)
    hand.end(len(hand.plan.wanted))  # complete, waiting for its first tokens
    world = hand.decode
    plans = []
    for _ in range(100):
        plans += world.step().fetches
    assert world.engine.scheduler.num_preemptions == 1
    (hand.plan,) = plans
    assert hand.plan.wait_source == ""
    hand.first_tokens()
    hand.end(len(hand.plan.wanted))
    world.run()
    streamed = [t for m in world.said if isinstance(m, Tokens) and m.fence == hand.fence for t in m.token_ids]
    assert streamed == fake_model.continuation(list(range(23)), 6)[1:]
    assert sum(isinstance(m, RoleReport) and m.fence == hand.fence for m in world.said) == 1


def test_a_forked_sample_can_be_stopped_while_it_fetches_again() -> None:
    hand = Handover(list(range(9)), n=2)
    hand.first_tokens()
    hand.end(len(hand.plan.wanted))
    world = hand.decode
    world.step()
    for sequence in list(world.engine.scheduler.holding):
        world.engine.scheduler.requeue(sequence)  # both are preempted, and what they had computed is evicted
    world.pool.clear_cached()
    (plan,) = world.step().fetches  # one for both
    fetching = next(seq for seq in world.engine.scheduler.holding if seq.fetch_id == plan.fetch_id)
    world.engine.on_stop_sample(0, hand.fence, fetching.index)
    assert world.step().cancels == [plan.fetch_id]
    world.engine.on_fetch_ended(FetchEnded(plan.fetch_id, (), (), ()), world.now_s)
    (again,) = world.step().fetches  # the other one tries for itself
    world.engine.on_fetch_ended(FetchEnded(again.fetch_id, (), (), ()), world.now_s)
    world.run()
    assert not [m for m in world.said if isinstance(m, Tokens) and m.index == fetching.index and m.finish_reason]
    other = [t for m in world.said if isinstance(m, Tokens) and m.index != fetching.index for t in m.token_ids]
    assert other == fake_model.continuation(list(range(9)), 6)[1:]
    assert all_free(world)


def test_while_an_abort_waits_for_one_samples_fetch_the_others_are_over() -> None:
    hand = Handover(list(range(9)), n=2)
    world = hand.decode
    hand.first = [5, 6]  # their streams differ, and so do their blocks
    hand.first_tokens()
    hand.end(len(hand.plan.wanted))
    for _ in range(3):
        world.step()
    preempted = world.engine.scheduler.holding[1]
    world.engine.scheduler.requeue(preempted)
    world.pool.clear_cached()
    (plan,) = world.step().fetches
    assert preempted.fetch_id == plan.fetch_id
    world.engine.on_abort(0, hand.fence, "client gone")
    assert not world.engine.has_work
    assert world.step().cancels == [plan.fetch_id]
    assert world.engine.scheduler.holding == [preempted], "only what is still written into is held"
    assert not world.ends(hand.fence)
    world.engine.on_fetch_ended(FetchEnded(plan.fetch_id, (), (), ()), world.now_s)
    world.step()
    assert world.ends(hand.fence) == ["aborted"]
    assert world.engine.counters().aborted_fetching == 1
    assert all_free(world)


def test_of_two_equal_prompts_the_second_hand_over_survives_the_end_of_the_first() -> None:
    world = World()
    prompt = list(range(10))
    for name in "ab":
        world.engine.on_dispatch(0, dispatch(name, prompt, role="prefill", here=False), world.now_s)
    for _ in range(3):
        world.step()
    partial = KeyChain(ROOT, BLOCK, prompt).partial_key()
    assert partial is not None
    world.engine.on_abort(0, Fence("a", 0, "prefill", 0), "handed over")
    world.step()
    assert world.pool.contains(partial)
    world.engine.on_abort(0, Fence("b", 0, "prefill", 0), "handed over")
    assert world.step().withdrawals == [1]
    assert not world.pool.contains(partial)
    assert all_free(world)


def test_a_probe_for_an_unknown_dispatch_is_answered_with_its_failure() -> None:
    world = World()
    world.engine.on_dispatch(0, dispatch("a", [1, 2]), world.now_s)
    world.engine.on_probe(0, Fence("a", 0, "decode", 0))
    world.engine.on_probe(0, Fence("lost", 0, "decode", 0))
    world.step()
    assert world.ends(Fence("lost", 0, "decode", 0)) == ["worker_lost"]
    assert world.ends(Fence("a", 0, "decode", 0)) == []


def test_what_has_to_be_said_does_not_wait_for_the_step() -> None:
    world = World()
    said: list[tuple[Output, int]] = []
    world.engine.on_output = lambda output: said.append((output, world.engine.counters().steps))
    world.engine.on_dispatch(0, dispatch("a", list(range(8)), role="prefill", here=False), world.now_s)
    out = world.step()
    ((early, steps),) = said
    assert early.promises
    assert steps == 0, "before anything was computed"
    assert not out.promises
    assert out.replies


def started(messages: list[Any]) -> list[str]:
    return [message.fence.request_id for message in messages if isinstance(message, Started)]


def test_it_is_said_once_of_each_dispatch_and_before_the_step_that_it_begins_to_be_computed() -> None:
    world = World()
    early: list[Any] = []
    begun_before: dict[str, int] = {}

    def note(output: Output) -> None:
        early.extend(message for _, message in output.replies)
        for name in started([message for _, message in output.replies]):
            begun_before[name] = world.engine.counters().steps

    world.engine.on_output = note
    world.engine.on_dispatch(0, dispatch("a", list(range(40)), n=2), world.now_s)
    world.step()
    assert started(early) == ["a"]
    world.engine.on_dispatch(0, dispatch("b", list(range(50, 60))), world.now_s)
    world.run()
    assert started([*early, *world.said]) == ["a", "b"]
    assert begun_before["a"] == 0 < begun_before["b"] < world.engine.counters().steps


def test_a_dispatch_that_only_fetches_or_waits_is_not_begun() -> None:
    world = World(num_blocks=8)
    world.engine.on_dispatch(
        0,
        dispatch("fetches", list(range(16)), here=False, sources=[SOURCE], wait_source="prefill-0"),
        world.now_s,
    )
    world.engine.on_dispatch(0, dispatch("waits", list(range(20, 40))), world.now_s)
    world.step()
    world.step()
    assert started(world.said) == []


def test_a_preempted_dispatch_is_begun_once() -> None:
    world = World(num_blocks=12, max_running=6)
    for i in range(5):
        world.engine.on_dispatch(0, dispatch(f"r{i}", [i, i + 1, i + 2], max_tokens=30), world.now_s)
    world.run()
    assert world.engine.scheduler.num_preemptions > 0
    assert sorted(started(world.said)) == [f"r{i}" for i in range(5)]


def test_a_leaving_worker_refuses_what_is_new_and_finishes_what_it_has() -> None:
    world = World()
    world.engine.on_dispatch(0, dispatch("a", [1, 2, 3]), world.now_s)
    world.engine.leave()
    world.engine.on_dispatch(0, dispatch("b", [4, 5, 6]), world.now_s)
    world.run()
    assert world.ends(Fence("b", 0, "decode", 0)) == ["draining"]
    assert world.ends(Fence("a", 0, "decode", 0)) == ["length"]
    assert world.stream(Fence("a", 0, "decode", 0)) == fake_model.continuation([1, 2, 3], 5)


def test_what_is_given_back_ends_with_one_word_and_its_blocks_stay_findable() -> None:
    world = World(num_blocks=32)
    prompt = list(range(18))
    world.engine.on_dispatch(0, dispatch("runs", prompt, max_tokens=50), world.now_s)
    world.engine.on_dispatch(0, dispatch("prefills", list(range(30, 40)), role="prefill", here=False), world.now_s)
    while not world.stream(Fence("runs", 0, "decode", 0)):
        world.step()
    fetching = dispatch("fetches", list(range(50, 58)), here=False, sources=[SOURCE], wait_source="prefill-0")
    world.engine.on_dispatch(0, fetching, world.now_s)
    world.engine.on_dispatch(0, dispatch("waits", list(range(40)), max_tokens=60), world.now_s)
    (plan,) = world.step().fetches
    world.engine.leave()
    world.engine.give_back()
    out = world.step()
    assert out.cancels == [plan.fetch_id]
    for name, role in (("runs", "decode"), ("prefills", "prefill"), ("waits", "decode")):
        assert world.ends(Fence(name, 0, role, 0)) == ["draining"]  # type: ignore[arg-type]
    assert world.ends(Fence("fetches", 0, "decode", 0)) == [], "its memory may still be written"
    world.engine.on_fetch_ended(FetchEnded(plan.fetch_id, (), tuple(w.key for w in plan.wanted), ()), world.now_s)
    world.step()
    assert world.ends(Fence("fetches", 0, "decode", 0)) == ["draining"]
    assert world.engine.is_idle
    assert all_free(world)
    assert len(world.pool.match(KeyChain(ROOT, BLOCK, prompt).keys)) == 4
