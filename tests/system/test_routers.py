"""Two routers over the same workers, as processes: whoever loses one goes on at the other with the same tokens."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from protos import tandem_pb2 as pb
from tandem.client import Client
from tandem.errors import TandemError
from tests.system.harness import Answer, RunningCluster, free_ports, wait_until

PROMPTS = [
    f"Here is story number {number} of many that were told in the evening by the fire, when the work of the day was done and "
    "everybody had come home. Once upon a time, "
    for number in range(6)
]
SAMPLING = {"max_tokens": 96, "ignore_eos": True}
LIVENESS_S = 2.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    ports = free_ports(2)
    router = {
        "replicas": 2,
        "liveness_s": LIVENESS_S,
        "grpc_port": ports[0],
        "control_port": ports[1],
        "http_port": 0,
        "admin_port": 0,
    }
    running = RunningCluster(tmp_path_factory.mktemp("routers"), {"router": router})
    try:
        yield running.start(["router", "router-1", "pool-0", "prefill-0", "decode-0"])
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"


class Watched(threading.Thread):
    """One answer, read on a thread of its own, with the time of each token."""

    def __init__(self, client: Client, prompt: str, sampling: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._stream = client.generate(prompt, pb.SamplingParams(**sampling), timeout_s=60.0)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.times_s: list[float] = []
        self.completed: pb.Completed | None = None
        self.error: BaseException | None = None
        self.start()

    @property
    def num_resumes(self) -> int:
        return self._stream.num_resumes

    def run(self) -> None:
        try:
            for event in self._stream:
                if event.HasField("completed"):
                    self.completed = event.completed
                elif event.HasField("chunk"):
                    assert event.chunk.position == len(self.tokens)
                    self.tokens += event.chunk.token_ids
                    self.logprobs += [item.logprob for item in event.chunk.logprobs]
                    self.text += event.chunk.text
                    self.times_s.append(time.monotonic())
        except BaseException as error:
            self.error = error

    def finish(self) -> Watched:
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self

    @property
    def longest_pause_s(self) -> float:
        return max(b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False))


def answers(client: Client) -> bool:
    """Whether this router is there, with workers."""
    try:
        return client.cluster().ready
    except TandemError:
        return False


def indexed(client: Client) -> bool:
    """Whether this router knows blocks of every process."""
    processes = client.cluster().processes
    return len(processes) == 3 and all(process.indexed_blocks for process in processes)


def settings(number: int) -> dict[str, Any]:
    """Half of the answers greedy, half sampled, with log-probabilities."""
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": number, "repetition_penalty": 1.1} if number % 2 else {}
    return SAMPLING | sampled | {"num_logprobs": 0}


@pytest.mark.timeout(400)
def test_a_killed_router_changes_no_token_and_comes_back(cluster: RunningCluster) -> None:
    targets = cluster.config.router.grpc_target.split(",")
    with Client(targets[1]) as other:
        truth = [Answer(other, prompt, settings(number)) for number, prompt in enumerate(PROMPTS)]
    with Client(f"{targets[0]},{targets[1]}") as client:
        client._preferred = 0
        streams = [Watched(client, prompt, settings(number)) for number, prompt in enumerate(PROMPTS)]
        wait_until(lambda: all(len(stream.tokens) >= 4 for stream in streams), 60.0, "all streams have begun")
        cluster.kill("router")
        for stream in streams:
            stream.finish()
        assert cluster.processes["router"].wait(10) == -signal.SIGKILL
        for stream, expected in zip(streams, truth, strict=True):
            assert stream.tokens == expected.tokens[0]
            assert stream.text == expected.text[0]
            assert stream.logprobs == [item.logprob for item in expected.logprobs]
            assert stream.num_resumes == 1
            assert stream.completed is not None
            assert stream.completed.exact
            assert stream.completed.num_generated_tokens == SAMPLING["max_tokens"]
        # A closed connection is noticed at once: nobody waited for a deadline.
        assert max(stream.longest_pause_s for stream in streams) < LIVENESS_S
        cluster.spawn("router")
        # It knows nothing of before, and learns where every block lies.
        with Client(targets[0]) as back:
            wait_until(lambda: answers(back), 30.0, "it is back")
            wait_until(lambda: indexed(back), 10.0, "the index is full again")
            again = Answer(back, PROMPTS[0], settings(0))
            assert again.tokens == truth[0].tokens
            assert again.completed is not None
            assert again.completed.num_cached_tokens > 0
        # What the lost router had dispatched is dropped by the workers after its deadline.
        for target in targets:
            with Client(target) as asked:
                wait_until(lambda: asked.audit().ok, 3 * LIVENESS_S, f"the audit of {target} is clean")


@pytest.mark.timeout(400)
def test_a_router_that_is_alone_and_restarts_loses_no_stream(cluster: RunningCluster) -> None:
    target = cluster.config.router.grpc_target.split(",")[1]
    with Client(target) as client:
        truth = [Answer(client, prompt, settings(number)) for number, prompt in enumerate(PROMPTS[:3])]
        streams = [Watched(client, prompt, settings(number)) for number, prompt in enumerate(PROMPTS[:3])]
        wait_until(lambda: all(len(stream.tokens) >= 4 for stream in streams), 60.0, "all streams have begun")
        cluster.kill("router-1")
        cluster.processes["router-1"].wait(10)
        cluster.spawn("router-1")
        for stream, expected in zip(streams, truth, strict=True):
            assert stream.finish().tokens == expected.tokens[0]
            assert stream.num_resumes == 1
        wait_until(lambda: client.audit().ok, 3 * LIVENESS_S, "the audit is clean")


@pytest.mark.timeout(400)
def test_a_router_that_is_stopped_hands_its_streams_over(cluster: RunningCluster) -> None:
    targets = cluster.config.router.grpc_target.split(",")
    long = SAMPLING | {"max_tokens": 600}
    with Client(f"{targets[0]},{targets[1]}") as client:
        client._preferred = 0
        truth = Answer(client, PROMPTS[0], long)
        client._preferred = 0
        stream = Watched(client, PROMPTS[0], long)
        wait_until(lambda: len(stream.tokens) >= 4, 30.0, "the stream has begun")
        cluster.kill("router", signal.SIGTERM)
        assert stream.finish().tokens == truth.tokens[0]
        assert cluster.processes["router"].wait(15) == 0
        cluster.spawn("router")
    with Client(targets[0]) as back:
        wait_until(lambda: answers(back), 30.0, "it is back")
