"""Rows of logits to tokens: the best one, or one drawn among those that top-k, top-p and min-p leave; and log-probabilities.

Owns what a draw computes, in numpy (`sample_row_ref`, which runs where there is no native library) and natively
(cpu/sampling.cpp, which computes the same but for the last bits of weights and sums). Owns no state: noise is a function of
(seed, sample index, position, token id). Rows never see each other, and nothing depends on threads. Weights are float64, so
even extreme temperatures neither overflow nor lose the best token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import Native
from kernels.noise import exponential_noise

Row = NDArray[np.float32]

MAX_VOCAB = 2**31 - 1
_LARGEST = float(np.finfo(np.float32).max)
_TOP_P_FIRST_TRY = 1024
_DRAW_STRUCT = np.dtype(
    [
        *((name, np.uint64) for name in ("logits", "raw")),
        *((name, np.float64) for name in ("temperature", "top_p", "min_p")),
        *((name, np.uint64) for name in ("seed", "sample_index", "position")),
        *((name, np.int64) for name in ("top_k", "num_logprobs")),
    ]
)
"""`tandem_draw` of cpu/sampling.cpp."""


class Draw(NamedTuple):
    """What one row is drawn with. temperature 0: the best token; top_p 1, min_p 0, top_k 0: off; num_logprobs -1: none, 0: the
    chosen token's alone. The noise is that of (seed, sample_index, position)."""

    temperature: float
    top_p: float
    min_p: float
    seed: int
    sample_index: int
    position: int
    top_k: int
    num_logprobs: int


class Drawn(NamedTuple):
    """A token; where asked for, the log-probabilities of the raw logits: its own, and the best tokens' `(id, log-probability)`,
    best first."""

    token_id: int
    logprob: float | None
    best: list[tuple[int, float]]


def clean(row: Row) -> Row:
    """The row with NaN as -inf and +inf as the largest number; itself if it has none."""
    # A NaN makes the maximum NaN, so one pass finds both.
    if row.max() <= _LARGEST:
        return row
    return np.nan_to_num(row, nan=-np.inf, posinf=_LARGEST, neginf=-np.inf)


def sample_rows(
    native: Native | None,
    logits: NDArray[np.float32],
    draws: Sequence[Draw],
    adjusted: Mapping[int, Row],
    masked: Mapping[int, Row] = MappingProxyType({}),
) -> list[Drawn]:
    """A token for each row of `logits` ([n, vocab], C-contiguous, not modified) by the draw of the same index, in one call.

    `masked[i]` stands for `logits[i]` where there is one; log-probabilities are of that. Row i is drawn from `adjusted[i]` where
    there is one. (Rows are [vocab], C-contiguous.) Total: NaN counts as -inf, +inf as the largest number; an adjusted row with
    nothing left gives the best token of the row that it was made of. Among equal values the lowest id wins.
    """
    assert logits.ndim == 2, logits.shape
    assert logits.dtype == np.float32, logits.dtype
    assert logits.flags.c_contiguous
    assert len(logits) == len(draws), (len(logits), len(draws))
    assert 1 <= logits.shape[1] <= MAX_VOCAB, logits.shape
    if native is None:
        raws = [masked.get(i, logits[i]) for i in range(len(draws))]
        return [sample_row_ref(adjusted.get(i, raws[i]), raws[i], draw) for i, draw in enumerate(draws)]
    return _sample_rows(native, logits, draws, adjusted, masked)


def _sample_rows(
    native: Native,
    logits: NDArray[np.float32],
    draws: Sequence[Draw],
    adjusted: Mapping[int, Row],
    masked: Mapping[int, Row],
) -> list[Drawn]:
    num, vocab = logits.shape
    base, stride = logits.ctypes.data, logits.strides[0]
    raws = [base + i * stride for i in range(num)]
    _point_at(masked, vocab, raws)
    sources = raws.copy()
    _point_at(adjusted, vocab, sources)
    structs = np.array([(sources[i], raws[i], *draw) for i, draw in enumerate(draws)], dtype=_DRAW_STRUCT)
    most = min(max((draw.num_logprobs for draw in draws), default=0), vocab)
    token_ids = np.empty(num, dtype=np.int64)
    logprobs = np.empty(num, dtype=np.float64)
    best_ids = np.full((num, max(most, 0)), -1, dtype=np.int64)
    best_logprobs = np.empty((num, max(most, 0)), dtype=np.float64)
    outputs = (token_ids, logprobs, best_ids, best_logprobs)
    failed = native.library.tandem_sample(
        structs.ctypes.data, num, vocab, *(array.ctypes.data for array in outputs), max(most, 0)
    )
    if failed:
        raise MemoryError(f"no memory to sample from a vocabulary of {vocab}")
    ids = token_ids.tolist()
    if most < 0:
        return [Drawn(token_id, None, []) for token_id in ids]
    drawn: list[Drawn] = []
    for i, draw in enumerate(draws):
        logprob = float(logprobs[i]) if draw.num_logprobs >= 0 else None
        count = max(draw.num_logprobs, 0)
        best = zip(best_ids[i, :count].tolist(), best_logprobs[i, :count].tolist(), strict=True)
        drawn.append(Drawn(ids[i], logprob, [pair for pair in best if pair[0] >= 0]))  # -1: an empty row has none
    return drawn


def _point_at(rows: Mapping[int, Row], vocab: int, addresses: list[int]) -> None:
    """Replaces the addresses of those rows."""
    for i, row in rows.items():
        assert row.shape == (vocab,), row.shape
        assert row.dtype == np.float32, row.dtype
        assert row.flags.c_contiguous
        addresses[i] = row.ctypes.data


# The reference


def sample_row_ref(row: Row, raw: Row, draw: Draw) -> Drawn:
    """A token of `row` ([vocab]), its log-probability in `raw` ([vocab]); as `sample_rows`."""
    row, raw = clean(row), clean(raw)
    if not np.isfinite(row).any():
        token_id = int(np.argmax(raw))
    elif draw.temperature == 0:
        token_id = int(np.argmax(row))
    else:
        token_id = _draw(row, draw)
    return _with_logprobs(raw, token_id, draw.num_logprobs) if draw.num_logprobs >= 0 else Drawn(token_id, None, [])


def _draw(row: Row, draw: Draw) -> int:
    """A token drawn with probability softmax(row / temperature) among those that top-k, top-p and min-p leave."""
    if 0 < draw.top_k < len(row):
        candidates = _best(row, draw.top_k)
        row = row[candidates]
    else:
        candidates = np.arange(len(row))
    # Relative to the best: the best weight is exactly 1, so nothing overflows and a tiny temperature leaves the best alone.
    with np.errstate(over="ignore", under="ignore"):
        distance = row.astype(np.float64) - np.float64(row.max())
        weights = np.exp(distance / np.float64(draw.temperature))
    if draw.top_p < 1:
        keep = _best(row, _num_top_p(weights, draw.top_p))
        candidates, weights = candidates[keep], weights[keep]
    possible = weights > 0 if draw.min_p <= 0 else weights >= draw.min_p
    candidates, weights = candidates[possible], weights[possible]
    noise = exponential_noise(draw.seed, draw.sample_index, draw.position, candidates)
    return int(candidates[np.argmax(weights / noise)])


def _num_top_p(weights: NDArray[np.float64], top_p: float) -> int:
    """How many of the greatest weights it takes for their share to reach `top_p`: at least 1."""
    target = top_p * float(weights.sum())
    size = len(weights)
    # Sorted sums go over the same numbers in the same order however many are looked at, so a short look changes no bit.
    for num in (min(_TOP_P_FIRST_TRY, size), size):
        greatest = np.partition(weights, size - num)[size - num :] if num < size else weights
        sums = np.cumsum(np.sort(greatest)[::-1])
        if sums[-1] >= target:
            return int(np.searchsorted(sums, target, side="left")) + 1
    return size  # the two orders of summation round differently, and nearly all was asked for


def _best(row: Row, count: int) -> NDArray[np.int64]:
    """The ids of the `count` greatest values, ascending; among equal values the lowest ids."""
    size = len(row)
    if count >= size:
        return np.arange(size)
    threshold = np.partition(row, size - count)[size - count]
    above = np.flatnonzero(row > threshold)
    equal = np.flatnonzero(row == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _with_logprobs(raw: Row, token_id: int, num_best: int) -> Drawn:
    """Log-softmax of the raw row: of the drawn token, and the `num_best` greatest, best first."""
    values = raw.astype(np.float64)
    highest = values.max()
    if highest == -np.inf:
        return Drawn(token_id, -np.inf, [])
    total = highest + np.log(np.exp(values - highest).sum())
    ids = _best(raw, num_best) if num_best else np.empty(0, dtype=np.int64)
    ids = ids[np.argsort(-values[ids], kind="stable")]
    best = [(int(best), float(values[best] - total)) for best in ids.tolist()]
    return Drawn(token_id, float(values[token_id] - total), best)
