"""The UCX library: which copy of it this process loads, how it is configured, and the binding's classes.

Owns the import of `ucxx` (the maintained successor of the archived ucx-py), of which only the synchronous classes of
`ucxx._lib.libucxx` are used: no asyncio, no thread of Python's, no futures. Opens nothing.

The wheel brings its own UCX, built without RDMA. Where the machine has an RDMA device and a UCX of its own that the binding
accepts, that one is loaded; `RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY` in the environment overrides. The import sets variables in
the environment, and UCX reads others only there: what we or it set is taken back afterwards, so that no child inherits it.

With GPU arenas the context would keep UCX's CUDA transports (`UCX_MEMTYPE_CACHE=n`), and the bounce region would be device
memory in which one kernel scatters and hashes; the frames would stay as they are.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tandem.errors import TransportError

log = logging.getLogger(__name__)

MIN_VERSION = (1, 19)
"""Of UCX, for the binding."""

RDMA_DEVICES = Path("/sys/class/infiniband")
_PREFER_SYSTEM = "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY"

_LOADED_WITH = {
    "UCX_LOG_LEVEL": "fatal",  # UCX logs to standard output; what matters, closed endpoints, we report ourselves
    "UCXX_LOG_LEVEL": "fatal",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_HANDLE_ERRORS": "none",  # else UCX takes SIGSEGV and its kin from faulthandler
}
"""Read when the libraries are loaded, and only from the environment."""

CONFIGURATION = {
    # A peer may be on any network, so its kernel buffers are what decides: 8 KiB segments made a quarter of the rate.
    "TCP_TX_SEG_SIZE": "512k",
    "TCP_RX_SEG_SIZE": "512k",
    "MAX_RNDV_RAILS": "1",
}
"""Our defaults, without the `UCX_` that a variable of the environment, which goes first, begins with."""

REQUIRED = {"RNDV_THRESH": "2k"}
"""Not for the user to change: of an eager message in several parts, a receive whose peer died in the middle never ends, and
keeps the worker alive (UCX 1.21). Frames stay below it, and blocks that a peer stops sending end with their connection."""

_MOMENT_S = 50e-6
_PROBE_S = 60.0

# In another process: a library that turns out too old can't be unloaded.
_PROBE = """
import ctypes
for name in ("libucs.so", "libucs_signal.so", "libuct.so", "libucp.so"):
    ucp = ctypes.CDLL(name)
numbers = [ctypes.c_uint() for _ in range(3)]
ucp.ucp_get_version(*map(ctypes.byref, numbers))
print(*(number.value for number in numbers))
"""


@dataclass(frozen=True, slots=True)
class Ucx:
    """The binding: `api` is the module `ucxx._lib.libucxx`, `array` the class that wraps a buffer for it."""

    api: Any
    array: Any
    version: tuple[int, int, int]

    def context(self) -> Any:
        """A new context for tagged messages, configured by `configuration`."""
        return self.api.UCXContext(configuration(), (self.api.Feature.TAG, self.api.Feature.WAKEUP))


@cache
def shared_context() -> Any:
    """The context of all transports of this process. Raises as `load`, or what UCX raises if it finds no way to communicate."""
    return load().context()


def configuration() -> dict[str, str]:
    """What we set; the rest is UCX's and the environment's."""
    return {name: value for name, value in CONFIGURATION.items() if f"UCX_{name}" not in os.environ} | REQUIRED


def comes_soon(worker: Any) -> bool:
    """Waits a moment for the next event of a transfer that is going on, and lets UCX handle it: going to sleep and being woken
    for each message cost an eighth of the rate. At most one moment a wake-up, so a peer that stopped costs nothing."""
    deadline = time.perf_counter() + _MOMENT_S
    while not worker.progress_once():
        if time.perf_counter() > deadline:
            return False
    return True


def system_version() -> tuple[int, int, int] | None:
    """The version of the machine's own UCX, as the loader finds it; None without a whole one that says it in time."""
    try:
        probe = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
        if probe.returncode:
            return None
        major, minor, release = (int(number) for number in probe.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.warning("the machine's own UCX could not be asked for its version: %s", error)
        return None
    return major, minor, release


def prefers_system(devices: Path = RDMA_DEVICES) -> bool:
    """Whether the machine's UCX is the better one: it has a device that only it can use, and is new enough."""
    if not devices.is_dir() or not any(devices.iterdir()):
        return False
    version = system_version()
    return version is not None and version[:2] >= MIN_VERSION


@cache
def load() -> Ucx:
    """Loads UCX once in a process. Raises TransportError where it isn't installed or doesn't load."""
    settings = dict(_LOADED_WITH)
    if _PREFER_SYSTEM not in os.environ:
        settings[_PREFER_SYSTEM] = str(prefers_system()).lower()
    try:
        with _environment(settings):
            api = importlib.import_module("ucxx._lib.libucxx")
            array = importlib.import_module("ucxx._lib.arr").Array
            return Ucx(api, array, tuple(api.get_ucx_version()))
    except Exception as error:  # whatever a binary package raises while it loads: the transport is off, not the process
        raise TransportError(f"ucx is off: the package ucxx can't be loaded: {error}") from error


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """The environment with those settings, unless the user has made them; afterwards it is as before."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in settings.items() if name not in before})
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
