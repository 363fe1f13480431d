"""Tandem's engine and its peers on the same weights, in turns: tokens a second, and their ratio round by round.

Owns the cases, the order of the turns and the goals. The engines run on the same cores with as many threads, one after the
other; all have loaded their models before the first round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from tandem.bench.cases import DECODE_TOKENS, Case, kv_tokens
from tandem.bench.engine import Roofline, fitted_engine
from tandem.bench.names import named
from tandem.bench.peer_models import GGUFKind, llama_cpp_model, vllm_model
from tandem.bench.peers import LLAMA_CPP, PROGRAMS, Peer, Program
from tandem.bench.report import Metric, Say, metric
from tandem.bench.rounds import times_a_peer
from tandem.bench.workload import EngineLoad
from tandem.config import WorkerConfig
from tandem.errors import ConfigError
from tandem.models.loader import open_weights

CASES = (Case("decode", 1, 512), Case("decode", 8, 512), Case("prefill", 1, 512))
_SETTLE_S = 0.3
"""Before each turn: OpenMP's threads of the engine before spin on for a while."""
_MAX_BATCH = max(case.batch for case in CASES)
_MAX_LEN = max(case.context for case in CASES) + DECODE_TOKENS
_SPARE_TOKENS = 64
"""A sequence of a peer may grow by so much past prompt and answer."""
_TANDEM = "tandem"

Weights = Literal["bf16", "int8", "int4"]
Contender = Callable[[Case], float]
"""Runs a case and answers tokens a second."""

# What the project promises: (peer, its weights, case, threads) → Tandem's speed is at least so many times the peer's.
GOALS: dict[tuple[str, Weights, Case, int], float] = {
    ("llama.cpp", "bf16", CASES[0], 1): 1.3,
    ("llama.cpp", "int8", CASES[0], 1): 1.5,
    ("llama.cpp", "int4", CASES[0], 1): 1.6,
    ("vllm", "bf16", CASES[1], 1): 1.6,
    ("vllm", "bf16", CASES[1], 2): 1.4,
    ("vllm", "bf16", CASES[2], 1): 1.2,
    ("vllm", "bf16", CASES[2], 2): 1.1,
}


_GGUF_KINDS: dict[Weights, GGUFKind] = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_1"}


def run(
    path: Path, weights: Weights, worker: WorkerConfig, programs: Sequence[Program], *, rounds: int, say: Say
) -> Iterator[Metric]:
    """Measures `rounds` rounds and yields for each case Tandem's speed, each peer's, and the ratios; `say` hears the progress.

    Raises ConfigError for more threads than cores, TandemError for a peer that isn't installed or fails, ModelError for a
    model that a peer can't run.
    """
    cpus = sorted(os.sched_getaffinity(0))[: worker.threads]
    if len(cpus) < worker.threads:
        raise ConfigError(f"{worker.threads} threads are asked for, this process may use {len(cpus)} cores")
    model = open_weights(path).config
    with ExitStack() as running:
        contenders: dict[str, Contender] = {}
        labels: dict[str, str] = {}
        for program in programs:
            file, form = _model_of(program, path, weights, say)
            command = program.command(file, model.vocab_size, cpus, _MAX_BATCH, _MAX_LEN + _SPARE_TOKENS)
            say(f"{program.name} is starting")
            peer = running.enter_context(Peer(program.name, command))
            contenders[program.name] = peer.rate
            labels[program.name] = f"{program.name} {peer.version} {form}"
        # The engine last, so that nothing that it does to this process reaches the children.
        running.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus)
        engine = fitted_engine(path, "bf16", weights, worker, kv_tokens(CASES), _MAX_BATCH, _MAX_LEN)
        contenders[_TANDEM] = EngineLoad(engine, _MAX_BATCH, worker.block_size).rate
        roofline = Roofline(model, "bf16", weights, worker.threads)
        rates, bounds = in_turns(contenders, roofline.bound, rounds, _SETTLE_S, say)
    for case in CASES:
        own = rates[_TANDEM, case]
        yield metric(case.name, own, "tokens/s", reference=roofline.text(case), reference_values=bounds[case])
        for name, label in labels.items():
            goal = GOALS.get((name, weights, case, worker.threads))
            yield from compared(case, name, label, own, rates[name, case], goal)
    yield from roofline.metrics()


def programs_named(names: Sequence[str]) -> list[Program]:
    """Raises ConfigError for a name that is none."""
    return [
        PROGRAMS[name] for name in named(names, PROGRAMS, "peer that Tandem can be measured against", optional=True)
    ]


def _model_of(program: Program, path: Path, weights: Weights, say: Say) -> tuple[Path, str]:
    """The model's file for that peer, and what its weights are. vLLM's CPU build has no int8 or int4 of a GGUF file."""
    if program is LLAMA_CPP:
        kind = _GGUF_KINDS[weights]
        return llama_cpp_model(path, kind, say), kind
    return vllm_model(path, say), "BF16"


def in_turns(
    contenders: Mapping[str, Contender], bound: Contender, rounds: int, settle_s: float, say: Say
) -> tuple[dict[tuple[str, Case], list[float]], dict[Case, list[float]]]:
    """Every case by every contender, `rounds` times, after a round that doesn't count; every other round in the opposite
    order. Returns the rates by contender and case, and what `bound` said for each case, round by round."""
    rates: dict[tuple[str, Case], list[float]] = {(name, case): [] for name in contenders for case in CASES}
    bounds: dict[Case, list[float]] = {case: [] for case in CASES}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "a round to warm up")
        for case in CASES:
            if number:
                bounds[case].append(bound(case))
            for name in list(contenders)[:: 1 if number % 2 else -1]:
                time.sleep(settle_s)
                rate = contenders[name](case)
                if number:
                    rates[name, case].append(rate)
    return rates, bounds


def compared(
    case: Case, name: str, label: str, own: Sequence[float], peer: Sequence[float], goal: float | None
) -> Iterator[Metric]:
    """The peer's speed, and Tandem's divided by it, round by round; the median of the ratios is held against `goal`."""
    yield metric(f"{case.name}_{name}", peer, "tokens/s", reference=label)
    yield times_a_peer(f"{case.name}_tandem_to_{name}", own, label, peer, goal)
