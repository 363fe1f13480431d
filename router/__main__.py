"""`python -m router --config FILE`: one router in the foreground."""

from __future__ import annotations

import threading

from router.server import run
from tandem.config import Config
from tandem.role_main import role_main


def _run(config: Config, name: str, stop: threading.Event) -> None:
    run(config, stop)


if __name__ == "__main__":
    role_main("router", "router", _run)
