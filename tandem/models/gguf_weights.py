"""GGUF files: their tensors, and the weights of supported architectures under Hugging Face names.

Trusts nothing in the file: every place is checked against the file's size before anything is allocated or read (the header is
`tandem.gguf_header`'s). The file is mapped, never written. Source: llama.cpp's converter for the order of q and k rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandem.errors import ModelError
from tandem.gguf_header import TensorPlace, read_header
from tandem.models.config import ModelConfig, RopeConfig


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies, inside the file. `shape` is in row-major order, `offset` from the start of the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """A GGUF file's metadata and tensors, read lazily from a mapping. Raises ModelError naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, places = read_header(path)
        try:
            self._map: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: can't be read: {error}") from error
        self.tensors = {name: self._checked(name, place) for name, place in places.items()}

    def _checked(self, name: str, place: TensorPlace) -> GGUFTensor:
        try:
            kind = gguf.GGMLQuantizationType(place.kind)
            items, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise ModelError(f"{self.path}: tensor {name!r} has unknown type {place.kind}") from error
        count = math.prod(place.shape)
        if count == 0 or place.shape[-1] % items:
            raise ModelError(f"{self.path}: tensor {name!r} of shape {place.shape} can't be {kind.name}")
        num_bytes = count // items * size
        if place.offset + num_bytes > len(self._map):
            raise ModelError(f"{self.path}: tensor {name!r} lies past the end of the file: truncated or damaged")
        return GGUFTensor(place.shape, kind, place.offset, num_bytes)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The dequantised tensor, fp32, a private copy. Raises ModelError if it is missing or has another shape."""
        entry = self.tensors.get(name)
        if entry is None:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        if entry.shape != shape:
            raise ModelError(f"{self.path}: tensor {name!r} has shape {entry.shape}, must be {shape}")
        items, size = gguf.GGML_QUANT_SIZES[entry.kind]
        raw = self._map[entry.offset : entry.offset + entry.num_bytes]
        raw = raw.reshape(*entry.shape[:-1], entry.shape[-1] // items * size)
        try:
            with np.errstate(all="ignore"):
                values = gguf.dequantize(np.ascontiguousarray(raw), entry.kind)
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"{self.path}: tensor {name!r} is {entry.kind.name}, which can't be read") from error
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))


_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor name."""
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[stem]}.{kind}"


class GGUFWeights:
    """The weights and config of a model in a GGUF file, under Hugging Face names and in Hugging Face order of rows."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self.config = self._read_config()

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """fp32, a private copy. Llama's converter interleaves the two halves of each head's q and k rows; undone here."""
        value = self._file.tensor(gguf_name(name), shape)
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(name.split(".")[-2])
        if heads is None or self._file.metadata["general.architecture"] != "llama":
            return value
        half = self.config.head_dim // 2
        return value.view(heads, half, 2, -1).transpose(1, 2).reshape(shape)

    def _get(self, key: str, kind: type[int] | type[float] | type[str], default: Any = None) -> Any:
        value = self._file.metadata.get(key, default)
        if value is None:
            raise ModelError(f"{self._file.path}: key {key!r} is missing")
        accepted = (int, float) if kind is float else kind
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise ModelError(f"{self._file.path}: key {key!r} is a {type(value).__name__}, must be a {kind.__name__}")
        return kind(value)

    def _read_config(self) -> ModelConfig:
        path, tensors = self._file.path, self._file.tensors
        arch = self._get("general.architecture", str)
        if arch not in ("llama", "qwen2"):
            raise ModelError(f"{path}: architecture {arch!r} is not supported (llama, mistral and qwen2 are)")
        if self._get(f"{arch}.expert_count", int, 0):
            raise ModelError(f"{path}: mixtures of experts are not supported")
        heads = self._get(f"{arch}.attention.head_count", int)
        hidden = self._get(f"{arch}.embedding_length", int)
        if heads < 1:
            raise ModelError(f"{path}: {arch}.attention.head_count is {heads}, must be at least 1")
        head_dim = self._get(f"{arch}.attention.key_length", int, hidden // heads)
        if self._get(f"{arch}.attention.value_length", int, head_dim) != head_dim:
            raise ModelError(f"{path}: keys and values of different lengths are not supported")
        rotated = self._get(f"{arch}.rope.dimension_count", int, head_dim)
        if rotated != head_dim:
            raise ModelError(f"{path}: rotary embedding of {rotated} of {head_dim} dimensions is not supported")
        context = self._get(f"{arch}.context_length", int)
        window = self._get(f"{arch}.attention.sliding_window", int, 0)
        if 0 < window < context:
            raise ModelError(
                f"{path}: a sliding window of {window} tokens, less than the context of {context}, is not supported"
            )
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelError(f"{path}: tensor 'token_embd.weight' is missing")
        config = ModelConfig(
            architecture=arch,
            num_layers=self._get(f"{arch}.block_count", int),
            hidden=hidden,
            intermediate=self._get(f"{arch}.feed_forward_length", int),
            num_heads=heads,
            num_kv_heads=self._get(f"{arch}.attention.head_count_kv", int, heads),
            head_dim=head_dim,
            vocab_size=embedding.shape[0],
            max_position=context,
            norm_eps=self._get(f"{arch}.attention.layer_norm_rms_epsilon", float),
            rope=self._read_rope(arch, head_dim),
            tied="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            o_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_down.bias" in tensors,
            eos_token_ids=self._read_eos(),
        )
        config.check(str(path))
        return config

    def _read_eos(self) -> tuple[int, ...]:
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return tuple(dict.fromkeys(self._get(key, int) for key in keys if key in self._file.metadata))

    def _read_rope(self, arch: str, head_dim: int) -> RopeConfig:
        path = self._file.path
        theta = self._get(f"{arch}.rope.freq_base", float, 10_000.0)
        scaling: str = self._get(f"{arch}.rope.scaling.type", str, "none")
        if "rope_freqs.weight" in self._file.tensors:
            if scaling not in ("none", "llama3"):
                raise ModelError(f"{path}: rope scaling {scaling!r} together with rope_freqs is not supported")
            factors = self._file.tensor("rope_freqs.weight", (head_dim // 2,))
            return RopeConfig(theta=theta, scaling="factors", factors=tuple(factors.tolist()))
        if scaling not in ("none", "linear"):
            raise ModelError(f"{path}: rope scaling {scaling!r} is not supported (none, linear and llama3 are)")
        kind: Literal["none", "linear"] = "linear" if scaling == "linear" else "none"
        factor = self._get(f"{arch}.rope.scaling.factor", float, 1.0) if kind == "linear" else 1.0
        return RopeConfig(theta=theta, scaling=kind, factor=factor)
