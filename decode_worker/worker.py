"""The decode worker: the worker loop with the decode role's part of the configuration."""

from __future__ import annotations

import threading

from tandem.config import Config
from tandem.worker_loop import WorkerLoop


def run(config: Config, name: str, stop: threading.Event) -> None:
    """Serves as decode worker `name` until `stop` is set. Raises TandemError if it can't start or a router refuses it."""
    WorkerLoop(config, config.decode, role="decode", name=name).run(stop)
