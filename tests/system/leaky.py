"""A router or decode worker that keeps one kilobyte of each request for ever: `python -m tests.system.leaky --name router`."""

from __future__ import annotations

import os
import sys
from typing import Any

LEAK_BYTES = 1024
_kept: list[bytes] = []


def leak_at(owner: type, method: str) -> None:
    """Each call of the method leaks."""
    original = getattr(owner, method)

    def leaking(*arguments: Any, **named: Any) -> Any:
        _kept.append(os.urandom(LEAK_BYTES))
        return original(*arguments, **named)

    setattr(owner, method, leaking)


if __name__ == "__main__":
    from tandem.role_main import role_main

    if any(argument.startswith("router") for argument in sys.argv):
        from router.journal import Journal

        leak_at(Journal, "close")
        role_main("router", "router")
    else:
        from tandem.engine.engine import Engine

        leak_at(Engine, "on_dispatch")
        role_main("decode", "decode-0")
