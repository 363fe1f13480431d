"""Sampling noise as a pure function of (seed, sample index, position, token id).

Owns the use of the counter-based generator Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011): key = (seed, sample index), counter = (token id // 4 + 1, 0, position, 0), word token id % 4. Nothing is remembered
between calls, so the noise is the same in every process, whatever else is drawn, and a token's noise does not depend on
which other tokens are candidates. Only raw words are taken from numpy, whose distributions may change between versions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WORDS = 4
_FEW = 64
"""Up to so many tokens, going from counter to counter is faster than drawing everything in between."""
_ONE = np.uint64(0x3FF0000000000000)
"""The bits of 1.0 as a float64."""


def exponential_noise(seed: int, sample_index: int, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Noise of `token_ids` ([n], ascending, not empty) for one position of one sample: [n], exponential with mean 1, in (0, 37).

    The argmax of `weight / noise` draws a token with a probability proportional to its weight (the Gumbel-max trick, since
    -log of an exponential variate is a Gumbel variate).
    """
    words = _words(seed, sample_index, position, token_ids)
    # The high 52 bits as the fraction of a float64 in [1, 2), then half a step up: uniform in (0, 1), every step exact, and
    # ten times as fast as converting integers.
    words >>= np.uint64(12)
    words |= _ONE
    uniform = words.view(np.float64)
    uniform -= 1.0
    uniform += 2.0**-53
    return -np.log(uniform)


def _words(seed: int, sample_index: int, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    generator = np.random.Philox(
        key=np.array([seed, sample_index], dtype=np.uint64), counter=np.array([0, 0, position, 0], dtype=np.uint64)
    )
    if len(token_ids) > _FEW:
        return generator.random_raw(int(token_ids[-1]) + 1)[token_ids]
    words = np.empty(len(token_ids), dtype=np.uint64)
    at = 0  # the counter's block that comes next
    block = np.empty(0, dtype=np.uint64)
    for i, token_id in enumerate(token_ids.tolist()):
        wanted, word = divmod(token_id, _WORDS)
        if wanted >= at:
            if wanted > at:
                generator.advance(wanted - at)
            block = generator.random_raw(_WORDS)
            at = wanted + 1
        words[i] = block[word]
    return words
