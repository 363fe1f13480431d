"""GGUF and Hugging Face files of one model are one model; damaged or unsupported files are one clear sentence."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tandem.errors import ModelError
from tandem.models.gguf_weights import GGUFFile
from tandem.models.loader import load_model
from tests.models import gguf_writer, tiny_models


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_writer.write(tiny_models.build("llama", {}), tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny Hugging Face directory."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path, "fp32")
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("variant", "arch", "keys"),
    [
        ("gqa", "llama", {}),
        ("tied", "llama", {}),
        ("bias", "llama", {}),
        ("mistral", "llama", {}),
        ("odd-heads", "llama", {"attention.key_length": 20, "attention.value_length": 20}),
        ("linear-rope", "llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ("qwen2", "qwen2", {}),
    ],
)
def test_a_gguf_file_is_the_same_model_as_its_directory(
    variant: str, arch: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    reference = tiny_models.build(*tiny_models.VARIANTS[variant])
    directory = load_model(tiny_models.save(reference, tmp_path / "hf"), "fp32")
    # The file keeps the epsilon as fp32, the JSON as fp64: write the fp32 value there.
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rms_norm_eps"] = struct.unpack("<f", struct.pack("<f", config["rms_norm_eps"]))[0]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    directory = load_model(tmp_path / "hf", "fp32")
    file = load_model(gguf_writer.write(reference, tmp_path / "model.gguf", arch, keys), "fp32")
    assert file.fingerprint == directory.fingerprint
    assert file.config.eos_token_ids == directory.config.eos_token_ids == (2,)
    assert file.config.tied == directory.config.tied


def test_rope_factors_of_a_gguf_file_are_llama3_scaling(tmp_path: Path) -> None:
    reference = tiny_models.build(*tiny_models.VARIANTS["llama3-rope"])
    directory = load_model(tiny_models.save(reference, tmp_path / "hf"), "fp32")
    plain = 10_000.0 ** (-torch.arange(0, 32, 2) / 32)
    scaled = directory.config.rope.inverse_frequencies(32)
    file = load_model(gguf_writer.write(reference, tmp_path / "m.gguf", "llama", factors=plain / scaled), "fp32")
    torch.testing.assert_close(file.config.rope.inverse_frequencies(32), scaled)
    assert (plain / scaled).max() > 7


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": None}, "key 'llama.block_count' is missing"),
        ({"block_count": "two"}, "must be a int"),
        ({"block_count": 3}, "tensor 'blk.2.attn_norm.weight' is missing"),
        ({"block_count": 0}, "num_layers is 0"),
        ({"attention.head_count": 0}, "head_count is 0"),
        ({"attention.head_count_kv": 4}, "6 heads don't divide into 4"),
        ({"attention.head_count_kv": 3}, "tensor 'blk.0.attn_k.weight' has shape"),
        ({"rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"rope.dimension_count": 4}, "4 of 32 dimensions"),
        ({"attention.sliding_window": 16}, "sliding window of 16 tokens, less than the context of 1024"),
        ({"expert_count": 8}, "mixtures of experts"),
        ({"rope.freq_base": -1.0}, "theta is -1.0"),
    ],
)
def test_a_gguf_file_that_does_not_fit_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refused(gguf_writer.write(tiny_models.build("llama", {}), tmp_path / "m.gguf", "llama", keys))


def test_an_unknown_gguf_architecture_is_refused(tmp_path: Path) -> None:
    path = gguf_writer.write(tiny_models.build("llama", {}), tmp_path / "m.gguf", "gemma3")
    assert "architecture 'gemma3' is not supported" in refused(path)


def header_bytes(path: Path) -> int:
    """Where the tensors' data begins, give or take the alignment."""
    return min(tensor.offset for tensor in GGUFFile(path).tensors.values())


@settings(max_examples=60)
@given(share=st.floats(0, 0.999999))
def test_a_truncated_gguf_file_is_refused(
    tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    refused(path)


@settings(max_examples=250)
@given(data=st.data())
def test_a_damaged_gguf_header_is_refused_or_read_in_bounds(
    tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_bytes(tiny_gguf) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "flip.gguf"
    path.write_bytes(content)
    said = str(path)
    tracemalloc.start()
    try:
        load_model(path, "fp32")
    except ModelError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert str(path) in said
    assert peak < 32 * 2**20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the magic needs 4 bytes, the file has 0 left"),
        (b"PK\x03\x04" + bytes(60), "doesn't begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1), "1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**63), "9223372036854775808 keys, the limit is"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "a string of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**60), "an array of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 10**6), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1), "not supported"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 77), "type 77 is unknown"),
    ],
)
def test_a_hostile_gguf_header_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    assert message in refused(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture 'GemmaForCausalLM' is not supported"),
        ({"architectures": None}, "not supported"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, "sliding window of 64 tokens"),
        ({"hidden_size": "192"}, "key 'hidden_size'"),
        ({"hidden_size": 64}, "tensor 'model.embed_tokens.weight' has shape (101, 192), must be (101, 64)"),
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "key 'factor'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "llama3",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"eos_token_id": [2, 101]}, "token 101 is outside"),
        ({"eos_token_id": "two"}, "eos_token_id"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    (checkpoint / "generation_config.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert message in refused(checkpoint)


def test_generation_config_extends_the_end_tokens(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_model(checkpoint, "fp32").config.eos_token_ids == (2, 7)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_object_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    assert "config.json" in refused(checkpoint)


def test_missing_files_are_named(checkpoint: Path, tmp_path: Path) -> None:
    assert "no such model" in refused(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").unlink()
    assert "neither model.safetensors nor its index" in refused(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert "safetensors only" in refused(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "config.json: can't be read" in refused(checkpoint)


def test_a_tensor_of_another_dtype_is_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, checkpoint / "model.safetensors")
    assert "tensor 'model.norm.weight' is torch.int32" in refused(checkpoint)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "model.bin", 7])
def test_an_index_that_leaves_its_directory_is_refused(checkpoint: Path, file: Any) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "model.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    assert "not the name of a safetensors file" in refused(checkpoint)


@settings(max_examples=100)
@given(data=st.data())
def test_a_damaged_safetensors_file_is_refused_or_read_in_bounds(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((tiny_checkpoint / "model.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    path = tmp_path_factory.mktemp("flip")
    shutil.copy(tiny_checkpoint / "config.json", path)
    cut = data.draw(st.booleans())
    if cut:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (path / "model.safetensors").write_bytes(content)
    said = "" if cut else str(path)
    try:
        load_model(path, "fp32")
    except ModelError as error:
        said = str(error)
    assert str(path) in said
