"""A request that has ended can be explained: what was weighed, what was chosen, what happened, what would have been best."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvpool.keys import Key
from protos.control import Capacity, Endpoints, Fence, Hello, RoleReport, RoutingGroup, Sampling, Tokens
from router.access import Caller
from router.explain import explain, hindsight
from router.journal import Journal, Request, Summary
from router.metrics import Metrics
from router.policy.base import Candidates, Placement, Prediction
from router.router import RouterCore, Settings
from tandem.errors import InvalidRequest

GROUP = RoutingGroup(model_fingerprint=b"f" * 16, kv_format="v1", numerics_class=b"n" * 16, block_size=4)
EPOCH = b"1" * 8
KEY: Key = bytes(16)


def placement(chosen: int, compute_s: list[float]) -> Placement:
    zeros = np.zeros(len(compute_s))
    candidates = Candidates(
        np.arange(len(compute_s)), zeros, zeros, np.array(compute_s), zeros, zeros, np.array([0.0] * len(compute_s))
    )
    prediction = Prediction(0, 0.0, 0.0, compute_s[chosen], 0.1, 0.0, 1.0, 0.0, 0.0)
    return Placement(chosen, 0, (), (), prediction, tuple(f"w{i}" for i in range(len(compute_s))), candidates)


def summary(ttft_s: float | None, *placements: Placement) -> Summary:
    return Summary("q", "completed", "", 10, 3, 3, ttft_s, 2.0, (0, 0), placements, tuple(0.5 for _ in placements), ())


def test_the_best_in_hindsight_is_who_was_predicted_to_be_sooner_than_the_choice_was() -> None:
    late = summary(2.0, placement(0, [0.3, 0.4, 0.9]))
    assert hindsight(late) == ("w1", pytest.approx(1.0), pytest.approx(1.0))
    good = summary(0.9, placement(0, [0.3, 0.4, 0.9]))
    assert hindsight(good) == ("w0", 0.9, 0.0)
    assert good.predicted_ttft_s == pytest.approx(0.9)


def test_predictions_and_regret_are_metrics() -> None:
    metrics = Metrics()
    metrics.ended(summary(2.0, placement(0, [0.3, 0.4])), 3)
    metrics.ended(summary(None), 0)
    value = metrics.registry.get_sample_value
    assert value("tandem_ttft_prediction_error_ratio_count") == 1
    bucket = "tandem_ttft_prediction_error_ratio_bucket"
    assert (value(bucket, {"le": "-0.9"}), value(bucket, {"le": "-0.5"})) == (0, 1)
    assert value("tandem_placement_regret_seconds_sum") == pytest.approx(1.0)


def test_what_is_not_remembered_is_an_error_that_says_so() -> None:
    journal = Journal()
    with pytest.raises(InvalidRequest, match="not among the last 0"):
        explain(journal, "", Caller())
    journal.open(Request("running", (1,), Sampling(max_tokens=1), 1, 9.0), 0.0)
    with pytest.raises(InvalidRequest, match="has not ended"):
        explain(journal, "running", Caller())


def test_a_request_through_the_core_is_explained() -> None:
    core = RouterCore(Settings("router", b"r" * 8), random.Random(1))
    for name, role in (("p0", "prefill"), ("d0", "decode"), ("d1", "decode")):
        hello = Hello(
            version=1,
            process=name,
            role=role,  # type: ignore[arg-type]
            epoch=EPOCH,
            pid=1,
            endpoints=Endpoints(fetch="f", events="e", replay="r"),
            capacity=Capacity(slab_bytes=1000, max_model_len=1000),
            group=GROUP,
        )
        core.on_message(name, EPOCH, hello, 0.0)
    core.submit(Request("q", tuple(range(400)), Sampling(max_tokens=1), 1, 60.0), 1.0)
    fence = Fence("q", 0, "prefill", 0)
    core.on_message("p0", EPOCH, RoleReport(fence, 16, 0, 384, [], 0.0, 0.0, 0.25), 1.3)
    core.on_message("p0", EPOCH, Tokens(fence, 0, 0, [7], finish_reason="length"), 1.3)

    answer = explain(core.journal, "", Caller())
    assert (answer.request_id, answer.outcome, answer.num_prompt_tokens) == ("q", "completed", 400)
    assert answer.ttft_s == pytest.approx(0.3)
    (decision,) = answer.decisions
    assert (decision.prefill, decision.after_s) == ("p0", 0.0)
    assert decision.decode in ("d0", "d1")
    assert {candidate.process for candidate in decision.candidates} == {"p0", "d0", "d1"}
    assert {c.process for c in decision.candidates if c.chosen} == {"p0", decision.decode}
    assert answer.predicted_ttft_s == pytest.approx(decision.compute_s) == pytest.approx(decision.ttft_s)
    assert [(run.process, run.computed_tokens) for run in answer.runs] == [("p0", 384)]
    assert answer.regret_s >= 0.0
