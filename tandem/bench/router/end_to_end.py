"""The real router process between fake workers and gRPC clients: what it adds to a request, and what goes through its core.

Owns the processes' places (the router has a core for itself as far as the machine lets it), the order of what is measured, and
the goals. The workers compute nothing, so whatever takes time is the router, gRPC, ZeroMQ, and the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from tandem.bench.peers import Peer
from tandem.bench.report import Metric, Say, metric
from tandem.bench.router import children
from tandem.bench.router.children import (
    Answered,
    Ask,
    Begin,
    Begun,
    Connect,
    Connected,
    Heard,
    Join,
    Joined,
    Listen,
    Open,
    Opened,
    Pace,
    Paced,
    Tokenize,
    Tokenized,
    Use,
    Used,
)
from tandem.bench.router.fake_workers import VOCAB_SIZE
from tandem.bench.router.texts import TEXT_BYTES
from tandem.clock import now_s
from tandem.config import Config, dump_config

TO_TOKENIZER = 0.6
ADDED_MS = 1.5
TOKENS_PER_S = 50_000
DELAY_MS = 25.0
FRAME_TOKENS = 8
"""Tokens that a worker sends at once, unless the run says otherwise."""
PREFILLS, DECODES = 5, 3
_WARM_S = 1.0
_SLOW_STEP_S = 0.5
"""Until all streams have begun."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one round found. Times in seconds; `*_use` is the part of its core that the router computed."""

    tokenized: Tokenized
    many: Answered
    many_use: float
    alone: Answered
    most: Heard
    most_use: float
    single: Heard
    single_use: float
    steady: Heard
    steady_use: float


class EndToEnd:
    """Router, workers and clients, each in a process of its own. A context."""

    def __init__(self, config: Config, prefills: int = PREFILLS, decodes: int = DECODES) -> None:
        """Raises TandemError if the model is not on this machine, or a process does not start."""
        cores = sorted(os.sched_getaffinity(0))
        others = cores[1:] or cores
        limits = config.limits.model_copy(update={"max_active_requests": max(1024, config.limits.max_active_requests)})
        served = config.model_copy(update={"router": config.router.private(), "limits": limits})
        with ExitStack() as running:
            self._router = running.enter_context(children.child("the router", "router_process"))
            self._workers = running.enter_context(children.child("the workers", "fake_workers"))
            self._clients = running.enter_context(children.child("the clients", "clients"))
            opened = self._router.ask(Open(dump_config(served), cores[0]), Opened, "opened its ports")
            self.model = opened.model
            self._workers.ask(Join(opened.control_port, prefills, decodes, others), Joined, "joined")
            self._clients.ask(Connect(opened.grpc_port, others), Connected, "connected")
            self._running = running.pop_all()

    def __enter__(self) -> EndToEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def router(self) -> Peer:
        """The router's process."""
        return self._router

    def tokenize(self, seed: int) -> Tokenized:
        """The router's tokenizer, while the router has nothing else to do."""
        return self._router.ask(Tokenize(seed), Tokenized, "tokenised the texts")

    def ask(self, clients: int, seconds: float, seed: int) -> tuple[Answered, float]:
        """What `clients` at a time found, and the part of its core that the router computed."""
        self._pace(1, 0.0)
        before_s, began_s = self._used_s(), now_s()
        answered = self._clients.ask(Ask(clients, seconds, seed), Answered, f"asked for {seconds:g} s")
        return answered, (self._used_s() - before_s) / (now_s() - began_s)

    def listen(self, streams: int, seconds: float, frame_tokens: int, tokens_per_s: float) -> tuple[Heard, float]:
        """What `streams` got at `tokens_per_s` together (0: as fast as the workers are acknowledged), and the part of its core
        that the router computed."""
        self._pace(1, _SLOW_STEP_S)
        self._clients.ask(Begin(streams), Begun, f"begun {streams} streams")
        self._pace(frame_tokens, streams * frame_tokens / tokens_per_s if tokens_per_s else 0.0)
        before_s, began_s = self._used_s(), now_s()
        heard = self._clients.ask(Listen(_WARM_S, seconds, VOCAB_SIZE), Heard, f"listened for {seconds:g} s")
        return heard, (self._used_s() - before_s) / (now_s() - began_s)

    def _pace(self, frame_tokens: int, step_s: float) -> None:
        self._workers.ask(Pace(frame_tokens, step_s), Paced, "taken a pace")

    def _used_s(self) -> float:
        return self._router.ask(Use(), Used, "said what it used").cpu_s


def run(
    config: Config,
    *,
    clients: int = 32,
    streams: int = 256,
    frame_tokens: int = FRAME_TOKENS,
    seconds: float = 5.0,
    rounds: int = 3,
    say: Say,
) -> Iterator[Metric]:
    """Measures `rounds` rounds, about five times `seconds` each, and yields what was found. The router serves with the
    tokenizer of the configured model. Raises TandemError if the model is not on this machine."""
    found: list[Round] = []
    with EndToEnd(config) as bench:
        bench.ask(clients, 1.0, 0)
        for number in range(rounds):
            say(f"end to end: round {number + 1} of {rounds}")
            tokenized = bench.tokenize(number)
            many, many_use = bench.ask(clients, seconds, number)
            alone, _ = bench.ask(1, min(2.0, seconds), number)
            most, most_use = bench.listen(streams, seconds, frame_tokens, 0.0)
            single, single_use = bench.listen(streams, seconds, 1, 0.0)
            steady, steady_use = bench.listen(streams, seconds, frame_tokens, TOKENS_PER_S)
            found.append(
                Round(tokenized, many, many_use, alone, most, most_use, single, single_use, steady, steady_use)
            )
    yield from metrics(found, clients=clients, streams=streams, frame_tokens=frame_tokens)


def metrics(found: Sequence[Round], *, clients: int, streams: int, frame_tokens: int) -> Iterator[Metric]:
    """From what was found round by round."""
    errors = [e for r in found for part in (r.many, r.alone, r.most, r.single, r.steady) for e in part.errors]
    a_core = [r.many.requests_per_s / r.many_use for r in found]
    ratio = median([rate / r.tokenized.texts_per_s for rate, r in zip(a_core, found, strict=True)])
    yield metric(
        "e2e_requests",
        a_core,
        "requests/s of a core",
        reference=f"its tokenizer alone on the same texts of {TEXT_BYTES} bytes; {clients} clients, answers of 1 token",
        reference_values=[r.tokenized.texts_per_s for r in found],
        goal=f"ratio >= {TO_TOKENIZER:g}",
        ok=ratio >= TO_TOKENIZER,
    )
    added_ms = [1e3 * (r.alone.ttft_p50_s - r.tokenized.p50_s) for r in found]
    yield metric(
        "e2e_added",
        added_ms,
        "ms",
        reference="p50 of the TTFT of one client at a time without the tokenizer's time for the text",
        reference_values=[1e3 * r.tokenized.p50_s for r in found],
        goal=f"<= {ADDED_MS:g}",
        ok=median(added_ms) <= ADDED_MS,
    )
    most = [r.most.tokens_per_s for r in found]
    shape = f"{streams} streams, {frame_tokens} tokens a frame"
    yield metric(
        "e2e_tokens",
        most,
        "tokens/s",
        reference=f"{shape}, as fast as they are acknowledged",
        goal=f">= {TOKENS_PER_S}",
        ok=median(most) >= TOKENS_PER_S,
    )
    yield metric(
        "e2e_single",
        [r.single.tokens_per_s for r in found],
        "tokens/s",
        reference=f"{streams} streams, a token a frame, as fast as they are acknowledged",
    )
    steady = [r.steady.tokens_per_s for r in found]
    yield metric("e2e_steady", steady, "tokens/s", reference=f"{shape}, {TOKENS_PER_S} tokens/s are sent")
    p50_ms = [1e3 * r.steady.delay_p50_s for r in found]
    yield metric(
        "e2e_delay_p50",
        p50_ms,
        "ms",
        reference=f"from a worker's send to the client, {shape}, at {TOKENS_PER_S} tokens/s",
        goal=f"<= {DELAY_MS:g}",
        ok=median(p50_ms) <= DELAY_MS,
    )
    yield metric("e2e_delay_p99", [1e3 * r.steady.delay_p99_s for r in found], "ms", reference="the same")
    for name, values in (
        ("requests", [r.many_use for r in found]),
        ("tokens", [r.most_use for r in found]),
        ("single", [r.single_use for r in found]),
        ("steady", [r.steady_use for r in found]),
    ):
        yield metric(f"e2e_{name}_core", values, "of a core", reference="what the router's process computed meanwhile")
    yield metric("e2e_errors", [len(errors)], "requests", reference="; ".join(errors[:1]), goal="0", ok=not errors)
