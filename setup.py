"""The native parts; everything else about the package is in pyproject.toml.

They need a C++ compiler. Without one the installation goes on with a warning: torch computes instead of the kernels, and Python
does what the others do. The kernels' sources are compiled once for each instruction set; the best that the processor has is
chosen at run time.
"""

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("kernels/cpu")
SOURCES = sorted(FOLDER.glob("*.cpp"))
HEADERS = sorted(FOLDER.glob("*.h"))
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx512vnni"]
# No contraction: a product and a sum must not become one rounding here and two there.
FLAGS = ["-O3", "-std=c++17", "-pthread", "-fwrapv", "-fno-fast-math", "-fno-math-errno", "-ffp-contract=off"]
SILENT = ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
CODE = [path.read_bytes() for path in [*SOURCES, *HEADERS]]
DIGEST = hashlib.sha256(b"".join([*CODE, " ".join(FLAGS).encode()])).hexdigest()
EXTENSIONS = {
    "kvpool._chain_keys": "kvpool/native/chain_keys.cpp",
    "router._block_map": "router/native/block_map.cpp",
    "router._weigh": "router/native/weigh.cpp",
    "tandem.sim._chain_cache": "tandem/sim/native/chain_cache.cpp",
}
VARIANTS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS |= {"avx2": AVX2, "avx512": AVX512}

setup(
    ext_modules=[
        Extension(
            f"kernels.cpu._native_{variant}",
            sources=[str(path) for path in SOURCES],
            depends=[str(path) for path in HEADERS],
            language="c++",
            extra_compile_args=[*FLAGS, "-fvisibility=hidden", *SILENT, *flags],
            extra_link_args=["-pthread"],
            define_macros=[("TANDEM_SOURCES", f'"{DIGEST}"')],
            optional=True,
        )
        for variant, flags in VARIANTS.items()
    ]
    + [
        Extension(
            name,
            sources=[source],
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden"],
            optional=True,
        )
        for name, source in EXTENSIONS.items()
    ]
)
