"""What a weight format costs: perplexity on a text, and how far a model's predictions are from those of bf16 weights.

Owns the text's windows, the comparison and the goals. All forms read the same text side by side, each through the engine's own
runner; nothing is sampled, the next token is always the text's. What it compares are forms of one file's weights: where the
file's own weights are quantized, their loss is in every form alike, and a form that holds them exactly (`weight_error` 0)
shows nothing but what the rounding of activations costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from kernels.cpu import Native, native
from kernels.linear import Matrix, WeightFormat, pack, unpack
from tandem.bench.names import named
from tandem.bench.report import Metric, Say, metric
from tandem.bench.roofline import weight_read_bytes
from tandem.config import WorkerConfig, packed_dir
from tandem.engine.runner import Chunk, Runner, layout_for
from tandem.errors import ConfigError
from tandem.models.llama import Weights
from tandem.models.loader import TORCH_DTYPES, LoadedModel, load_model, open_weights
from tandem.tokenizer.tokenizer import Tokenizer, load_tokenizer

TEXT = Path(__file__).resolve().parents[2] / "benchmarks" / "texts" / "alice.txt"
TITLE = "Alice's Adventures in Wonderland"
WINDOW_TOKENS = 1024
REFERENCE: WeightFormat = "bf16"
_LOGIT_ROWS = 64
"""Positions whose logits every model holds at a time."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a form must reach: the least agreement, the most perplexity as a multiple of the reference's."""

    agreement: float
    perplexity: float


GOALS: dict[WeightFormat, Goal] = {"int8": Goal(0.93, 1.02), "int4": Goal(0.85, 1.05)}


@dataclass(slots=True)
class Quality:
    """Sums over the positions that one model predicted. `loss` and `divergence` are in nats."""

    num_positions: int = 0
    num_agreed: int = 0
    loss: float = 0.0
    divergence: float = 0.0

    def add(self, scores: Tensor, reference: Tensor, targets: Tensor) -> None:
        """scores, reference: [positions, vocab_size] log-probabilities; targets: [positions], the tokens that came."""
        self.num_positions += len(targets)
        self.num_agreed += int((scores.argmax(-1) == reference.argmax(-1)).sum())
        self.loss -= float(scores.gather(-1, targets[:, None]).sum())
        self.divergence += float((reference.exp() * (reference - scores)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.num_positions)

    @property
    def agreement(self) -> float:
        """The share of positions whose likeliest token is the reference's."""
        return self.num_agreed / self.num_positions

    @property
    def mean_divergence(self) -> float:
        """Kullback-Leibler divergence of this model from the reference, in nats a position."""
        return self.divergence / self.num_positions


class Reader:
    """One model that reads windows of at most `max_len` tokens, over an arena of its own that holds one of them."""

    def __init__(self, model: LoadedModel, kernels: Native | None, worker: WorkerConfig, max_len: int) -> None:
        layout = layout_for(model.config, model.dtype, worker.block_size)
        self._table = range(layout.num_blocks_for(max_len))
        arena = torch.zeros((len(self._table), *layout.slab_shape), dtype=TORCH_DTYPES[model.dtype])
        self._step_tokens = worker.max_step_tokens
        self._runner = Runner(
            model,
            arena,
            layout,
            native=kernels,
            max_rows=max(self._step_tokens, _LOGIT_ROWS),
            threads=worker.threads,
        )

    def logits(self, window: Sequence[int]) -> Iterator[Tensor]:
        """fp32 logits after every token of `window` but the last, in order, `_LOGIT_ROWS` positions at a time.

        A chunk has logits of its last token alone, so the window is prefilled as a prompt is, and then each of its tokens is
        computed once more as a chunk of one row: over KV that is there, into which it writes the same bits again.
        """
        count = len(window) - 1
        for start in range(0, count, self._step_tokens):
            end = min(start + self._step_tokens, count)
            self._runner.run([Chunk(window[start:end], start, self._table, False)])
        for start in range(0, count, _LOGIT_ROWS):
            positions = range(start, min(start + _LOGIT_ROWS, count))
            yield self._runner.run([Chunk(window[at : at + 1], at, self._table, True) for at in positions])


def forms_named(names: Sequence[str]) -> list[WeightFormat]:
    """The formats of these names, each once, the reference always and first. Raises ConfigError for a name that is none."""
    known: tuple[WeightFormat, ...] = get_args(WeightFormat)
    found = named(names, known, "format of weights")
    return [REFERENCE, *(form for form in known if form in found and form != REFERENCE)]


def windows(token_ids: Sequence[int], num_tokens: int, size: int, bos: int | None) -> list[list[int]]:
    """The first `num_tokens` of a text, `size` at a time, each part after `bos` if there is one: contexts of their own.

    Parts in which nothing follows anything are left out. Raises ConfigError if the text is shorter.
    """
    if num_tokens > len(token_ids):
        raise ConfigError(
            f"{num_tokens} tokens are asked for, the text has {len(token_ids)} in this model's vocabulary"
        )
    before = [] if bos is None else [bos]
    parts = [before + list(token_ids[at : min(at + size, num_tokens)]) for at in range(0, num_tokens, size)]
    return [part for part in parts if len(part) > 1]


def compare(readers: Mapping[str, Reader], texts: Sequence[Sequence[int]], say: Say) -> dict[str, Quality]:
    """Lets every model predict every token of every window from those before it, side by side. `readers` has the REFERENCE."""
    found = {form: Quality() for form in readers}
    for number, window in enumerate(texts, 1):
        say(f"window {number} of {len(texts)}")
        done = 1
        for step in zip(*(reader.logits(window) for reader in readers.values()), strict=True):
            scores = {form: logits.double().log_softmax(-1) for form, logits in zip(readers, step, strict=True)}
            targets = torch.tensor(window[done : done + len(step[0])])
            for form, own in scores.items():
                found[form].add(own, scores[REFERENCE], targets)
            done += len(targets)
    return found


def run(
    path: Path, forms: Sequence[WeightFormat], worker: WorkerConfig, *, num_tokens: int, say: Say
) -> Iterator[Metric]:
    """Measures `forms` (from `named`) on the first `num_tokens` of the text and yields the metrics of each.

    KV is bf16, as in a cluster; with fp32 weights it is fp32. Raises ConfigError for a text that isn't there or is too short,
    ModelError for a model that can't be read.
    """
    torch.set_num_threads(worker.threads)
    kernels, weights = native(), open_weights(path)
    size = min(WINDOW_TOKENS, weights.config.max_position)
    texts = _read(load_tokenizer(path), num_tokens, size)
    readers: dict[str, Reader] = {}
    for form in forms:
        say(f"{form}: loading")
        model = load_model(path, "fp32" if form == "fp32" else "bf16", form, packed_dir())
        readers[form] = Reader(model, kernels, worker, size)
    found = compare(readers, texts, say)
    for form in forms:
        yield from metrics(form, found[form], found[REFERENCE], f"{len(texts)} windows of {TITLE}")
        error = weight_error(weights, form)
        if error == 0 and form != "fp32":
            say(f"{form}: the model's file holds these very weights, so only the rounding of activations is measured")
        yield metric(
            f"{form}_weight_error",
            [error],
            "relative RMS",
            reference="the file's own values, in the layers' down projections",
        )
        yield metric(
            f"{form}_weights",
            [weight_read_bytes(weights.config, form) / 1e6],
            "MB",
            reference=f"{REFERENCE}, every linear and the output head",
            reference_values=[weight_read_bytes(weights.config, REFERENCE) / 1e6],
        )


def weight_error(weights: Weights, form: WeightFormat) -> float:
    """How far packing moves the weights, as a share of their size: those of the layers' down projections, as a sample."""
    config = weights.config
    shape = (config.hidden, config.intermediate)
    moved = size = 0.0
    for index in range(config.num_layers):
        own = weights.tensor(f"model.layers.{index}.mlp.down_proj.weight", shape).float()
        packed = unpack(Matrix(pack(own, form), None, *shape, form))
        moved += float((packed - own).square().sum())
        size += float(own.square().sum())
    return math.sqrt(moved / size) if size else 0.0


def _read(tokenizer: Tokenizer, num_tokens: int, size: int) -> list[list[int]]:
    """The windows of the shipped text."""
    if not TEXT.is_file():
        raise ConfigError(
            f"{TEXT} is not there: quality is measured from a checkout of the project, set up with `make setup`"
        )
    bos = tokenizer.bos_token_id if tokenizer.add_bos else None
    return windows(tokenizer.encode(TEXT.read_text(encoding="utf-8")), num_tokens, size, bos)


def metrics(form: WeightFormat, found: Quality, reference: Quality, text: str) -> Iterator[Metric]:
    """One form's figures beside the reference's, held against its goals."""
    goal = GOALS.get(form)
    yield metric(
        f"{form}_perplexity",
        [found.perplexity],
        "a token",
        reference=f"{REFERENCE}, {reference.num_positions} tokens in {text}",
        reference_values=[reference.perplexity],
        goal=None if goal is None else f"ratio <= {goal.perplexity:g}",
        ok=goal is None or found.perplexity <= goal.perplexity * reference.perplexity,
    )
    yield metric(
        f"{form}_agreement",
        [found.agreement],
        "of the tokens",
        reference=f"the likeliest token is that of {REFERENCE}",
        goal=None if goal is None else f">= {goal.agreement:g}",
        ok=goal is None or found.agreement >= goal.agreement,
    )
    yield metric(f"{form}_divergence", [found.mean_divergence], "nats a token", reference=f"KL({REFERENCE} || {form})")
