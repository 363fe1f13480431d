"""Policies side by side: who runs, what nobody can beat, and what 100 % of a cluster's capacity is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from router.policy.seconds import PredictedSeconds
from tandem.errors import ConfigError
from tandem.sim.compare import (
    CAPACITY_GOODPUT,
    OURS,
    REMOVABLE,
    Contender,
    bound,
    capacity_rate,
    compare,
    contenders,
    load_of,
    ours,
    outcome,
    sanity,
    tuned,
)
from tandem.sim.policies.registry import POLICIES
from tandem.sim.presets import PRESETS
from tandem.sim.replay import Job, Outcome, noise_of
from tandem.sim.trace import BLOCK_TOKENS, TraceRequest

H100 = PRESETS["h100-llama-70b"]


def quiet(line: str) -> None:
    """Nobody listens."""


def requests(num: int = 120) -> list[TraceRequest]:
    """Conversations after one system prompt, one request a second."""
    rng = np.random.default_rng(2)
    found = []
    for at in range(num):
        name, turn = at % 10 + 10 * (at // 50), at // 10 % 5
        num_tokens = 1000 + 2500 * turn + int(rng.integers(0, 500))
        blocks = [0, *(1000 * (name + 1) + block for block in range(1, -(-num_tokens // BLOCK_TOKENS)))]
        found.append(TraceRequest(1000.0 * at, num_tokens, int(rng.integers(5, 60)), blocks))
    return found


# --- who ----------------------------------------------------------------------------------------------------------------------


def test_contenders_are_found_by_name_in_the_order_of_asking() -> None:
    found = contenders(["mooncake", OURS, "random"])
    assert [one.name for one in found] == ["mooncake", OURS, "random"]
    assert [(one.hold, one.ordered) for one in found] == [(False, False), (True, True), (False, False)]
    assert all(one.make() is not one.make() for one in found)
    assert [one.name for one in contenders(["all"])] == [OURS, *POLICIES]
    assert contenders([]) == []


def test_without_adds_ours_less_a_part() -> None:
    found = contenders([OURS], ["fetch", "hold"])
    assert [(one.name, one.setting) for one in found] == [(OURS, ""), (OURS, "without fetch"), (OURS, "without hold")]
    each = contenders([], ["each"])
    assert [one.setting for one in each] == [f"without {part}" for part in REMOVABLE]


@pytest.mark.parametrize(
    ("names", "without", "message"),
    [
        (["sglnag"], [], "'sglnag' is not known .*mooncake"),
        ([OURS, "bound"], [], "'bound' is not known"),
        (["all", OURS], [], "'all' is not known"),
        ([OURS], ["quue"], "'quue' is no part of the policy .*queue, fetch"),
        ([OURS], ["each", "queue"], "'each' is no part"),
    ],
)
def test_a_name_that_is_not_known_is_refused(names: list[str], without: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        contenders(names, without)


@pytest.mark.parametrize("part", REMOVABLE)
def test_ours_without_a_part_lacks_this_one_alone(part: str) -> None:
    whole, less = ours(), ours(part)
    made, lacking = whole.make(), less.make()
    assert isinstance(made, PredictedSeconds)
    assert isinstance(lacking, PredictedSeconds)
    terms, left = dataclasses.asdict(made._terms), dataclasses.asdict(lacking._terms)
    if part in terms:
        assert {name for name in terms if terms[name] != left[name]} == {part}
        assert left[part] == 0.0
        assert (less.hold, less.ordered) == (True, True)
    else:
        assert terms == left
        assert (less.hold, less.ordered) == {"hold": (False, True), "order": (False, False)}[part]


@pytest.mark.parametrize("part", ["others", "fetch", "queue", "hold", "order"])
def test_ours_without_a_part_does_otherwise(part: str) -> None:
    jobs = load_of(requests(), 14.0, 4, 1)
    whole = outcome(ours(), H100, 4, jobs, 1, quiet)
    less = outcome(ours(part), H100, 4, jobs, 1, quiet)
    assert not np.array_equal(whole.ttft_s, less.ttft_s)


# --- what nobody can beat -----------------------------------------------------------------------------------------------------


def test_the_bound_computes_alone_what_nobody_had_before() -> None:
    prices = H100.prices
    jobs = [Job(0.0, 3000, 10, (), 3000), Job(1.0, 3000, 10, (), 440)]
    alone = [prices.prefill_s(3000, 0) + prices.base_s, prices.prefill_s(440, 2560)]  # two steps, and one
    found = bound(H100, jobs, 2.0, 0.5, seed=1)
    noise = noise_of(2, seed=1)
    assert found.ttft_p50 == found.ttft_p90 == pytest.approx(alone[1] * noise[1] + H100.overhead_s)
    assert alone[0] * noise[0] > alone[1] * noise[1]
    assert found.hit_rate == pytest.approx(2560 / 6000)
    assert (found.policy, found.rate, found.load, found.goodput) == ("bound", 2.0, 0.5, 1.0)
    assert found.tpot_p50 == prices.base_s + prices.sequence_s


@pytest.mark.parametrize("rate", [4.0, 14.0])
def test_nobody_beats_the_bound(rate: float) -> None:
    found = list(
        compare(requests(), H100, 8, contenders(["all"]), rates=[rate], loads=[], tune=False, seed=1, say=quiet)
    )
    best = found[0]
    assert [one.policy for one in found] == ["bound", OURS, *POLICIES]
    for one in found[1:]:
        assert one.ttft_p50 >= best.ttft_p50 * (1 - 1e-9)
        assert one.ttft_p90 >= best.ttft_p90 * (1 - 1e-9)
        assert one.tpot_p50 >= best.tpot_p50
        assert one.hit_rate <= 1.01 * best.hit_rate  # who came first may find what one that came later computed
        assert one.goodput <= best.goodput
        assert one.ttft_p50 <= one.ttft_p90 <= one.ttft_p99
        assert one.hit_rate == pytest.approx(sum(one.hits.values()))
        assert one.imbalance >= 1.0


def test_every_contender_runs_at_every_rate() -> None:
    who = contenders(["least-loaded", OURS])
    said: list[str] = []
    found = list(compare(requests(20), H100, 4, who, rates=[1.0, 3.0], loads=[], tune=False, seed=1, say=said.append))
    assert [(one.policy, one.rate, one.load) for one in found] == [
        (name, rate, None) for rate in (1.0, 3.0) for name in ("bound", "least-loaded", OURS)
    ]
    assert sum("4 workers" in line for line in said) == 4


# --- capacity ----------------------------------------------------------------------------------------------------------------


def test_capacity_is_where_least_loaded_keeps_nine_of_ten_promises() -> None:
    trace = requests()
    said: list[str] = []
    full = capacity_rate(trace, H100, 4, 1, said.append)
    least_loaded = contenders(["least-loaded"])[0]

    def goodput(rate: float) -> float:
        return float(outcome(least_loaded, H100, 4, load_of(trace, rate, 4, 1), 1, quiet).within.mean())

    assert goodput(full) >= CAPACITY_GOODPUT
    assert goodput(1.3 * full) < CAPACITY_GOODPUT < goodput(0.7 * full)
    assert any(line.startswith("capacity of 4 workers: ") for line in said)


def test_parts_of_the_capacity_are_rates() -> None:
    trace = requests(60)
    full = capacity_rate(trace, H100, 4, 1, quiet)
    found = list(compare(trace, H100, 4, [], rates=[], loads=[0.5, 1.0], tune=False, seed=1, say=quiet))
    assert [(one.load, one.rate) for one in found] == [(0.5, pytest.approx(full / 2)), (1.0, pytest.approx(full))]


def test_of_a_large_load_the_first_requests_can_be_enough() -> None:
    trace = requests(60)
    assert load_of(trace, 3.0, 4, 1, most=20) == load_of(trace, 3.0, 4, 1)[:20]
    asked = {"rates": [3.0], "loads": [], "tune": False, "seed": 1, "say": quiet}
    all_of_it, some = (
        list(compare(trace, H100, 4, contenders(["least-loaded"]), **asked, most=most))[1]  # type: ignore[arg-type]
        for most in (None, 20)
    )
    assert some.moved_bytes["hand-over"] < all_of_it.moved_bytes["hand-over"] / 2


def test_the_capacity_of_the_first_requests_is_searched_with_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: set[int] = set()

    def counted(*arguments: Any) -> Outcome:
        lengths.add(len(arguments[3]))
        return outcome(*arguments)

    monkeypatch.setattr("tandem.sim.compare.outcome", counted)
    assert capacity_rate(requests(60), H100, 4, 1, quiet, most=20) > 0
    assert lengths == {20}


def test_a_cluster_that_keeps_no_promise_at_any_rate_has_no_capacity() -> None:
    slow = dataclasses.replace(H100, overhead_s=1000.0)
    with pytest.raises(ConfigError, match="fewer than 90% of its promises at 0.02 requests/s"):
        capacity_rate(requests(20), slow, 4, 1, quiet)


# --- tuning ------------------------------------------------------------------------------------------------------------------


def test_policies_of_others_are_tuned_and_ours_is_not() -> None:
    trace = requests(60)
    said: list[str] = []

    def tune(contender: Contender) -> Contender:
        return tuned(contender, trace, H100, 4, 8.0, 1, said.append)

    whole = ours()
    assert tune(whole) is whole
    fixed = contenders(["round-robin"])[0]
    assert tune(fixed) is fixed
    assert not said
    mooncake = tune(contenders(["mooncake"])[0])
    settings = {setting.label: setting.make for setting in POLICIES["mooncake"].settings}
    assert mooncake.make is settings[mooncake.setting]
    goodputs = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in said}
    label = mooncake.setting or "as published"
    assert len(said) == len(settings)
    assert goodputs[f"mooncake {label}:"] == max(goodputs.values())


def test_sanity_says_what_a_trace_is_like() -> None:
    trace = [TraceRequest(0, 600, 10, [1, 2]), TraceRequest(1000, 1000, 30, [1, 3])]
    assert sanity(trace) == {
        "requests": 2,
        "prompt_tokens": 800.0,
        "answer_tokens": 20.0,
        "block_hit_rate": 0.25,
        "block_tokens": 512,
    }
