"""How every benchmark says what it found: a header, then one metric a line, each with a reference measured in the same run.

Owns the shape of the lines and what `spread` and `ratio` mean; measures nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

Say = Callable[[str], None]
"""Hears of the progress."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number. `spread` is (largest - smallest) / median of the repetitions, None for one; `ratio` is value / reference_value;
    `goal` is what the value must reach, None if there is none; `ok` says whether it does and nothing failed."""

    metric: str
    value: float
    unit: str
    spread: float | None
    reference: str
    reference_value: float | None
    ratio: float | None
    goal: str | None
    ok: bool


def metric(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    reference: str = "",
    reference_values: Sequence[float] = (),
    goal: str | None = None,
    ok: bool = True,
) -> Metric:
    """A metric from its repetitions: the medians and their ratio. `values` must not be empty."""
    value = median(values)
    against = median(reference_values) if reference_values else None
    return Metric(
        metric=name,
        value=value,
        unit=unit,
        spread=_spread(values),
        reference=reference,
        reference_value=against,
        ratio=value / against if against else None,
        goal=goal,
        ok=ok,
    )


def _spread(values: Sequence[float]) -> float | None:
    middle = median(values)
    if len(values) < 2:
        return None
    return (max(values) - min(values)) / middle if middle else 0.0


def as_line(result: Metric) -> dict[str, object]:
    """A metric as the JSON object that is printed."""
    return asdict(result)


def header() -> dict[str, object]:
    """The first line: which machine, which versions, which commit of the source ("" outside a checkout)."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "ray", "grpcio", "tandem")}
    return {
        "machine": {
            "cpu": cpu,
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "kernel": platform.release(),
        },
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
    }


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return ""
    folder = Path(__file__).resolve().parent
    result = subprocess.run(
        [git, "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return result.stdout.strip()


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below or at which `percent` of `values` lie (nearest rank). `values` must not be empty."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]
