"""Tandem's cluster and a peer's server under the same chat load, in turns: turns a second within the limits, and their ratio.

Owns the order of the turns, what is fair between the systems, and the metrics. Both have the same cores, threads, weights and
bytes for KV; each search is the same procedure over the same conversations, and every trial has a salt of its own, so that it
finds nothing of an earlier one cached. Whoever isn't measured does nothing: Tandem's cluster is started anew for each
of its turns, the peer's server, which idles without using a core, runs throughout.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tandem.bench.chat.drive import System, drive
from tandem.bench.chat.loop import HOLDS, TPOT_S, TTFT_S, OpenLoop, Seen, Trial, Window
from tandem.bench.chat.search import highest
from tandem.bench.chat.tandem_system import TandemSystem
from tandem.bench.chat.vllm_system import Server, VLLMSystem, server_command
from tandem.bench.chat.workload import Scripts, Workload
from tandem.bench.peer_models import vllm_model
from tandem.bench.peers import free_port
from tandem.bench.report import Metric, Say, metric, percentile
from tandem.config import Config
from tandem.errors import ConfigError
from tandem.tokenizer.tokenizer import load_tokenizer

GOAL = 2.0
"""Tandem's turns a second, as a multiple of the peer's."""
WARM_UP_S = 12.0
"""Of each trial: about a conversation's length, after which turns of every number are on their way."""
_FIRST = Window(0.0, 6.0)
_FIRST_RATE = 2.0
"""Before the first trial of a server, not counted."""
_SPARE_TOKENS = 1024

StartCluster = Callable[[Config], AbstractContextManager[str]]


@dataclass(frozen=True, slots=True)
class Result:
    """One search: the rate found, and every trial."""

    rate: float
    trials: tuple[Trial, ...]

    def trial(self, rate: float) -> Trial | None:
        """The one at that rate, if it went to its end."""
        return next((trial for trial in self.trials if trial.rate == rate and not trial.given_up), None)


class Contest:
    """What both systems are put through. `say` hears the progress; `stop`, once set, ends it with Cancelled."""

    def __init__(self, workload: Workload, scripts: Scripts, seconds: float, say: Say, stop: threading.Event) -> None:
        self._workload = workload
        self._scripts = scripts
        self._window = Window(WARM_UP_S, WARM_UP_S + seconds)
        self._say = say
        self._stop = stop
        self._limit = workload.max_rate(self._window.end_s)

    def search(self, system: System, salt: int) -> Result:
        """The highest rate that `system` holds. Salts are counted from `salt`: the same for each system, so are the prompts."""
        trials: list[Trial] = []

        def holds(rate: float) -> bool:
            trial = self._trial(system, rate, self._window, salt + 1 + len(trials), patient=not trials)
            trials.append(trial)
            self._say(f"{system.name} at {rate:.3g} turns/s: {_summary(trial)}")
            return trial.holds

        self._trial(system, _FIRST_RATE, _FIRST, salt, patient=True)
        return Result(highest(holds, self._limit), tuple(trials))

    def _trial(self, system: System, rate: float, window: Window, salt: int, *, patient: bool) -> Trial:
        loop = OpenLoop(self._scripts.salted(salt), self._workload.mean_turns, rate, window)
        with system.session() as session:
            return drive(session, loop, self._workload.answer_tokens, self._stop, patient=patient)


def _summary(trial: Trial) -> str:
    answered = [seen for seen in trial.seen if not seen.error]
    words = f"{trial.share:.0%} of {len(trial.seen)} turns within the limits"
    if answered:
        ttft_s = percentile([seen.ttft_s for seen in answered], 90)
        tpot_s = percentile([seen.tpot_s for seen in answered], 90)
        words += f", p90 TTFT {ttft_s * 1000:.0f} ms, TPOT {tpot_s * 1000:.0f} ms, cached {_cached(answered):.0%}"
    if trial.errors:
        words += f", {len(trial.errors)} errors, the first: {trial.errors[0]}"
    return words + (" (given up)" if trial.given_up else "")


def _percentile(name: str, percent: float, seen: Sequence[Seen]) -> float:
    return percentile([getattr(each, name) for each in seen], percent)


def _cached(seen: Sequence[Seen]) -> float:
    return sum(each.num_cached_tokens for each in seen) / sum(each.num_prompt_tokens for each in seen)


def run(
    path: Path,
    config: Config,
    workload: Workload,
    start_cluster: StartCluster,
    *,
    seconds: float,
    rounds: int,
    say: Say,
    stop: threading.Event,
) -> Iterator[Metric]:
    """Measures `rounds` rounds, each a search for Tandem's rate and one for vLLM's, every other in the opposite order; each
    trial counts `seconds`. Raises ConfigError for what can't be compared here, TandemError if a system can't be run."""
    cpus = _cpus(config)
    scripts = Scripts(workload, load_tokenizer(path))
    contest = Contest(workload, scripts, seconds, say, stop)
    longest = max(
        sum(map(len, script.parts)) + workload.answer_tokens * len(script.parts) for script in scripts.salted(0)
    )
    kv_bytes = config.prefill.arena_bytes + config.decode.arena_bytes + config.pool.replicas * config.pool.host_bytes
    port = free_port()
    with _on(cpus):
        command = server_command(vllm_model(path, say), cpus, port, longest + _SPARE_TOKENS, kv_bytes)
        say("vllm is starting")
        with Server(command, port) as server:
            server.wait(stop)
            results: list[tuple[Result, Result]] = []
            for number in range(rounds):
                say(f"round {number + 1} of {rounds}")
                salt = 1000 * number
                theirs = contest.search(VLLMSystem(port), salt) if number % 2 else None
                with start_cluster(config) as target:
                    ours = contest.search(TandemSystem(target), salt)
                results.append((ours, theirs or contest.search(VLLMSystem(port), salt)))
                say(f"tandem held {ours.rate:.3g} turns/s, vllm {results[-1][1].rate:.3g}")
    yield from metrics(results)


def _cpus(config: Config) -> list[int]:
    """A core for each thread that computes; whatever else runs has the same ones."""
    prefill, decode = config.prefill, config.decode
    count = prefill.replicas * prefill.threads + decode.replicas * decode.threads
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < count:
        raise ConfigError(f"the workers have {count} threads, this process may use {len(cpus)} cores")
    return cpus[:count]


@contextmanager
def _on(cpus: Sequence[int]) -> Iterator[None]:
    """This thread, and what it starts, on those cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def metrics(results: Sequence[tuple[Result, Result]]) -> Iterator[Metric]:
    """The rounds as metrics, Tandem's values with vLLM's as reference. `results` must not be empty."""
    ours, theirs = [own.rate for own, _ in results], [peer.rate for _, peer in results]
    limits = f"{HOLDS:.0%} of turns within TTFT {TTFT_S * 1000:.0f} ms and TPOT {TPOT_S * 1000:.0f} ms"
    yield metric(
        "turns",
        ours,
        "turns/s",
        reference=f"vLLM's server on the same cores, in turns; {limits}",
        reference_values=theirs,
        goal=f">= {GOAL:g} x vLLM",
        ok=0 < median(ours) >= GOAL * median(theirs),
    )
    for rate in sorted({trial.rate for own, peer in results for trial in (*own.trials, *peer.trials)}):
        pairs = [(own.trial(rate), peer.trial(rate)) for own, peer in results]
        whole = [(own, peer) for own, peer in pairs if own and peer and _answered(own) and _answered(peer)]
        if len(whole) == len(results):
            yield from _at(rate, whole)
    errors = [error for own, _ in results for trial in own.trials if trial.holds for error in trial.errors]
    yield metric("errors", [len(errors)], "turns at rates that hold", goal="0", ok=not errors)


def _answered(trial: Trial) -> list[Seen]:
    return [seen for seen in trial.seen if not seen.error]


def _at(rate: float, pairs: Sequence[tuple[Trial, Trial]]) -> Iterator[Metric]:
    """Both systems at a rate that both were tried at to the end in every round."""
    reference = f"vLLM at the same {rate:.3g} turns/s"
    suffix = f"at_{rate:.3g}"
    own, peer = [list(map(_answered, side)) for side in zip(*pairs, strict=True)]

    def compared(name: str, unit: str, value: Callable[[Sequence[Seen]], float]) -> Metric:
        values, against = list(map(value, own)), list(map(value, peer))
        return metric(f"{name}_{suffix}", values, unit, reference=reference, reference_values=against)

    yield metric(
        f"within_{suffix}",
        [trial.share for trial, _ in pairs],
        "of turns",
        reference=reference,
        reference_values=[trial.share for _, trial in pairs],
    )
    for percent in (50, 90, 99):
        yield compared(f"ttft_p{percent}", "s", functools.partial(_percentile, "ttft_s", percent))
    for percent in (50, 90, 99):
        yield compared(f"tpot_p{percent}", "s", functools.partial(_percentile, "tpot_s", percent))
    yield compared("cached_share", "of prompt tokens", _cached)
