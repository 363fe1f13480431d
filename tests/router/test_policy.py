"""The policy's choices, as its users would expect them."""

from __future__ import annotations

import random
from typing import Any

from protos.control import StepPrices
from router.policy import Candidate, Placement, Policy
from router.prefix_index import Place

SLAB = 368_640


def place(num_tokens: int, **changes: Any) -> Placement:
    fields: dict[str, Any] = {
        "num_tokens": num_tokens,
        "block_size": 16,
        "slab_bytes": SLAB,
        "hits": {},
        "prefills": [Candidate("p0", 0, 0)],
        "decodes": [Candidate("d0", 0, 0)],
        "rng": random.Random(1),
    }
    placement = Policy().place(**(fields | changes))
    assert placement is not None
    return placement


def test_a_long_uncached_prompt_goes_to_the_prefill_worker() -> None:
    for num_tokens in (200, 2_000, 20_000):
        placement = place(num_tokens)
        assert placement.prefill == "p0"
        assert placement.decode == "d0"


def test_a_worker_that_has_not_measured_its_speed_is_taken_to_be_like_the_others() -> None:
    slow = [Candidate("p0", 0, 0, prices=StepPrices(token_s=1 / 300))]
    assert place(500, prefills=slow).prefill == "p0"
    assert place(500, prefills=[], decodes=[Candidate("d0", 0, 0)]).chosen.compute_s == 0.25


def test_a_short_suffix_is_prefilled_where_it_is_decoded() -> None:
    assert place(8).prefill is None
    hit = {Place("d0", "DEVICE"): 125}
    placement = place(2_010, hits=hit)
    assert placement.prefill is None
    assert placement.hit_tokens == 2_000


def test_a_prefill_worker_with_a_long_queue_is_passed_over() -> None:
    assert place(500, prefills=[Candidate("p0", 50_000, 9)]).prefill is None
    two = [Candidate("p0", 5_000, 1), Candidate("p1", 0, 0)]
    assert place(500, prefills=two).prefill == "p1"


def test_a_busy_decode_worker_is_spared_a_prefill_that_an_idle_one_would_take() -> None:
    assert place(30, decodes=[Candidate("d0", 0, 0)]).prefill is None
    assert place(30, decodes=[Candidate("d0", 0, 16)]).prefill == "p0"


def test_no_prefill_worker_or_an_order_to_do_without_means_prefill_here() -> None:
    assert place(5_000, prefills=[]).prefill is None
    assert place(5_000, prefill_here_only=True).prefill is None


def test_no_decode_worker_means_no_placement() -> None:
    nothing = Policy().place(
        num_tokens=5,
        block_size=16,
        slab_bytes=1,
        hits={},
        prefills=[Candidate("p", 0, 0)],
        decodes=[],
        rng=random.Random(),
    )
    assert nothing is None


def test_the_worker_that_holds_the_prefix_is_preferred_while_its_queue_is_short() -> None:
    hits = {Place("p1", "DEVICE"): 100}
    decodes = [Candidate("d0", 0, 0, fetch_bytes_per_s=1e9)]
    slow = [Candidate("p0", 0, 0, fetch_bytes_per_s=2e8), Candidate("p1", 0, 0, fetch_bytes_per_s=2e8)]
    assert place(2_000, hits=hits, prefills=slow, decodes=decodes).prefill == "p1"
    slow[1] = Candidate("p1", 100_000, 4)
    placement = place(2_000, hits=hits, prefills=slow, decodes=[Candidate("d0", 9_000, 0)])
    assert placement.prefill == "p0"
    assert placement.prefill_sources == (Place("p1", "DEVICE"),)


def test_a_fetch_that_takes_longer_than_computing_is_not_asked_for() -> None:
    hits = {Place("pool", "HOST"): 100}
    placement = place(
        2_000, hits=hits, prefills=[Candidate("p0", 0, 0, fetch_bytes_per_s=1e6)], decodes=[Candidate("d0", 8_000, 0)]
    )
    assert placement.prefill == "p0"
    assert placement.prefill_sources == ()
    assert placement.hit_tokens == 0


def test_sources_are_the_places_that_hold_more_longest_first() -> None:
    hits = {
        Place("p0", "DEVICE"): 10,
        Place("d0", "DEVICE"): 5,
        Place("d1", "DEVICE"): 60,
        Place("pool", "HOST"): 60,
        Place("pool", "DISK"): 80,
    }
    placement = place(2_000, hits=hits)
    assert placement.prefill == "p0"
    assert placement.prefill_sources == (Place("pool", "DISK"), Place("d1", "DEVICE"), Place("pool", "HOST"))
    assert placement.decode_sources == placement.prefill_sources
    assert placement.hit_tokens == 80 * 16


def test_ties_are_spread_by_the_given_generator() -> None:
    decodes = [Candidate(f"d{i}", 0, 0) for i in range(4)]
    rng = random.Random(3)
    chosen = {place(500, decodes=decodes, rng=rng).decode for _ in range(100)}
    assert chosen == {"d0", "d1", "d2", "d3"}


def test_a_suffix_costs_more_the_more_it_attends_to() -> None:
    prices = StepPrices(base_s=0.01, token_s=1e-4, pair_s=1e-6)
    decodes = [Candidate("d0", 0, 0, prices=prices)]
    first = place(1_000, prefills=[], decodes=decodes).chosen.compute_s
    after = place(5_000, prefills=[], decodes=decodes, hits={Place("d0", "DEVICE"): 250}).chosen.compute_s
    assert round(first, 9) == round(0.01 + 0.1 + 1e-6 * 500_500, 9)
    assert round(after, 9) == round(0.01 + 0.1 + 1e-6 * (4_000_000 + 500_500), 9)


def test_a_queue_costs_what_its_prompts_cost_one_by_one() -> None:
    worker = Candidate("d0", 50_000, 9, prices=StepPrices(token_s=1e-4, pair_s=1e-7))
    assert round(place(1_000, prefills=[], decodes=[worker]).chosen.queue_s, 9) == round(50_000 * (1e-4 + 5e-5), 9)


def test_predictions_add_up_and_all_candidates_are_kept() -> None:
    prefills = [Candidate("p0", 100, 1, prices=StepPrices(token_s=0.001))]
    placement = place(1_000, prefills=prefills, decodes=[Candidate("d0", 0, 0, prices=StepPrices(token_s=0.002))])
    assert placement.chosen.queue_s == 0.1
    assert placement.chosen.compute_s == 1.0
    assert placement.predicted_ttft_s == 1.1
    assert len(placement.considered) == 3
