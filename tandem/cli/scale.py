"""`tandem scale` and `tandem drain`: how many workers there are to be, and which one is to leave.

Owns the command lines. Routers are told; whoever keeps the cluster acts on it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from protos import tandem_pb2 as pb
from tandem.cli.common import ConfigOption, JsonOption, TargetOption, as_dict, print_json
from tandem.cli.reach import connect
from tandem.errors import InvalidRequest

ROLES = ("prefill", "decode")


def scale(
    counts: Annotated[list[str], typer.Argument(help="`prefill=N`, `decode=N`, or both.")],
    reason: Annotated[str, typer.Option(help="Why: `tandem status` shows it.")] = "",
    config_path: ConfigOption = None,
    target: TargetOption = "",
    as_json: JsonOption = False,
) -> None:
    """Set how many workers of a role there are to be. `tandem serve` or `tandem up` starts them, or lets some finish what they
    have and leave; where one role gets fewer and the other more, workers change their role in their places."""
    wanted = counts_of(counts)
    with connect(target, config_path) as client:
        found = client.set_replicas(wanted.get("prefill"), wanted.get("decode"), reason or "tandem scale")
    _show(found, as_json)


def drain(
    process: Annotated[str, typer.Argument(help="A worker, as `tandem status` names it.")],
    config_path: ConfigOption = None,
    target: TargetOption = "",
    as_json: JsonOption = False,
) -> None:
    """Let a worker finish what it has and leave; nothing starts in its place until `tandem scale` says so, or the planner."""
    with connect(target, config_path) as client:
        found = client.drain(process)
    if as_json:
        print_json(as_dict(found))
        return
    print(
        f"{process} takes nothing more, finishes what it has ({found.num_dispatches} dispatches of this router) and leaves"
    )
    if found.wanted.revision:
        _show(found.wanted, as_json=False)


def counts_of(said: list[str]) -> dict[str, int]:
    """`prefill=2 decode=3` as numbers. Raises InvalidRequest for anything else."""
    found: dict[str, int] = {}
    for part in said:
        role, sign, number = part.partition("=")
        if role not in ROLES or not sign or not number.isdecimal() or role in found:
            raise InvalidRequest(f"{part!r} is not `prefill=N` or `decode=N`, each once")
        found[role] = int(number)
    return found


def _show(wanted: pb.Replicas, as_json: bool) -> None:
    if as_json:
        print_json(as_dict(wanted))
    else:
        print(f"wanted: {wanted.prefill} prefill and {wanted.decode} decode workers")
