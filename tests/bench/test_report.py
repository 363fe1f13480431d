"""Benchmarks report medians, references and errors as docs promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.bench.report import as_line, header, metric, percentile
from tandem.bench.serve import Load, Prompts, metrics


def test_a_metric_is_the_median_with_its_spread_beside_the_median_of_its_reference() -> None:
    line = as_line(metric("speed", [1.0, 4.0, 2.0], "m/s", reference="light", reference_values=[8.0, 7.0, 9.0]))
    assert line == {
        "metric": "speed",
        "value": 2.0,
        "unit": "m/s",
        "spread": 1.5,
        "reference": "light",
        "reference_value": 8.0,
        "ratio": 0.25,
        "goal": None,
        "ok": True,
    }


def test_a_single_repetition_has_no_spread() -> None:
    assert metric("speed", [2.0], "tokens/s").spread is None


def test_the_header_says_machine_versions_and_commit() -> None:
    first = header()
    assert set(first) == {"machine", "versions", "commit"}


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([50.0, 95.0, 99.0]))
def test_a_percentile_is_a_value_that_enough_others_do_not_exceed(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100
    assert sum(value < found for value in values) < len(values) * percent / 100


def test_one_error_spoils_every_metric_and_is_counted() -> None:
    good = Load([0.1], [0.01], num_tokens=32, num_requests=1, prompt_tokens=10, seconds=1.0)
    assert all(result.ok for result in metrics([(good, good)]))
    bad = Load([0.1], [0.01], num_tokens=32, num_requests=1, prompt_tokens=10, seconds=1.0, errors=["x"])
    results = list(metrics([(good, good), (bad, good)]))
    assert not any(result.ok for result in results)
    assert results[-1].value == 1


def test_a_run_in_which_nothing_ended_is_not_ok() -> None:
    (errors,) = metrics([(Load(seconds=1.0), Load())])
    assert not errors.ok


def test_prompts_share_prefixes_and_are_the_same_for_the_same_seed() -> None:
    one, other = Prompts(seed=1), Prompts(seed=1)
    prompts = [one.next() for _ in range(40)]
    assert prompts == [other.next() for _ in range(40)]
    beginnings = {tuple(prompt[:100]) for prompt in prompts if len(prompt) > 200}
    assert 1 <= len(beginnings) <= 3


def test_a_metric_without_values_is_our_bug() -> None:
    with pytest.raises(ValueError):
        metric("nothing", [], "s")
