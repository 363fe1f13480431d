from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import linear, paged_attention
from kernels.linear import WeightFormat, weight_format
from tandem.engine.numerics import numerics_class
from tandem.models.loader import Dtype, load_model
from tests.models import tiny_models
from tests.reference import smollm2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama", {}), tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_every_tiny_model_is_deterministic_here(variant: str, dtype: Dtype, tmp_path: Path) -> None:
    path = tiny_models.save(tiny_models.build(*tiny_models.VARIANTS[variant]), tmp_path)
    report = numerics_class(load_model(path, dtype))
    assert report.deterministic, report.evidence
    assert len(report.digest) == 32


def test_smollm2_is_deterministic_here() -> None:
    report = numerics_class(smollm2("bf16"))
    assert report.deterministic, report.evidence


def test_a_short_context_is_probed_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tiny_models.save(tiny_models.build("llama", {"max_position_embeddings": 70}), tmp_path)
    report = numerics_class(load_model(path, "bf16"))
    assert report.deterministic
    assert report.evidence.startswith("70 tokens")


def test_the_digest_is_a_function_of_weights_dtype_form_and_threads(checkpoint: Path, tmp_path: Path) -> None:
    other = tiny_models.save(tiny_models.build("llama", {}, seed=1), tmp_path)
    forms: list[tuple[Path, Dtype, WeightFormat | None]] = [
        (checkpoint, "fp32", None),
        (checkpoint, "bf16", None),
        (checkpoint, "bf16", "bf16-rounded"),
        (other, "fp32", None),
    ]
    digests = [numerics_class(load_model(*form)).digest for form in forms]
    assert [numerics_class(load_model(*form)).digest for form in forms] == digests
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        digests.append(numerics_class(load_model(checkpoint, "fp32")).digest)
    finally:
        torch.set_num_threads(threads)
    expected = 5 if weight_format(torch.bfloat16) == "bf16-packed" else 4
    assert len(set(digests)) == expected


def test_a_linear_whose_bits_depend_on_the_number_of_rows_is_found(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(linear.Fp32Linear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            out = super().__call__(x)
            return torch.nextafter(out, torch.tensor(torch.inf)) if x.shape[0] == 63 else out

    monkeypatch.setattr(linear, "Fp32Linear", Careless)
    report = numerics_class(load_model(checkpoint, "fp32"))
    assert not report.deterministic
    assert "KV in one chunk and in pieces" in report.evidence


def test_attention_without_padded_rows_is_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real hazard: BLAS reduces few rows in another order."""
    rows, tile = torch.randn(512, 64), torch.randn(64, 256)
    if torch.equal(F.linear(rows, tile.T)[:3], F.linear(rows[:3], tile.T)):
        pytest.skip("this BLAS computes three rows as it computes 512: there is no hazard to find")
    monkeypatch.setattr(paged_attention, "MIN_ROWS", 1)
    assert not numerics_class(load_model(checkpoint, "fp32")).deterministic


_CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kernels.linear import weight_format
from tandem.engine.numerics import numerics_class
from tandem.models.loader import load_model
report = numerics_class(load_model(Path(sys.argv[1]), "bf16"))
print(weight_format(torch.bfloat16), report.deterministic, report.digest.hex())
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


def test_processes_agree_and_a_lower_instruction_set_falls_back_to_another_class(checkpoint: Path) -> None:
    one, two = _in_a_process(checkpoint), _in_a_process(checkpoint)
    assert one == two
    lower = _in_a_process(checkpoint, ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    assert lower[:2] == ["bf16-rounded", "True"]
    assert lower[2] != one[2]
