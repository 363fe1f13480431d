"""What moving blocks costs at least on this machine: plain copies, plain shared memory, plain sockets, UCX's own test.

Owns these measurements, the references of `tandem bench transfer`; uses nothing of Tandem's transports.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
from numpy.typing import NDArray

from kvpool.transport.ucx_library import CONFIGURATION
from tandem.bench.kv_source import HOST, SendRaw, SourceProcess
from tandem.bench.peers import free_port
from tandem.errors import TandemError

_LIMIT_S = 60.0
_ACCEPT_S = 10.0
_PORT_S = 0.05
_FINAL = re.compile(r"^(?:Final:)?\s+\d+\s+(?:[\d.]+\s+){4}([\d.]+)\s+\d+\s+\d+\s*$", re.MULTILINE)


def copy_blocks(
    source: NDArray[np.uint8], locations: Sequence[int], target: NDArray[np.uint8], block_ids: Sequence[int]
) -> float:
    """Seconds of numpy's copies, one a block."""
    began = time.perf_counter()
    for location, block_id in zip(locations, block_ids, strict=True):
        target[block_id] = source[location]
    return time.perf_counter() - began


class RawSockets:
    """A plain TCP socket over which the source sends blocks with `sendall`, and we receive them with MSG_WAITALL."""

    def __init__(self, source: SourceProcess, target: NDArray[np.uint8]) -> None:
        self._source = source
        self._target = target
        with socket.create_server((HOST, 0)) as listener:
            listener.settimeout(_ACCEPT_S)
            self._port = listener.getsockname()[1]
            source.tell(SendRaw(self._port, []))
            self._socket, _ = listener.accept()
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read(self, locations: Sequence[int], block_ids: Sequence[int]) -> float:
        """Seconds until every block is there."""
        began = time.perf_counter()
        self._source.tell(SendRaw(self._port, list(locations)))
        for block_id in block_ids:
            view = self._target[block_id].data
            while len(view):
                received = self._socket.recv_into(view, len(view), socket.MSG_WAITALL)
                if not received:
                    raise TandemError("the source of blocks closed its plain socket")
                view = view[received:]
        return time.perf_counter() - began

    def close(self) -> None:
        self._socket.close()


class UcxPerftest:
    """`ucx_perftest` of the UCX that is installed, over TCP on loopback, with the segments that Tandem sets: tagged messages of
    one block each. It sends one buffer over and over, which stays in the cache."""

    def __init__(self, slab_bytes: int, batch_blocks: int) -> None:
        program, library = _perftest()
        self._command = [program, "-t", "tag_bw", "-s", str(slab_bytes), "-O", str(batch_blocks), "-f"]
        self._environment = os.environ | {f"UCX_{name}": value for name, value in CONFIGURATION.items()} | {
            "UCX_TLS": "tcp,self",
            "UCX_NET_DEVICES": "lo",
            "UCX_LOG_LEVEL": "error",
        }  # fmt: skip
        if library:
            self._environment["LD_LIBRARY_PATH"] = library

    def rate(self, num_blocks: int) -> float:
        """GB/s of so many messages. Raises TandemError."""
        port = free_port()
        run = [*self._command, "-n", str(num_blocks), "-w", str(max(1, num_blocks // 10)), "-p", str(port)]
        server = subprocess.Popen(
            run, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            _wait_until_listening(port, server)
            client = subprocess.run(
                [run[0], HOST, *run[1:]],
                env=self._environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise TandemError(f"ucx_perftest took longer than {_LIMIT_S:g} s") from error
        finally:
            server.kill()
            server.wait()
        return perftest_rate(client.stdout + client.stderr)


def perftest_rate(printed: str) -> float:
    """GB/s on the average, from what the client of `ucx_perftest` printed. Raises TandemError if it isn't there."""
    finals = _FINAL.findall(printed)
    if not finals:
        raise TandemError(f"ucx_perftest said no result: {printed.strip()[-300:]}")
    return float(finals[-1]) * 2**20 / 1e9


def _perftest() -> tuple[str, str]:
    """The program, and where its libraries are if not with the machine's."""
    spec = find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "bin" / "ucx_perftest"
        if program.is_file():
            return str(program), str(Path(folder) / "lib")
    found = which("ucx_perftest")
    if found is None:
        raise TandemError(
            "there is no ucx_perftest: neither in the package libucx nor on the machine (Debian: ucx-utils)"
        )
    return found, ""


def _wait_until_listening(port: int, server: subprocess.Popen[bytes]) -> None:
    """Without connecting: the server takes the first connection for its client."""
    listening = re.compile(rf"^\s*\d+: [0-9A-F]+:{port:04X} [0-9A-F]+:0000 0A ", re.MULTILINE)
    gives_up = time.monotonic() + _ACCEPT_S
    while not any(listening.search(Path(f"/proc/net/{kind}").read_text(encoding="ascii")) for kind in ("tcp", "tcp6")):
        if server.poll() is not None or time.monotonic() > gives_up:
            raise TandemError(f"ucx_perftest doesn't listen on port {port}")
        time.sleep(_PORT_S)
