"""Clusters to simulate: what a step, a byte and a block cost there, and how much each tier holds.

Owns the presets and where their numbers come from. Nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos.control import StepPrices
from tandem.capacity.arithmetic import Worker
from tandem.capacity.devices import device_named
from tandem.capacity.shapes import shape_of
from tandem.errors import ConfigError
from tandem.sim.trace import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of cluster. Blocks are those of the trace, `BLOCK_TOKENS` each."""

    name: str
    source: str
    prices: StepPrices
    block_bytes: int
    device_blocks: int
    """Of each worker."""
    host_blocks: int
    """Of each machine's pool node, and of its DISK tier."""
    disk_blocks: int
    machine_workers: int
    """Workers of a machine."""
    prefill_step_tokens: int
    decode_step_tokens: int
    max_running: int
    prefill_part: float
    """Of the workers, that prefill."""
    home_bytes_per_s: float
    """From the machine's own pool node, from another machine, and from a DISK tier."""
    net_bytes_per_s: float
    disk_bytes_per_s: float
    overhead_s: float
    """What messages take between a request's arrival and its first token."""


def _h100_llama_70b() -> Preset:
    worker = Worker(shape_of("llama-3.1-70b"), device_named("h100"), 4)
    shape = worker.shape
    per_token = 2.0 * shape.layer_params / worker.flops
    per_pair = 4.0 * shape.num_hidden_layers * shape.num_attention_heads * shape.head / worker.flops
    block_bytes = int(worker.kv_of(BLOCK_TOKENS))
    return Preset(
        name="h100-llama-70b",
        source="4 x NVIDIA H100 SXM a worker, Llama 3.1 70B in bf16: step prices by `tandem capacity` (half of the data sheet's "
        "flops, 0.7 of its bandwidth); DGX H100 data sheet: 2 TB memory, eight 400 Gb/s adapters and 30 TB of NVMe for eight "
        "GPUs, of which 1 TB, four fifths and 15 TB are taken",
        prices=StepPrices(
            base_s=worker.step_s(0, 0),
            token_s=per_token,
            pair_s=per_pair,
            sequence_s=2.0 * (shape.layer_params + shape.head_params) / worker.flops,
            context_s=worker.kv_of(1) / worker.bytes_per_s,
        ),
        block_bytes=block_bytes,
        device_blocks=int(worker.kv_room / block_bytes),
        host_blocks=int(1e12 / block_bytes),
        disk_blocks=int(15e12 / block_bytes),
        machine_workers=2,
        prefill_step_tokens=2048,
        decode_step_tokens=512,
        max_running=256,
        prefill_part=5 / 8,
        home_bytes_per_s=4 * 40e9,
        net_bytes_per_s=4 * 40e9,
        disk_bytes_per_s=20e9,
        overhead_s=0.005,
    )


def _cpu_smollm2() -> Preset:
    return Preset(
        name="cpu-smollm2-135m",
        source="one Zen 5 thread a worker, SmolLM2-135M in bf16: step prices fitted to the medians of `tandem bench engine` in "
        "docs/performance.md, speeds of `tandem bench transfer` and `tandem bench tiers`",
        prices=StepPrices(base_s=6.3e-3, token_s=4.6e-4, pair_s=1.95e-7, sequence_s=3.8e-4, context_s=0.93e-6),
        block_bytes=23_040 * BLOCK_TOKENS,
        device_blocks=2**30 // (23_040 * BLOCK_TOKENS),
        host_blocks=2**31 // (23_040 * BLOCK_TOKENS),
        disk_blocks=2**33 // (23_040 * BLOCK_TOKENS),
        machine_workers=2,
        prefill_step_tokens=512,
        decode_step_tokens=512,
        max_running=64,
        prefill_part=0.5,
        home_bytes_per_s=10e9,
        net_bytes_per_s=3e9,
        disk_bytes_per_s=2e9,
        overhead_s=0.005,
    )


PRESETS = {preset.name: preset for preset in (_h100_llama_70b(), _cpu_smollm2())}


def preset_named(name: str) -> Preset:
    """Raises ConfigError for one that isn't known."""
    if name not in PRESETS:
        raise ConfigError(f"--preset {name!r} is not known ({', '.join(PRESETS)} are)")
    return PRESETS[name]
