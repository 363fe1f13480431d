"""The half of a peer that all peers share: JSON lines on stdin and stdout, one request, one answer.

Runs inside a peer's own virtual environment, so it knows nothing of Tandem and imports the standard library alone. The other
half, with the description of the lines, is `tandem.bench.peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol, TextIO


class Engine(Protocol):
    """What a peer's script provides: each call answers (tokens, seconds)."""

    def prefill(self, batch: int, context: int) -> tuple[int, float]:
        """Prompts that were never seen before, until each sequence has its first token; their tokens."""

    def decode(self, batch: int, context: int, tokens: int) -> tuple[int, float]:
        """`tokens` steps of `batch` sequences, each with a prompt of its own; the tokens drawn."""


def arguments() -> argparse.Namespace:
    """The command line of every peer; restricts this process to the given cores."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--cpus", required=True, help="comma-separated; as many threads are used")
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    options = parser.parse_args()
    options.cpus = [int(cpu) for cpu in options.cpus.split(",")]
    os.sched_setaffinity(0, options.cpus)
    # Before anything loads OpenMP.
    os.environ["OMP_NUM_THREADS"] = str(len(options.cpus))
    return options


def own_stdout() -> TextIO:
    """Stdout for answers alone: whatever libraries print there goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def random_tokens(generator: random.Random, vocab: int, count: int) -> list[int]:
    return [generator.randrange(vocab) for _ in range(count)]


def serve(answers: TextIO, version: str, engine: Engine) -> None:
    """Answers until stdin ends, which it does when the parent is gone."""

    def measured(request: dict[str, Any]) -> dict[str, Any]:
        run = {"prefill": engine.prefill, "decode": engine.decode}[request.pop("t")]
        tokens, seconds = run(**request)
        return {"t": "measured", "tokens": tokens, "seconds": seconds}

    answer_all(answers, version, measured)


def answer_all(answers: TextIO, version: str, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers every request by `answer`, whose errors are said to the parent, until stdin ends."""
    _say(answers, {"t": "ready", "version": version})
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:  # said to the parent, whatever it is: it decides
            traceback.print_exc()
            found = {"t": "failed", "message": f"{type(error).__name__}: {error}"}
        _say(answers, found)


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
