"""`tandem demo`, which `make demo` runs: a whole cluster on free ports answers a prompt, then shows a prefix hit.

Owns the story that is shown. Everything runs in a temporary run folder and is gone at the end.
"""

from __future__ import annotations

import tempfile
from typing import Annotated

import typer

from protos import tandem_pb2 as pb
from tandem.cli.common import ConfigOption, report_lines, stderr, stdout
from tandem.cli.generate import Answer, check_prompt, say_cut, stream
from tandem.cli.models import pull_with_bar
from tandem.cli.serve import stop_on_signals
from tandem.client import Client
from tandem.config import load_config
from tandem.errors import TandemError

_REPORT = (
    "On day {day} the station keeper wrote: wind from the {wind}, the water {water}, {birds} birds on the rocks, and a ship "
    "of {masts} masts passed at noon without a greeting. "
)
_REPORT_TOKENS = 42
_LONG_TOKENS = 2000


def demo(
    prompt: Annotated[str, typer.Argument(help="What to ask.")] = "Write one sentence about the sea.",
    config_path: ConfigOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generate at most so many tokens.")] = 128,
) -> None:
    """Start a cluster on this machine, ask it, show where the answer came from, and stop it."""
    from tandem.cluster import Cluster
    from tandem.model_files import KNOWN_MODELS

    check_prompt(prompt)
    with tempfile.TemporaryDirectory(prefix="tandem-demo-") as folder:
        config = load_config(config_path)
        config = config.model_copy(update={"run_dir": folder, "router": config.router.private()})
        cluster = Cluster(config)
        if config.model.path in KNOWN_MODELS:
            pull_with_bar(config.model.path)
        with stop_on_signals() as stop, cluster:
            cluster.start(progress=_progress, stop=stop)
            with Client(cluster.target) as client:
                _heading(prompt)
                sampling = pb.SamplingParams(max_tokens=max_tokens)
                answer = stream(client, [("user", prompt)], sampling, echo=True, timeout_s=300)
                print()
                say_cut(answer)
                _report(answer)
                if stop.is_set():
                    return
                _heading(f"The same prompt of some {_LONG_TOKENS} tokens twice: the second finds its KV")
                long = _long_prompt()
                first, second = (
                    stream(client, [("user", long)], pb.SamplingParams(max_tokens=16), timeout_s=300) for _ in range(2)
                )
                _report(first)
                _report(second)
                _compare(first, second)
                if first.token_ids != second.token_ids:
                    raise TandemError(f"the two answers differ: {first.texts!r} and {second.texts!r}")
            _progress("stopping everything")


def _long_prompt() -> str:
    """About 2,000 tokens of a diary and a question about it."""
    winds, waters = ("north", "east", "south", "west"), ("grey", "green", "calm", "rough", "white with foam")
    days = [
        _REPORT.format(day=day, wind=winds[day % 4], water=waters[day % 5], birds=day * 7 % 50, masts=day % 3 + 1)
        for day in range(1, _LONG_TOKENS // _REPORT_TOKENS)
    ]
    return "".join(days) + "What did the keeper see most often?"


def _compare(first: Answer, second: Answer) -> None:
    """Says how much sooner the second answer began, on the router's clock, like the reports above it."""
    if first.completed is not None and second.completed is not None:
        before_s, after_s = first.completed.ttft_s, second.completed.ttft_s
        ratio = f" ({before_s / after_s:.1f} times faster)" if after_s else ""
        print(f"time to first token: {before_s * 1000:.0f} ms, then {after_s * 1000:.0f} ms{ratio}")


def _progress(line: str) -> None:
    stderr.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def _dim(line: str) -> None:
    stdout.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def _heading(line: str) -> None:
    stdout.print(f"\n{line}", style="bold", highlight=False, markup=False, soft_wrap=True)


def _report(answer: Answer) -> None:
    if answer.completed is not None:
        for line in report_lines(answer.completed, answer.time_per_token_s):
            _dim(line)
