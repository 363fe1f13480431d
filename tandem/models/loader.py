"""From a path to a model that runs: a GGUF file or a Hugging Face directory.

Owns the choice of reader and the model's fingerprint. Never unpickles, never runs code that comes with a model, never asks
the network.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kernels.linear import WeightFormat, weight_format
from tandem.errors import ModelError
from tandem.models.config import ModelConfig
from tandem.models.gguf_weights import GGUFWeights
from tandem.models.hf_weights import HFWeights
from tandem.models.llama import LlamaModel, Weights

Dtype = Literal["bf16", "fp32"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and its identity. `fingerprint` (32 bytes) covers effective weights, rope and every setting that changes KV;
    how this machine computes is not in it (that is the numerics class)."""

    config: ModelConfig
    dtype: Dtype
    fingerprint: bytes
    model: LlamaModel


def _fingerprint(model: LlamaModel, dtype: Dtype) -> bytes:
    config = model.config
    digest = hashlib.sha256(b"tandem/model/1")
    digest.update(model.weights_digest)
    settings = (dtype, config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps.hex(), config.tied)
    digest.update(repr(settings).encode())
    digest.update(config.rope.inverse_frequencies(config.head_dim).numpy())
    return digest.digest()


def open_weights(path: Path) -> Weights:
    """The reader for `path`. Raises ModelError if it is neither a GGUF file nor a Hugging Face directory."""
    if path.is_dir():
        return HFWeights(path)
    if path.is_file():
        return GGUFWeights(path)
    raise ModelError(f"{path}: there is no such model file or directory")


def load_model(path: Path, dtype: Dtype, form: WeightFormat | None = None) -> LoadedModel:
    """Reads, dequantises, casts and packs. `form` overrides how linears compute (default: the best this machine runs).

    Raises ModelError: one sentence naming file and tensor or key.
    """
    torch_dtype = TORCH_DTYPES[dtype]
    with torch.inference_mode():
        model = LlamaModel(open_weights(path), torch_dtype, form or weight_format(torch_dtype))
    return LoadedModel(model.config, dtype, _fingerprint(model, dtype), model)
