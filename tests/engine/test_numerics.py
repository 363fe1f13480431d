from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import paged_attention, torch_linear
from kernels.cpu import SWITCH
from kernels.linear import WeightFormat
from kernels.torch_linear import bf16_form
from tandem.engine.numerics import numerics_class
from tandem.models.loader import Dtype, load_model
from tests import backends
from tests.models import tiny_models
from tests.reference import smollm2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama", {}), tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_every_tiny_model_is_deterministic_here(variant: str, form: WeightFormat, tmp_path: Path) -> None:
    path = tiny_models.save(tiny_models.build(*tiny_models.VARIANTS[variant]), tmp_path)
    report = numerics_class(load_model(path, "fp32" if form == "fp32" else "bf16", form), backends.best())
    assert report.deterministic, report.evidence
    assert len(report.digest) == 32


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", backends.ALL)
def test_every_backend_is_deterministic_here(checkpoint: Path, backend: str, dtype: Dtype) -> None:
    report = numerics_class(load_model(checkpoint, dtype), backends.backend(backend))
    assert report.deterministic, report.evidence
    assert f"({backend}, {dtype})" in report.evidence


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_smollm2_is_deterministic_here(form: WeightFormat) -> None:
    report = numerics_class(smollm2("bf16", form), backends.best(), threads=2)
    assert report.deterministic, report.evidence


def test_a_short_context_is_probed_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tiny_models.save(tiny_models.build("llama", {"max_position_embeddings": 70}), tmp_path)
    report = numerics_class(load_model(path, "bf16"), backends.best())
    assert report.deterministic
    assert report.evidence.startswith("70 tokens")


def test_the_digest_is_a_function_of_weights_dtype_and_form(checkpoint: Path, tmp_path: Path) -> None:
    other = tiny_models.save(tiny_models.build("llama", {}, seed=1), tmp_path)
    forms: list[tuple[Path, Dtype, WeightFormat]] = [
        (checkpoint, "fp32", "fp32"),
        (checkpoint, "bf16", "bf16"),
        (checkpoint, "fp32", "bf16"),
        (checkpoint, "bf16", "int8"),
        (checkpoint, "bf16", "int4"),
        (other, "fp32", "fp32"),
    ]
    digests = [numerics_class(load_model(*form), backends.best()).digest for form in forms]
    assert [numerics_class(load_model(*form), backends.best()).digest for form in forms] == digests
    assert len(set(digests)) == len(forms)


def test_every_backend_is_a_class_of_its_own(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(checkpoint, "bf16")
    here = [variant for variant in backends.NATIVE if backends.runs(variant)]
    classes = [numerics_class(model, backends.native(variant)).digest for variant in here]
    classes.append(numerics_class(model, None).digest)
    if bf16_form() != "bf16-rounded":
        monkeypatch.setattr(torch_linear, "bf16_form", lambda: "bf16-rounded")
        classes.append(numerics_class(model, None).digest)
    assert len(set(classes)) == len(classes)


def test_threads_make_another_class_with_torch_and_the_same_one_natively(checkpoint: Path) -> None:
    model = load_model(checkpoint, "bf16")
    for variant in backends.NATIVE:
        if backends.runs(variant):
            kernels = backends.native(variant)
            assert len({numerics_class(model, kernels, threads).digest for threads in (1, 2, 3)}) == 1
    one = numerics_class(model, None).digest
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert numerics_class(model, None).digest != one
    finally:
        torch.set_num_threads(threads)


def test_a_linear_whose_bits_depend_on_the_number_of_rows_is_found(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(torch_linear.Fp32Linear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            out = super().__call__(x)
            return torch.nextafter(out, torch.tensor(torch.inf)) if x.shape[0] == 63 else out

    monkeypatch.setattr(torch_linear, "Fp32Linear", Careless)
    report = numerics_class(load_model(checkpoint, "fp32"), None)
    assert not report.deterministic
    assert "KV in large chunks and in pieces" in report.evidence


def test_attention_without_padded_rows_is_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real hazard: BLAS reduces few rows in another order."""
    rows, tile = torch.randn(512, 64), torch.randn(64, 256)
    if torch.equal(F.linear(rows, tile.T)[:3], F.linear(rows[:3], tile.T)):
        pytest.skip("this BLAS computes three rows as it computes 512: there is no hazard to find")
    monkeypatch.setattr(paged_attention, "MIN_ROWS", 1)
    assert not numerics_class(load_model(checkpoint, "fp32"), None).deterministic


_CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kernels.cpu import native
from kernels.torch_linear import bf16_form
from tandem.engine.numerics import numerics_class
from tandem.models.loader import load_model
report = numerics_class(load_model(Path(sys.argv[1]), "bf16"), native())
print(bf16_form(), report.deterministic, report.digest.hex())
"""


def _in_a_process(checkpoint: Path, **environment: str) -> list[str]:
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(checkpoint)],
        env=os.environ | {"PYTHONPATH": root} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_processes_of_the_native_kernels_agree(checkpoint: Path) -> None:
    assert _in_a_process(checkpoint) == _in_a_process(checkpoint)


def test_processes_of_torch_agree_and_a_lower_instruction_set_falls_back_to_another_class(checkpoint: Path) -> None:
    torch_only = {SWITCH: "torch"}
    one, two = _in_a_process(checkpoint, **torch_only), _in_a_process(checkpoint, **torch_only)
    assert one == two
    lower = _in_a_process(checkpoint, ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2", **torch_only)
    assert lower[:2] == ["bf16-rounded", "True"]
    assert lower[2] != one[2]
