"""What a drill is: its file as frozen structures (`deploy/drills/*.yaml`).

Owns the shape of the files and the reading of them; runs nothing. A drill is a cluster, the requests that it serves, the steps in
which it is hurt, and what must hold all the same. Whatever is wrong with a file is a ConfigError that names file and key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import yaml
from msgspec import Meta, Struct

from tandem.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "drills"

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]


class _Part(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


# --- the cluster -----------------------------------------------------------------------------------------------------------


class LineSpec(_Part, frozen=True):
    """A line of one process that goes through a proxy, so that a step can hurt it. `control`: to its routers. `data`: all that
    others dial: fetches, transfers, replays and KV events; the events alone are dropped and reordered."""

    process: str
    kind: Literal["control", "data"] = "control"


class ClusterSpec(_Part, frozen=True):
    """Which processes run, with which configuration. `layers` of the configured model are computed: its first ones."""

    processes: Annotated[list[str], Meta(min_length=1)]
    config: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    """What one process' configuration has besides."""
    lines: dict[str, LineSpec] = {}
    in_ray: bool = False
    """Ray runs them, on the nodes `node-…` besides its `head`."""
    layers: Positive = 4
    small_disk_bytes: Count = 0
    """The pool's DISK tier lies on a file system of its own of this size; 0: it has none."""


# --- the load --------------------------------------------------------------------------------------------------------------


class RequestSpec(_Part, frozen=True):
    """Requests of one kind, `count` of them, each with a prompt of its own."""

    name: str = "q"
    count: Positive = 1
    distinct: Count = 0
    """So many of them differ, and the others are asked again in turn; 0: all."""
    words: Positive = 60
    """Of the prompt; a word is a token or two."""
    max_tokens: Positive = 64
    temperature: float = 0.0
    seed: Count = 1
    n: Positive = 1
    logprobs: int = -1
    stop_at: Count = 0
    """A stop string that the fault-free answer reaches at about this token; 0: none."""
    phase: Count = 0
    """0: sent when the drill begins; others when a step says so."""
    every_s: Seconds = 0.0
    """Between one and the next."""
    at_once: Count = 0
    """No more than so many at a time; 0: as they come."""
    again: str = ""
    """The prompts of the requests of this name."""
    leaves_at: Count | None = None
    """The client is gone after so many tokens; 0: right after the request was accepted."""
    pause_at: Count = 0
    pause_s: Seconds = 0.0
    """The client reads nothing for so long after so many tokens."""
    timeout_s: Seconds = 60.0


# --- the steps -------------------------------------------------------------------------------------------------------------


class When(_Part, frozen=True):
    """What a step waits for; all that is said must be true."""

    tokens: Annotated[dict[str, Count], Meta(max_length=1)] = {}
    """So many tokens of each request of that name have come."""
    accepted: str = ""
    """Every request of that name is accepted."""
    ended: str = ""
    running: str = ""
    """That process, or one of that role, has work."""
    more: dict[str, Count] = {}
    """`PROCESS.COUNTER`, or `ROLE.COUNTER` for the sum, has grown by so much since the drill began."""
    step_s: dict[str, Seconds] = {}
    """One step of that process, or of one of that role (`worker`: prefill or decode), runs for so long already."""
    gone: str = ""
    """The router lists that process no more."""
    listed: str = ""
    """It lists the process that runs now."""
    after_s: Seconds = 0.0
    """So long after the step before."""
    within_s: Seconds = 30.0


class SignalStep(_Part, frozen=True, tag="signal", tag_field="do"):
    """Sends a signal. `process`: a name; `busy:ROLE`: the one of that role (or `busy:worker`) that has most work, of
    those that are in a step if any is; `last`: that of the last step."""

    process: str
    signal: Literal["KILL", "STOP", "CONT", "TERM"] = "KILL"
    when: When = When()


class StartStep(_Part, frozen=True, tag="start", tag_field="do"):
    """Starts a process again that has ended, or one that did not run yet."""

    process: str
    when: When = When()


class LineStep(_Part, frozen=True, tag="line", tag_field="do"):
    """Hurts a line, or mends it (`open`). `cut`: connections end, new ones are refused; `reset`: the same by RST; `blackhole`:
    nothing passes, nobody is told; `slow`: so many bytes a second. `towards`: that direction alone."""

    line: str
    state: Literal["open", "cut", "reset", "blackhole", "slow"]
    bytes_per_s: Count = 0
    towards: Literal["both", "listener", "dialler"] = "both"
    when: When = When()


class EventsStep(_Part, frozen=True, tag="events", tag_field="do"):
    """Every `drop`-th batch of KV events of a `data` line is lost, every `swap`-th comes after its successor; 0: none."""

    line: str
    drop: Count = 0
    swap: Count = 0
    when: When = When()


class DiskStep(_Part, frozen=True, tag="disk", tag_field="do"):
    """Hurts the DISK tier: `fill` takes all room of its file system, `free` gives it back, `flip` changes a bit in each of its
    slots, `truncate` cuts its segments."""

    how: Literal["fill", "free", "flip", "truncate"]
    when: When = When()


class LoadStep(_Part, frozen=True, tag="load", tag_field="do"):
    """Sends the requests of a phase."""

    phase: Positive
    when: When = When()


class MemoryStep(_Part, frozen=True, tag="memory", tag_field="do"):
    """From here on memory must not grow: `expect.memory_bytes`."""

    when: When = When()


class WaitStep(_Part, frozen=True, tag="wait", tag_field="do"):
    """Waits, and does nothing."""

    when: When


Step = SignalStep | StartStep | LineStep | EventsStep | DiskStep | LoadStep | MemoryStep | WaitStep


# --- what must hold ----------------------------------------------------------------------------------------------------------


class Expect(_Part, frozen=True):
    """What must hold besides what must always hold: tokens, chunks, usage, one end, nothing left."""

    errors: dict[str, Count] = {}
    """`NAME.CODE`: so many requests of that name end with that error; all others complete."""
    may_fail: dict[str, list[str]] = {}
    """Requests of that name may complete or end with one of these."""
    pause_s: Seconds = 5.0
    """No stream that goes on stands still for longer."""
    late_s: Seconds = 0.0
    """No first token comes so much later than in the fault-free run; 0: not looked at."""
    end_s: Seconds = 30.0
    """From the last step to the last end."""
    again: dict[str, Count] = {}
    """By ROLE: at least so many requests were dispatched again for it."""
    recomputed_tokens: Count | None = None
    """Whoever took a stream over computed no more tokens of it that had been computed before; None: not looked at."""
    never_again: bool = False
    """None was."""
    ends: dict[str, Count] = {}
    """`NAME.END`: at least so many; END is `completed`, `left` or an error's code."""
    resumed: Count = 0
    """At least so many answers went on at another router."""
    more: dict[str, Count] = {}
    """As `When.more`, at the end, at least."""
    at_most: dict[str, Count] = {}
    fetched_from: dict[str, list[str]] = {}
    """Some request of that name got KV from one of these processes."""
    memory_bytes: Count = 0
    """No process that lived since the `memory` step has grown by more at the end; 0: not looked at."""
    exact: bool = True
    audit_s: Seconds = 20.0
    """So soon afterwards all parties agree and nothing is held."""


class DrillSpec(_Part, frozen=True):
    """One drill."""

    about: str
    cluster: str
    requests: Annotated[list[RequestSpec], Meta(min_length=1)]
    steps: Annotated[list[Step], Meta(min_length=1)]
    expect: Expect = Expect()
    fresh: bool = False
    """It has a cluster of its own."""
    promise: str = ""
    """What of docs/reliability.md it shows."""


class Drill(Struct, frozen=True):
    """A drill and where it comes from."""

    name: str
    spec: DrillSpec
    cluster: ClusterSpec


_T = TypeVar("_T")


def read(path: Path, kind: type[_T]) -> _T:
    """One file. Raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error


def names(folder: Path = FOLDER) -> list[str]:
    """Of all drills, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(name: str, folder: Path = FOLDER) -> Drill:
    """One drill, with its cluster. Raises ConfigError, also for what can't work whatever happens."""
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise ConfigError(f"there is no drill {name!r}; there are {', '.join(names(folder))}")
    spec = read(path, DrillSpec)
    cluster = read(folder / "clusters" / f"{spec.cluster}.yaml", ClusterSpec)
    _check(path, spec, cluster)
    return Drill(name, spec, cluster)


def _check(path: Path, spec: DrillSpec, cluster: ClusterSpec) -> None:
    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{path}: {key}: {why}")

    known = {request.name for request in spec.requests}
    if spec.expect.memory_bytes and not any(isinstance(step, MemoryStep) for step in spec.steps):
        refuse("expect.memory_bytes", "no step says since when")
    if len(known) != len(spec.requests):
        refuse("requests", "two have one name")
    phases = {step.phase for step in spec.steps if isinstance(step, LoadStep)}
    for number, request in enumerate(spec.requests):
        if request.phase and request.phase not in phases:
            refuse(f"requests[{number}].phase", f"no step sends phase {request.phase}")
        if request.again and request.again not in known:
            refuse(f"requests[{number}].again", f"there are no requests {request.again!r}")
    for number, step in enumerate(spec.steps):
        key, when = f"steps[{number}]", step.when
        for name in [*when.tokens, *(name for name in (when.accepted, when.ended) if name)]:
            if name not in known:
                refuse(f"{key}.when", f"there are no requests {name!r}")
        if isinstance(step, LoadStep) and step.phase not in {request.phase for request in spec.requests}:
            refuse(f"{key}.phase", f"no request has phase {step.phase}")
        if isinstance(step, LineStep | EventsStep) and step.line not in cluster.lines:
            refuse(f"{key}.line", f"cluster {spec.cluster!r} has no line {step.line!r}")
        if isinstance(step, EventsStep) and cluster.lines[step.line].kind != "data":
            refuse(f"{key}.line", f"{step.line!r} carries no KV events: its kind must be data")
        if isinstance(step, MemoryStep) and not spec.expect.memory_bytes:
            refuse("expect.memory_bytes", "is not given, and a step measures memory")
        if isinstance(step, DiskStep) and not cluster.small_disk_bytes:
            refuse(f"{key}.do", f"cluster {spec.cluster!r} has no disk: small_disk_bytes is 0")
    for name in [key.partition(".")[0] for key in spec.expect.errors] + [
        *spec.expect.may_fail,
        *spec.expect.fetched_from,
    ]:
        if name not in known:
            refuse("expect", f"there are no requests {name!r}")
