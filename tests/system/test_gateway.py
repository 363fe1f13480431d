"""A gateway of others, as a process, before real routers: it finds model and tokenizer by itself, and answers as we do."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.harness import RunningCluster, free_port, free_ports, wait_until

MESSAGES = [{"role": "user", "content": "Count from one to ten, in words."}]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    ports = free_ports(2)
    router = {"replicas": 2, "grpc_port": ports[0], "control_port": ports[1], "admin_port": 0}
    running = RunningCluster(tmp_path_factory.mktemp("gateway"), {"router": router})
    try:
        yield running.start(["router", "router-1", "pool-0", "prefill-0", "decode-0"])
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"


@contextmanager
def gateway(folder: Path, *arguments: str) -> Iterator[str]:
    """`smg` with these arguments: the address it answers at, once it knows the model."""
    url = f"http://127.0.0.1:{free_port()}"
    log = folder / "smg.log"
    command = [str(Path(sys.executable).parent / "smg"), "launch", *arguments, "--host", "127.0.0.1"]
    command += [
        "--port",
        url.rpartition(":")[2],
        "--prometheus-host",
        "127.0.0.1",
        "--prometheus-port",
        str(free_port()),
    ]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            wait_until(lambda: _ready(url), 60, f"the gateway knows the model: {log.read_text()[-3000:]}")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
            models = json.load(answer)["data"]
        return bool(models) and bool(_chat(url, max_tokens=2)["choices"])
    except OSError:
        return False


def _chat(url: str, **fields: Any) -> Any:
    body = {"model": "smollm2-135m", "messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS} | fields
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as answer:
        if not body.get("stream"):
            return json.load(answer)
        lines = [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


def _text(chunks: Sequence[Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.fixture(scope="module")
def truth(cluster: RunningCluster) -> str:
    """What the cluster itself answers."""
    prompt = [(message["role"], message["content"]) for message in MESSAGES]
    return cluster.generate(prompt, max_tokens=MAX_TOKENS).text[0]


@pytest.mark.timeout(400)
def test_it_takes_a_router_for_an_engine(cluster: RunningCluster, truth: str, tmp_path: Path) -> None:
    with gateway(tmp_path, "--worker-urls", f"grpc://127.0.0.1:{cluster.config.router.grpc_port}") as url:
        whole = _chat(url)
        assert whole["choices"][0]["message"]["content"] == truth
        assert whole["usage"]["completion_tokens"] == MAX_TOKENS
        assert _text(_chat(url, stream=True)) == truth
        assert _chat(url)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.timeout(400)
def test_it_splits_prefill_from_decode_between_two_routers(cluster: RunningCluster, truth: str, tmp_path: Path) -> None:
    config = cluster.config.router
    prefill, decode = (f"grpc://127.0.0.1:{config.replica(number).grpc_port}" for number in range(2))
    with gateway(tmp_path, "--pd-disaggregation", "--prefill", prefill, "--decode", decode) as url:
        assert _chat(url)["choices"][0]["message"]["content"] == truth
        assert _text(_chat(url, stream=True)) == truth
        # Neither half names a seed: the ticket of the first one is what makes the second one draw the same.
        assert _chat(url, temperature=1.0)["choices"][0]["message"]["content"]
    assert cluster.client.audit().ok
