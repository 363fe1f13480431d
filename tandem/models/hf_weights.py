"""Hugging Face directories: config.json and safetensors, nothing else.

Trusts nothing in the files: JSON is bounded and validated key by key, shapes are checked before a tensor is read. Never unpickles
and never runs code that a directory brings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem.errors import ModelError
from tandem.models.config import ModelConfig, RopeConfig

MAX_CONFIG_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
_FAMILIES: dict[str, Literal["llama", "mistral", "qwen2"]] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > limit:
            raise ModelError(f"{path}: {size} bytes, the limit is {limit}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: the top level is a {type(value).__name__}, must be an object")
    return value


class _Keys:
    """Typed access to one JSON object of `path`."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def _fail(self, key: str, kind: str) -> ModelError:
        return ModelError(f"{self.path}: key {key!r} is {str(self.values.get(key))[:80]!r}, must be {kind}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._fail(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fail(key, "a number")
        try:
            return float(value)
        except OverflowError as error:
            raise self._fail(key, "a number") from error

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._fail(key, "true or false")
        return value

    def section(self, key: str) -> dict[str, Any] | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._fail(key, "an object")
        return value


def _read_rope(keys: _Keys, max_position: int) -> RopeConfig:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` before it."""
    section = keys.section("rope_parameters") or keys.section("rope_scaling") or {}
    rope = _Keys(keys.path, section)
    theta = rope.number("rope_theta", keys.number("rope_theta", 10_000.0))
    kind = section.get("rope_type", section.get("type", "default"))
    if section.get("partial_rotary_factor", 1.0) != 1.0 or keys.number("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{keys.path}: partial rotary embedding is not supported")
    if kind in ("default", None):
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=rope.number("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.integer("original_max_position_embeddings", max_position),
        )
    raise ModelError(f"{keys.path}: rope scaling {str(kind)[:80]!r} is not supported (default, linear and llama3 are)")


def _check_window(keys: _Keys, architecture: str, max_position: int) -> None:
    window = keys.values.get("sliding_window")
    if architecture == "llama" or window is None:
        return
    if architecture == "qwen2" and not keys.flag("use_sliding_window", False):
        return
    if keys.integer("sliding_window") < max_position:
        raise ModelError(
            f"{keys.path}: a sliding window of {window} tokens, less than the context of {max_position}, is not supported"
        )


def _read_eos(keys: _Keys, directory: Path) -> tuple[int, ...]:
    """Of generation_config.json, which chat models extend, else of config.json."""
    generation = directory / "generation_config.json"
    sources = [_read_json(generation, MAX_CONFIG_BYTES)] if generation.is_file() else []
    for values in (*sources, keys.values):
        found = values.get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ModelError(
                f"{directory}: eos_token_id is {str(found)[:80]!r}, must be an integer or a list of integers"
            )
        return tuple(dict.fromkeys(ids))
    return ()


def read_config(directory: Path) -> ModelConfig:
    """The config of a Hugging Face directory. Raises ModelError naming file and key."""
    path = directory / "config.json"
    keys = _Keys(path, _read_json(path, MAX_CONFIG_BYTES))
    names = keys.values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    architecture = _FAMILIES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ModelError(f"{path}: architecture {str(name)[:80]!r} is not supported ({', '.join(_FAMILIES)} are)")
    if keys.values.get("quantization_config") is not None:
        raise ModelError(f"{path}: quantised checkpoints are not supported here; GGUF is")
    if keys.values.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: hidden_act {str(keys.values['hidden_act'])[:80]!r} is not supported (silu is)")
    heads = keys.integer("num_attention_heads")
    hidden = keys.integer("hidden_size")
    if heads < 1:
        raise ModelError(f"{path}: num_attention_heads is {heads}, must be at least 1")
    max_position = keys.integer("max_position_embeddings")
    _check_window(keys, architecture, max_position)
    attention_bias = architecture == "llama" and keys.flag("attention_bias", False)
    config = ModelConfig(
        architecture=architecture,
        num_layers=keys.integer("num_hidden_layers"),
        hidden=hidden,
        intermediate=keys.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", hidden // heads),
        vocab_size=keys.integer("vocab_size"),
        max_position=max_position,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=_read_rope(keys, max_position),
        tied=keys.flag("tie_word_embeddings", False),
        qkv_bias=architecture == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=architecture == "llama" and keys.flag("mlp_bias", False),
        eos_token_ids=_read_eos(keys, directory),
    )
    config.check(str(path))
    return config


class HFWeights:
    """The weights of a Hugging Face directory: `model.safetensors`, or the shards that its index names."""

    def __init__(self, directory: Path) -> None:
        self.config = read_config(directory)
        self._files: dict[Path, Any] = {}
        self._where = self._locate(directory)

    def _locate(self, directory: Path) -> dict[str, Path]:
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        if not index.is_file():
            raise ModelError(f"{directory}: neither model.safetensors nor its index is there (safetensors only)")
        weight_map = _read_json(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index}: 'weight_map' must be an object")
        where: dict[str, Path] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ModelError(f"{index}: {str(file)[:80]!r} is not the name of a safetensors file in this directory")
            where[name] = directory / file
        return where

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: can't be read as safetensors: {error}") from error
        return self._files[path]

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as stored (bf16, fp16 or fp32). Raises ModelError naming file and tensor."""
        path = self._where.get(name)
        if path is None:
            raise ModelError(f"{self._describe()}: tensor {name!r} is missing")
        try:
            entry = self._open(path).get_slice(name)
            found = tuple(entry.get_shape())
            if found != shape:
                raise ModelError(f"{path}: tensor {name!r} has shape {found}, must be {shape}")
            value: Tensor = self._open(path).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path}: tensor {name!r} can't be read: {error}") from error
        if value.dtype not in _DTYPES:
            raise ModelError(f"{path}: tensor {name!r} is {value.dtype}, must be bf16, fp16 or fp32")
        return value

    def _describe(self) -> str:
        return ", ".join(sorted({str(path) for path in self._where.values()})[:2]) or "the directory"
