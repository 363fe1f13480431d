"""Each overlay, rendered and started container by container on this machine, serves a request and ends cleanly.

So manifests can't drift from the program: a flag, a key, a path or a port that one has and the other hasn't shows here.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.client import Client
from tandem.model_files import cached_path
from tests.deploy.local_pods import Local, LocalPods
from tests.system.harness import Answer, free_port, wait_until

START_S = 900.0
"""For a machine that does much else at the same time; alone it takes some fifteen seconds."""
PROMPT = "The sea is " + "deep and blue and wide and cold and " * 12
MODEL = "smollm2-135m"

SIZES = {
    "TANDEM_PREFILL__ARENA_BYTES": "268435456",
    "TANDEM_DECODE__ARENA_BYTES": "268435456",
    "TANDEM_PREFILL__THREADS": "1",
    "TANDEM_DECODE__THREADS": "1",
    "TANDEM_POOL__HOST_BYTES": "268435456",
    "TANDEM_POOL__DISK__BYTES": "67108864",
}
"""Of gpu-ucx, cut to this machine's."""


def outward_address() -> str:
    """This machine's own, by which it would reach others; loopback where it has no network. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


LOCAL: dict[str, Callable[[], Local]] = {
    "cpu-demo": lambda: Local(model={f"{MODEL}.gguf": cached_path(MODEL)}),
    # The engine computes on CPUs as yet, so no option has to keep it from GPUs: the product runs as it is rendered.
    "gpu-ucx": lambda: Local(environment=SIZES, model={"served": cached_path(MODEL)}),
    # Ray's port, and the router's address as the workers dial it: where it listens is the Pod's own here. Ray takes an address of
    # the machine that isn't loopback.
    "kuberay": lambda: Local(
        address=outward_address(),
        texts={"6379": str(free_port()), "addresses: [127.0.0.1]": "addresses: []"},
        model={f"{MODEL}.gguf": cached_path(MODEL)},
    ),
}


def roles_of(client: Client) -> set[str]:
    return {process.role for process in client.cluster().processes}


def serve_and_end(overlay: str, folder: Path) -> None:
    pods = LocalPods(overlay, folder, LOCAL[overlay]())
    try:
        pods.start(START_S)
        # All at the same time, and not only each once: on a machine that does much else a process is lost for a moment.
        wait_until(lambda: not pods.failing_probes(), START_S, "all probes pass")
        answers = []
        for target in pods.endpoints("router", "grpc"):
            with Client(target) as client:
                answer = Answer(client, PROMPT, {"max_tokens": 16, "seed": 1})
                assert answer.completed is not None
                answers.append(answer.text[0])
                wait_until(
                    lambda c=client: roles_of(c) == {"prefill", "decode", "pool"}, START_S, "all roles are listed"
                )
        assert len(set(answers)) == 1
        assert answers[0]
    finally:
        codes = pods.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{pods.logs()}"


@pytest.mark.timeout(1200)
def test_cpu_demo_serves_and_ends(tmp_path: Path) -> None:
    serve_and_end("cpu-demo", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("overlay", ["gpu-ucx", "kuberay"])
def test_an_overlay_serves_and_ends(overlay: str, tmp_path: Path) -> None:
    serve_and_end(overlay, tmp_path)
