"""The picture of a comparison: every policy and figure in it, well-formed, whatever came of it."""

from __future__ import annotations

import math
from dataclasses import replace
from xml.etree import ElementTree

from tandem.sim.compare import Result
from tandem.sim.picture import draw

ONE = Result(
    policy="tandem",
    setting="",
    rate=3.5,
    load=None,
    goodput=0.98,
    ttft_p50=0.3,
    ttft_p90=1.9,
    ttft_p99=10.0,
    tpot_p50=0.019,
    tpot_p90=0.021,
    tpot_p99=0.022,
    hit_rate=0.373,
    hits={},
    moved_bytes={},
    prefilled_here=0.0,
    imbalance=1.0,
    prediction_error=0.03,
    requests_per_s=4000.0,
)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_policies_are_drawn_from_best_to_worst_with_their_figures() -> None:
    worse = replace(ONE, policy="least-loaded", setting="decay=0.5", goodput=0.91, ttft_p90=2.5)
    found = texts(draw([worse, ONE], 8))
    assert found.index("tandem") < found.index("least-loaded")
    assert {"98.0%", "91.0%", "300 ms – 1.9 s", "19 ms – 21 ms", "37.3%", "(decay=0.5)"} <= set(found)
    assert "8 workers, 3.5 requests/s" in found[0]


def test_rates_stand_one_below_the_other_and_what_never_came_has_no_range() -> None:
    never = replace(ONE, rate=7.0, load=0.95, ttft_p90=math.inf, goodput=0.2)
    found = texts(draw([never, ONE], 64))
    assert "3.5 and 7.0 requests/s" in draw([ONE, never], 64)
    assert "–" in found
    assert "(95% of capacity)" in found
