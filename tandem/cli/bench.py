"""`tandem bench engine`, `serve` and `ladder`: run a benchmark, print it for people or programs.

Owns the printing and the exit code; what is measured is in `tandem.bench`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from tandem.bench.ladder.results import Step
from tandem.bench.report import Metric, as_line, header
from tandem.bench.serve import Load
from tandem.cli.common import ConfigOption, JsonOption, print_json, stderr, stdout
from tandem.config import Config, load_config

app = typer.Typer(no_args_is_help=True, help="Measure this machine; every number beside a reference of the same run.")


@app.command()
def engine(
    config_path: ConfigOption = None,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each measurement is made.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Tokens a second of the engine alone, in this process, on one thread. Takes about half a minute with the default model, and
    grows with --repetitions."""
    from tandem.bench import engine as bench
    from tandem.model_files import resolve_model

    config = load_config(config_path)
    path = resolve_model(config.model.path)
    if as_json:
        print_json(header())
    _print(bench.run(path, config.model.dtype, config.decode, repetitions), as_json)


@app.command()
def serve(
    config_path: ConfigOption = None,
    target: Annotated[
        str, typer.Option(help="host:port of a running cluster. Default: one is started for the run.")
    ] = "",
    clients: Annotated[int, typer.Option(min=1, max=1024, help="Concurrent clients, each one request at a time.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="How long they go on sending.")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Latency and throughput of a real cluster under concurrent clients. Any error makes the exit code 1.

    Takes --seconds, the time of one to three waves of all clients for the reference in each of three rounds, and the start of
    a cluster where no --target is given.
    """
    from tandem.bench import serve as bench
    from tandem.cluster import check_replicas
    from tandem.model_files import resolve_model

    config = load_config(config_path)
    if not target:
        check_replicas(config)
    path = resolve_model(config.model.path)
    if as_json:
        print_json(header())
    reference = bench.Reference(path, config.model.dtype, config.decode, clients)
    measured: list[tuple[Load, Load]] = []
    with contextlib.nullcontext(target) if target else _own_cluster(config) as reached:
        for number, (cluster, local) in enumerate(bench.rounds(reached, reference, clients, seconds), 1):
            measured.append((cluster, local))
            note = (
                f"round {number} of {bench.NUM_ROUNDS}: {cluster.num_requests} requests, {len(cluster.errors)} errors"
            )
            stderr.print(note, style="dim", highlight=False, markup=False)
            for error in cluster.errors:
                stderr.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
    _print(bench.metrics(measured), as_json)


@app.command()
def ladder(
    config_path: ConfigOption = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw it, as an SVG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What each technique buys on one workload, from no KV cache to a cluster. Takes some three to six minutes with the default
    model. Needs a checkout. The exit code is 1 if any rung's tokens differ or paging wastes more than 4 % of its memory."""
    from tandem.bench.ladder.climb import climb
    from tandem.bench.ladder.picture import draw
    from tandem.bench.ladder.results import Results
    from tandem.model_files import resolve_model

    config = load_config(config_path)
    path = resolve_model(config.model.path)
    if as_json:
        print_json(header())
    results, every_ok = Results(), True
    for rung, run in climb(path, config, _own_cluster):
        step = results.add(rung, run)
        for result in results.metrics():
            every_ok &= result.ok
            if as_json:
                print_json(as_line(result))
        stderr.print(f"{step.title}: {step.tokens_per_s:.4g} tokens/s", style="dim", highlight=False, markup=False)
        if picture is not None:
            picture.write_text(draw(results.steps), encoding="utf-8")
    if not as_json:
        stdout.print(_ladder_table(results.steps))
    if not every_ok:
        raise typer.Exit(1)


def _ladder_table(steps: Sequence[Step]) -> Table:
    """A rung a row; `ratio` is tokens/s against the rung before."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("rung", no_wrap=True)
    for column in ("tokens/s", "ratio", "TTFT p50", "p95", "TPOT p50", "p95", "gap p99", "KV wasted", "same tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for before, step in zip([None, *steps], steps, strict=False):
        table.add_row(
            step.title,
            f"{step.tokens_per_s:.4g}",
            "" if before is None else f"{step.tokens_per_s / before.tokens_per_s:.2f}",
            f"{step.ttft_p50_s:.2f} s",
            f"{step.ttft_p95_s:.2f} s",
            f"{1000 * step.tpot_p50_s:.0f} ms",
            f"{1000 * step.tpot_p95_s:.0f} ms",
            f"{1000 * step.gap_p99_s:.0f} ms",
            "" if step.wasted is None else f"{step.wasted:.1%}" + ("" if step.waste_ok else " NO"),
            "" if step.same_tokens is None else "yes" if step.same_tokens == 1 else f"NO: {step.same_tokens:.0%}",
        )
    return table


@contextlib.contextmanager
def _own_cluster(config: Config) -> Iterator[str]:
    """A cluster of that configuration on free ports for the time of the measurement."""
    from tandem.cluster import Cluster

    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        ports = config.router.model_copy(update={"grpc_port": 0, "control_port": 0, "metrics_port": 0})
        with Cluster(config.model_copy(update={"run_dir": folder, "router": ports})) as cluster:
            cluster.start(progress=lambda line: stderr.print(line, style="dim", highlight=False, markup=False))
            yield cluster.target


def _print(results: Iterable[Metric], as_json: bool) -> None:
    """Prints every metric as it comes (the table at the end). Exits 1 if any is not ok."""
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("metric", "value", "unit", "spread", "ratio", "ok", "reference"):
        table.add_column(column, no_wrap=column != "reference")
    every_ok = True
    for result in results:
        every_ok &= result.ok
        if as_json:
            print_json(as_line(result))
        reference = "" if result.reference_value is None else f"{result.reference_value:.4g} {result.reference}"
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        table.add_row(
            result.metric,
            f"{result.value:.4g}",
            result.unit,
            "" if result.spread is None else f"{result.spread:.0%}",
            ratio,
            "yes" if result.ok else "NO",
            reference,
        )
    if not as_json:
        stdout.print(table)
    if not every_ok:
        raise typer.Exit(1)
