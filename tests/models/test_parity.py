"""Tandem's models compute what `transformers` computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import torch_linear
from kernels.cpu import Native
from tandem.engine.runner import Chunk, Runner, layout_for
from tandem.model_files import resolve_model
from tandem.models.loader import TORCH_DTYPES, LoadedModel, load_model
from tests import backends
from tests.models import tiny_models
from tests.reference import hf_reference, smollm2


def logits_at(model: LoadedModel, native: Native | None, tokens: list[int], positions: list[int]) -> Tensor:
    """Logits after the tokens at `positions` (rising), each computed at the end of a chunk, over an arena of NaN."""
    layout = layout_for(model.config, model.dtype, 16)
    table = list(range(layout.num_blocks_for(len(tokens))))
    arena = torch.full((len(table), *layout.slab_shape), torch.nan, dtype=TORCH_DTYPES[model.dtype])
    runner = Runner(model, arena, layout, native=native)
    found, start = [], 0
    for position in positions:
        found.append(runner.run([Chunk(tokens[start : position + 1], start, table, True)]))
        start = position + 1
    return torch.cat(found)


def greedy(model: LoadedModel, native: Native | None, prompt: list[int], num_tokens: int) -> list[int]:
    layout = layout_for(model.config, model.dtype, 16)
    table = list(range(layout.num_blocks_for(len(prompt) + num_tokens)))
    arena = torch.zeros((len(table), *layout.slab_shape), dtype=TORCH_DTYPES[model.dtype])
    runner = Runner(model, arena, layout, native=native)
    logits, tokens, start = runner.run([Chunk(prompt, 0, table, True)]), list(prompt), len(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits.argmax()))
        logits = runner.run([Chunk(tokens[start:], start, table, True)])
        start += 1
    return tokens[len(prompt) :]


def some_tokens(count: int, vocab: int) -> list[int]:
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(1)).tolist()


POSITIONS = [0, 1, 40, 200, 255, 256, 330]


@pytest.fixture(scope="module", params=tiny_models.VARIANTS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoadedModel]:
    """The `transformers` model and Tandem's of one variant."""
    reference = tiny_models.build(*tiny_models.VARIANTS[request.param])
    return reference, load_model(tiny_models.save(reference, tmp_path_factory.mktemp("tiny")), "fp32")


@pytest.mark.parametrize("backend", backends.ALL)
def test_a_tiny_model_agrees_with_transformers_in_fp32(tiny: tuple[Any, LoadedModel], backend: str) -> None:
    native = backends.backend(backend)
    reference, model = tiny
    tokens = some_tokens(331, tiny_models.VOCAB)
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0, POSITIONS]
        generated = reference.generate(
            torch.tensor([tokens[:90]]), do_sample=False, max_new_tokens=12, min_new_tokens=12, eos_token_id=None
        )
    assert (logits_at(model, native, tokens, POSITIONS) - expected).abs().max() < 5e-6 * expected.abs().max()
    assert greedy(model, native, tokens[:90], 12) == generated[0, 90:].tolist()


def _regrouped(model: Any) -> None:
    """Pairs each query head with another KV head."""
    for layer in model.model.layers:
        heads = layer.self_attn.q_proj.weight
        heads.data = heads.data.view(2, 3, 32, -1).transpose(0, 1).reshape(heads.shape)


def _without_biases(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()


def _without_mlp_and_o_biases(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and ("mlp" in name or "o_proj" in name):
            parameter.data.zero_()


def _other_head(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))


NO_SCALING = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
OTHER_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


@pytest.mark.parametrize(
    ("variant", "changes", "damage"),
    [
        ("gqa", {}, _regrouped),
        ("gqa", OTHER_THETA, None),
        ("gqa", {"rms_norm_eps": 1e-1}, None),
        ("tied", {}, _other_head),
        ("bias", {}, _without_biases),
        ("bias", {}, _without_mlp_and_o_biases),
        ("qwen2", {}, _without_biases),
        ("linear-rope", NO_SCALING, None),
        ("llama3-rope", NO_SCALING, None),
        ("mistral", {"sliding_window": 16}, None),
    ],
)
def test_each_feature_moves_the_logits_so_that_parity_would_notice(
    variant: str, changes: dict[str, Any], damage: Any
) -> None:
    family, settings = tiny_models.VARIANTS[variant]
    tokens = torch.tensor([some_tokens(120, tiny_models.VOCAB)])
    right, wrong = tiny_models.build(family, settings), tiny_models.build(family, settings | changes)
    if damage is not None:
        damage(wrong)
    with torch.inference_mode():
        assert (right(tokens).logits[0, -1] - wrong(tokens).logits[0, -1]).abs().max() > 1e-2


def test_shards_and_one_file_are_the_same_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sharded = tiny_models.save(tiny_models.build("llama", {}), tmp_path, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert load_model(sharded, "fp32").fingerprint == load_model(tiny_checkpoint, "fp32").fingerprint


def test_the_fingerprint_names_weights_dtype_and_rope(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen = {load_model(tiny_checkpoint, "fp32").fingerprint, load_model(tiny_checkpoint, "bf16").fingerprint}
    seen |= {load_model(tiny_checkpoint, "bf16", form).fingerprint for form in ("int8", "int4")}
    assert load_model(tiny_checkpoint, "bf16", "bf16").fingerprint in seen
    for index, changes in enumerate(({"rms_norm_eps": 2e-5}, NO_SCALING, OTHER_THETA)):
        path = tiny_models.save(tiny_models.build("llama", changes), tmp_path / str(index))
        seen.add(load_model(path, "fp32").fingerprint)
    other = tiny_models.build("llama", {})
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3
    seen.add(load_model(tiny_models.save(other, tmp_path / "weights"), "fp32").fingerprint)
    assert (
        len(seen) == 7
    )  # fp32 and bf16, int8 and int4, epsilon, theta, weights; the plain rope is the checkpoint's own


def test_old_rope_settings_mean_the_same_as_new_ones(tmp_path: Path) -> None:
    path = tiny_models.save(tiny_models.build("llama", tiny_models.VARIANTS["llama3-rope"][1]), tmp_path)
    new = load_model(path, "fp32")
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (path / "config.json").write_text(json.dumps(config))
    assert load_model(path, "fp32").config == new.config


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def smollm2_truth(smollm2_path: Path) -> tuple[list[int], Tensor, float]:
    """Tokens, the fp32 reference's logits at POSITIONS, and the relative error of transformers in bf16."""
    tokens = some_tokens(331, 49_152)
    with torch.inference_mode():
        truth = hf_reference(smollm2_path, "fp32")(torch.tensor([tokens])).logits[0, POSITIONS]
        rounded = hf_reference(smollm2_path, "bf16")(torch.tensor([tokens])).logits[0, POSITIONS].float()
    return tokens, truth, float((rounded - truth).norm() / truth.norm())


@pytest.mark.parametrize("backend", backends.ALL)
def test_smollm2_agrees_with_transformers_in_fp32(smollm2_truth: tuple[list[int], Tensor, float], backend: str) -> None:
    tokens, truth, _ = smollm2_truth
    found = logits_at(smollm2("fp32"), backends.backend(backend), tokens, POSITIONS)
    assert (found - truth).norm() / truth.norm() < 1e-5
    assert (found - truth).abs().max() < 1e-3
    assert found.argmax(-1).tolist() == truth.argmax(-1).tolist()


@pytest.mark.parametrize("backend", [*backends.ALL, "torch-rounded"])
def test_smollm2_in_bf16_is_as_near_to_fp32_as_transformers(
    smollm2_truth: tuple[list[int], Tensor, float], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, truth, reference_error = smollm2_truth
    if backend == "torch-rounded":
        monkeypatch.setattr(torch_linear, "bf16_form", lambda: "bf16-rounded")
    native = None if backend == "torch-rounded" else backends.backend(backend)
    found = logits_at(smollm2("bf16"), native, tokens, POSITIONS)
    assert (found - truth).norm() / truth.norm() <= 1.25 * reference_error
