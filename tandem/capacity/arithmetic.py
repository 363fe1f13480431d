"""The arithmetic of serving: what a model needs of a device, and how many workers a load needs.

Owns the formulas; every figure that `plan` returns says which one made it. A step takes as long as its multiplications or its
memory traffic, whichever is more, at an assumed part of what the data sheet says (Pope et al., *Efficiently Scaling
Transformer Inference*, MLSys 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.capacity.devices import Device
from tandem.capacity.shapes import ModelShape
from tandem.errors import ConfigError

MAX_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Workload:
    """What comes, and what was promised."""

    requests_per_s: float
    prompt_tokens: int
    answer_tokens: int
    hit_rate: float = 0.0
    """Part of prompt tokens whose KV exists already."""
    ttft_s: float = 1.0
    tpot_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Assumed:
    """What isn't on a data sheet."""

    compute_part: float = 0.5
    """Of the device's flops that prefill reaches."""
    memory_part: float = 0.7
    """Of the device's bandwidth that decode reaches."""
    usable_memory: float = 0.9
    """Of the device's memory, for weights and KV."""
    busy: float = 0.7
    """Of the time that a decode worker is used: the rest is for the ups and downs of the load."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker of `num_gpus` devices that share the model evenly."""

    shape: ModelShape
    device: Device
    num_gpus: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    assumed: Assumed = Assumed()

    @property
    def flops(self) -> float:
        return self.num_gpus * self.device.flops * self.assumed.compute_part

    @property
    def bytes_per_s(self) -> float:
        return self.num_gpus * self.device.bytes_per_s * self.assumed.memory_part

    @property
    def weights(self) -> float:
        """Bytes."""
        return self.shape.num_params * self.weight_bytes

    @property
    def kv_room(self) -> float:
        """Bytes of memory that KV may take; not positive if the weights don't fit."""
        return self.num_gpus * self.device.memory_bytes * self.assumed.usable_memory - self.weights

    def kv_of(self, num_tokens: float) -> float:
        """Bytes."""
        return num_tokens * self.shape.kv_bytes_per_token(self.kv_bytes)

    def prefill_s(self, num_tokens: float, num_before: float = 0.0) -> float:
        """Of one prompt's `num_tokens` after `num_before` that are there: two operations a parameter and token, four a pair of
        a token and one that it attends to, for each head and its width."""
        shape = self.shape
        pairs = num_tokens * (num_before + num_tokens / 2)
        attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head * pairs
        return (2 * shape.layer_params * num_tokens + 2 * shape.head_params + attention) / self.flops

    def step_s(self, batch: float, context: float) -> float:
        """Of a decode step: every weight and the KV of all sequences are read once, every token is multiplied."""
        shape = self.shape
        read = (shape.layer_params + shape.head_params) * self.weight_bytes + self.kv_of(batch * context)
        attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head * batch * context
        multiplied = 2 * (shape.layer_params + shape.head_params) * batch + attention
        return max(read / self.bytes_per_s, multiplied / self.flops)

    def largest_batch(self, context: float, tpot_s: float) -> int:
        """The most sequences that fit into memory and step within `tpot_s`; 0 if one doesn't."""
        low, high = 0, MAX_BATCH
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.kv_of(middle * context) <= self.kv_room and self.step_s(middle, context) <= tpot_s
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


@dataclass(frozen=True, slots=True)
class Figure:
    """One result and the formula that made it."""

    name: str
    value: float
    unit: str
    formula: str


def plan(
    worker: Worker, load: Workload, *, host_bytes: float, disk_bytes: float, price_per_gpu_hour: float | None
) -> list[Figure]:
    """What a load needs of such workers. `host_bytes` and `disk_bytes` are those of one machine's pool node. Raises ConfigError
    for a model that doesn't fit, and for promises that no number of workers keeps."""
    shape, device = worker.shape, worker.device
    context = load.prompt_tokens + load.answer_tokens / 2
    whole = load.prompt_tokens + load.answer_tokens
    if worker.kv_room <= 0:
        raise ConfigError(
            f"--gpus {worker.num_gpus}: the weights take {worker.weights / 1e9:.1f} GB, "
            f"{worker.num_gpus} x {device.name} have {worker.kv_room / 1e9 + worker.weights / 1e9:.1f} GB for weights and KV"
        )
    hit = int(load.hit_rate * load.prompt_tokens)
    prefill_s = worker.prefill_s(load.prompt_tokens - hit, hit)
    prefill_busy = _busy_for(prefill_s, load.ttft_s)
    if prefill_busy <= 0:
        raise ConfigError(
            f"--ttft {load.ttft_s:g}: a prompt alone takes {prefill_s:.2f} s on {worker.num_gpus} x {device.name}; more GPUs a "
            f"worker (--gpus) would shorten it"
        )
    batch = worker.largest_batch(context, load.tpot_s)
    if not batch:
        raise ConfigError(
            f"--tpot {load.tpot_s:g}: a step of one sequence takes {worker.step_s(1, context):.3f} s on {worker.num_gpus} x "
            f"{device.name}, whose memory has room for {worker.kv_room / worker.kv_of(context):.1f} sequences"
        )
    step_s = worker.step_s(batch, context)
    tokens_per_s = batch / step_s
    num_prefill = max(1, math.ceil(load.requests_per_s * prefill_s / prefill_busy))
    num_decode = max(1, math.ceil(load.requests_per_s * load.answer_tokens / (tokens_per_s * worker.assumed.busy)))
    num_gpus = (num_prefill + num_decode) * worker.num_gpus
    generated_per_s = load.requests_per_s * load.answer_tokens
    figures = [
        Figure("parameters", shape.num_params, "", "layers x (attention + MLP + norms) + embedding + head"),
        Figure("weights", worker.weights / 1e9, "GB", f"parameters x {worker.weight_bytes:g} bytes"),
        Figure("kv_per_token", worker.kv_of(1), "bytes", "2 x layers x KV heads x head width x bytes an element"),
        Figure("kv_per_request", worker.kv_of(whole) / 1e9, "GB", "KV a token x (prompt + answer)"),
        Figure("kv_room", worker.kv_room / 1e9, "GB a worker", "GPUs x memory x usable part - weights"),
        Figure(
            "requests_in_device",
            worker.kv_room / worker.kv_of(context),
            "a worker",
            "KV room / (KV a token x (prompt + answer / 2))",
        ),
        Figure("requests_in_host", host_bytes / worker.kv_of(whole), "a machine", "HOST bytes / KV of a request"),
        Figure("requests_in_disk", disk_bytes / worker.kv_of(whole), "a machine", "DISK bytes / KV of a request"),
        Figure(
            "prefill",
            prefill_s,
            "s a prompt",
            "(2 x parameters x uncached tokens + attention) / (flops x compute part)",
        ),
        Figure(
            "prefill_busy", prefill_busy, "of its time", "most that keeps the mean wait, M/D/1, within TTFT - prefill"
        ),
        Figure("batch", batch, "sequences", "most that fit into KV room with a step within TPOT"),
        Figure("decode_step", step_s, "s", "max((weights + KV of all) / bandwidth, operations / flops)"),
        Figure("decode_tokens", tokens_per_s, "tokens/s a worker", "batch / step"),
        Figure("prefill_workers", num_prefill, "", "requests/s x prefill / busy part, rounded up"),
        Figure(
            "decode_workers", num_decode, "", "requests/s x answer tokens / (tokens/s a worker x busy part), rounded up"
        ),
        Figure("prefill_to_decode", num_prefill / num_decode, "", "prefill workers / decode workers"),
        Figure("gpus", num_gpus, "", "all workers x GPUs a worker"),
        Figure("generated", generated_per_s, "tokens/s", "requests/s x answer tokens"),
    ]
    if price_per_gpu_hour is not None:
        cost = num_gpus * price_per_gpu_hour / (generated_per_s * 3600) * 1e6
        figures.append(Figure("cost", cost, "per million generated tokens", "GPUs x price an hour / tokens an hour"))
    return figures


def _busy_for(service_s: float, limit_s: float) -> float:
    """The utilisation at which a queue with random arrivals and equal services (M/D/1) waits `limit_s - service_s` on average:
    wait = service x busy / (2 x (1 - busy)). Not positive if the service alone takes longer."""
    wait_s = limit_s - service_s
    return 2 * wait_s / (service_s + 2 * wait_s) if wait_s > 0 else 0.0
