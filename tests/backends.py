"""The backends that the promises of `kernels` are tested on: every variant of the native kernels, and torch."""

from __future__ import annotations

import shutil

import pytest

from kernels import cpu
from kernels.cpu import Native, Variant

NATIVE: tuple[Variant, ...] = cpu.VARIANTS
ALL: tuple[str, ...] = (*NATIVE, "torch")


def native(variant: Variant) -> Native:
    """That variant; skips the test, saying why, where this processor can't run it or no compiler could build it."""
    missing = cpu.NEEDS[variant] - cpu._flags()
    if missing:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}: no {variant} kernels")
    found = cpu.load(variant)
    if found is None and shutil.which("c++") is None:
        pytest.skip(f"no C++ compiler: no {variant} kernels")
    assert found is not None, f"there is a C++ compiler, but the {variant} kernels were not built"
    return found


def runs(variant: Variant) -> bool:
    """Whether that variant was built and this processor can run it."""
    return cpu.load(variant) is not None


def backend(name: str) -> Native | None:
    """What a `Runner` takes for one of `ALL`."""
    return None if name == "torch" else native(next(variant for variant in NATIVE if variant == name))


def best() -> Native | None:
    """What the product chooses here."""
    return cpu.native()
