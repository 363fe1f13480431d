"""Fetches between two hosts: network namespaces with their own stacks, joined by a pair of virtual cables. Needs root and
`ip` (Debian: iproute2)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.kvpool.processes import REPOSITORY

SLAB = 64 * 1024
LARGE = 1024 * 1024
"""So that a fetch is many reads, more than what is asked for ahead."""
NAMES = [f"block{i:02}" for i in range(64)]
WITHIN_S = 60.0

_WHY_NOT = "" if os.geteuid() == 0 and shutil.which("ip") else "network namespaces need root and the command ip"
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, timeout=20)


@dataclass
class Hosts:
    """Two hosts on one cable."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    def start(self, host: int, **arguments: object) -> subprocess.Popen[str]:
        """A process of this module on that host."""
        words = json.dumps({"host": self.addresses[host], **arguments})
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, "-m", "tests.kvpool.two_hosts", words],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def cable(self, host: int, state: str) -> None:
        """Plugs it in or out (`up`, `down`)."""
        ip("-n", self.names[host], "link", "set", f"cable{host}", state)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    names = (f"tandem-a-{os.getpid()}", f"tandem-b-{os.getpid()}")
    addresses = ("10.213.7.1", "10.213.7.2")
    for name in names:
        ip("netns", "add", name)
    try:
        ip("-n", names[0], "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for host, (name, address) in enumerate(zip(names, addresses, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{host}")
            ip("-n", name, "link", "set", f"cable{host}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Hosts(names, addresses)
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def answer(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stdout is not None
    line: dict[str, object] = json.loads(process.stdout.readline() or "{}")
    return line


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
def test_blocks_cross_the_cable_whole(hosts: Hosts, transport: str) -> None:
    source = hosts.start(0, role="source", names=NAMES, slab_bytes=SLAB, transports=["shm", transport])
    hello = answer(source)
    sink = hosts.start(1, role="sink", names=NAMES, slab_bytes=SLAB, transports=["shm", transport], sources=[hello])
    result = answer(sink)
    finish(source, sink)
    assert result == {"wrong": [], "missing": [], "transports": [transport]}, "shm must not reach across"


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
def test_a_cable_pulled_out_in_the_middle_sends_the_fetch_to_the_next_source(hosts: Hosts, transport: str) -> None:
    far = hosts.start(0, role="source", names=NAMES, slab_bytes=LARGE, transports=[transport])
    near = hosts.start(1, role="source", names=NAMES, slab_bytes=LARGE, transports=["shm"])
    sources = [answer(far), answer(near)]
    sink = hosts.start(
        1, role="sink", names=NAMES, slab_bytes=LARGE, transports=["shm", transport], sources=sources, pause_after=8
    )
    assert 8 <= answer(sink)["came"] < len(NAMES), "it has begun"  # type: ignore[operator]
    hosts.cable(0, "down")
    assert sink.stdin is not None
    sink.stdin.write("go on\n")
    sink.stdin.flush()
    result = answer(sink)
    finish(far, near, sink)
    assert (result["wrong"], result["missing"]) == ([], [])
    assert "shm" in result["transports"], "the rest came from the near one"  # type: ignore[operator]
