"""Tiny Llama-like checkpoints with random weights whose attention is peaked, written as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 101
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
# Head dimensions are such that the native kernels run; of "odd-heads" torch computes the attention, whatever was built.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("llama", {}),
    "mha": ("llama", {"num_key_value_heads": 6}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "odd-heads": ("llama", {"head_dim": 20}),
    "wide-heads": ("llama", {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "odd-widths": ("llama", {"hidden_size": 72, "intermediate_size": 57, "attention_bias": True, "mlp_bias": True}),
    "bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
}
SMOLLM2_SHAPES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
"""Two layers of SmolLM2-135M's shapes, with few words."""


def build(family: str, changes: dict[str, Any], seed: int = 0) -> Any:
    """The `transformers` model in fp32. Every tensor is random (biases and norms too); q and k are large, so that attention
    depends strongly on positions and heads."""
    config_class, model_class = FAMILIES[family]
    settings = BASE | changes
    if family == "qwen2":
        settings = {key: value for key, value in settings.items() if key != "head_dim"}
    model = model_class(config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                scale = 2.5 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(noise * scale / parameter.shape[1] ** 0.5)
    return model


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Writes config.json and safetensors."""
    model.save_pretrained(directory, safe_serialization=True, **options)
    return directory
