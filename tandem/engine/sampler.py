"""The sampler: logits of each row to one token, as that row's request asks.

Owns the order of operations, which is vLLM's: what the grammar allows, min_tokens, logit_bias, penalties (repetition, frequency,
presence), temperature, then top-k, top-p and min-p, then the draw; log-probabilities are those of the raw logits, of the allowed
tokens alone where there is a grammar. Masks, bias and penalties are here;
`kernels.sampling` does the rest, one call a step. Owns no state: what was generated so far is an argument, and noise is a
function of (seed, sample index, position, token id), so a stream's tokens are the same in any batch, in any process of the
same numerics class, and after any crash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import cpu
from kernels.sampling import Draw, Drawn, Row, clean, sample_rows
from protos.control import Sampling, TokenLogprobs
from tandem.grammar.matcher import Mask


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What one row is sampled for. `position` is the index of the token to be drawn in the generated stream;
    `output_token_ids` are those before it."""

    sampling: Sampling
    sample_index: int
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    allowed: Mask | None = None
    """What the request's grammar allows, at least one token; None without one."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token, and its log-probabilities if the request wants them."""

    token_id: int
    logprobs: TokenLogprobs | None


Sampler = Callable[[torch.Tensor, Sequence[SampleRequest]], list[Sampled]]
"""As `sample`."""


def sample(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[Sampled]:
    """One token for each row of `logits` ([n, vocab], fp32; not modified) by the request of the same index.

    Total: NaN counts as -inf, +inf as the largest number; if masks leave nothing, the best raw token is taken, of the `allowed`
    ones. Among equal values the lowest id wins. Token ids outside the vocabulary in a request are ignored. Native or not by the
    same choice as the model (`kernels.cpu.native`).
    """
    assert logits.ndim == 2, logits.shape
    assert logits.dtype == torch.float32, logits.dtype
    assert len(logits) == len(requests), (len(logits), len(requests))
    if not requests:
        return []
    rows = logits.detach().to("cpu").contiguous().numpy()
    draws = [_draw_of(request) for request in requests]
    masked = {i: _masked(rows[i], request.allowed) for i, request in enumerate(requests) if request.allowed is not None}
    adjusted = {
        i: _adjusted(masked.get(i, rows[i]), request) for i, request in enumerate(requests) if _adjusts(request)
    }
    drawn = sample_rows(cpu.native(), rows, draws, adjusted, masked)
    return [_sampled(found, i in masked) for i, found in enumerate(drawn)]


def _draw_of(request: SampleRequest) -> Draw:
    s = request.sampling
    return Draw(
        s.temperature, s.top_p, s.min_p, s.seed, request.sample_index, request.position, s.top_k, s.num_logprobs
    )


def _sampled(drawn: Drawn, is_masked: bool) -> Sampled:
    if drawn.logprob is None:
        return Sampled(drawn.token_id, None)
    best = [pair for pair in drawn.best if pair[1] > -math.inf] if is_masked else drawn.best
    return Sampled(drawn.token_id, TokenLogprobs(drawn.logprob, best))


def _masked(raw: Row, allowed: Mask) -> Row:
    """A copy of the row in which what is not allowed is -inf. Should all that is allowed be so too, it counts as equal."""
    size = min(len(raw), len(allowed))
    row = np.full(len(raw), -np.inf, dtype=np.float32)
    np.copyto(row[:size], clean(raw)[:size], where=allowed[:size])
    if row.max() == -np.inf:
        row[:size][allowed[:size]] = 0.0
    return row


def _adjusts(request: SampleRequest) -> bool:
    """Whether anything is done to the row before the draw."""
    sampling = request.sampling
    masks = request.position < sampling.min_tokens and sampling.stop_token_ids
    return bool(masks or sampling.logit_bias or _has_penalties(sampling))


def _has_penalties(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0


def _adjusted(raw: Row, request: SampleRequest) -> Row:
    """A copy of the row after masks, bias and penalties."""
    sampling, size = request.sampling, len(raw)
    row = clean(raw)
    if row is raw:
        row = raw.copy()
    mask = sampling.stop_token_ids if request.position < sampling.min_tokens else ()
    with np.errstate(over="ignore"):
        row[_ids(mask, size)] = -np.inf
        for token_id, bias in sampling.logit_bias:
            if 0 <= token_id < size:
                row[token_id] += np.float32(bias)
        if _has_penalties(sampling):
            _penalize(row, request)
    return row


def _penalize(row: Row, request: SampleRequest) -> None:
    """In place, in float32: repetition over prompt and output, frequency and presence over the output."""
    sampling, size = request.sampling, len(row)
    output = _ids(request.output_token_ids, size)
    if sampling.repetition_penalty != 1:
        seen = np.concatenate([_ids(request.prompt_token_ids, size), output])
        penalty = np.float32(sampling.repetition_penalty)
        values = row[seen]  # a copy: a token that comes several times is penalised once
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if len(output) and (sampling.frequency_penalty or sampling.presence_penalty):
        ids, counts = np.unique(output, return_counts=True)
        row[ids] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
        row[ids] -= np.float32(sampling.presence_penalty)


def _ids(token_ids: Sequence[int], size: int) -> NDArray[np.int64]:
    """Those that are in the vocabulary."""
    ids = np.asarray(token_ids, dtype=np.int64)
    return ids[(ids >= 0) & (ids < size)]
