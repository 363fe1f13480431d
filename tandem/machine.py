"""Which machine this is, and how much memory it has left."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import psutil

from tandem.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")


@cache
def machine_id() -> str:
    """The kernel's boot id and the network namespace: equal for processes that can meet on an abstract Unix socket."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot_id}:{Path('/proc/self/ns/net').stat().st_ino}"


def memory_bytes() -> int:
    """What this process may use at most: the machine's memory, or its control group's if that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def check_memory(key: str, num_bytes: int) -> None:
    """Raises ConfigError if the configuration's `key` asks for more memory than there is; the pages come only when they are
    written, too late to say no."""
    limit = memory_bytes()
    if num_bytes > limit:
        raise ConfigError(f"{key} is {num_bytes}, more than the {limit} bytes of memory that this machine gives us")
