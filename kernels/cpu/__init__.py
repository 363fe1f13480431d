"""The native CPU kernels: one shared library for each instruction set, behind a plain C ABI, loaded with ctypes.

Owns which of them this processor runs, and their prototypes. Calls release the GIL.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tandem.errors import ConfigError

Variant = Literal["avx512", "avx2", "portable"]
VARIANTS: tuple[Variant, ...] = ("avx512", "avx2", "portable")
"""Best first."""
NEEDS: dict[Variant, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "portable": frozenset(),
}
"""Processor flags as /proc/cpuinfo spells them."""
LEVELS: dict[Variant, int] = {"avx512": 2, "avx2": 1, "portable": 0}
"""What a library says that it was compiled for."""
SWITCH = "TANDEM_KERNELS"
"""The environment variable that asks for one variant, or for torch."""
HEAD_DIMS = frozenset({32, 64, 96, 128, 256})
"""Head dimensions that the attention kernel is compiled for."""


@dataclass(frozen=True, slots=True)
class Native:
    """One variant's library. `build` names its sources and compiler."""

    variant: Variant
    build: str
    library: Any


def _flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


@cache
def load(variant: Variant) -> Native | None:
    """That variant, or None: it was not built, or this processor can't run it."""
    path = Path(__file__).with_name(f"_native_{variant}{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not path.exists() or not NEEDS[variant] <= _flags():
        return None
    library = ctypes.CDLL(str(path))
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.tandem_build.restype = ctypes.c_char_p
    library.tandem_team_new.restype = pointer
    library.tandem_team_new.argtypes = [int32]
    library.tandem_team_free.restype = None
    library.tandem_team_free.argtypes = [pointer]
    library.tandem_team_pin.restype = int32
    library.tandem_team_pin.argtypes = [pointer, pointer]
    library.tandem_run.restype = None
    library.tandem_run.argtypes = [pointer, pointer, int64, pointer, pointer]
    library.tandem_sample.restype = int32
    library.tandem_sample.argtypes = [pointer, int64, int64, pointer, pointer, pointer, pointer, int64]
    library.tandem_copy_blocks.restype = int32
    library.tandem_copy_blocks.argtypes = [
        pointer, int64, int64, pointer, pointer, int64, int64, pointer, int64, int64, pointer
    ]  # fmt: skip
    library.tandem_checksum_blocks.restype = None
    library.tandem_checksum_blocks.argtypes = [pointer, int64, pointer, int64, int64, pointer]
    library.tandem_send_blocks.restype = int64
    library.tandem_send_blocks.argtypes = [
        int32, ctypes.c_char_p, int64, pointer, int64, pointer, int64, int64, int64, int64
    ]  # fmt: skip
    library.tandem_receive_blocks.restype = int64
    library.tandem_receive_blocks.argtypes = [int32, pointer, int64, pointer, int64, int64, int64, int64, pointer]
    if library.tandem_level() != LEVELS[variant]:
        raise ConfigError(
            f"{path} was compiled for another instruction set, by CFLAGS of the environment: install Tandem again"
        )
    return Native(variant, library.tandem_build().decode(), library)


def native() -> Native | None:
    """The best variant that was built and that this processor runs; what `TANDEM_KERNELS` names, if it is set ("torch": None).

    Raises ConfigError if that can't be had.
    """
    asked = os.environ.get(SWITCH, "")
    if not asked:
        return next((found for variant in VARIANTS if (found := load(variant)) is not None), None)
    if asked == "torch":
        return None
    if asked not in VARIANTS:
        raise ConfigError(f"{SWITCH} is {asked!r}, must be one of {', '.join((*VARIANTS, 'torch'))}")
    found = load(asked)
    if found is None:
        raise ConfigError(f"{SWITCH} is {asked!r}: it was not built, or this processor lacks {', '.join(NEEDS[asked])}")
    return found
