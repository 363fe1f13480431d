"""A worker that starts sooner, and of which a test may want that it dies: `python -m tests.system.quick_worker`.

The product has no such switches. Before this process becomes the worker whose role `--name` begins with, it makes the numerics
probe a short one (the long one takes seven seconds of a core), and, with `FAULTS`, a JSON list of `Fault`s, puts something in
front of `Runner.run`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

import tandem.engine.numerics
from tandem.engine.runner import Chunk, Runner
from tandem.role_main import role_main

PROBE_TOKENS = 12
VARIABLE = "FAULTS"
DIES_AFTER_S = 0.05
"""Into a step: what was sent before it has left by then, also on a machine that is busy with other tests."""


class Fault(msgspec.Struct, frozen=True):
    """What happens in the step that computes `token`: it takes `sleep_s` longer, or, with 0, is the process's last. With `once`,
    a file, it happens to the first process alone that creates that."""

    token: int
    sleep_s: float = 0.0
    once: str = ""

    def happens(self, chunks: Sequence[Chunk]) -> bool:
        """Whether it is its turn in this step."""
        if not any(self.token in chunk.token_ids for chunk in chunks):
            return False
        if not self.once:
            return True
        try:
            Path(self.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def main() -> None:
    tandem.engine.numerics.PROBE_TOKENS = PROBE_TOKENS
    faults = msgspec.json.decode(os.environ.get(VARIABLE, "[]"), type=list[Fault])
    run = Runner.run

    def faulty_run(self: Runner, chunks: Sequence[Chunk]) -> torch.Tensor:
        for fault in faults:
            if fault.happens(chunks):
                time.sleep(fault.sleep_s or DIES_AFTER_S)
                if not fault.sleep_s:
                    os.kill(os.getpid(), signal.SIGKILL)
        return run(self, chunks)

    if faults:
        Runner.run = faulty_run  # type: ignore[method-assign]
    role = sys.argv[sys.argv.index("--name") + 1].split("-")[0]
    role_main(role, f"{role}-0")


if __name__ == "__main__":
    main()
