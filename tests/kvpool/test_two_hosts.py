"""Fetches between two hosts: network namespaces with their own stacks, joined by a pair of virtual cables. Needs root and
`ip` (Debian: iproute2)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from protos.control import Source
from tests.kvpool.child import Child

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

    def start(self, host: int, **arguments: object) -> Child:
        """A process on that host, see `two_hosts`."""
        arguments["host"] = self.addresses[host]
        return Child("tests.kvpool.two_hosts", arguments, by=["ip", "netns", "exec", self.names[host]])

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


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
def test_blocks_cross_the_cable_whole(hosts: Hosts, transport: str) -> None:
    with hosts.start(0, role="source", names=NAMES, slab_bytes=SLAB, transports=["shm", transport]) as source:
        sources = [source.hear(Source)]
        with hosts.start(
            1, role="sink", names=NAMES, slab_bytes=SLAB, transports=["shm", transport], sources=sources
        ) as sink:
            result = sink.hear()
    assert result == {"wrong": [], "missing": [], "transports": [transport]}, "shm must not reach across"


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
def test_a_cable_pulled_out_in_the_middle_sends_the_fetch_to_the_next_source(hosts: Hosts, transport: str) -> None:
    with (
        hosts.start(0, role="source", names=NAMES, slab_bytes=LARGE, transports=[transport]) as far,
        hosts.start(1, role="source", names=NAMES, slab_bytes=LARGE, transports=["shm"]) as near,
    ):
        sources = [far.hear(Source), near.hear(Source)]
        with hosts.start(
            1, role="sink", names=NAMES, slab_bytes=LARGE, transports=["shm", transport], sources=sources, pause_after=8
        ) as sink:
            assert 8 <= sink.hear()["came"] < len(NAMES), "it has begun"
            hosts.cable(0, "down")
            sink.tell("go on")
            result = sink.hear()
    assert (result["wrong"], result["missing"]) == ([], [])
    assert "shm" in result["transports"], "the rest came from the near one"
