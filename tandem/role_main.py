"""What the `__main__` of every role does: read arguments and configuration, run until a signal, end with a clear word."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from tandem.config import Config, load_config
from tandem.errors import TandemError


def role_main(module: str, default_name: str, run: Callable[[Config, str, threading.Event], None]) -> None:
    """Runs a role as this process and exits: 0 after SIGTERM or SIGINT, 1 with one sentence on an error."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=f"Runs one process of the role {module} in the foreground."
    )
    parser.add_argument(
        "--config", help="YAML file; environment variables TANDEM_… override it (default: built-in values)"
    )
    parser.add_argument("--name", default=default_name, help="the process's name in its cluster (default: %(default)s)")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    arguments = parser.parse_args()
    logging.basicConfig(level=arguments.log_level, format=f"%(asctime)s {arguments.name} %(levelname)s %(message)s")
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        run(load_config(arguments.config), arguments.name, stop)
    except TandemError as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        sys.exit(1)
