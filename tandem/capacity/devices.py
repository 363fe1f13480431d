"""What devices can do, by their makers' data sheets.

Owns the table. A figure is that of the sheet, without sparsity; what a kernel reaches of it is the arithmetic's assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator. `flops` of bf16 a second, bytes, bytes a second."""

    name: str
    flops: float
    memory_bytes: float
    bytes_per_s: float
    source: str


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 989e12, 80e9, 3.35e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
        Device("h200", 989e12, 141e9, 4.8e12, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
        Device("a100", 312e12, 80e9, 2.039e12, "NVIDIA A100 80GB Tensor Core GPU data sheet, SXM"),
        Device("l40s", 362e12, 48e9, 0.864e12, "NVIDIA L40S data sheet"),
        Device("mi300x", 1307e12, 192e9, 5.3e12, "AMD Instinct MI300X data sheet"),
    )
}


def device_named(name: str) -> Device:
    """Raises ConfigError for one that isn't known."""
    if name not in DEVICES:
        raise ConfigError(f"--gpu {name!r} is not known ({', '.join(DEVICES)} are)")
    return DEVICES[name]
