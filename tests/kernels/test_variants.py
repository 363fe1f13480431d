"""Which native library a machine loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kernels import cpu
from tandem.errors import ConfigError
from tests import backends

fresh: Callable[[cpu.Variant], cpu.Native | None] = cpu.load.__wrapped__
"""`load` without its memory."""


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", fresh)


def test_the_best_variant_that_runs_here_is_chosen() -> None:
    running = [variant for variant in cpu.VARIANTS if cpu.NEEDS[variant] <= cpu._flags()]
    chosen = backends.native(running[0])
    assert cpu.native() == chosen
    assert chosen.variant == running[0]
    # One set of sources and one compiler for all of them.
    assert len({backends.native(variant).build for variant in running}) == 1


@pytest.mark.parametrize("variant", backends.NATIVE)
def test_a_variant_can_be_asked_for(variant: cpu.Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = backends.native(variant)
    monkeypatch.setenv(cpu.SWITCH, variant)
    assert cpu.native() == expected


def test_torch_can_be_asked_for_and_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.SWITCH, "torch")
    assert cpu.native() is None
    monkeypatch.setenv(cpu.SWITCH, "sse9")
    with pytest.raises(ConfigError, match="'sse9', must be one of avx512, avx2, portable, torch"):
        cpu.native()


@pytest.mark.usefixtures("no_memory")
def test_a_processor_that_lacks_a_flag_gets_the_next_best(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.native("avx2")
    monkeypatch.setattr(cpu, "_flags", lambda: cpu.NEEDS["avx2"] | (cpu.NEEDS["avx512"] - {"avx512_bf16"}))
    assert fresh("avx512") is None
    found = cpu.native()
    assert found is not None
    assert found.variant == "avx2"
    monkeypatch.setenv(cpu.SWITCH, "avx512")
    with pytest.raises(ConfigError, match="lacks .*avx512_bf16"):
        cpu.native()
    monkeypatch.delenv(cpu.SWITCH)
    monkeypatch.setattr(cpu, "_flags", frozenset)
    found = cpu.native()
    assert found is not None
    assert found.variant == "portable"


@pytest.mark.usefixtures("no_memory")
def test_where_nothing_was_built_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "__init__.py"))
    assert cpu.native() is None
    monkeypatch.setenv(cpu.SWITCH, "portable")
    with pytest.raises(ConfigError, match="was not built"):
        cpu.native()


def test_a_library_compiled_for_another_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.native("portable")
    monkeypatch.setitem(cpu.LEVELS, "portable", 2)
    with pytest.raises(ConfigError, match="compiled for another instruction set"):
        fresh("portable")
