"""Both systems are put through the same, nothing is cached from before, and the metrics say what was promised."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tandem.bench import peers
from tandem.bench.chat import contest, loop
from tandem.bench.chat.contest import Contest, Result, metrics
from tandem.bench.chat.loop import Answer, Seen, Trial, Window
from tandem.bench.chat.workload import Conversation, Script, UserTurn, Workload
from tandem.bench.report import Metric
from tandem.cli.main import main
from tandem.clock import now_s
from tandem.config import Config, load_config
from tandem.errors import ConfigError


class FakeScripts:
    """The salt is the first token of every prompt."""

    def salted(self, salt: int) -> list[Script]:
        return [Script(0.05 * number, ((salt, number), (0,)), (0.0, 0.01)) for number in range(1, 101)]


class FakeSystem:
    """Within the limits up to a rate, which it takes from the arrivals themselves."""

    def __init__(self, name: str, slow_salts: set[int]) -> None:
        self.name = name
        self.salts: list[int] = []
        self._slow = slow_salts

    @contextmanager
    def session(self) -> Iterator[FakeSystem]:
        yield self

    def ask(self, prompt: tuple[int, ...], num_tokens: int) -> Answer:
        salt = prompt[0]
        if salt not in self.salts:
            self.salts.append(salt)
        first_s = now_s() + (2.0 if salt in self._slow else 0.0)
        return Answer((5,) * num_tokens, tuple(first_s + 0.001 * number for number in range(num_tokens)), 1)

    def cancel(self) -> None:
        pass


WORKLOAD = Workload(4, ("s",), (Conversation(5.0, 0, (UserTurn("a", 0.0), UserTurn("b", 0.0))),))


def test_every_trial_has_a_salt_of_its_own_and_every_system_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "WARM_UP_S", 0.05)
    monkeypatch.setattr(loop, "TTFT_S", 0.9)  # a busy machine may be late, but not by so much
    monkeypatch.setattr(contest, "_FIRST", Window(0.0, 0.1))
    lines: list[str] = []
    running = Contest(WORKLOAD, FakeScripts(), 0.3, lines.append, threading.Event())  # type: ignore[arg-type]
    systems = [FakeSystem(name, slow_salts={3002}) for name in ("one", "other")]
    results = [running.search(system, 3000) for system in systems]
    for system, result in zip(systems, results, strict=True):
        # 2 holds, 3 doesn't; 2.45 and 2.71 are between.
        assert [round(trial.rate, 2) for trial in result.trials] == [2, 3, 2.45, 2.71]
        assert system.salts == [3000, 3001, 3002, 3003, 3004]
        assert result.rate == pytest.approx(2.71, abs=0.01)
    assert lines[0].startswith("one at 2 turns/s: 100% of ")


def trial(rate: float, *, ttft_s: float = 0.1, errors: int = 0, given_up: bool = False) -> Trial:
    seen = (Seen(ttft_s, 0.02, 100, 80),) * 19 + (Seen(0.0, 0.0, 100, 0, error="gone"),) * errors
    return Trial(rate, 30.0, seen, given_up)


def found(results: list[tuple[Result, Result]]) -> dict[str, Metric]:
    return {metric.metric: metric for metric in metrics(results)}


def test_the_metrics_are_medians_of_the_rounds_beside_the_peers() -> None:
    rounds = [
        (Result(rate, (trial(2.0), trial(3.0))), Result(peer, (trial(2.0, ttft_s=0.3), trial(3.0, given_up=True))))
        for rate, peer in ((6.0, 2.0), (6.5, 3.0), (5.0, 2.5))
    ]
    result = found(rounds)
    turns = result["turns"]
    assert (turns.value, turns.reference_value, turns.ratio) == (6.0, 2.5, 2.4)
    assert turns.ok
    assert turns.goal == ">= 2 x vLLM"
    assert (result["ttft_p50_at_2"].value, result["ttft_p50_at_2"].reference_value) == (0.1, 0.3)
    assert result["tpot_p99_at_2"].value == 0.02
    assert result["cached_share_at_2"].value == 0.8
    assert result["within_at_2"].value == 1
    assert not any(name.endswith("_at_3") for name in result)  # not to the end by both
    assert all(metric.ok for metric in result.values())


@pytest.mark.parametrize(
    ("ours", "theirs", "ok"), [(4.0, 2.0, True), (3.9, 2.0, False), (0.0, 0.0, False), (0.5, 0.0, True)]
)
def test_twice_the_peers_rate_is_the_goal(ours: float, theirs: float, ok: bool) -> None:
    assert found([(Result(ours, (trial(2.0),)), Result(theirs, (trial(2.0),)))])["turns"].ok is ok


def test_an_error_at_a_rate_that_holds_is_not_ok() -> None:
    result = found([(Result(6.0, (trial(2.0, errors=1), trial(9.0, errors=15))), Result(2.0, (trial(2.0),)))])
    assert result["errors"].value == 1
    assert not result["errors"].ok


def test_more_threads_than_cores_are_refused() -> None:
    config = load_config(None, {"decode": {"threads": len(os.sched_getaffinity(0))}})
    with pytest.raises(ConfigError, match="the workers have .* threads"):
        contest._cpus(config)


def test_both_have_a_core_for_each_thread() -> None:
    config = load_config(None, {"prefill": {"replicas": 0}})
    assert contest._cpus(config) == sorted(os.sched_getaffinity(0))[:1]
    before = os.sched_getaffinity(0)
    with contest._on([min(before)]):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def no_cluster(config: Config) -> None:
    raise AssertionError("a cluster was started")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "sglang"), "'sglang' is no server that Tandem's can be measured against (vllm is)"),
        (("--against", "vllm", "--target", "127.0.0.1:1"), "--target 127.0.0.1:1 can't be given with --against"),
        (("--against", "vllm", "--workload", "/no/such.json"), "/no/such.json is not there"),
        (("--workload", "chat.json"), "--workload chat.json is what --against sends"),
    ],
)
def test_bench_serve_refuses_what_it_can_not_compare(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "serve", *options, "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in " ".join(printed.err.split())


def test_bench_serve_says_how_to_install_what_it_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "_REPOSITORY", tmp_path)
    monkeypatch.setattr("tandem.cluster.Cluster.start", no_cluster)
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "serve", "--against", "vllm", "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "`make peers` installs it" in " ".join(capsys.readouterr().err.split())
