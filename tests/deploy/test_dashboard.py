"""The Grafana dashboard is what its script writes, and asks for nothing that a router does not show."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric

from tests.router.watched import page_of, watched_cluster

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
BOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
TARGETS = [(panel["title"], target) for panel in BOARD["panels"] for target in panel.get("targets", ())]
OF_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds when it collects."""
SELECTOR = re.compile(r"(tandem_\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\b(?:by|without) \(([^)]*)\)")


@pytest.fixture(scope="module")
def samples() -> Iterator[dict[str, set[str]]]:
    """Labels by sample name, of a page to which everything has happened."""
    with watched_cluster() as router:
        page: dict[str, Metric] = page_of(router)
        found: dict[str, set[str]] = {}
        for family in page.values():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        yield found


def test_the_file_is_what_the_script_writes() -> None:
    written = runpy.run_path(str(FOLDER / "dashboard.py"))["text"]()
    assert (FOLDER / "dashboard.json").read_text(encoding="utf-8") == written


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=lambda found: found if isinstance(found, str) else "")
def test_each_query_names_metrics_and_labels_that_a_router_shows(
    samples: dict[str, set[str]], title: str, target: dict[str, Any]
) -> None:
    expr = target["expr"]
    selected = SELECTOR.findall(expr)
    assert selected, f"{title}: {expr}"
    labels: set[str] = set()
    for name, matchers in selected:
        assert name in samples, f"{title}: no router shows {name}"
        labels |= samples[name] | OF_PROMETHEUS
        for matcher in filter(None, matchers.split(",")):
            label = re.match(r"\s*(\w+)\s*(?:=|!=|=~|!~)\s*\"[^\"]*\"\s*$", matcher)
            assert label, f"{title}: {matcher!r} is no matcher"
            assert label[1] in samples[name] | OF_PROMETHEUS, f"{title}: {name} has no label {label[1]}"
    grouped = {label.strip() for group in GROUPED.findall(expr) for label in group.split(",")}
    assert grouped <= labels, f"{title}: {grouped - labels}"
    shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    kept = grouped if re.search(r"\bby \(", expr) else labels
    assert shown <= kept, f"{title}: the legend shows {shown - kept}, which the query drops"
    assert expr.count("(") == expr.count(")")


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=lambda found: found if isinstance(found, str) else "")
def test_counters_are_asked_for_their_rate_and_processes_of_one_router(title: str, target: dict[str, Any]) -> None:
    expr = target["expr"]
    for name in re.findall(r"(tandem_\w+_(?:total|bucket))\b", expr):
        assert f"rate({name}" in expr, f"{title}: {expr}"
    for name in re.findall(r"tandem_process_\w+", expr):
        assert re.search(rf"max without \(instance\) \((?:rate\()?{name}\b", expr), f"{title}: counted once a router"


def test_panels_lie_beside_each_other_and_have_numbers_of_their_own() -> None:
    panels = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(numbers) == len(set(numbers))
