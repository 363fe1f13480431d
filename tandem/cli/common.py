"""What several subcommands share: options, where the cluster answers, JSON lines, tables.

Owns no command and keeps no state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from protos import tandem_pb2 as pb
from tandem.cli.run_file import RunFile
from tandem.config import Config, load_config

stdout = Console()
stderr = Console(stderr=True)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; TANDEM_… environment variables override it.")
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target", help="host:port of a router. Default: the cluster that runs here, else the configured port."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]


def target_of(target: str, config: Config) -> str:
    """Where the router answers: `target` if given, else what the running cluster's run file says, else the configuration."""
    if target:
        return target
    running = RunFile(config.run_path).read()
    return running.target if running else f"{config.router.host}:{config.router.grpc_port}"


def configured_target(target: str, config_path: Path | None) -> str:
    """As `target_of`, from the path of a configuration."""
    return target or target_of("", load_config(config_path))


def print_json(values: dict[str, Any]) -> None:
    """One line, flushed: a program may be waiting for it."""
    print(json.dumps(values, ensure_ascii=False), flush=True)


def as_dict(message: Message) -> dict[str, Any]:
    """A message as a program reads it: names as in the proto file, zeros included."""
    values: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return values


def cluster_table(cluster: pb.GetClusterResponse) -> Table:
    """What runs where, a process a row."""
    title = f"{cluster.model or '(no model yet)'}: {'ready' if cluster.ready else 'not ready'}"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("process", "pid", "beat", "run", "wait", "KV blocks", "tokens", "hits", "fetched"):
        table.add_column(column, justify="left" if column == "process" else "right", no_wrap=True)
    table.add_row(cluster.router or "router", "", "", str(cluster.num_active_requests))
    for process in cluster.processes:
        table.add_row(
            process.name,
            str(process.pid),
            f"{process.heartbeat_age_s:.1f}s",
            str(process.num_running),
            str(process.num_waiting),
            f"{process.num_blocks - process.free_blocks + process.cached_blocks}/{process.num_blocks}",
            str(process.prefill_tokens + process.decode_tokens),
            str(process.prefix_hit_tokens),
            str(process.fetched_blocks),
        )
    return table


def report_lines(done: pb.Completed, time_per_token_s: float | None = None) -> list[str]:
    """Where a request ran and what it reused, as sentences for people."""
    lines = [
        f"prompt {done.num_prompt_tokens} tokens, {done.num_cached_tokens} of them found cached; "
        f"generated {done.num_generated_tokens}",
        f"time to first token {done.ttft_s * 1000:.0f} ms, whole answer {done.total_s:.2f} s"
        + (f", {time_per_token_s * 1000:.1f} ms a token" if time_per_token_s is not None else ""),
    ]
    for run in done.runs:
        lines.append(
            f"{run.role} on {run.process}: had {run.local_hit_tokens} tokens, fetched {run.fetched_tokens}, "
            f"computed {run.computed_tokens} (queue {run.queue_s * 1000:.0f} ms, fetch {run.fetch_s * 1000:.0f} ms, "
            f"compute {run.compute_s * 1000:.0f} ms)" + (f", attempt {run.attempt}" if run.attempt else "")
        )
        for source in run.fetched:
            blocks = "1 block" if source.num_blocks == 1 else f"{source.num_blocks} blocks"
            lines.append(
                f"  {blocks} ({source.num_bytes / 2**20:.1f} MiB) from {source.process}'s {source.tier} tier "
                f"over {source.transport}"
            )
    return lines
