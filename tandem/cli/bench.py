"""`tandem bench engine`, `serve`, `transfer`, `pool`, `ladder` and `quality`: run a benchmark, print it for people or programs.

Owns the printing and the exit code; what is measured is in `tandem.bench`.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE
from rich.table import Table

from tandem.bench.ladder.results import Step
from tandem.bench.report import Metric, as_line, header
from tandem.bench.serve import Load
from tandem.cli.common import ConfigOption, JsonOption, print_json, stderr, stdout
from tandem.cli.reach import given
from tandem.cli.serve import stop_on_signals
from tandem.config import Config, cache_dir, load_config
from tandem.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Measure this machine; every number beside a reference of the same run.")


@app.command()
def engine(
    config_path: ConfigOption = None,
    batches: Annotated[str, typer.Option(help="Sequences in a step, separated by commas.")] = "1,4,8,16",
    contexts: Annotated[
        str, typer.Option(help="Tokens of each sequence's prompt, separated by commas.")
    ] = "128,512,2048,6000",
    weights: Annotated[
        Literal["bf16", "int8", "int4"] | None,
        typer.Option(
            help="How linears keep their weights. Default: the configuration's model.weights, else model.dtype."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Default: the configuration's decode.threads.")
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="How often each measurement is made. Default: 3, with --against 5.")
    ] = None,
    max_seconds: Annotated[
        float,
        typer.Option(
            min=1, help="No measurement begins later, nor if computing its prompts would take longer; it is said which."
        ),
    ] = 300.0,
    against: Annotated[
        str,
        typer.Option(
            help="llama.cpp, vllm or both, separated by a comma: measured in turns with Tandem on the same weights, threads "
            "and cores, at batch 1 and 8 and 512 tokens (--batches, --contexts and --max-seconds don't apply). "
            "`make peers` installs them."
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Tokens a second of the engine alone, in this process: prefill and decode by batch and context, each beside what the cores
    of this machine allow at best, measured in the same run; where the time of a decode step goes, for the smallest and the
    largest batch; and what two workers take of memory, which hold their weights once.

    A decode step reads every weight of the linears and of the output head once, and the keys and values of all its sequences
    once: those bytes at the measured speed of memory are the reference. A prefill multiplies in the linears, in attention
    and, for each prompt's last token, in the head: those at the measured speed of a plain matrix product are its reference.
    Every sequence has a prompt of its own. Takes some five minutes with the default model, at most --max-seconds; with
    --against some three minutes. The exit code is 1 if a goal isn't reached.
    """
    from tandem.bench import against as comparison
    from tandem.bench import engine as bench
    from tandem.model_files import resolve_model

    config = load_config(config_path)
    worker = config.decode if threads is None else config.decode.model_copy(update={"threads": threads})
    sizes = _numbers("--batches", batches), _numbers("--contexts", contexts)
    peers = comparison.programs_named([name.strip() for name in against.split(",")]) if against else []
    if peers and config.model.dtype != "bf16":
        raise ConfigError(f"model.dtype is {config.model.dtype}, --against compares bf16 alone")
    path = resolve_model(config.model.path)
    form = weights or config.model.weights
    if as_json:
        print_json(header() | {"engine": {"weights": form or config.model.dtype, "threads": worker.threads}})
    if peers:
        results = comparison.run(path, form or "bf16", worker, peers, rounds=repetitions or 5, say=_say)
    else:
        results = bench.run(
            path,
            config.model.dtype,
            form or config.model.dtype,
            worker,
            batches=sizes[0],
            contexts=sizes[1],
            repetitions=repetitions or 3,
            max_seconds=max_seconds,
            say=_say,
        )
    _print(results, as_json)


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option} is {text!r}, must be whole numbers of at least 1, separated by commas")
    return [int(part) for part in parts]


def _say(line: str) -> None:
    """Progress and reasons, on stderr."""
    stderr.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


@app.command()
def serve(
    config_path: ConfigOption = None,
    target: Annotated[
        str, typer.Option(help="host:port of a running cluster. Default: one is started for the run.")
    ] = "",
    clients: Annotated[int, typer.Option(min=1, max=1024, help="Concurrent clients, each one request at a time.")] = 16,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="How long they go on sending. Default: 60; with --against 30, counted at each rate."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="vllm: another load, a committed chat, on this cluster and on vLLM's server in turns, to find the highest rate "
            "of each (--clients and --target don't apply). `make peers` installs it."
        ),
    ] = "",
    workload: Annotated[
        Path | None, typer.Option(help="With --against: the chat. Default: benchmarks/workloads/chat.json.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="With --against: searches for each system's rate.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Latency and throughput of a real cluster under concurrent clients. Any error makes the exit code 1.

    Takes --seconds, the time of one to three waves of all clients for the reference in each of three rounds, and the start of
    a cluster where no --target is given.

    With --against vllm: conversations of four turns with shared system prompts arrive at random times of a fixed seed, at a
    rate that the systems can't slow down. A rate holds if at least 90 % of the turns have their first token within 300 ms and
    the others, on average, every 50 ms. Printed are the highest rates that hold in turns a second, medians of the rounds, and
    both systems' latencies at rates that both were tried at. Takes some ten minutes a round. The exit code is 1 if Tandem
    holds less than twice vLLM's rate.
    """
    from tandem.bench import serve as bench
    from tandem.cluster import check_replicas
    from tandem.model_files import resolve_model

    config = load_config(config_path)
    if against:
        if target:
            raise ConfigError(f"--target {target} can't be given with --against: the cluster is started for the run")
        _print(_chat(config, against, workload, seconds or 30.0, rounds, as_json), as_json)
        return
    if workload is not None:
        raise ConfigError(f"--workload {workload} is what --against sends, and that isn't given")
    if not target:
        check_replicas(config)
    path = resolve_model(config.model.path)
    if as_json:
        print_json(header())
    reference = bench.Reference(path, config.model.dtype, config.decode, clients)
    measured: list[tuple[Load, Load]] = []
    with contextlib.nullcontext(target) if target else _own_cluster(config) as reached:
        for number, (cluster, local) in enumerate(
            bench.rounds(reached, reference, clients, seconds or 60.0, given()), 1
        ):
            measured.append((cluster, local))
            note = (
                f"round {number} of {bench.NUM_ROUNDS}: {cluster.num_requests} requests, {len(cluster.errors)} errors"
            )
            stderr.print(note, style="dim", highlight=False, markup=False)
            for error in cluster.errors:
                stderr.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
    _print(bench.metrics(measured), as_json)


def _chat(
    config: Config, against: str, workload: Path | None, seconds: float, rounds: int, as_json: bool
) -> Iterator[Metric]:
    """The chat load on a cluster of `config` and on vLLM."""
    from tandem.bench.chat import contest
    from tandem.bench.chat.vllm_system import server_program
    from tandem.bench.chat.workload import WORKLOAD, load_workload
    from tandem.cluster import check_replicas
    from tandem.model_files import resolve_model

    if against != "vllm":
        raise ConfigError(f"{against!r} is no server that Tandem's can be measured against (vllm is)")
    weights = config.model.weights or config.model.dtype
    if config.model.dtype != "bf16" or weights != "bf16":
        raise ConfigError(f"model.dtype is {config.model.dtype}, weights are {weights}; --against compares bf16 alone")
    check_replicas(config)
    chat = load_workload(workload or WORKLOAD)
    server_program()  # said before anything is loaded
    path = resolve_model(config.model.path)
    if as_json:
        print_json(header() | {"serve": {"against": against, "seconds": seconds, "rounds": rounds}})
    with stop_on_signals() as stop:
        start = functools.partial(_own_cluster, stop=stop)
        yield from contest.run(path, config, chat, start, seconds=seconds, rounds=rounds, say=_say, stop=stop)


_BlockBytes = Annotated[
    int,
    typer.Option("--block-bytes", min=4096, max=1 << 26, help="Of one block; the default: 16 tokens of SmolLM2-135M."),
]
_BatchBlocks = Annotated[int, typer.Option("--batch", min=1, max=512, help="Scattered blocks of one batch.")]
_Rounds = Annotated[int, typer.Option(min=1, max=1000, help="Everything is measured so often, in turns.")]


@app.command()
def transfer(
    transports: Annotated[
        str, typer.Option(help="shm, ucx, tcp, tls (tcp with TLS), separated by commas.")
    ] = "shm,ucx,tcp,tls",
    block_bytes: _BlockBytes = 368_640,
    batch: _BatchBlocks = 64,
    arena_mib: Annotated[int, typer.Option(min=1, help="Of each process's arena.")] = 512,
    batches: Annotated[int, typer.Option(min=1, max=1000, help="Of each turn.")] = 20,
    rounds: _Rounds = 5,
    against: Annotated[
        str,
        typer.Option(
            help="nixl, mooncake or both, separated by a comma: in turns with Tandem. `make peers` installs them."
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """How fast blocks move from one process to another, by each transport: checksums included, and whole fetches with their
    messages; beside copies in one process, plain sockets and UCX's own test, measured in turns. And what a block costs of
    processor time when its bytes cost nothing.

    Everything is on this machine, over loopback. Takes about a minute, with --against two. The exit code is 1 if a goal isn't
    reached.
    """
    from tandem.bench import transfer as bench
    from tandem.bench.block_peers import MOVERS, peers_named
    from tandem.bench.kv_source import transports_named

    chosen = transports_named(_names(transports))
    peers = peers_named(_names(against), MOVERS)
    shape = bench.shape_of(block_bytes, batch, arena_mib << 20, batches)
    if as_json:
        blocks = {"block_bytes": block_bytes, "batch": batch, "arena_blocks": shape.num_blocks}
        print_json(header() | {"transfer": {"transports": chosen, **blocks}})
    with _interruptible(), contextlib.closing(bench.run(shape, chosen, peers, rounds=rounds, say=_say)) as results:
        _print(results, as_json)


@app.command()
def pool(
    tiers: Annotated[str, typer.Option(help="host, disk, restart, separated by commas.")] = "host,disk,restart",
    block_bytes: _BlockBytes = 368_640,
    batch: _BatchBlocks = 64,
    values: Annotated[int, typer.Option(min=1, help="Blocks that are put and got.")] = 2000,
    restart_blocks: Annotated[
        int, typer.Option(min=1, help="Blocks of 4,096 bytes on the disk of a node that starts again.")
    ] = 100_000,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir", help="On the disk to measure; a new folder in it is made and removed. Default: the cache's."
        ),
    ] = None,
    rounds: _Rounds = 5,
    against: Annotated[
        str,
        typer.Option(
            help="lmcache, mooncake (HOST alone) or both, separated by a comma: in turns with Tandem. `make peers` installs them."
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """How fast a pool node's tiers take blocks in and give them out: HOST from another process, DISK beside plain direct I/O in
    the same directory; and how soon a node with blocks on disk serves after it was killed.

    Takes one to three minutes, and of memory some six times the values (with --against lmcache,mooncake fifteen times). The
    exit code is 1 if a goal isn't reached.
    """
    from tandem.bench import pool as bench
    from tandem.bench.block_peers import HOST_STORES, peers_named

    chosen = bench.tiers_named(_names(tiers))
    peers = peers_named(_names(against), HOST_STORES)
    load = bench.Load(block_bytes, batch, values, restart_blocks)
    if as_json:
        blocks = {"block_bytes": block_bytes, "batch": batch, "values": values, "restart_blocks": restart_blocks}
        print_json(header() | {"pool": {"tiers": chosen, **blocks}})
    results = bench.run(load, chosen, peers, directory, rounds=rounds, say=_say)
    with _interruptible(), contextlib.closing(results):
        _print(results, as_json)


@app.command()
def tiers(
    config_path: ConfigOption = None,
    what: Annotated[
        str, typer.Option("--what", help="ttft, handover, checkpoints, separated by commas.")
    ] = "ttft,handover,checkpoints",
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="For the DISK tier; a new folder in it is made and removed. Default: the cache's."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What KV that exists somewhere is worth to a whole cluster: the time to first token of a prompt of 2,000 tokens whose KV
    nobody has, HOST has, or DISK alone has; how long after prefill's first token a hand-over is complete; and what a token costs
    more with a pool node that keeps a copy of each block.

    Starts small clusters of its own, one after the other, on free ports. Takes some four minutes. The exit code is 1 if a goal
    isn't reached.
    """
    from tandem.bench import tiers as bench
    from tandem.model_files import resolve_model

    chosen = bench.parts_named(_names(what))
    config = load_config(config_path)
    slab_bytes = bench.slab_bytes_of(resolve_model(config.model.path), config)
    if as_json:
        print_json(
            header() | {"tiers": {"what": chosen, "prompt_tokens": bench.PROMPT_TOKENS, "slab_bytes": slab_bytes}}
        )
    with _interruptible(), tempfile.TemporaryDirectory(prefix="tandem-bench-", dir=directory or cache_dir()) as folder:
        _print(bench.run(chosen, config, _own_cluster, slab_bytes, folder, _say), as_json)


@app.command()
def router(
    workers: Annotated[int, typer.Option(min=1, max=65_000, help="That hold blocks.")] = 64,
    entries: Annotated[
        int, typer.Option(min=100_000, max=100_000_000, help="Blocks, counted once for each worker that holds them.")
    ] = 1_000_000,
    holders: Annotated[int, typer.Option(min=1, help="Workers that hold each prompt of 64 blocks.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Each with other blocks.")] = 3,
    against: Annotated[str, typer.Option(help="dynamo: in turns with Tandem. `make peers` installs it.")] = "",
    end_to_end: Annotated[
        bool,
        typer.Option(
            "--end-to-end",
            help="Instead: the router's process between fake workers and gRPC clients; of the other options --rounds applies.",
        ),
    ] = False,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """The router on one core. Its prefix index: how soon it says which worker holds how much of a prompt, how many events a
    second it takes in, and its memory. Whole decisions: from a prompt's tokens to the dispatches, with everything that is
    counted, and freed again.

    With --end-to-end: requests of 4 kB of text a second, what is added to one request, and tokens a second to 256 streams.

    Takes some twenty seconds a round. The exit code is 1 if a goal isn't reached.
    """
    from tandem.bench.router import end_to_end as whole
    from tandem.bench.router import run as bench

    if end_to_end:
        if against:
            raise ConfigError(f"--against {against} can't be given with --end-to-end")
        if as_json:
            print_json(header())
        _print(whole.run(load_config(config_path), rounds=rounds, say=_say), as_json)
        return
    compared = bench.named(_names(against)) if against else False
    if as_json:
        print_json(header() | {"router": {"workers": workers, "entries": entries, "holders": holders}})
    _print(bench.run(workers, entries, holders, compared, rounds=rounds, say=_say), as_json)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A polite kill ends like Ctrl-C: what was started is ended, what was written is removed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def ladder(
    config_path: ConfigOption = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw it, as an SVG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What each technique buys on one workload, from no KV cache to a cluster. Takes some two to six minutes with the default
    model. Needs a checkout. The exit code is 1 if any rung's tokens differ or paging wastes more than 4 % of its memory."""
    from tandem.bench.ladder.climb import climb
    from tandem.bench.ladder.picture import draw
    from tandem.bench.ladder.results import Results
    from tandem.model_files import resolve_model

    if picture is not None and not picture.parent.is_dir():
        raise ConfigError(f"--picture {picture}: there is no folder {picture.parent}")
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


@app.command()
def quality(
    config_path: ConfigOption = None,
    weights: Annotated[
        str,
        typer.Option(help="fp32, bf16, int8, int4, separated by commas; bf16 is always measured, as the reference."),
    ] = "bf16,int8,int4",
    tokens: Annotated[
        int, typer.Option(min=2, help="How much of the text is read, in windows of 1024 tokens, each its own context.")
    ] = 4096,
    as_json: JsonOption = False,
) -> None:
    """What int8 and int4 weights cost, beside bf16 weights of the same file: perplexity on the first chapters of Alice's
    Adventures in Wonderland, how often the likeliest next token is the same, and the divergence of the predictions. Where the
    file's own weights are quantized, a form that holds them exactly (its weight_error is 0) loses no more of them.

    Takes some half a minute with the default model. Needs a checkout. The exit code is 1 if a goal isn't reached.
    """
    from tandem.bench import quality as bench
    from tandem.model_files import resolve_model

    config = load_config(config_path)
    forms = bench.forms_named([name.strip() for name in weights.split(",")])
    path = resolve_model(config.model.path)
    if as_json:
        print_json(header() | {"quality": {"weights": forms, "tokens": tokens, "threads": config.decode.threads}})
    _print(bench.run(path, forms, config.decode, num_tokens=tokens, say=_say), as_json)


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
def _own_cluster(config: Config, stop: threading.Event | None = None) -> Iterator[str]:
    """A cluster of that configuration on free ports for the time of the measurement. Raises Cancelled if `stop` is set while it
    starts."""
    from tandem.cluster import Cluster

    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        own = {"run_dir": folder, "router": config.router.private()}
        with Cluster(config.model_copy(update=own)) as cluster:
            cluster.start(progress=_say, stop=stop)
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
        limit = "" if result.reference_value is None else f"{result.reference_value:.4g} "
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        table.add_row(
            result.metric,
            f"{result.value:.4g}",
            result.unit,
            "" if result.spread is None else f"{result.spread:.0%}",
            ratio,
            ("yes" if result.ok else "NO") + ("" if result.goal is None else f" (goal {result.goal})"),
            limit + result.reference,
        )
    if not as_json:
        stdout.print(table)
    if not every_ok:
        raise typer.Exit(1)
