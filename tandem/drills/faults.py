"""The steps that hurt a cluster: what each waits for, what it does, and the evidence that it did.

Owns nothing: processes, lines and clients are the stage's. A step whose condition doesn't come true in time, or that did nothing,
raises `NotFired`: a drill whose fault didn't happen has shown nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from protos import tandem_pb2 as pb
from tandem.clock import now_s
from tandem.drills.load import Asking
from tandem.drills.processes import role_of, wait_until
from tandem.drills.spec import (
    DiskStep,
    EventsStep,
    LineStep,
    LoadStep,
    MemoryStep,
    SignalStep,
    StartStep,
    Step,
    WaitStep,
    When,
)
from tandem.drills.stage import Stage
from tandem.errors import DeadlineExceeded, TandemError

END_S = 10.0
_ALIGNMENT = 4096


class NotFired(TandemError):
    """A step did not happen."""


@dataclass(frozen=True, slots=True)
class Fired:
    """A step that happened, when, and what shows it. `name` is short, for pictures."""

    name: str
    at_s: float
    evidence: str


@dataclass(slots=True)
class Scene:
    """What steps see: the stage, the clients by name of their requests, and what was counted when the drill began."""

    stage: Stage
    asking: dict[str, list[Asking]] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    send: Callable[[int], Sequence[str]] = lambda phase: ()
    """Sends the requests of a phase; their keys."""
    last: str = ""
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of each process that ran when memory was measured: its pid and its bytes."""

    def named(self, process: str) -> str:
        """The process that a step means."""
        if process == "last":
            return self.last
        if not process.startswith("busy:"):
            return process
        role = process.removeprefix("busy:")
        listed = self.running(self.stage.cluster.listed() or {})
        ours = [status for name, status in listed.items() if _is(name, role)]
        busy = [status for status in ours if status.num_running + status.num_waiting or status.step_age_s > 0]
        if not busy:
            raise NotFired(f"no {role} process has work")
        return max(busy, key=lambda one: (one.step_age_s > 0, one.num_running + one.num_waiting)).name

    def running(self, listed: dict[str, pb.ProcessStatus]) -> dict[str, pb.ProcessStatus]:
        """Without those that have ended, and of which the router has not noticed it yet."""
        processes = self.stage.cluster.processes
        return {name: one for name, one in listed.items() if name not in processes or processes[name].poll() is None}

    def grown(self, what: str, listed: dict[str, pb.ProcessStatus] | None) -> int:
        """By how much a counter of a process, or of all of a role, has grown since the drill began."""
        return counted(what, listed) - self.before.get(what, 0)


def _is(name: str, who: str) -> bool:
    """Whether that process is meant: by its name, its role, or as one of both kinds of workers."""
    return who in (name, role_of(name)) or (who == "worker" and role_of(name) in ("prefill", "decode"))


def counted(what: str, listed: dict[str, pb.ProcessStatus] | None) -> int:
    """`PROCESS.COUNTER`, or the sum of `ROLE.COUNTER`."""
    who, _, counter = what.rpartition(".")
    return sum(
        status.counters.get(counter, 0) for name, status in (listed or {}).items() if who in (name, role_of(name))
    )


def fire(step: Step, scene: Scene, after_s: float) -> Fired:
    """Waits for the step's condition, does it, and says so. `after_s`: when the step before was. Raises NotFired."""
    try:
        why = _await(step.when, scene, after_s)
        name, evidence = _do(step, scene)
    except DeadlineExceeded as error:
        raise NotFired(str(error)) from error
    return Fired(name, now_s(), f"{why}{evidence}")


def _await(when: When, scene: Scene, after_s: float) -> str:
    seen: dict[str, str] = {}

    def come() -> bool:
        if now_s() < after_s + when.after_s:
            return False
        for name, count in when.tokens.items():
            if any(one.got.num_tokens < count for one in scene.asking.get(name, [])) or name not in scene.asking:
                return False
            seen["tokens"] = f"after {max(one.got.num_tokens for one in scene.asking[name])} tokens of {name}, "
        if when.accepted and any(one.got.accepted_s is None for one in scene.asking.get(when.accepted, [])):
            return False
        if when.ended and any(one.got.ended_s is None for one in scene.asking.get(when.ended, [])):
            return False
        return _seen_by_router(when, scene, seen)

    wait_until(come, when.within_s, f"the condition {when}")
    return "".join(seen.values())


def _seen_by_router(when: When, scene: Scene, seen: dict[str, str]) -> bool:
    if not (when.running or when.more or when.step_s or when.gone or when.listed):
        return True
    listed = scene.stage.cluster.listed()
    if listed is None:
        return False
    if when.running:
        busy = [
            name
            for name, status in listed.items()
            if when.running in (name, role_of(name)) and status.num_running + status.num_waiting
        ]
        if not busy:
            return False
        seen["running"] = f"while {busy[0]} works, "
    for what, more in when.more.items():
        if (grown := scene.grown(what, listed)) < more:
            return False
        seen[what] = f"with {what} +{grown}, "
    for who, least_s in when.step_s.items():
        ages_s = [status.step_age_s for name, status in scene.running(listed).items() if _is(name, who)]
        if max(ages_s, default=0.0) < least_s:
            return False
        seen[who] = f"in a step of {max(ages_s):.2f} s of {who}, "
    if when.gone and scene.named(when.gone) in listed:
        return False
    return not when.listed or scene.stage.cluster.is_listed(scene.named(when.listed), listed)


def _do(step: Step, scene: Scene) -> tuple[str, str]:
    stage = scene.stage
    match step:
        case SignalStep():
            scene.last = scene.named(step.process)
            return f"{step.signal} {scene.last}", _signal(stage, scene.last, step.signal)
        case StartStep():
            name = scene.last = scene.named(step.process)
            stage.start(name)
            return f"start {name}", f"{name} is process {stage.cluster.processes[name].pid}"
        case LineStep():
            line = stage.lines[step.line]
            passed = line.num_bytes
            line.set(step.state, step.towards, step.bytes_per_s)
            return f"{step.line}: {step.state}", f"{step.line} is {step.state} after {passed} bytes"
        case EventsStep():
            relays = stage.lines[step.line].relays
            if not relays:
                raise NotFired(f"no KV events pass {step.line}")
            for relay in relays:
                relay.drop, relay.swap = step.drop, step.swap
            return f"{step.line}: events", f"every {step.drop}-th lost, every {step.swap}-th late"
        case DiskStep():
            return f"disk {step.how}", _disk(stage, step.how)
        case LoadStep():
            keys = scene.send(step.phase)
            return f"phase {step.phase}", f"{len(keys)} requests"
        case MemoryStep():
            scene.memory = {name: (pid, resident_bytes(pid)) for name, pid in stage.pids().items()}
            return "memory", f"{len(scene.memory)} processes were measured"
        case WaitStep():
            # What is waited for may be the fault itself.
            return ("long step" if step.when.step_s else ""), "waited"


def _signal(stage: Stage, name: str, kind: str) -> str:
    process = stage.cluster.processes[name]
    if process.poll() is not None:
        raise NotFired(f"{name} had ended already, with {process.returncode}")
    if kind == "TERM":
        stage.ask_to_stop(name)
        return f"{name} (process {process.pid}) was asked to stop"
    process.send_signal(getattr(signal, f"SIG{kind}"))
    if kind == "KILL":
        code = process.wait(END_S)
        if code != -signal.SIGKILL:
            raise NotFired(f"{name} ended with {code}, not by SIGKILL")
        return f"{name} (process {process.pid}) ended with {code}"
    stopped = kind == "STOP"
    wait_until(
        lambda: (_state(process.pid) == "T") == stopped, END_S, f"{name} is {'stopped' if stopped else 'running'}"
    )
    return f"{name} (process {process.pid}) is in state {_state(process.pid)}"


def _state(pid: int) -> str:
    """As /proc says it."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]


def _disk(stage: Stage, how: str) -> str:
    folder = stage.disk
    assert folder is not None
    filler = folder / "others"
    if how == "fill":
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(_ALIGNMENT))
        return f"{os.statvfs(folder).f_bavail} blocks are left"
    if how == "free":
        filler.unlink()
        return f"{os.statvfs(folder).f_bavail} blocks are left"
    segments = sorted(folder.glob("segment-*"))
    if not segments:
        raise NotFired(f"{folder} has no segments")
    if how == "truncate":
        for segment in segments:
            os.truncate(segment, 0)
        return f"{len(segments)} segments have 0 bytes"
    num_flipped = 0
    for segment in segments:
        with segment.open("r+b") as file:
            for at in range(512, segment.stat().st_size, _ALIGNMENT):
                file.seek(at)
                (byte,) = file.read(1) or b"\0"
                file.seek(at)
                file.write(bytes([byte ^ 1]))
                num_flipped += 1
    return f"{num_flipped} bits are flipped"


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own: not the arenas and weights that it maps."""
    memory = psutil.Process(pid).memory_info()
    return int(memory.rss - memory.shared)
