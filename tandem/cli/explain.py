"""`tandem explain`: why a request went where it went.

Owns the printing; what is said is the router's (`router/explain.py`).
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from protos import tandem_pb2 as pb
from tandem.cli.common import ConfigOption, JsonOption, TargetOption, as_dict, print_json, stdout
from tandem.cli.reach import connect


def explain(
    request_id: Annotated[str, typer.Argument(help="One of the last that ended. Default: the very last.")] = "",
    config_path: ConfigOption = None,
    target: TargetOption = "",
    as_json: JsonOption = False,
) -> None:
    """Why a request went where it went: every worker that was weighed with its predicted seconds, the choice, what happened, and
    what the best choice would have been in hindsight."""
    with connect(target, config_path) as client:
        answer = client.explain(request_id)
    if as_json:
        print_json(as_dict(answer))
        return
    stdout.print(
        f"request {answer.request_id}: {answer.outcome}{': ' + answer.error if answer.error else ''}; "
        f"{answer.num_prompt_tokens:,} prompt tokens, {answer.num_generated_tokens:,} generated",
        highlight=False,
    )
    for decision in answer.decisions:
        _print_decision(decision)
    for run in answer.runs:
        stdout.print(
            f"happened: {run.role} at {run.process}: {run.local_hit_tokens:,} tokens found, {run.fetched_tokens:,} fetched, "
            f"{run.computed_tokens:,} computed; queue {_ms(run.queue_s)}, fetch {_ms(run.fetch_s)}, compute {_ms(run.compute_s)}",
            highlight=False,
        )
    if answer.HasField("ttft_s"):
        stdout.print(
            f"first token after {_ms(answer.ttft_s)}, predicted {_ms(answer.predicted_ttft_s)}. In hindsight best: "
            f"{answer.best_process} with {_ms(answer.best_ttft_s)}; regret {_ms(answer.regret_s)}",
            highlight=False,
        )


def _print_decision(decision: pb.Decision) -> None:
    where = f"{decision.prefill} → {decision.decode}" if decision.prefill else f"{decision.decode} alone"
    stdout.print(
        f"after {_ms(decision.after_s)}: {where}; {decision.hit_tokens:,} tokens need not be computed; predicted first token "
        f"{_ms(decision.ttft_s)} = longer of queue {_ms(decision.queue_s)} and fetch {_ms(decision.fetch_s)} + compute "
        f"{_ms(decision.compute_s)} + messages {_ms(decision.overhead_s)}",
        highlight=False,
    )
    if decision.sources:
        places = ", ".join(f"{place.process} {place.tier} ({place.num_blocks} blocks)" for place in decision.sources)
        stdout.print(f"sources, in order: {places}", highlight=False)
    table = Table(box=SIMPLE, pad_edge=False)
    columns = ("worker", "first token", "queue", "fetch", "compute", "hit tokens", "others wait", "stream")
    for column in columns:
        table.add_column(column, justify="left" if column == "worker" else "right", no_wrap=True)
    for candidate in sorted(decision.candidates, key=lambda one: (not one.chosen, one.ttft_s + one.others_s)):
        table.add_row(
            f"{'*' if candidate.chosen else ' '} {candidate.process}",
            *(_ms(value) for value in (candidate.ttft_s, candidate.queue_s, candidate.fetch_s, candidate.compute_s)),
            f"{candidate.hit_tokens:,}",
            _ms(candidate.others_s),
            _ms(candidate.stream_s),
        )
    stdout.print(table)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"
