"""What decides a model's arithmetic: sizes, rope, norms, biases.

Owns the validation of these values and the rope frequencies; reads no file. A value that Tandem can't run is a `ModelError`
that names it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tandem.errors import ModelError

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_POSITION = 1 << 24


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding's frequencies. `factors` (one per frequency) divide them, as GGUF files carry Llama 3's scaling."""

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "factors"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """[head_dim / 2] fp32. `llama3` as in the Llama 3.1 reference: long waves slowed by `factor`, middle ones blended."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        plain = 1.0 / (self.theta**exponents)
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "factors":
            return plain / torch.tensor(self.factors, dtype=torch.float32)
        if self.scaling == "llama3":
            waves = 2 * math.pi / plain
            low = self.original_max_position / self.low_freq_factor
            high = self.original_max_position / self.high_freq_factor
            smooth = (self.original_max_position / waves - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            blended = (1 - smooth) * plain / self.factor + smooth * plain
            return torch.where(waves > low, plain / self.factor, torch.where(waves < high, plain, blended))
        return plain


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family. `where` in errors is the caller's; `check` names the value and the limit."""

    architecture: Literal["llama", "mistral", "qwen2"]
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tied: bool
    """The head is the embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def check(self, where: str) -> None:
        """Raises ModelError for what can't be a model; `where` names the file."""
        limits = {
            "num_layers": MAX_LAYERS,
            "hidden": MAX_WIDTH,
            "intermediate": MAX_WIDTH,
            "num_heads": MAX_WIDTH,
            "num_kv_heads": MAX_WIDTH,
            "head_dim": 1024,
            "vocab_size": 1 << 22,
            "max_position": MAX_POSITION,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise ModelError(f"{where}: {name} is {value}, must be between 1 and {limit}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{where}: {self.num_heads} heads don't divide into {self.num_kv_heads} KV heads")
        if self.num_heads * self.head_dim > MAX_WIDTH:
            raise ModelError(f"{where}: {self.num_heads} heads of {self.head_dim} are wider than {MAX_WIDTH}")
        if self.head_dim % 2:
            raise ModelError(f"{where}: head_dim is {self.head_dim}, must be even for rotary embedding")
        if not (math.isfinite(self.norm_eps) and 0 < self.norm_eps < 1):
            raise ModelError(f"{where}: the norm's epsilon is {self.norm_eps}, must be between 0 and 1")
        self._check_rope(where)
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise ModelError(
                    f"{where}: end-of-sequence token {token} is outside the vocabulary of {self.vocab_size}"
                )

    def _check_rope(self, where: str) -> None:
        rope = self.rope
        if not (math.isfinite(rope.theta) and rope.theta > 0):
            raise ModelError(f"{where}: rope theta is {rope.theta}, must be positive")
        if not (math.isfinite(rope.factor) and rope.factor > 0):
            raise ModelError(f"{where}: rope scaling factor is {rope.factor}, must be positive")
        if rope.scaling == "llama3" and not (
            0 < rope.low_freq_factor < rope.high_freq_factor < math.inf and rope.original_max_position >= 1
        ):
            raise ModelError(
                f"{where}: llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor and a positive original length, "
                f"has {rope.low_freq_factor}, {rope.high_freq_factor} and {rope.original_max_position}"
            )
        if rope.scaling == "factors":
            if len(rope.factors) != self.head_dim // 2:
                raise ModelError(
                    f"{where}: {len(rope.factors)} rope factors for head_dim {self.head_dim}, needs half of it"
                )
            if not all(math.isfinite(factor) and factor > 0 for factor in rope.factors):
                raise ModelError(f"{where}: rope factors must be positive and finite")
