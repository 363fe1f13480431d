"""The native CPU kernels; everything else about the package is in pyproject.toml.

They need a C++ compiler. Without one the installation goes on with a warning, and the kernels' torch references run instead.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("kernels/cpu")
SOURCES = sorted(FOLDER.glob("*.cpp"))
HEADERS = sorted(FOLDER.glob("*.h"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in [*SOURCES, *HEADERS])).hexdigest()

setup(
    ext_modules=[
        Extension(
            "kernels.cpu._native",
            sources=[str(path) for path in SOURCES],
            depends=[str(path) for path in HEADERS],
            language="c++",
            # No contraction: a product and a sum must not become one rounding here and two there.
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-fno-math-errno",
                "-ffp-contract=off",
                "-Wno-maybe-uninitialized",
            ],
            define_macros=[("TANDEM_SOURCES", f'"{DIGEST}"')],
            optional=True,
        )
    ]
)
