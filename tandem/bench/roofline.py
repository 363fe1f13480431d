"""What a model's steps must read from memory and multiply at the very least: the bounds of the engine's figures.

Owns the counts; measures nothing (`tandem.bench.limits` does). A decode step reads each weight and the KV of its sequences
once; activations and the embedding's one row a token aren't counted, and nothing is assumed to stay in a cache between steps.
"""

from __future__ import annotations

from kernels.linear import GROUP, PANEL, WeightFormat, panel_bytes
from tandem.models.config import ModelConfig
from tandem.models.llama import embedding_format


def weights_per_layer(config: ModelConfig) -> int:
    """Weights of one layer's linears."""
    attention = config.hidden * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return attention + 3 * config.hidden * config.intermediate


def head_weights(config: ModelConfig) -> int:
    """Weights of the output head, tied or not."""
    return config.vocab_size * config.hidden


def kv_read_bytes(config: ModelConfig, batch: int, context: int, value_bytes: int) -> int:
    """Bytes of the keys and values of `batch` sequences with `context` tokens each, `value_bytes` a value."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * batch * context * value_bytes


def weight_read_bytes(config: ModelConfig, form: WeightFormat) -> float:
    """Bytes of every linear's and the head's weights in `form`, scales of groups included."""
    layers = config.num_layers * weights_per_layer(config) * _value_bytes(form)
    return layers + head_weights(config) * _value_bytes(embedding_format(form))


def _value_bytes(form: WeightFormat) -> float:
    return panel_bytes(GROUP, form) / (PANEL * GROUP)


def prefill_flops(config: ModelConfig, batch: int, context: int) -> float:
    """Floating-point operations of `batch` prompts of `context` tokens: two a weight and token in the linears, two a weight of
    the head for each prompt's last token, four a query head, dimension and pair of positions (causal) in attention."""
    linears = 2 * config.num_layers * weights_per_layer(config) * context
    pairs = context * (context + 1) // 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return batch * (linears + attention + 2 * head_weights(config))
