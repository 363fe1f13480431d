"""Peers get the same weights as Tandem, in their own formats, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from tandem.bench import peer_models
from tandem.bench.peer_models import llama_cpp_model, vllm_model, write_directory, write_gguf
from tandem.errors import ModelError
from tandem.models.gguf_weights import GGUFFile, GGUFWeights
from tandem.models.hf_weights import HFWeights
from tests.models import gguf_writer, tiny_models

WIDE = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}
"""Rows that divide into the quantised formats' blocks of 32."""
VARIANTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gqa": ("llama", "llama", {}, {}),
    "tied": ("llama", "llama", {"tie_word_embeddings": True}, {}),
    "bias": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "wide-heads": ("llama", "llama", {"head_dim": 20}, {"attention.key_length": 20, "attention.value_length": 20}),
    "linear-rope": (
        "llama",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}, {}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "peers"


def silent(_: str) -> None:
    pass


def written(variant: str, folder: Path) -> tuple[Path, Any]:
    family, arch, changes, keys = VARIANTS[variant]
    model = tiny_models.build(family, WIDE | changes)
    return gguf_writer.write(model, folder / "tiny.gguf", arch, keys), model


def tensors_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_directory_for_vllm_is_the_same_model_rounded_to_bf16(variant: str, tmp_path: Path) -> None:
    path, model = written(variant, tmp_path)
    write_directory(path, tmp_path / "hf")
    made = HFWeights(tmp_path / "hf")
    assert made.config == GGUFWeights(path).config
    for name, value in tensors_of(model).items():
        found = made.tensor(name, tuple(value.shape))
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, value.bfloat16()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bf16_file_for_llama_cpp_is_the_same_model_rounded_to_bf16(variant: str, tmp_path: Path) -> None:
    path, model = written(variant, tmp_path)
    write_gguf(path, "BF16", tmp_path / "bf16.gguf")
    made = GGUFWeights(tmp_path / "bf16.gguf")
    assert made.config == GGUFWeights(path).config
    for name, value in tensors_of(model).items():
        expected = value.bfloat16().float() if value.dim() > 1 else value
        assert torch.equal(made.tensor(name, tuple(value.shape)), expected), name


@pytest.mark.parametrize(("kind", "steps"), [("Q8_0", 127 * 2), ("Q4_1", 15)])
def test_a_quantised_file_is_within_half_a_step_of_every_weight(
    kind: peer_models.GGUFKind, steps: int, tmp_path: Path
) -> None:
    path, model = written("gqa", tmp_path)
    write_gguf(path, kind, tmp_path / "made.gguf")
    file = GGUFFile(tmp_path / "made.gguf")
    assert {entry.kind.name for entry in file.tensors.values() if len(entry.shape) == 2} == {kind}
    made = GGUFWeights(tmp_path / "made.gguf")
    for name, value in tensors_of(model).items():
        found = made.tensor(name, tuple(value.shape))
        if value.dim() == 1:
            assert torch.equal(found, value)
            continue
        blocks = value.view(-1, 32)
        widths = 2 * blocks.abs().amax(1) if kind == "Q8_0" else blocks.amax(1) - blocks.amin(1)
        # Scales are fp16: their own rounding comes on top.
        allowed = widths / steps * 0.5 + 2e-3 * blocks.abs().amax(1)
        assert ((found.view(-1, 32) - blocks).abs().amax(1) <= allowed).all(), name


def test_rows_that_do_not_divide_into_blocks_stay_bf16(tmp_path: Path) -> None:
    path = gguf_writer.write(
        tiny_models.build("llama", {"hidden_size": 48, "head_dim": 8}), tmp_path / "tiny.gguf", "llama"
    )
    write_gguf(path, "Q8_0", tmp_path / "made.gguf")
    kinds = {entry.kind.name for entry in GGUFFile(tmp_path / "made.gguf").tensors.values() if len(entry.shape) == 2}
    assert kinds == {"BF16"}


def test_metadata_stays_but_for_the_type_of_file(tmp_path: Path) -> None:
    path, _ = written("gqa", tmp_path)
    write_gguf(path, "Q8_0", tmp_path / "made.gguf")
    before, after = GGUFFile(path).metadata, GGUFFile(tmp_path / "made.gguf").metadata
    assert after.pop("general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0
    assert after.pop("general.quantization_version") == gguf.GGML_QUANT_VERSION
    assert after == before


def test_metadata_keeps_its_types(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    kinds = gguf.GGUFValueType
    values: list[tuple[str, Any, Any, Any]] = [
        ("a.u8", 200, kinds.UINT8, None),
        ("a.i64", -5, kinds.INT64, None),
        ("a.f32", 0.25, kinds.FLOAT32, None),
        ("a.flag", True, kinds.BOOL, None),
        ("a.words", ["x", "", "é"], kinds.ARRAY, kinds.STRING),
        ("a.numbers", [1, -2, 3], kinds.ARRAY, kinds.INT32),
        ("a.scores", [0.5, -1.5], kinds.ARRAY, kinds.FLOAT32),
    ]
    for name, value, kind, item_kind in values:
        writer.add_key_value(name, value, kind, sub_type=item_kind)
    writer.add_tensor("token_embd.weight", torch.ones(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_gguf(tmp_path / "model.gguf", "Q8_0", tmp_path / "made.gguf")
    fields = gguf.GGUFReader(tmp_path / "made.gguf").fields
    for name, value, kind, item_kind in values:
        assert fields[name].types == ([kind] if item_kind is None else [kind, item_kind]), name
        assert fields[name].contents() == value


def test_a_file_is_made_once_and_a_changed_model_anew(tmp_path: Path, own_cache: Path) -> None:
    path, _ = written("gqa", tmp_path)
    said: list[str] = []
    first = [llama_cpp_model(path, "BF16", said.append), vllm_model(path, said.append)]
    assert [llama_cpp_model(path, "BF16", said.append), vllm_model(path, said.append)] == first
    assert len(said) == 2
    gguf_writer.write(tiny_models.build("llama", WIDE, seed=1), path, "llama")
    assert llama_cpp_model(path, "BF16", said.append) not in first
    assert len(list(own_cache.iterdir())) == 3


def test_a_file_that_is_what_a_peer_wants_is_used_as_it_is(tmp_path: Path) -> None:
    path, _ = written("gqa", tmp_path)
    made = llama_cpp_model(path, "Q4_1", silent)
    assert made != path
    assert llama_cpp_model(made, "Q4_1", silent) == made


def test_nothing_half_made_is_ever_visible(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = written("gqa", tmp_path)
    monkeypatch.setattr(GGUFWeights, "tensor", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        vllm_model(path, silent)
    assert list(own_cache.iterdir()) == []


def test_a_directory_is_vllms_model_and_not_llama_cpps(tiny_checkpoint_copy: Path) -> None:
    assert vllm_model(tiny_checkpoint_copy, silent) == tiny_checkpoint_copy
    with pytest.raises(ModelError, match="is a Hugging Face directory and llama.cpp reads GGUF files"):
        llama_cpp_model(tiny_checkpoint_copy, "BF16", silent)


@pytest.fixture
def tiny_checkpoint_copy(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.build("llama", {}), tmp_path / "checkpoint")


def test_rope_factors_are_refused_for_vllm(tmp_path: Path) -> None:
    model = tiny_models.build("llama", {})
    path = gguf_writer.write(model, tmp_path / "tiny.gguf", "llama", factors=torch.full((16,), 2.0).numpy())
    with pytest.raises(ModelError, match="rope factors"):
        vllm_model(path, silent)
