"""`tandem audit`: what every party of a cluster owns against what the others believe, and what dead ones left on this machine.

Owns the local checks, the printing and the exit code; the cluster's own checks are made by its routers (`router/auditor.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from tandem.cli.common import (
    ConfigOption,
    JsonOption,
    TargetOption,
    print_json,
)
from tandem.cli.reach import connect_own, given, target_of
from tandem.cli.run_file import RunFile
from tandem.client import Client, targets_of
from tandem.clock import now_s
from tandem.config import Config, load_config

_ARENA = "/memfd:tandem-arena"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of an audit."""

    check: str
    ok: bool
    evidence: str
    seconds: float


def audit(config_path: ConfigOption = None, target: TargetOption = "", as_json: JsonOption = False) -> None:
    """Ask every process what it owns and hold that against what the others believe: blocks, leases, dispatches, the prefix index,
    the ledger, shared memory; and look for what dead processes left on this machine. Exit code 0 only if all agree."""
    config = load_config(config_path)
    ok = True
    for check in (*_routers(target, config), left_memory(), left_run_file(config.run_path)):
        ok &= check.ok
        if as_json:
            print_json({"check": check.check, "ok": check.ok, "evidence": check.evidence, "seconds": check.seconds})
        else:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.check}: {check.evidence}")
    if not ok:
        raise typer.Exit(1)


def _routers(target: str, config: Config) -> Iterator[Check]:
    """Each router has its own beliefs."""
    targets = targets_of(target_of(target, config))
    for one in targets:
        began_s = now_s()
        with Client(one, credentials=given()) if target else connect_own(config, one) as client:
            answer = client.audit()
        seconds = now_s() - began_s
        for check in answer.checks:
            name = check.check if len(targets) == 1 else f"{one}: {check.check}"
            yield Check(name, check.ok, check.evidence, seconds)


def left_memory(proc: Path = Path("/proc")) -> Check:
    """Arenas of which the process that wrote them is gone, and which others hold."""
    began_s = now_s()
    owned: set[int] = set()
    held: dict[int, list[str]] = {}
    for process in proc.glob("[0-9]*"):
        try:
            lines = (process / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue  # it has ended, or is somebody else's
        for line in lines:
            if _ARENA not in line:
                continue
            _, permissions, _, _, inode, _ = line.split(maxsplit=5)
            if "w" in permissions:
                owned.add(int(inode))
            held.setdefault(int(inode), []).append(process.name)
    left = {inode: pids for inode, pids in held.items() if inode not in owned}
    evidence = f"{len(held)} arenas on this machine"
    if left:
        holders = sorted({pid for pids in left.values() for pid in pids}, key=int)
        evidence += f", {len(left)} of them of dead processes, held by {', '.join(holders)}"
    return Check("no memory of a dead process is left on this machine", not left, evidence, now_s() - began_s)


def left_run_file(run_path: Path) -> Check:
    """A run file whose process was killed: the next `tandem serve` cleans up after it."""
    began_s = now_s()
    run_file = RunFile(run_path)
    running = run_file.read()
    try:
        size = run_file.path.stat().st_size
    except FileNotFoundError:
        size = 0
    left = running is None and size > 0
    evidence = f"{run_file.path}: " + ("left by a process that is gone" if left else "held" if running else "none")
    return Check("no run file of a dead process is left", not left, evidence, now_s() - began_s)
