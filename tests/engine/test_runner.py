"""A token's logits and KV are the same bits however the work is cut, batched, placed and interrupted."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.linear import WeightFormat
from kvpool.layout import KVLayout
from tandem.engine.runner import Chunk, Runner, layout_for
from tandem.models.loader import Dtype, LoadedModel, load_model
from tests.models import tiny_models
from tests.reference import smollm2


@dataclass(frozen=True)
class Truth:
    """One model and some sequences, each computed alone in 512-row chunks: the KV of every token and the logits at the ends of
    prefixes of it."""

    model: LoadedModel
    sequences: tuple[tuple[int, ...], ...]
    kv: tuple[Tensor, ...]
    logits: tuple[dict[int, Tensor], ...]


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def kv_of(arena: Tensor, table: list[int], num_tokens: int) -> Tensor:
    """[num_tokens, num_layers, 2, num_kv_heads, head_dim]"""
    return arena[table].permute(0, 4, 1, 2, 3, 5).flatten(0, 1)[:num_tokens]


def fresh_runner(model: LoadedModel, num_blocks: int, block_size: int) -> tuple[Runner, Tensor, KVLayout]:
    """A runner over an arena in which every slot is NaN."""
    layout = layout_for(model.config, model.dtype, block_size)
    arena = torch.full((num_blocks, *layout.slab_shape), torch.nan, dtype=model.model.dtype)
    return Runner(model, arena, layout), arena, layout


def make_truth(model: LoadedModel, lengths: list[int], ends: list[int]) -> Truth:
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(5)
    sequences = tuple(tuple(torch.randint(0, vocab, (length,), generator=generator).tolist()) for length in lengths)
    all_kv, all_logits = [], []
    for tokens in sequences:
        runner, arena, layout = fresh_runner(model, len(tokens), 16)
        table = list(range(layout.num_blocks_for(len(tokens))))
        for start in range(0, len(tokens), 512):
            runner.run([Chunk(tokens[start : start + 512], start, table, False)])
        all_kv.append(kv_of(arena, table, len(tokens)))
        wanted = sorted({end for end in (*ends, len(tokens)) if end <= len(tokens)})
        found = {}
        for end in wanted:
            start = max(0, end - 512)
            found[end] = runner.run([Chunk(tokens[start:end], start, table, True)])[0]
        all_logits.append(found)
    return Truth(model, sequences, tuple(all_kv), tuple(all_logits))


VARIANTS: dict[str, tuple[str, Dtype, WeightFormat | None]] = {
    "gqa-fp32": ("gqa", "fp32", None),
    "gqa-bf16": ("gqa", "bf16", None),
    "gqa-bf16-rounded": ("gqa", "bf16", "bf16-rounded"),
    "mha-bf16": ("mha", "bf16", None),
    "bias-bf16": ("bias", "bf16", None),
    "wide-heads-fp32": ("wide-heads", "fp32", None),
    "qwen2-bf16": ("qwen2", "bf16", None),
}


@pytest.fixture(scope="module")
def tiny_truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    truths = {}
    for name, (variant, dtype, form) in VARIANTS.items():
        path = tiny_models.save(tiny_models.build(*tiny_models.VARIANTS[variant]), tmp_path_factory.mktemp(name))
        truths[name] = make_truth(load_model(path, dtype, form), [5, 257, 600], [1, 5, 64, 256, 257, 511, 600])
    return truths


def run_in_some_order(truth: Truth, seed: int, step_rows: int, single_rows: float) -> None:
    """Cuts every sequence at random places, mixes the chunks into steps of up to `step_rows` rows over scattered blocks of a
    poisoned arena, after prefix hits, and compares every KV bit and all logits that the truth has."""
    choose = random.Random(seed)
    block_size = choose.choice([1, 4, 16, 64])
    num_blocks = sum(-(-len(tokens) // block_size) for tokens in truth.sequences) + 3
    runner, arena, layout = fresh_runner(truth.model, num_blocks, block_size)
    free = list(range(num_blocks))
    choose.shuffle(free)
    tables = [[free.pop() for _ in range(layout.num_blocks_for(len(tokens)))] for tokens in truth.sequences]
    done = []
    for index, table in enumerate(tables):
        # A prefix hit: its KV was computed by somebody else and comes as bytes.
        hit = choose.choice([0, choose.randrange(len(truth.sequences[index]))]) // block_size
        if hit:
            arrived = truth.kv[index][: hit * block_size].unflatten(0, (hit, block_size))
            arena[table[:hit]] = arrived.permute(0, 2, 3, 4, 1, 5)
        done.append(hit * block_size)
    while any(count < len(tokens) for count, tokens in zip(done, truth.sequences, strict=True)):
        chunks, ends, room = [], [], step_rows
        for index in choose.sample(range(len(tables)), len(tables)):
            tokens, start = truth.sequences[index], done[index]
            if start == len(tokens) or room == 0:
                continue
            size = 1 if choose.random() < single_rows else choose.randint(1, room)
            end = min(start + size, len(tokens))
            stops = [stop for stop in truth.logits[index] if start < stop < end]
            if stops and choose.random() < 0.5:
                end = choose.choice(stops)
            chunks.append(Chunk(tokens[start:end], start, tables[index], end in truth.logits[index]))
            ends.append((index, end))
            done[index] = end
            room -= end - start
        logits = runner.run(chunks)
        wanted = [(index, end) for index, end in ends if end in truth.logits[index]]
        assert logits.shape == (len(wanted), truth.model.config.vocab_size)
        for row, (index, end) in zip(logits, wanted, strict=True):
            assert torch.equal(bits(row), bits(truth.logits[index][end]))
    for index, table in enumerate(tables):
        num_tokens = len(truth.sequences[index])
        assert torch.equal(bits(kv_of(arena, table, num_tokens)), bits(truth.kv[index]))
    assert arena[free].isnan().all()


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    step_rows=st.sampled_from([8, 64, 300, 512]),
    single_rows=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_any_cut_batch_prefix_hit_and_placement_gives_the_same_bits(
    tiny_truths: dict[str, Truth], name: str, seed: int, step_rows: int, single_rows: float
) -> None:
    run_in_some_order(tiny_truths[name], seed, step_rows, single_rows)


@pytest.fixture(scope="module")
def smollm2_truth() -> Truth:
    return make_truth(smollm2("bf16"), [270, 70, 2], [1, 2, 69, 255, 257])


@settings(max_examples=3)
@given(seed=st.integers(0, 2**32))
def test_smollm2_in_bf16_gives_the_same_bits_however_it_is_cut(smollm2_truth: Truth, seed: int) -> None:
    run_in_some_order(smollm2_truth, seed, 200, 0.3)


def test_smollm2_decodes_to_the_bits_of_its_prefill(smollm2_truth: Truth) -> None:
    tokens = smollm2_truth.sequences[0]
    runner, arena, layout = fresh_runner(smollm2_truth.model, 40, 16)
    table = list(range(3, 3 + layout.num_blocks_for(270)))
    runner.run([Chunk(tokens[:250], 0, table, False)])
    logits = [runner.run([Chunk(tokens[at : at + 1], at, table, True)])[0] for at in range(250, 270)]
    for end in (255, 257, 270):
        assert torch.equal(bits(logits[end - 251]), bits(smollm2_truth.logits[0][end]))
    assert torch.equal(bits(kv_of(arena, table, 270)), bits(smollm2_truth.kv[0]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path: Path = tiny_models.save(tiny_models.build("llama", {}), tmp_path_factory.mktemp("tiny"))
    return load_model(path, "fp32")


def test_chunks_that_break_the_contract_are_refused_before_anything_is_written(tiny: LoadedModel) -> None:
    runner, arena, _ = fresh_runner(tiny, 8, 16)
    wrong = {
        "a step of 0 rows": [],
        "a step of 513 rows": [Chunk([1] * 513, 0, range(8), False)],
        "a chunk of 0 tokens": [Chunk([1], 0, [0], True), Chunk([], 0, [1], True)],
        "at position -1": [Chunk([1], -1, [0], True)],
        "the limit is 128": [Chunk([1], 128, range(9), True)],
        "1 blocks don't cover 17 positions": [Chunk([1], 16, [0], True)],
        "token ids 1 to 101": [Chunk([1, 101], 0, [0], True)],
        "token ids -1 to -1": [Chunk([-1], 0, [0], True)],
        "block ids 3 to 8": [Chunk([1, 2], 15, [3, 8], True)],
        "block ids -1 to -1": [Chunk([1], 0, [-1], True)],
    }
    for message, chunks in wrong.items():
        with pytest.raises((ValueError, IndexError), match=message):
            runner.run(chunks)
    assert arena.isnan().all()
    assert runner.run([Chunk([1], 0, [0], False)]).shape == (0, tiny_models.VOCAB)


def test_the_logits_are_the_callers_own(tiny: LoadedModel) -> None:
    runner, _, _ = fresh_runner(tiny, 8, 16)
    first = runner.run([Chunk([1], 0, [0], True)])
    kept = first.clone()
    second = runner.run([Chunk([1], 0, [1], True)])
    second[0, 5] = -torch.inf
    assert torch.equal(first, kept)
    assert first.dtype == torch.float32


def test_an_arena_or_layout_of_another_model_is_refused(tiny: LoadedModel) -> None:
    layout = layout_for(tiny.config, "fp32", 16)
    with pytest.raises(ValueError, match="contiguous"):
        Runner(tiny, torch.zeros((4, *layout.slab_shape), dtype=torch.bfloat16), layout)
    with pytest.raises(ValueError, match="layout"):
        Runner(tiny, torch.zeros((4, *layout.slab_shape)), KVLayout(3, 2, 8, 16, "fp32"))
    for block_size in (0, 48, 512):
        with pytest.raises(ValueError, match="must divide 256"):
            layout_for(tiny.config, "fp32", block_size)
