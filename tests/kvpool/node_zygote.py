"""Starts pool nodes quickly, by forking a process that has imported everything: run as `python -m tests.kvpool.node_zygote`.

Reads lines of JSON, `{"name": …, "environment": {…}, "log": path}`, and answers each with the new process's id.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading

from kvpool.node import run
from tandem.config import load_config
from tandem.errors import TandemError


def _serve(name: str, environment: dict[str, str], log: str) -> int:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 2)
    os.environ.update(environment)
    logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
    try:
        run(load_config(None), name, stop)
    except TandemError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: they are watched by pidfd
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            try:
                os._exit(_serve(**order))
            finally:
                os._exit(70)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
