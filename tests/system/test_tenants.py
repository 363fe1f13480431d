"""What one tenant can find out of another's prompts by asking: nothing, measured on a real cluster.

The second tenant sends prompts that the first one has sent and prompts that nobody has. If it could tell them apart, by hits or
by the time to its first token, it could try out what others ask. That the same measure tells a tenant's own hits from its misses
shows that it would see a difference if there were one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence

import pytest

from protos import tandem_pb2 as pb
from router.keyring import api_key
from router.keys_file import KeysFile
from tandem.client import Client
from tandem.credentials import Credentials
from tests.system.harness import RunningCluster

NAMES = ("router", "pool-0", "decode-0")
NUM_PROMPTS = 200
PROMPT_TOKENS = 96
SIGNIFICANT = 0.01
VOCABULARY = (1_000, 40_000)


def ks_p_value(one: Sequence[float], other: Sequence[float]) -> float:
    """Of the two-sided Kolmogorov–Smirnov test that both are drawn from one distribution, by its asymptotic series (Smirnov,
    *Table for estimating the goodness of fit of empirical distributions*, Ann. Math. Stat. 1948)."""
    values = sorted([(value, 1 / len(one)) for value in one] + [(value, -1 / len(other)) for value in other])
    distance = height = 0.0
    for number, (value, step) in enumerate(values):
        height += step
        if number + 1 == len(values) or values[number + 1][0] != value:
            distance = max(distance, abs(height))
    x = distance * math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    if x < 0.2:
        return 1.0  # where the series converges slowly, and p is 1 to twelve digits
    series = sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * series))


def test_the_measure_knows_equal_from_different() -> None:
    rng = random.Random(1)
    same = [[rng.gauss(0, 1) for _ in range(200)] for _ in range(100)]
    p_values = [ks_p_value(one, other) for one, other in zip(same[:50], same[50:], strict=True)]
    assert 0.2 < sum(p_values) / len(p_values) < 0.8
    assert sum(p < 0.05 for p in p_values) < 10
    assert ks_p_value(same[0], [value + 1.0 for value in same[1]]) < 1e-6
    assert ks_p_value(same[0], same[0]) == 1.0
    # Tables have 1.949 * sqrt(2 / 200) = 0.1949 for two samples of 200 at 0.1 %: this is 39 / 200.
    ranks = [float(rank) for rank in range(200)]
    assert ks_p_value(ranks, [rank + 38.5 for rank in ranks]) == pytest.approx(0.001, rel=0.01)


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client]]:
    """Clients of two tenants of one cluster, that decodes and prefills in one worker, with a pool."""
    folder = tmp_path_factory.mktemp("tenants")
    file = KeysFile(folder / "keys.yaml")
    for name in ("first", "second"):
        file.update(lambda keyring, name=name: keyring.with_key(api_key(name, name, "client", f"tdm_{name}")))
    router = {"keys_file": str(file.path), "liveness_s": 30.0}  # nobody is to be lost on a machine that is busy
    running = RunningCluster(folder, {"router": router, "prefill": {"replicas": 0}}, faults=[])
    try:
        running.launch(NAMES)
        running.wait_ready(NAMES, deadline_s=300.0)
        target = running.config.router.grpc_target
        with (
            Client(target, credentials=Credentials("tdm_first")) as first,
            Client(target, credentials=Credentials("tdm_second")) as second,
        ):
            yield first, second
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"


class DisturbedError(Exception):
    """A request was dispatched or asked for again, as happens on a machine that is too busy: what it finds then is its own."""


def ask(client: Client, prompt: list[int]) -> tuple[float, int, list[int]]:
    """Seconds to the first token as its client sees them, prompt tokens that were found, and the answer."""
    sent_s, ttft_s, answer, done = time.perf_counter(), math.nan, list[int](), pb.Completed()
    for event in client.generate(prompt, pb.SamplingParams(max_tokens=1, ignore_eos=True), timeout_s=120):
        if event.HasField("chunk"):
            ttft_s = ttft_s if answer else time.perf_counter() - sent_s
            answer += event.chunk.token_ids
        elif event.HasField("completed"):
            done = event.completed
    if done.resume_no or any(run.attempt for run in done.runs):
        raise DisturbedError(str(done))
    return ttft_s, done.num_cached_tokens, answer


class Measured:
    """One round: times to first token of each kind, in seconds."""

    def __init__(self, first: Client, second: Client, seed: int) -> None:
        rng = random.Random(seed)
        self._first, self._second = first, second
        self.missed: list[float] = []
        self.hit: list[float] = []
        self.asked_by_first: list[float] = []
        self.asked_by_nobody: list[float] = []
        num_disturbed = 0
        while len(self.missed) < NUM_PROMPTS:
            prompt, fresh = ([rng.randint(*VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(2))
            try:
                times_s = self._ask(prompt, fresh, rng.random() < 0.5)
            except DisturbedError:
                num_disturbed += 1
                assert num_disturbed <= NUM_PROMPTS // 4, "the machine is too busy to measure anything"
                continue
            for values, value in zip(
                (self.missed, self.hit, self.asked_by_first, self.asked_by_nobody), times_s, strict=True
            ):
                values.append(value)
        print(f"{num_disturbed} prompts left out")

    def _ask(self, prompt: list[int], fresh: list[int], fresh_first: bool) -> tuple[float, float, float, float]:
        """All four of one prompt. The second tenant's come in either order: what one request does to the next must not show as a
        difference between the two kinds."""
        missed_s, cached, answer = ask(self._first, prompt)
        assert cached == 0
        hit_s, cached, again = ask(self._first, prompt)
        assert cached >= PROMPT_TOKENS // 2
        assert again == answer
        nobody = ask(self._second, fresh) if fresh_first else None
        asked_s, cached, other = ask(self._second, prompt)
        assert cached == 0, f"the second tenant found {cached} tokens of what the first one asked"
        assert other == answer
        nobody_s, cached, _ = nobody or ask(self._second, fresh)
        assert cached == 0, f"the second tenant found {cached} tokens of what nobody asked"
        return missed_s, hit_s, asked_s, nobody_s


@pytest.mark.slow
def test_the_second_tenant_can_not_tell_what_the_first_one_asked(tenants: tuple[Client, Client]) -> None:
    for client in tenants:
        ask(client, list(range(*VOCABULARY))[:PROMPT_TOKENS])  # whatever is slower once
    # Even where there is no difference, one round of a hundred shows one at this level; two in a row are one of ten thousand.
    for seed in (1, 2):
        measured = Measured(*tenants, seed)
        told = ks_p_value(measured.missed, measured.hit)
        p_value = ks_p_value(measured.asked_by_first, measured.asked_by_nobody)
        print(f"own misses and hits: p = {told:.2g}; asked by the first or by nobody: p = {p_value:.2g}")
        assert told < SIGNIFICANT, "the measure is too coarse: it doesn't tell a tenant's own hits from its misses"
        if p_value > SIGNIFICANT:
            return
    pytest.fail(f"times to first token tell what the first tenant asked: p = {p_value:.2g}")
