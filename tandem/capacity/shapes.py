"""How large a model is: the numbers of its `config.json` that the arithmetic of serving needs.

Owns the known models and the reading of a `config.json`; loads no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from tandem.errors import ConfigError

_Size = Annotated[int, Meta(ge=1, le=1_000_000_000)]
MAX_CONFIG_BYTES = 1 << 20


class ModelShape(Struct, frozen=True):
    """A dense decoder of the Llama family, by the names of its `config.json`."""

    num_hidden_layers: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_attention_heads: _Size
    vocab_size: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    tie_word_embeddings: bool = False

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def layer_params(self) -> int:
        """Of all layers: what every token is multiplied with, but for the output head."""
        attention = self.hidden_size * self.head * (2 * self.num_attention_heads + 2 * self.kv_heads)
        return self.num_hidden_layers * (
            attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        )

    @property
    def head_params(self) -> int:
        """Of the output head."""
        return self.hidden_size * self.vocab_size

    @property
    def num_params(self) -> int:
        return self.layer_params + self.head_params * (1 if self.tie_word_embeddings else 2) + self.hidden_size

    def kv_bytes_per_token(self, element_bytes: float) -> float:
        """Keys and values of all layers."""
        return 2 * self.num_hidden_layers * self.kv_heads * self.head * element_bytes


# From the `config.json` of each model's repository at huggingface.co.
SHAPES = {
    "llama-3.1-8b": ModelShape(32, 4096, 14336, 32, 128_256, 8, 128),
    "llama-3.1-70b": ModelShape(80, 8192, 28672, 64, 128_256, 8, 128),
    "llama-3.1-405b": ModelShape(126, 16384, 53248, 128, 128_256, 8, 128),
    "qwen2.5-7b": ModelShape(28, 3584, 18944, 28, 152_064, 4, 128),
    "smollm2-135m": ModelShape(30, 576, 1536, 9, 49_152, 3, 64, True),
}


def shape_of(model: str) -> ModelShape:
    """A known model, or that of a `config.json` or of a folder with one. Raises ConfigError for what is neither."""
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(f"--model {model}: no known model ({', '.join(SHAPES)} are), and no config.json")
    data = path.read_bytes()[: MAX_CONFIG_BYTES + 1]
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: more than {MAX_CONFIG_BYTES} bytes")
    try:
        shape = msgspec.json.decode(data, type=ModelShape)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}") from error
    if shape.num_attention_heads % shape.kv_heads:
        raise ConfigError(f"{path}: {shape.num_attention_heads} heads can't share {shape.kv_heads} of keys and values")
    return shape
