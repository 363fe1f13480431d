"""`tandem capacity`: how many workers a load needs, by arithmetic.

Owns the command line and the printing; the formulas are in `tandem.capacity`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from tandem.capacity.arithmetic import Assumed, Worker, Workload, plan
from tandem.capacity.devices import device_named
from tandem.capacity.shapes import shape_of
from tandem.cli.common import JsonOption, print_json, stdout


def capacity(
    model: Annotated[str, typer.Option(help="A known model, a config.json, or a folder with one.")] = "llama-3.1-70b",
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, l40s or mi300x.")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, max=1024, help="Of one worker.")] = 4,
    requests: Annotated[float, typer.Option(min=0.001, max=1e6, help="A second, of the whole cluster.")] = 10.0,
    prompt: Annotated[int, typer.Option(min=1, max=10_000_000, help="Tokens.")] = 4000,
    answer: Annotated[int, typer.Option(min=1, max=1_000_000, help="Tokens.")] = 300,
    hit_rate: Annotated[float, typer.Option(min=0.0, max=0.99, help="Of prompt tokens whose KV is there.")] = 0.0,
    ttft: Annotated[float, typer.Option(min=0.001, max=3600, help="Seconds to the first token, on average.")] = 2.0,
    tpot: Annotated[float, typer.Option(min=0.0001, max=60, help="Seconds for each token after it.")] = 0.05,
    weight_bytes: Annotated[
        float, typer.Option(min=0.1, max=8, help="Of a parameter: 2 is bf16, 1 is int8 or fp8.")
    ] = 2.0,
    kv_bytes: Annotated[float, typer.Option(min=0.1, max=8, help="Of a key's or value's element.")] = 2.0,
    host_gb: Annotated[float, typer.Option(min=0, max=1e6, help="Of a machine's HOST tier.")] = 512.0,
    disk_gb: Annotated[float, typer.Option(min=0, max=1e9, help="Of a machine's DISK tier.")] = 8000.0,
    price: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Of one GPU for an hour: adds what a million tokens cost.")
    ] = None,
    compute_part: Annotated[float, typer.Option(min=0.01, max=1, help="Of the flops that prefill reaches.")] = 0.5,
    memory_part: Annotated[float, typer.Option(min=0.01, max=1, help="Of the bandwidth that decode reaches.")] = 0.7,
    as_json: JsonOption = False,
) -> None:
    """The arithmetic of serving: KV of a token and of a request, how many requests each tier holds, how many prefill and
    decode workers a load needs within its promises, tokens a second and what they cost; each with its formula.

    Data sheets say what a device can do; which part of that is reached is assumed, and can be given. Nothing is measured.
    """
    shape, device = shape_of(model), device_named(gpu)
    assumed = Assumed(compute_part=compute_part, memory_part=memory_part)
    worker = Worker(shape, device, gpus, weight_bytes, kv_bytes, assumed)
    load = Workload(requests, prompt, answer, hit_rate, ttft, tpot)
    figures = plan(worker, load, host_bytes=host_gb * 1e9, disk_bytes=disk_gb * 1e9, price_per_gpu_hour=price)
    if as_json:
        print_json(
            {
                "capacity": {
                    "model": model, "gpu": device.name, "gpus": gpus, "source": device.source, "load": asdict(load),
                    "assumed": asdict(assumed),
                }
            }
        )  # fmt: skip
        for figure in figures:
            print_json(asdict(figure))
        return
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("what", "value", "unit", "formula"):
        table.add_column(column, justify="right" if column == "value" else "left", no_wrap=column != "formula")
    for figure in figures:
        table.add_row(figure.name, _short(figure.value), figure.unit, figure.formula)
    stdout.print(table)
    stdout.print(
        f"{device.name}: {device.flops / 1e12:g} TFLOPS, {device.memory_bytes / 1e9:g} GB, {device.bytes_per_s / 1e12:g} TB/s "
        f"({device.source}). Assumed: {assumed.compute_part:g} of the flops, {assumed.memory_part:g} of the bandwidth, "
        f"{assumed.usable_memory:g} of the memory, decode workers busy {assumed.busy:g} of the time.",
        style="dim", highlight=False,
    )  # fmt: skip


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
