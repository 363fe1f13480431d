"""One model's weights as the files that peers read: GGUF in bf16, Q8_0 or Q4_1 for llama.cpp, a Hugging Face directory for vLLM.

Owns the folder `peers` of the cache folder. Every file is made once from the values of the model's own file, under a name that
says which file that was, and becomes visible in one atomic move. Never changes the model's own file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from tandem.bench.report import Say
from tandem.config import cache_dir
from tandem.errors import ModelError
from tandem.models.config import ModelConfig
from tandem.models.gguf_weights import GGUFFile, GGUFWeights

GGUFKind = Literal["BF16", "Q8_0", "Q4_1"]
_FILE_TYPES: dict[GGUFKind, gguf.LlamaFileType] = {
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_STALE_S = 3600.0
"""A temporary folder that is older was left by a killed process."""
_READ_BYTES = 1 << 24


def llama_cpp_model(model: Path, kind: GGUFKind, say: Say) -> Path:
    """A GGUF file with the weights of `model` in `kind`: `model` itself if it is that already.

    Raises ModelError for a Hugging Face directory: making a GGUF file of one takes llama.cpp's own converter.
    """
    if model.is_dir():
        raise ModelError(f"{model} is a Hugging Face directory and llama.cpp reads GGUF files: give the model as one")
    if GGUFFile(model).metadata.get("general.file_type") == _FILE_TYPES[kind]:
        return model
    return _made(model, f"{kind.lower()}.gguf", say, lambda target: write_gguf(model, kind, target))


def vllm_model(model: Path, say: Say) -> Path:
    """A Hugging Face directory with the weights of `model`: `model` itself if it is one, else bf16 safetensors."""
    if model.is_dir():
        return model
    return _made(model, "hf", say, lambda target: write_directory(model, target))


def _made(model: Path, suffix: str, say: Say, make: Callable[[Path], None]) -> Path:
    """The cached file or directory, made by `make` if it is not there."""
    folder = cache_dir() / "peers"
    target = folder / f"{model.stem}-{_digest(model)}-{suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".making-*"):
        if time.time() - stale.stat().st_mtime > _STALE_S:
            shutil.rmtree(stale, ignore_errors=True)
    say(f"making {target.name} of {model.name} (once)")
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as scratch:
        made = Path(scratch) / "made"
        make(made)
        try:
            made.rename(target)
        except OSError:
            if not target.exists():  # else another process was quicker: its directory is the same
                raise
    return target


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128(b"1")  # the version of what is written here
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_gguf(model: Path, kind: GGUFKind, target: Path) -> None:
    """Writes the GGUF file `model` anew with its matrices in `kind` (in BF16 where rows don't divide into that kind's blocks, as
    llama.cpp's own tool does); vectors stay fp32, metadata as it is."""
    source = GGUFFile(model)  # its bounds are checked; the package's reader then knows the exact types of the metadata
    writer = gguf.GGUFWriter(target, str(source.metadata.get("general.architecture")))
    _copy_metadata(gguf.GGUFReader(model), writer)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = {name: _kind_of(entry.shape, kind) for name, entry in source.tensors.items()}
    for name, entry in source.tensors.items():
        shape = gguf.quant_shape_to_byte_shape(entry.shape, kinds[name])
        num_bytes = int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), num_bytes, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, entry in source.tensors.items():
        values = source.tensor(name, entry.shape).numpy()
        writer.write_tensor_data(_bytes_of(values, kinds[name]))
    writer.close()


def _copy_metadata(reader: Any, writer: Any) -> None:
    ours = ("general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if name in ours or name.startswith("GGUF."):
            continue
        item_kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=item_kind)


def _kind_of(shape: tuple[int, ...], kind: GGUFKind) -> gguf.GGMLQuantizationType:
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    wanted = gguf.GGMLQuantizationType[kind]
    fits = shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else gguf.GGMLQuantizationType.BF16


def _bytes_of(values: npt.NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    stored = gguf.quantize(np.ascontiguousarray(values), kind)
    return np.ascontiguousarray(stored).view(np.uint8)


def write_directory(model: Path, target: Path) -> None:
    """Writes the GGUF file `model` as a Hugging Face directory in bf16: config.json and safetensors, no tokenizer.

    Raises ModelError for a model whose settings config.json can't say.
    """
    weights = GGUFWeights(model)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(_config(weights.config, model), indent=1) + "\n", encoding="utf-8")
    tensors: dict[str, Tensor] = {}
    for name, shape in _tensors(weights.config):
        tensors[name] = weights.tensor(name, shape).to(torch.bfloat16).contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _config(config: ModelConfig, model: Path) -> dict[str, object]:
    if config.rope.scaling == "factors":
        raise ModelError(f"{model}: a Hugging Face config can't carry rope factors: give vLLM's model as a directory")
    llama = config.architecture == "llama"
    if llama and config.qkv_bias != config.o_bias:
        raise ModelError(f"{model}: biases of q, k and v without one of o: a Hugging Face config can't say that")
    values: dict[str, object] = {
        "architectures": [_ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "bfloat16",
        "eos_token_id": list(config.eos_token_ids),
    }
    if llama:
        values |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if config.rope.scaling == "linear":
        values["rope_scaling"] = {"rope_type": "linear", "factor": config.rope.factor}
    return values


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of everything a checkpoint of `config` has."""
    hidden, queries, keys = config.hidden, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.o_bias),
        "mlp.gate_proj": (config.intermediate, hidden, config.mlp_bias),
        "mlp.up_proj": (config.intermediate, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, config.intermediate, config.mlp_bias),
    }
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tied:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for name, (rows, width, bias) in linears.items():
            yield f"{layer}.{name}.weight", (rows, width)
            if bias:
                yield f"{layer}.{name}.bias", (rows,)
