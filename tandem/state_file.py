"""The state file: how a worker or a pool node, which listen on no port of fixed number, show a supervisor how they are.

Owns `NAME.state` in the run folder. What it says is whether a router knows the process; that its time of change is young says
that the process goes round its loop. Kubernetes' probes read both (deploy/kubernetes); nothing of ours does.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Literal

log = logging.getLogger(__name__)

State = Literal["joined", "alone", "leaving"]
"""Some router knows the process; none does; it was told to end."""

TOUCH_S = 1.0
"""The time of change is at most so old, and what the process does between two rounds of its loop."""


class StateFile:
    """The file of process `name` in `folder`, which is made. There is none until the first `show`: what a killed predecessor left
    behind goes at once. A folder that can't be written costs a warning, not the process."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name.replace('/', '_')}.state"
        self._shown: State | None = None
        self._touch_at_s = float("-inf")
        self._broken = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)

    def __enter__(self) -> StateFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def show(self, state: State, now_s: float) -> None:
        """To be called at each round of the loop, with its clock; it writes on a change and else every `TOUCH_S`."""
        if self._broken or (state == self._shown and now_s < self._touch_at_s):
            return
        self._touch_at_s = now_s + TOUCH_S
        try:
            if state == self._shown:
                os.utime(self._path)
            else:
                self._path.write_text(f"{state}\n", encoding="ascii")
                self._shown = state
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._broken = True
        log.warning("%s can't be written, so nobody can see there how this process is: %s", self._path, error.strerror)
