"""`tandem sim`: the production router in virtual time.

Owns the command line and the printing; what happens is `tandem.sim`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from tandem.cli.common import JsonOption, print_json, stderr, stdout
from tandem.errors import ConfigError
from tandem.scaling.scaler import Counts, Limits, Scaler
from tandem.sim.compare import REMOVABLE, Result, compare, contenders, sanity
from tandem.sim.load import jobs_of
from tandem.sim.picture import draw
from tandem.sim.policies.registry import POLICIES
from tandem.sim.presets import PRESETS, preset_named
from tandem.sim.scaled import (
    HOLD_S,
    RAMP_S,
    SETTLE_S,
    START_S,
    Scaled,
    ScaledReplay,
    scaler_of,
    shaped,
    summary_of,
    waves_of,
)
from tandem.sim.trace import read_trace

PROGRESS_SEEDS = 10
"""After so many runs a word is said of how it goes."""

app = typer.Typer(no_args_is_help=True, help="The production router in virtual time, against simulated workers.")


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="Requests in Mooncake's format, .gz or not.")],
    workers: Annotated[int, typer.Option(min=2, max=4096, help="Prefill and decode workers together.")] = 8,
    policy: Annotated[
        str, typer.Option(help=f"tandem, {', '.join(POLICIES)}; several, separated by commas; or all.")
    ] = "tandem,least-loaded",
    rate: Annotated[str, typer.Option(help="Requests a second; several, separated by commas.")] = "",
    load: Annotated[
        str,
        typer.Option(
            help="Parts of the capacity, 1 being where least loaded keeps 90 % of its promises. Default, without --rate: 0.95."
        ),
    ] = "",
    most: Annotated[
        int | None, typer.Option("--requests", min=1, help="Only the first so many that come. Default: all.")
    ] = None,
    without: Annotated[
        str, typer.Option(help=f"Ours without a part, to see what it is worth: {', '.join(REMOVABLE)}; or each.")
    ] = "",
    tune: Annotated[
        bool, typer.Option("--tune", help="Policies of others with the parameters that are best in the first half.")
    ] = False,
    preset: Annotated[str, typer.Option(help=f"{' or '.join(PRESETS)}.")] = "h100-llama-70b",
    seed: Annotated[int, typer.Option(min=0)] = 1,
    picture: Annotated[Path | None, typer.Option(help="Also draw it, as an SVG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A recorded trace through the production index, fleet, admission and policy, in virtual time, beside the policies that other
    systems publish, which get the same workers, tiers and network.

    Workers take as long as the preset's step times say, 5 % more or less at random. A request is served as promised with its
    first token within 300 ms and 300 ms more for each thousand tokens that no request before it had, and 50 ms a token after it.
    What is never answered counts as an infinite time to first token. Larger clusters than 8 workers get copies of the trace side
    by side.
    """
    if picture is not None and not picture.parent.is_dir():
        raise ConfigError(f"--picture {picture}: there is no folder {picture.parent}")
    if not (rate or load):
        load = "0.95"
    rates, loads = _numbers("--rate", rate), _numbers("--load", load)
    who = contenders(_names(policy), _names(without))
    chosen = preset_named(preset)
    requests = read_trace(file)
    about = sanity(requests)
    if as_json:
        print_json({"trace": file.name, **about, "workers": workers, "preset": chosen.name, "source": chosen.source})
    else:
        stdout.print(
            f"{about['requests']:,.0f} requests of {about['prompt_tokens']:,.0f} tokens, answers of "
            f"{about['answer_tokens']:,.0f}; {about['block_hit_rate']:.1%} of all blocks came before. {workers} workers.",
            highlight=False,
        )
        stdout.print(f"{chosen.name}: {chosen.source}", style="dim", highlight=False)
    results = compare(
        requests, chosen, workers, who, rates=rates, loads=loads, most=most, tune=tune, seed=seed, say=_say
    )
    found: list[Result] = []
    for result in results:
        found.append(result)
        if as_json:
            print_json(asdict(result))
    if picture is not None:
        picture.write_text(draw(found, workers), encoding="utf-8")
    if as_json:
        return
    for asked in dict.fromkeys(result.rate for result in found):
        _print([result for result in found if result.rate == asked])


@app.command()
def planner(
    file: Annotated[
        Path, typer.Argument(help="Requests in Mooncake's format, .gz or not: what comes is made of them.")
    ],
    rate: Annotated[float, typer.Option(min=0.01, max=1e4, help="Requests a second before the load doubles.")] = 2.0,
    waves: Annotated[int, typer.Option(min=1, max=100, help="So often the load doubles and halves.")] = 2,
    hold: Annotated[float, typer.Option(min=10, max=1e5, help="Seconds between one ramp and the next.")] = HOLD_S,
    ramp: Annotated[float, typer.Option(min=1, max=1e5, help="Seconds in which it doubles, or halves.")] = RAMP_S,
    start: Annotated[float, typer.Option(min=0, max=3600, help="Seconds in which a worker starts.")] = START_S,
    settle: Annotated[
        float, typer.Option(min=1, max=1e5, help="Seconds without need before workers are taken away.")
    ] = SETTLE_S,
    preset: Annotated[str, typer.Option(help=f"{' or '.join(PRESETS)}.")] = "h100-llama-70b",
    seed: Annotated[int, typer.Option(min=0)] = 1,
    why: Annotated[bool, typer.Option("--why", help="Also each change, with its reasons.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A load that doubles and halves, with as many workers as the planner wants, beside fixed numbers of them: the most that it
    had, all the time, and as many as it had on average.

    The planner is the production one, and so is the router. Promises are those of `tandem sim trace`. The first minutes, in which
    the planner has two workers of each role and knows nothing, count as well.
    """
    chosen = preset_named(preset)
    points = waves_of(waves, hold, ramp)
    jobs = shaped(jobs_of(read_trace(file), rate, seed=seed), rate, points)
    runs: list[tuple[str, Scaled]] = []

    def run(name: str, wanted: Counts, scaler: Scaler | None) -> Scaled:
        _say(f"{name}: {wanted.prefill} prefill and {wanted.decode} decode workers" + (" at first" if scaler else ""))
        found = ScaledReplay(chosen, wanted, jobs, scaler, start_s=start, seed=seed).run_scaled()
        runs.append((name, found))
        return found

    planned = run("planner", Counts(2, 2), scaler_of(Limits(), start_s=start, settle_s=settle))
    run("its most", planned.most, None)
    run("its mean", planned.mean, None)
    if as_json:
        print_json({"trace": file.name, "requests": len(jobs), "rate": rate, "waves": waves, "preset": chosen.name})
        for name, found in runs:
            print_json({"workers": name} | summary_of(found))
        return
    stdout.print(
        f"{len(jobs):,} requests in {points[-1][0]:,.0f} s: {rate:g}/s, {waves} times doubled within {ramp:g} s and halved after "
        f"{hold:g} s",
        highlight=False,
    )
    table = Table(box=SIMPLE, pad_edge=False)
    columns = (
        "workers",
        "prefill",
        "decode",
        "as promised",
        "TTFT p50",
        "p90",
        "TPOT p90",
        "worker-hours",
        "changes",
        "moved",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "workers" else "right", no_wrap=True)
    for name, found in runs:
        said = summary_of(found)
        table.add_row(
            name,
            *(f"{said[key]}" for key in ("prefill", "decode")),
            f"{said['as_promised']:.1%}",
            *(f"{said[key]:.2f} s" for key in ("ttft_p50_s", "ttft_p90_s")),
            f"{1000 * said['tpot_p90_s']:.0f} ms",
            f"{said['worker_hours']:.2f}",
            *(f"{said[key]}" for key in ("changes", "moved")),
        )
    stdout.print(table)
    for change in planned.changes if why else ():
        stdout.print(
            f"{change.at_s:,.0f} s: {change.wanted.prefill} prefill, {change.wanted.decode} decode", highlight=False
        )
        for reason in change.reasons:
            stdout.print(f"    {reason}", highlight=False, style="dim")


@app.command()
def faults(
    seeds: Annotated[int, typer.Option(min=1, max=10_000_000, help="So many runs, each with a seed of its own.")] = 100,
    first_seed: Annotated[int, typer.Option(min=0)] = 1,
    requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="Of each run.")] = 300,
    requests_per_fault: Annotated[int, typer.Option(min=0, help="A fault every so many; 0: no faults.")] = 50,
    story: Annotated[bool, typer.Option("--story", help="Tell what happened in each run, also when all held.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The production classes of router, workers and pool nodes under a virtual clock and network, while processes crash and
    freeze, messages are lost, doubled, late or cut off, clocks jump and bytes are damaged.

    Checked: every token exactly once and the fake model's truth; one terminal message a request; no memory freed while it is
    read, none lost, none kept; what routers and pool nodes believe becomes what workers hold; nothing waits for ever. A seed is a
    run: a violation is told with its story and the command that repeats it. Exits 0 only if all seeds hold.
    """
    from tandem.sim.faults.report import Summary, command_of, line_of
    from tandem.sim.faults.run import run_seeds
    from tandem.sim.faults.shape import Shape

    shape = Shape(requests_per_fault=requests_per_fault)
    summary = Summary()
    for result in run_seeds(first_seed, seeds, requests, shape, tell=story):
        summary.add(result)
        if as_json:
            print_json(line_of(result))
        elif story or result.violation:
            stdout.print("\n".join(result.story), highlight=False, markup=False, soft_wrap=True)
        if result.violation:
            stderr.print(f"seed {result.seed}: {result.violation}", style="bold red", markup=False, soft_wrap=True)
            stderr.print(f"again: {command_of(result, requests, requests_per_fault)}", markup=False, soft_wrap=True)
        if summary.num_seeds % PROGRESS_SEEDS == 0 and summary.num_seeds < seeds:
            _say(summary.line())
    if as_json:
        print_json(summary.as_line())
    else:
        stdout.print(summary.line(), highlight=False, markup=False, soft_wrap=True)
    if summary.failed:
        raise typer.Exit(1)


def _say(line: str) -> None:
    stderr.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in _names(text)]
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}, must be numbers separated by commas") from error
    if text and not numbers:
        raise ConfigError(f"{option} is {text!r}, must be numbers separated by commas")
    if not all(0.0 < number <= 1e6 for number in numbers):
        raise ConfigError(f"{option} is {text!r}, each must be more than 0 and at most 1,000,000")
    return numbers


def _print(results: Sequence[Result]) -> None:
    first = results[0]
    part = f", {first.load:.0%} of capacity" if first.load is not None else ""
    latency = _table(
        f"{first.rate:.2f} requests/s{part}",
        ("policy", "as promised", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "req/s"),
    )
    blocks = _table(
        "KV: where hits were, of all prompt tokens, and what was moved",
        ("policy", "hits", "in place", "HOST", "DISK", "others", "fetched", "handed over", "here", "busiest"),
    )
    for result in results:
        name = f"{result.policy} {result.setting}".strip()
        latency.add_row(
            name,
            f"{result.goodput:.1%}",
            *(f"{value:.2f} s" for value in (result.ttft_p50, result.ttft_p90, result.ttft_p99)),
            *(f"{1000 * value:.0f} ms" for value in (result.tpot_p50, result.tpot_p90, result.tpot_p99)),
            f"{result.requests_per_s:,.0f}",
        )
        if not result.hits:
            continue  # the bound is nowhere
        blocks.add_row(
            name,
            f"{result.hit_rate:.1%}",
            *(f"{result.hits.get(place, 0.0):.1%}" for place in ("DEVICE", "HOST", "DISK", "other DEVICE")),
            *(f"{result.moved_bytes.get(why, 0.0) / 1e12:.1f} TB" for why in ("fetch", "hand-over")),
            f"{result.prefilled_here:.1%}",
            f"{result.imbalance:.2f}",
        )
    stdout.print(latency)
    stdout.print(blocks)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    return table
