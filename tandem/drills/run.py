"""Plays drills: prepares the truth, hurts the cluster, judges, and makes the cluster as new.

Owns the stages of a run and the order of its drills. Those of one kind of cluster share it, one after the other, as long as it
comes out of each of them clean; one that doesn't is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from protos import tandem_pb2 as pb
from tandem.clock import now_s
from tandem.drills.checks import Check, Played, judge
from tandem.drills.faults import Fired, NotFired, Scene, counted, fire, resident_bytes
from tandem.drills.load import Asked, Asking, Got, Truth, prompts
from tandem.drills.processes import wait_until
from tandem.drills.spec import ClusterSpec, Drill
from tandem.drills.stage import Stage
from tandem.errors import DeadlineExceeded, TandemError

_REFERENCE = ClusterSpec(processes=["router", "decode-0"], config={"pool": {"replicas": 0}})
_CLIENTS_S = 90.0
_COOL_S = 10.0


@dataclass(frozen=True, slots=True)
class Span:
    """When a request began, was accepted, got tokens and ended, in seconds of the drill."""

    key: str
    begin_s: float
    end_s: float
    tokens_s: tuple[float, ...]
    end: str


@dataclass(frozen=True, slots=True)
class Result:
    """A drill that was played."""

    name: str
    about: str
    checks: Sequence[Check]
    seconds: float
    spans: Sequence[Span] = ()
    marks: Sequence[tuple[float, str]] = ()
    """Steps, by seconds of the drill."""
    logs: str = ""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


class Runner:
    """Plays drills in `folder`; a context manager, which stops all that runs at its end. `say` hears of what is going on."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self._folder = folder
        self._say = say
        self._stages: dict[str, Stage] = {}
        self._references: dict[int, Stage] = {}
        self._num_stages = 0

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stage in (*self._stages.values(), *self._references.values()):
            stage.close()

    def play(self, drill: Drill) -> Result:
        """One drill, from a clean cluster to a clean cluster. Whatever goes wrong is a check that failed."""
        began_s = now_s()
        try:
            stage = self._stage(drill)
        except TandemError as error:
            return Result(
                drill.name, drill.spec.about, [Check("the cluster starts", False, str(error))], now_s() - began_s
            )
        try:
            result = self._play(drill, stage, began_s)
        except TandemError as error:
            checks = [Check("the drill can be played", False, str(error))]
            result = Result(drill.name, drill.spec.about, checks, now_s() - began_s, logs=stage.cluster.logs())
        if drill.spec.fresh or not result.ok:
            self._drop(drill.spec.cluster)
        return result

    def leave(self, cluster: str) -> None:
        """No more drills of that kind of cluster come."""
        self._drop(cluster)

    def _drop(self, cluster: str) -> None:
        if (stage := self._stages.pop(cluster, None)) is not None:
            stage.close()

    def _stage(self, drill: Drill) -> Stage:
        if drill.spec.fresh:
            self._drop(drill.spec.cluster)
        if drill.spec.cluster not in self._stages:
            self._say(f"starting cluster {drill.spec.cluster}: {', '.join(drill.cluster.processes)}")
            self._stages[drill.spec.cluster] = Stage(drill.cluster, self._new_folder(drill.spec.cluster))
        return self._stages[drill.spec.cluster]

    def _truth(self, layers: int) -> Truth:
        if layers not in self._references:
            self._say(f"starting the cluster that nobody hurts, with {layers} layers")
            spec = ClusterSpec(processes=_REFERENCE.processes, config=_REFERENCE.config, layers=layers)
            self._references[layers] = Stage(spec, self._new_folder("reference"))
        return Truth(self._references[layers].cluster.client)

    def _new_folder(self, name: str) -> Path:
        self._num_stages += 1
        folder = self._folder / f"{self._num_stages:02}-{name}"
        folder.mkdir(parents=True)
        return folder

    def _play(self, drill: Drill, stage: Stage, began_s: float) -> Result:
        spec = drill.spec
        asked, truth = self._truth(drill.cluster.layers).of(prompts(spec.requests, secrets.randbits(40)))
        scene = Scene(stage)
        listed = stage.cluster.listed()
        for what in (
            *spec.expect.more,
            *spec.expect.at_most,
            *(what for step in spec.steps for what in step.when.more),
        ):
            scene.before[what] = counted(what, listed)
        asking: list[Asking] = []
        scene.send = functools.partial(_send, scene, asked, asking)
        start_s = now_s()
        scene.send(0)
        played = self._hurt(drill, scene, asking, truth, start_s)
        checks = list(judge(played, spec.expect, scene))
        checks += self._after(drill, scene, crashed=any(one.is_alive() for one in asking))
        spans = [_span(one, start_s) for one in asking]
        marks = [(one.at_s - start_s, one.name) for one in played.fired if one.name]
        logs = "" if all(check.ok for check in checks) else stage.cluster.logs(40)
        return Result(drill.name, spec.about, checks, now_s() - began_s, spans, marks, logs)

    def _hurt(self, drill: Drill, scene: Scene, asking: list[Asking], truth: dict[str, Got], start_s: float) -> Played:
        fired: list[Fired] = []
        error, last_s = "", start_s
        for number, step in enumerate(drill.spec.steps):
            try:
                fired.append(fire(step, scene, last_s))
            except NotFired as not_fired:
                error = f"step {number} ({type(step).__name__}): {not_fired}"
                break
            last_s = now_s()
        if error:
            scene.stage.restore()
        end_s = now_s() + max(drill.spec.expect.end_s, _CLIENTS_S if not error else _COOL_S)
        for one in asking:
            one.join(max(0.1, end_s - now_s()))
        return Played(asking, truth, fired, error)

    def _after(self, drill: Drill, scene: Scene, *, crashed: bool) -> Iterator[Check]:
        """The cluster is whole again, and nobody holds anything."""
        spec, stage = drill.spec, scene.stage
        if crashed:
            yield Check("every client ends", False, "some still wait")
        began_s = now_s()
        try:
            stage.restore()
        except TandemError as error:
            yield Check("the cluster is whole again", False, str(error))
            return
        yield Check(
            "the cluster is whole again", True, f"{len(stage.spec.processes)} processes after {now_s() - began_s:.1f} s"
        )
        yield audited(stage, spec.expect.audit_s)
        if spec.expect.memory_bytes:
            yield _grown(scene, spec.expect.memory_bytes)


def audited(stage: Stage, within_s: float) -> Check:
    """Whether all parties agree and nothing is held, soon."""
    began_s = now_s()
    answer: pb.AuditResponse | None = None

    def clean() -> bool:
        nonlocal answer
        with contextlib.suppress(TandemError):
            answer = stage.cluster.client.audit()
            return answer.ok and not any(check.evidence.startswith("not idle") for check in answer.checks)
        return False

    name = "no block, lease or dispatch is left, all parties agree"
    try:
        wait_until(clean, within_s, name)
    except DeadlineExceeded:
        wrong = (
            [] if answer is None else [f"{check.check}: {check.evidence}" for check in answer.checks if not check.ok]
        )
        return Check(name, False, "; ".join(wrong) or "no answer, or requests that don't end")
    assert answer is not None
    return Check(name, True, f"{len(answer.checks)} checks after {now_s() - began_s:.1f} s")


def _grown(scene: Scene, limit: int) -> Check:
    """Of the processes that are the same still."""
    running = scene.stage.pids()
    grown = {
        name: resident_bytes(pid) - num_bytes
        for name, (pid, num_bytes) in scene.memory.items()
        if running.get(name) == pid
    }
    if not grown:
        return Check("memory is flat", False, "no process lived from its measurement to the end")
    by_name = ", ".join(f"{name} {num_bytes / 2**10:+,.0f} KiB" for name, num_bytes in sorted(grown.items()))
    evidence = f"{by_name}; the limit is {limit / 2**10:,.0f} KiB"
    return Check("memory is flat", max(grown.values()) <= limit, evidence)


def _send(scene: Scene, asked: Sequence[Asked], asking: list[Asking], phase: int) -> list[str]:
    """Starts the clients of a phase."""
    sent = []
    turns = {one.spec.name: threading.Semaphore(one.spec.at_once) for one in asked if one.spec.at_once}
    for one in asked:
        if one.spec.phase == phase:
            cluster = scene.stage.cluster
            where = cluster.client.target if cluster.config.router.replicas > 1 else cluster.client
            client = Asking(where, one, one.number * one.spec.every_s, turns.get(one.spec.name))
            asking.append(client)
            scene.asking.setdefault(one.spec.name, []).append(client)
            client.start()
            sent.append(one.key)
    return sent


def _span(one: Asking, start_s: float) -> Span:
    got = one.got
    end = "left" if got.left else "completed" if got.completed else got.error.code if got.error else "no end"
    times_s = tuple(at - start_s for at in got.times_s)
    return Span(one.asked.key, got.began_s - start_s, (got.ended_s or now_s()) - start_s, times_s, end)


def ordered(drills: Sequence[Drill]) -> list[Drill]:
    """So that those that share a cluster follow each other, those with their own last."""
    return sorted(drills, key=lambda drill: (drill.spec.cluster, drill.spec.fresh, drill.name))
