"""What several subcommands share: options, JSON lines, tables.

Owns no command and keeps no state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from protos import tandem_pb2 as pb

_PIPED_WIDTH = 200
"""Columns where stdout is no terminal: whatever reads it has no edge to fit."""

stdout = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
stderr = Console(stderr=True)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; TANDEM_… environment variables override it.")
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        help="host:port of a router, or of several with commas between. Default: the cluster that runs here, else as configured.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]


def print_json(values: dict[str, Any]) -> None:
    """One line, flushed: a program may be waiting for it."""
    print(json.dumps(values, ensure_ascii=False), flush=True)


def as_dict(message: Message) -> dict[str, Any]:
    """A message as a program reads it: names and their order as in the proto file, zeros included, integers of all sizes as
    numbers, maps sorted by key."""
    values = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _ordered(cast("Descriptor", message.DESCRIPTOR), values)


_WIDE = (
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_SINT64,
    FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_SFIXED64,
)
"""What protobuf's JSON writes as strings."""


def _ordered(descriptor: Descriptor, values: dict[str, Any]) -> dict[str, Any]:
    return {field.name: _plain(field, values[field.name]) for field in descriptor.fields if field.name in values}


def _plain(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(field, item) for item in value]
    if field.message_type is None:
        return int(value) if field.type in _WIDE else value
    if field.message_type.GetOptions().map_entry:
        return {key: _plain(field.message_type.fields_by_name["value"], value[key]) for key in sorted(value)}
    return _ordered(field.message_type, value)


_COLUMNS = ("process", "pid", "beat", "run", "wait", "KV blocks", "tokens", "hits", "fetched")
_DISPENSABLE = ("fetched", "hits", "beat", "tokens", "pid", "wait")
"""What a narrow terminal does without, first to last: a missing column is better than a number cut short."""


def cluster_table(cluster: pb.GetClusterResponse, console: Console = stdout) -> Table:
    """What runs where, a process a row, with as many columns as fit `console` uncut."""
    columns = list(_COLUMNS)
    table = _cluster_table(cluster, columns)
    for name in _DISPENSABLE:
        if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
            break
        columns.remove(name)
        table = _cluster_table(cluster, columns)
    return table


def _cluster_table(cluster: pb.GetClusterResponse, columns: list[str]) -> Table:
    title = f"{cluster.model or '(no model yet)'}: {'ready' if cluster.ready else 'not ready'}"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "process" else "right", no_wrap=True)
    rows = [{"process": cluster.router or "router", "run": str(cluster.num_active_requests)}]
    rows += [
        {
            "process": process.name,
            "pid": str(process.pid),
            "beat": f"{process.heartbeat_age_s:.1f}s",
            "run": str(process.num_running),
            "wait": str(process.num_waiting),
            "KV blocks": f"{process.num_blocks - process.free_blocks + process.cached_blocks}/{process.num_blocks}",
            "tokens": str(process.prefill_tokens + process.decode_tokens),
            "hits": str(process.prefix_hit_tokens),
            "fetched": str(process.fetched_blocks),
        }
        for process in cluster.processes
    ]
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
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
        # A decode worker asks while prefill is still computing: its fetch is mostly waiting.
        fetch = "waited for prefill and fetched" if run.role == "decode" else "fetch"
        lines.append(
            f"{run.role} on {run.process}: had {run.local_hit_tokens} tokens, fetched {run.fetched_tokens}, "
            f"computed {run.computed_tokens} (queue {run.queue_s * 1000:.0f} ms, {fetch} {run.fetch_s * 1000:.0f} ms, "
            f"compute {run.compute_s * 1000:.0f} ms)" + (f", attempt {run.attempt}" if run.attempt else "")
        )
        for source in run.fetched:
            blocks = "1 block" if source.num_blocks == 1 else f"{source.num_blocks} blocks"
            lines.append(
                f"  {blocks} ({source.num_bytes / 2**20:.1f} MiB) from {source.process}'s {source.tier} tier "
                f"over {source.transport}"
            )
    if done.HasField("exposed_transfer_s"):
        lines.append(
            f"the prompt's KV was complete {done.exposed_transfer_s * 1000:.1f} ms after prefill's first token"
        )
    return lines


def link_lines(cluster: pb.GetClusterResponse) -> list[str]:
    """What moves between whom, by which transport and how fast."""
    return [
        f"{process.name} ← {link.source} over {link.transport}: {link.num_bytes / 2**20:,.0f} MiB"
        + (f", {link.bytes_per_s / 1e9:.1f} GB/s" if link.bytes_per_s else "")
        for process in cluster.processes
        for link in process.links
    ]
