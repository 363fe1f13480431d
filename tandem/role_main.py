"""What the `__main__` of every role does: read arguments and configuration, run until a signal, end with a clear word."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType

from tandem.config import Config, load_config
from tandem.errors import TandemError
from tandem.logs import configure
from tandem.stop import Stop

ENTRY_POINTS: Mapping[str, str] = {
    "router": "router.server:run",
    "prefill": "prefill_worker.worker:run",
    "decode": "decode_worker.worker:run",
    "pool": "kvpool.node:run",
}
"""Where each role's `run(config, name, stop)` is."""

Run = Callable[[Config, str, Stop], None]


def load_role(role: str, config: Config, entry_point: str) -> Run:
    """Imports a role's `run` in the process that will run it alone. What torch reads from the environment when it is imported is
    set before: its idle threads sleep, because spinning would take other processes' cores."""
    threads = {"prefill": config.prefill.threads, "decode": config.decode.threads}.get(role, 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    module, _, function = entry_point.partition(":")
    run: Run = getattr(importlib.import_module(module), function)
    return run


def role_main(role: str, default_name: str) -> None:
    """Runs a role as this process and exits: 0 after SIGTERM or SIGINT, 1 with one sentence on an error. After a first signal the
    role finishes what it has, as far as its bounds let it; after a second one it ends at once."""
    module = ENTRY_POINTS[role].partition(".")[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=f"Runs one process of the role {module} in the foreground."
    )
    parser.add_argument(
        "--config", help="YAML file; environment variables TANDEM_… override it (default: built-in values)"
    )
    parser.add_argument("--name", default=default_name, help="the process's name in its cluster (default: %(default)s)")
    parser.add_argument(
        "--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"], help="instead of the configuration's log.level"
    )
    arguments = parser.parse_args()
    stop = Stop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            stop.now()
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        config = load_config(arguments.config)
        configure(config.log.format, arguments.log_level or config.log.level, role=role, process=arguments.name)
        load_role(role, config, ENTRY_POINTS[role])(config, arguments.name, stop)
    except TandemError as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        sys.exit(1)
