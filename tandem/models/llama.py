"""The Llama family: Llama 2 and 3, Mistral without a window, Qwen2, SmolLM2.

Owns the packed weights and the order of a step's operations; the runner owns the step's metadata, the kernels the arithmetic.
The residual stream is fp32; what a matrix multiplies is in the model's dtype.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import MIN_ROWS, Linear, WeightFormat, make_linear
from kernels.paged_attention import AttentionPlan, paged_attention
from kernels.rms_norm import rms_norm
from kernels.rope_write import WritePlan, rope_write
from kernels.silu_mul import WIDTH_MULTIPLE, silu_mul
from tandem.models.config import ModelConfig


class Weights(Protocol):
    """Where a model's tensors come from, under Hugging Face names."""

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, of exactly that shape. Raises ModelError naming file and tensor."""


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: Tensor
    qkv: Linear
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's rows, padded to the model's `min_rows`. Rows past `plan.num_rows` are padding."""

    token_ids: Tensor
    """[num_rows] int64"""
    write: WritePlan
    plan: AttentionPlan
    logit_rows: Tensor
    """[num_logits] int64: rows whose logits are wanted."""


class LlamaModel:
    """A model ready to run. Not changed after it is made; may be shared by runners."""

    def __init__(self, weights: Weights, dtype: torch.dtype, form: WeightFormat) -> None:
        config = weights.config
        self.config = config
        self.dtype = dtype
        self.form: WeightFormat = form
        self.min_rows = MIN_ROWS[form]
        self._weights = weights
        self._hash = hashlib.sha256()
        self._embedding = self._take("model.embed_tokens.weight", (config.vocab_size, config.hidden))
        self._layers = [self._make_layer(index) for index in range(config.num_layers)]
        self._norm = self._take("model.norm.weight", (config.hidden,), torch.float32)
        head = self._embedding if config.tied else self._take("lm_head.weight", (config.vocab_size, config.hidden))
        self._head = make_linear(head, None, form)
        self.weights_digest = self._hash.digest()
        """SHA-256 over names, shapes and effective values, in a fixed order: the same from any file format."""
        del self._weights, self._hash

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        value = self._weights.tensor(name, shape).to(dtype or self.dtype).contiguous()
        self._hash.update(f"{name}{shape}{value.dtype}".encode())
        self._hash.update(value.view(torch.uint8).numpy())
        return value

    def _joined(self, layer: str, parts: list[tuple[str, int]], width: int, bias: bool, multiple: int = 1) -> Linear:
        """Projections of the same input as one matrix, each padded with zero rows to a multiple of `multiple`."""

        def padded(value: Tensor) -> Tensor:
            missing = -value.shape[0] % multiple
            return F.pad(value, (0, 0) * (value.dim() - 1) + (0, missing)) if missing else value

        weight = torch.cat([padded(self._take(f"{layer}.{name}.weight", (rows, width))) for name, rows in parts])
        if not bias:
            return make_linear(weight, None, self.form)
        biases = torch.cat([padded(self._take(f"{layer}.{name}.bias", (rows,))) for name, rows in parts])
        return make_linear(weight, biases, self.form)

    def _make_layer(self, index: int) -> Layer:
        config = self.config
        name = f"model.layers.{index}"
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        width = config.intermediate
        attention_norm = self._take(f"{name}.input_layernorm.weight", (config.hidden,), torch.float32)
        qkv = self._joined(
            f"{name}.self_attn",
            [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)],
            config.hidden,
            config.qkv_bias,
        )
        o = self._joined(f"{name}.self_attn", [("o_proj", config.hidden)], queries, config.o_bias)
        mlp_norm = self._take(f"{name}.post_attention_layernorm.weight", (config.hidden,), torch.float32)
        gate_up = self._joined(
            f"{name}.mlp", [("gate_proj", width), ("up_proj", width)], config.hidden, config.mlp_bias, WIDTH_MULTIPLE
        )
        down_weight = self._take(f"{name}.mlp.down_proj.weight", (config.hidden, width))
        down_bias = self._take(f"{name}.mlp.down_proj.bias", (config.hidden,)) if config.mlp_bias else None
        down = make_linear(F.pad(down_weight, (0, -width % WIDTH_MULTIPLE)), down_bias, self.form)
        return Layer(attention_norm, qkv, o, mlp_norm, gate_up, down)

    def forward(self, step: StepInputs, arena: Tensor) -> Tensor:
        """Writes the step's KV into `arena` and returns fp32 logits [num_logits, vocab_size].

        arena: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim] in the model's dtype, contiguous.
        """
        config = self.config
        heads, eps, scale = config.num_heads, config.norm_eps, config.head_dim**-0.5
        x = self._embedding.index_select(0, step.token_ids).float()
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(rms_norm(x, layer.attention_norm, eps, self.dtype, delta))
            q = rope_write(qkv, step.write, arena, index, heads, scale)
            attended = paged_attention(q, arena, index, step.plan, self.dtype)
            gate_up = layer.gate_up(rms_norm(x, layer.mlp_norm, eps, self.dtype, layer.o(attended)))
            delta = layer.down(silu_mul(gate_up))
        assert delta is not None
        x.add_(delta)
        wanted = step.logit_rows.numel()
        if wanted == 0:
            return torch.empty((0, config.vocab_size))
        x = rms_norm(x.index_select(0, step.logit_rows), self._norm, eps, self.dtype)
        if wanted < self.min_rows:
            x = F.pad(x, (0, 0, 0, self.min_rows - wanted))
        return self._head(x)[:wanted].float()
