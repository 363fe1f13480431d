"""The Llama family: Llama 2 and 3, Mistral without a window, Qwen2, SmolLM2.

Owns how a checkpoint's tensors become packed matrices, and the order of a step's operations. The runner owns the step's metadata,
the kernels the arithmetic. The residual stream is fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import Matrix, WeightFormat, pack, padded
from kernels.ops import Ops
from kernels.silu_mul import GATE_RUN
from kernels.torch_ops import padded_norm
from tandem.models.config import ModelConfig

A = TypeVar("A")


class Weights(Protocol):
    """Where a model's tensors come from, under Hugging Face names."""

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, of exactly that shape. Raises ModelError naming file and tensor."""


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: Tensor
    qkv: Matrix
    o: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


def embedding_format(form: WeightFormat) -> WeightFormat:
    """Embedding and output head are more sensitive than the layers: of an int4 model they are int8."""
    return "int8" if form == "int4" else form


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Runs of gates and of what they gate, in turns; each padded with zeros to whole runs. silu(0) * 0 is 0."""
    missing = -gate.shape[0] % GATE_RUN
    runs = [F.pad(part, (0, 0) * (part.dim() - 1) + (0, missing)).unflatten(0, (-1, GATE_RUN)) for part in (gate, up)]
    return torch.stack(runs, dim=1).flatten(0, 2)


def _padded_bias(bias: Tensor) -> Tensor:
    return F.pad(bias.float(), (0, padded(bias.numel()) - bias.numel()))


def packed_tensors(weights: Weights, form: WeightFormat) -> Iterator[tuple[str, Tensor]]:
    """The model's packed matrices, biases and norms under the names that `LlamaModel` looks up, in a fixed order: a function of
    the weights' values and `form`, the same from any file format."""
    config = weights.config
    hidden, width = config.hidden, config.intermediate
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def joined(parts: list[tuple[str, int]], columns: int, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Projections of the same input as one matrix."""
        matrix = torch.cat([weights.tensor(f"{name}.weight", (rows, columns)) for name, rows in parts])
        return matrix, torch.cat([weights.tensor(f"{name}.bias", (rows,)) for name, rows in parts]) if bias else None

    def matrix(
        name: str, value: Tensor, bias: Tensor | None, kind: WeightFormat = form
    ) -> Iterator[tuple[str, Tensor]]:
        yield name, pack(value, kind)
        if bias is not None:
            yield f"{name}.bias", _padded_bias(bias)

    top = embedding_format(form)
    embedding = weights.tensor("model.embed_tokens.weight", (config.vocab_size, hidden))
    yield from matrix("embedding", embedding, None, top)
    for index in range(config.num_layers):
        here = f"model.layers.{index}"
        yield f"{index}.attention_norm", padded_norm(weights.tensor(f"{here}.input_layernorm.weight", (hidden,)))
        attention, mlp = f"{here}.self_attn", f"{here}.mlp"
        parts = [(f"{attention}.q_proj", queries), (f"{attention}.k_proj", keys), (f"{attention}.v_proj", keys)]
        yield from matrix(f"{index}.qkv", *joined(parts, hidden, config.qkv_bias))
        yield from matrix(f"{index}.o", *joined([(f"{attention}.o_proj", hidden)], queries, config.o_bias))
        yield f"{index}.mlp_norm", padded_norm(weights.tensor(f"{here}.post_attention_layernorm.weight", (hidden,)))
        gate, gate_bias = joined([(f"{mlp}.gate_proj", width)], hidden, config.mlp_bias)
        up, up_bias = joined([(f"{mlp}.up_proj", width)], hidden, config.mlp_bias)
        both = None if gate_bias is None or up_bias is None else _interleaved(gate_bias, up_bias)
        yield from matrix(f"{index}.gate_up", _interleaved(gate, up), both)
        yield from matrix(f"{index}.down", *joined([(f"{mlp}.down_proj", hidden)], width, config.mlp_bias))
    yield "norm", padded_norm(weights.tensor("model.norm.weight", (hidden,)))
    if not config.tied:
        yield from matrix("head", weights.tensor("lm_head.weight", (config.vocab_size, hidden)), None, top)


class LlamaModel:
    """A model ready to run. Not changed after it is made; may be shared by runners."""

    def __init__(self, config: ModelConfig, form: WeightFormat, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: what `packed_tensors` yielded for that `config` and `form`."""
        self.config = config
        self.form: WeightFormat = form

        def matrix(name: str, out_features: int, in_features: int, kind: WeightFormat = form) -> Matrix:
            return Matrix(tensors[name], tensors.get(f"{name}.bias"), out_features, in_features, kind)

        hidden, heads = config.hidden, config.num_heads * config.head_dim
        width = config.intermediate
        top = embedding_format(form)
        self._embedding = matrix("embedding", config.vocab_size, hidden, top)
        self._layers = [
            Layer(
                attention_norm=tensors[f"{index}.attention_norm"],
                qkv=matrix(f"{index}.qkv", heads + 2 * config.num_kv_heads * config.head_dim, hidden),
                o=matrix(f"{index}.o", hidden, heads),
                mlp_norm=tensors[f"{index}.mlp_norm"],
                gate_up=matrix(f"{index}.gate_up", -(-width // GATE_RUN) * GATE_RUN * 2, hidden),
                down=matrix(f"{index}.down", hidden, width),
            )
            for index in range(config.num_layers)
        ]
        self._norm = tensors["norm"]
        self._head = self._embedding if config.tied else matrix("head", config.vocab_size, hidden, top)

    def forward(self, ops: Ops[A]) -> None:
        """One step: the KV of its tokens, and the logits that it asks for."""
        eps, last = self.config.norm_eps, self.config.num_layers - 1
        x = ops.embed(self._embedding)
        for index, layer in enumerate(self._layers):
            attended = ops.attention(ops.norm_linear(x, layer.attention_norm, eps, layer.qkv), index)
            if index == last:
                # The last layer's KV is written: rows whose logits nobody wants are finished.
                ops.keep_logit_rows(x, attended)
            ops.add_linear(x, attended, layer.o)
            ops.add_linear(x, ops.norm_gated(x, layer.mlp_norm, eps, layer.gate_up), layer.down)
        ops.logits(x, self._norm, eps, self._head)
