"""From a path to a model that runs: a GGUF file or a Hugging Face directory.

Owns the choice of reader and the model's fingerprint. Never unpickles, never runs code that comes with a model, never asks
the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kernels.linear import WeightFormat
from tandem.errors import ModelError
from tandem.models.config import ModelConfig
from tandem.models.gguf_weights import GGUFWeights
from tandem.models.hf_weights import HFWeights
from tandem.models.llama import LlamaModel, Weights, packed_tensors
from tandem.models.packed import pack_in_memory, packed_weights

Dtype = Literal["bf16", "fp32"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and its identity. `dtype` is that of its KV. `fingerprint` (32 bytes) covers effective weights, rope and every
    setting that changes KV; how this machine computes is not in it (that is the numerics class)."""

    config: ModelConfig
    dtype: Dtype
    fingerprint: bytes
    model: LlamaModel


def _fingerprint(config: ModelConfig, dtype: Dtype, form: WeightFormat, weights_digest: bytes) -> bytes:
    digest = hashlib.sha256(b"tandem/model/2")
    digest.update(weights_digest)
    settings = (dtype, form, config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps.hex(), config.tied)
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


def load_model(path: Path, dtype: Dtype, form: WeightFormat | None = None, packed: Path | None = None) -> LoadedModel:
    """Reads the model; its weights become `form` (default: as `dtype`), kept in a file in the folder `packed` where all
    processes of this machine share them (None: a private copy).

    Raises ModelError: one sentence naming file and tensor or key.
    """
    weights = open_weights(path)
    chosen: WeightFormat = form or dtype

    def source() -> Iterable[tuple[str, Tensor]]:
        with torch.no_grad():
            yield from packed_tensors(weights, chosen)

    found = pack_in_memory(source) if packed is None else packed_weights(path, chosen, source, packed)
    config = weights.config
    model = LlamaModel(config, chosen, found.tensors)
    return LoadedModel(config, dtype, _fingerprint(config, dtype, chosen, found.digest), model)
