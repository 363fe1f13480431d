"""The prefill worker: the worker loop with the prefill role's part of the configuration."""

from __future__ import annotations

import threading

from tandem.config import Config
from tandem.worker_loop import WorkerLoop


def run(config: Config, name: str, stop: threading.Event) -> None:
    """Serves as prefill worker `name` until `stop` is set. Raises TandemError if it can't start or a router refuses it."""
    WorkerLoop(config, config.prefill, role="prefill", name=name).run(stop)
