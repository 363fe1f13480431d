"""Noise is a pure function: of its key and counter, of nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels.noise import exponential_noise

VOCAB = 5000


def all_noise(seed: int = 1, index: int = 2, position: int = 3) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return exponential_noise(seed, index, position, np.arange(VOCAB))


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as the paper states it, on Python's integers."""
    mask = 2**64 - 1
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [(right >> 64) ^ counter[1] ^ key[0], right & mask, (left >> 64) ^ counter[3] ^ key[1], left & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


def test_noise_is_the_papers_philox() -> None:
    seed, index, position = 2**63 - 1, 7, 123_456
    noise = exponential_noise(seed, index, position, np.arange(64))
    words = [word for block in range(16) for word in philox4x64([block + 1, 0, position, 0], [seed, index])]
    expected = [-np.log(((word >> 12) + 0.5) / 2**52) for word in words]
    np.testing.assert_allclose(noise, expected, rtol=1e-14)


@given(ids=st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=200))
def test_a_tokens_noise_does_not_depend_on_the_other_candidates(ids: set[int]) -> None:
    chosen = np.array(sorted(ids))
    assert (exponential_noise(1, 2, 3, chosen) == all_noise()[chosen]).all()


def test_every_part_of_the_key_changes_all_noise() -> None:
    base = all_noise()
    for other in (all_noise(seed=2), all_noise(index=3), all_noise(position=4)):
        assert not (other == base).any()


def test_noise_is_exponential() -> None:
    noise = np.concatenate([all_noise(position=position) for position in range(40)])
    assert (noise > 0).all()
    assert (noise < 37).all()
    num = len(noise)
    # The largest distance between the empirical and the true distribution (Kolmogorov-Smirnov, 0.1 %).
    distance = np.abs(np.arange(1, num + 1) / num - (1 - np.exp(-np.sort(noise)))).max()
    assert distance < 1.95 / num**0.5
