"""The sampler: logits of each row to one token, as that row's request asks.

Owns the order of operations, which is vLLM's: min_tokens, logit_bias, penalties (repetition, frequency, presence), temperature,
then top-k, top-p and min-p, then the draw; log-probabilities are those of the raw logits. Owns no state: what was generated
so far is an argument, and noise is a function of (seed, sample index, position, token id), so a stream's tokens are the same
in any batch, in any process, and after any crash.

Rows never see each other: each is handled alone, as a 1-D numpy array. numpy runs on one thread and its sums depend on the
array alone, whereas torch splits a softmax over a vocabulary between as many threads as it happens to have. Weights are
float64, so even extreme temperatures neither overflow nor lose the best token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from protos.control import Sampling, TokenLogprobs
from tandem.engine.noise import exponential_noise

Row = NDArray[np.float32]

_LARGEST = float(np.finfo(np.float32).max)
_TOP_P_FIRST_TRY = 1024


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What one row is sampled for. `position` is the index of the token to be drawn in the generated stream;
    `output_token_ids` are those before it."""

    sampling: Sampling
    sample_index: int
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token, and its log-probabilities if the request wants them."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[Sampled]:
    """One token for each row of `logits` ([n, vocab], fp32; not modified) by the request of the same index.

    Total: NaN counts as -inf, +inf as the largest number; if masks leave nothing, the best raw token is taken. Among equal
    values the lowest id wins. Token ids outside the vocabulary in a request are ignored.
    """
    assert logits.ndim == 2, logits.shape
    assert logits.dtype == torch.float32, logits.dtype
    assert len(logits) == len(requests), (len(logits), len(requests))
    best = _argmax(logits) if any(_is_plain(request) for request in requests) else []
    return [
        Sampled(best[i], None) if best and best[i] >= 0 and _is_plain(request) else _sample_row(logits[i], request)
        for i, request in enumerate(requests)
    ]


def _is_plain(request: SampleRequest) -> bool:
    """Whether the row's token is simply the best one."""
    sampling = request.sampling
    return (
        sampling.temperature == 0
        and sampling.num_logprobs < 0
        and not sampling.logit_bias
        and request.position >= sampling.min_tokens
        and not _has_penalties(sampling)
    )


def _has_penalties(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0


def _argmax(logits: torch.Tensor) -> list[int]:
    """The best id of each row, the lowest of equal ones; -1 for a row with NaN (torch's argmax goes to a NaN)."""
    ids = torch.argmax(logits, dim=-1)  # documented to be the first of equal values
    values = logits.gather(1, ids[:, None])[:, 0]
    return [int(token_id) for token_id in torch.where(values.isnan(), -1, ids).tolist()]


def _sample_row(logits: torch.Tensor, request: SampleRequest) -> Sampled:
    raw = _clean(logits.detach().to("cpu").contiguous().numpy())
    row = _adjust(raw, request)
    sampling = request.sampling
    if not np.isfinite(row).any():
        token_id = int(np.argmax(raw))
    elif sampling.temperature == 0:
        token_id = int(np.argmax(row))
    else:
        token_id = _draw(row, request)
    wanted = sampling.num_logprobs
    return Sampled(token_id, _logprobs(raw, token_id, wanted) if wanted >= 0 else None)


def _clean(row: Row) -> Row:
    """The row without NaN and +inf; itself if it has none."""
    # A NaN makes the maximum NaN, so one pass finds both.
    if row.max() <= _LARGEST:
        return row
    return np.nan_to_num(row, nan=-np.inf, posinf=_LARGEST, neginf=-np.inf)


def _adjust(raw: Row, request: SampleRequest) -> Row:
    """The row after masks, bias and penalties; `raw` itself if there are none."""
    sampling, size = request.sampling, len(raw)
    mask = sampling.stop_token_ids if request.position < sampling.min_tokens else ()
    if not (mask or sampling.logit_bias or _has_penalties(sampling)):
        return raw
    row = raw.copy()
    with np.errstate(over="ignore"):
        row[_ids(mask, size)] = -np.inf
        for token_id, bias in sampling.logit_bias:
            if 0 <= token_id < size:
                row[token_id] += np.float32(bias)
        if _has_penalties(sampling):
            _penalize(row, request)
    return _clean(row)


def _penalize(row: Row, request: SampleRequest) -> None:
    """In place, in float32: repetition over prompt and output, frequency and presence over the output."""
    sampling, size = request.sampling, len(row)
    output = _ids(request.output_token_ids, size)
    if sampling.repetition_penalty != 1:
        seen = np.unique(np.concatenate([_ids(request.prompt_token_ids, size), output]))
        penalty = np.float32(sampling.repetition_penalty)
        values = row[seen]
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if len(output) and (sampling.frequency_penalty or sampling.presence_penalty):
        ids, counts = np.unique(output, return_counts=True)
        row[ids] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
        row[ids] -= np.float32(sampling.presence_penalty)


def _ids(token_ids: Sequence[int], size: int) -> NDArray[np.int64]:
    """Those that are in the vocabulary."""
    ids = np.asarray(token_ids, dtype=np.int64)
    return ids[(ids >= 0) & (ids < size)]


def _draw(row: Row, request: SampleRequest) -> int:
    """A token drawn with probability softmax(row / temperature) among those that top-k, top-p and min-p leave."""
    sampling = request.sampling
    if 0 < sampling.top_k < len(row):
        candidates = _best(row, sampling.top_k)
        row = row[candidates]
    else:
        candidates = np.arange(len(row))
    # Relative to the best: the best weight is exactly 1, so nothing overflows and a tiny temperature leaves the best alone.
    with np.errstate(over="ignore", under="ignore"):
        distance = row.astype(np.float64) - np.float64(row.max())
        weights = np.exp(distance / np.float64(sampling.temperature))
    keep: NDArray[np.int64] | None = None
    if sampling.top_p < 1:
        keep = _best(row, _num_top_p(weights, sampling.top_p))
        candidates, weights = candidates[keep], weights[keep]
    possible = weights > 0 if sampling.min_p <= 0 else weights >= sampling.min_p
    candidates, weights = candidates[possible], weights[possible]
    noise = exponential_noise(sampling.seed, request.sample_index, request.position, candidates)
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


def _logprobs(raw: Row, token_id: int, num_best: int) -> TokenLogprobs:
    """Log-softmax of the raw row: of the drawn token, and the `num_best` greatest, best first."""
    values = raw.astype(np.float64)
    highest = values.max()
    if highest == -np.inf:
        return TokenLogprobs(-np.inf, [])
    total = highest + np.log(np.exp(values - highest).sum())
    ids = _best(raw, num_best) if num_best else np.empty(0, dtype=np.int64)
    ids = ids[np.argsort(-values[ids], kind="stable")]
    return TokenLogprobs(
        float(values[token_id] - total), [(int(best), float(values[best] - total)) for best in ids.tolist()]
    )
