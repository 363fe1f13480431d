"""A cluster under concurrent clients: time to first token, time per token, throughput, beside the same engine in one process.

Owns the workload and the clients. It speaks the public API alone, so the target may be any cluster of the same model. An error
of any request is a result, never dropped: the metrics of a run with errors are not ok.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from protos.control import Sampling
from tandem.bench.ask import Answered, ask, random_tokens
from tandem.bench.report import Metric, metric, percentile
from tandem.client import Client
from tandem.clock import now_s
from tandem.config import WorkerConfig
from tandem.credentials import Credentials
from tandem.errors import TandemError

_PREFIX_TOKENS = (0, 128, 256, 384)
"""Lengths of the prefixes that requests share; 0 shares nothing."""
_SUFFIX_TOKENS = (16, 96)
_ANSWER_TOKENS = 32
NUM_ROUNDS = 3
_ASK_S = 300.0
LEARNING_REQUESTS = 200
"""After so many the router is held to its predictions."""


@dataclass(slots=True)
class Load:
    """What the clients saw. Seconds; a request counts when it has ended."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_requests: int = 0
    prediction_errors: list[float] = field(default_factory=list)
    """Of each request, in the order of their ends: how far the router's predicted time to first token was from what it measured,
    as a part of that."""
    cached_tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


class Prompts:
    """The workload: a deterministic sequence of prompts, of which most begin with one of a few shared prefixes."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        shared = Random(0)
        self._prefixes = [random_tokens(shared, length) for length in _PREFIX_TOKENS]

    def next(self) -> list[int]:
        """Token ids of one prompt."""
        suffix = random_tokens(self._random, self._random.randint(*_SUFFIX_TOKENS))
        return [*self._random.choice(self._prefixes), *suffix]


def sources(clients: int) -> list[Prompts]:
    """The prompts of each client. Whoever runs them first or elsewhere gets the same ones."""
    return [Prompts(seed=number + 1) for number in range(clients)]


def load(target: str, prompts: Sequence[Prompts], seconds: float, credentials: Credentials = Credentials()) -> Load:
    """Runs one closed loop for each of `prompts` against `target` for `seconds`; requests that have begun are waited for."""
    result, lock = Load(), threading.Lock()
    began_s = now_s()

    def loop(own: Prompts) -> None:
        while now_s() - began_s < seconds:
            prompt, sent_s = own.next(), now_s()
            try:
                seen = ask(client, prompt, _ANSWER_TOKENS, _ASK_S)
            except TandemError as error:
                with lock:
                    result.errors.append(f"{type(error).__name__}: {error}")
                return  # a cluster that refuses is not hammered
            with lock:
                _add(result, sent_s, seen)

    with Client(target, credentials=credentials) as client:
        threads = [threading.Thread(target=loop, args=(own,), name="client") for own in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    result.seconds = now_s() - began_s
    return result


def _add(result: Load, sent_s: float, seen: Answered) -> None:
    times_s = seen.times_s
    result.num_requests += 1
    result.num_tokens += len(times_s)
    result.prompt_tokens += seen.completed.num_prompt_tokens
    result.cached_tokens += seen.completed.num_cached_tokens
    if seen.completed.runs and seen.completed.ttft_s:
        predicted_s = seen.completed.runs[0].predicted_ttft_s
        result.prediction_errors.append(abs(predicted_s / seen.completed.ttft_s - 1.0))
    result.ttft_s.append(times_s[0] - sent_s)
    result.tpot_s.append((times_s[-1] - times_s[0]) / (len(times_s) - 1))


class Reference:
    """The same engine alone in this process: what a cluster is compared with."""

    def __init__(self, path: Path, dtype: Literal["bf16", "fp32"], worker: WorkerConfig, clients: int) -> None:
        from tandem.engine.local import LocalEngine

        self._engine = LocalEngine(path, dtype=dtype, worker=worker)
        self._prompts = sources(clients)

    def waves(self, num_requests: int) -> Load:
        """Runs the next prompts of all clients together, until `num_requests` have ended."""
        result = Load()
        began_s = now_s()
        while result.num_requests < num_requests:
            wave = [own.next() for own in self._prompts]
            for (output,) in self._engine.generate(wave, [Sampling(max_tokens=_ANSWER_TOKENS)] * len(wave)):
                times_s = output.token_times_s
                result.num_requests += 1
                result.num_tokens += len(times_s)
                result.ttft_s.append(times_s[0])
                result.tpot_s.append((times_s[-1] - times_s[0]) / (len(times_s) - 1))
        result.seconds = now_s() - began_s
        return result


def rounds(
    target: str, reference: Reference, clients: int, seconds: float, credentials: Credentials = Credentials()
) -> Iterator[tuple[Load, Load]]:
    """Cluster and reference in turns, `NUM_ROUNDS` times, `seconds` of the cluster in all. A round with errors is the last."""
    prompts = sources(clients)
    for _ in range(NUM_ROUNDS):
        cluster = load(target, prompts, seconds / NUM_ROUNDS, credentials)
        yield cluster, reference.waves(max(clients, min(cluster.num_requests, 3 * clients)))
        if cluster.errors:
            return


def metrics(measured: Sequence[tuple[Load, Load]]) -> Iterator[Metric]:
    """The rounds as metrics; nothing is ok if any request failed or none ended."""
    errors = [error for cluster, _ in measured for error in cluster.errors]
    useful = [(cluster, local) for cluster, local in measured if cluster.num_requests]
    ok = not errors and bool(useful)
    reference = "the same prompts, a wave of all clients at a time, through one engine in one process, in turns"
    if useful:
        for name in ("ttft", "tpot"):
            for percent in (50, 95, 99):
                yield metric(
                    f"{name}_p{percent}",
                    [percentile(getattr(cluster, f"{name}_s"), percent) for cluster, _ in useful],
                    "s",
                    reference=reference,
                    reference_values=[percentile(getattr(local, f"{name}_s"), percent) for _, local in useful],
                    ok=ok,
                )
        yield metric(
            "throughput",
            [cluster.num_tokens / cluster.seconds for cluster, _ in useful],
            "generated tokens/s",
            reference=reference,
            reference_values=[local.num_tokens / local.seconds for _, local in useful],
            ok=ok,
        )
        yield metric("requests", [c.num_requests / c.seconds for c, _ in useful], "requests/s", ok=ok)
        errors_after = [error for c, _ in useful for error in c.prediction_errors][LEARNING_REQUESTS:]
        if errors_after:
            yield metric(
                "ttft_prediction_error",
                [percentile(errors_after, 50)],
                f"of the TTFT, after {LEARNING_REQUESTS} requests",
                ok=ok,
            )
        yield metric("cached_share", [c.cached_tokens / c.prompt_tokens for c, _ in useful], "of prompt tokens", ok=ok)
    yield metric("errors", [len(errors)], "requests", goal="0", ok=ok)
