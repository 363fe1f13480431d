"""The policy's choices, as its users would expect them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from protos.control import Capacity, Fence, Link, Load, StepPrices
from router.fleet import SENDS_UNTIL, Fleet, Work
from router.policy.base import Ask, Placement, SourcePlace
from router.policy.seconds import PredictedSeconds
from router.policy.weigh import Terms
from router.prefix_index import Hits

SLAB = 368_640
PRICES = StepPrices(base_s=0.002, token_s=5e-4, pair_s=1e-9, sequence_s=1e-3, context_s=1e-7)
FULL = Load(prices=PRICES, fetch_bytes_per_s=3e9, free_blocks=10_000)


class Cluster:
    """A fleet by names: `p…` prefill and `d…` decode workers, `h…` pool nodes, each with the load given."""

    def __init__(self, **loads: Load) -> None:
        self.fleet = Fleet()
        self.held: dict[str, tuple[int, int, int]] = {}
        for name, load in loads.items():
            role = {"p": "prefill", "d": "decode", "h": "pool"}[name[0]]
            machine = f"machine-{name[1:]}"
            self.fleet.join(name, role, machine, Capacity(num_blocks=10_000, max_running=64), "g", 0.0)  # type: ignore[arg-type]
            self.fleet.reported(name, load, (), 0.0, 0.0)
        self.fleet.serve("g")

    def hits(self) -> Hits:
        counts = np.zeros((self.fleet.table.shape[1], 3), dtype=np.int32)
        for name, tiers in self.held.items():
            counts[self.fleet.number(name)] = tiers
        holders = [number for name in self.held if (number := self.fleet.number(name)) is not None]
        return Hits(counts, holders, int(counts.sum(axis=1).max()))

    def place(
        self, num_tokens: int, rng: random.Random | None = None, terms: Terms | None = None, **asked: object
    ) -> Named:
        ask = replace(Ask(num_tokens, 16, SLAB), **asked)  # type: ignore[arg-type]
        policy = PredictedSeconds(terms)
        placement = policy.place(ask, self.hits(), self.fleet, 0.0, rng or random.Random(1))
        assert placement is not None
        return Named(placement)


@dataclass
class Named:
    """A placement by names."""

    placement: Placement

    @property
    def prefill(self) -> str | None:
        number = self.placement.prefill
        return None if number is None else self.placement.names[number]

    @property
    def decode(self) -> str:
        return self.placement.names[self.placement.decode]

    def sources(self, of: tuple[SourcePlace, ...]) -> list[tuple[str, str, int]]:
        return [(self.placement.names[place.number], place.tier, place.num_blocks) for place in of]


def busy(num_tokens: int = 0, num_generating: int = 0, **changes: object) -> Load:
    load = replace_load(
        FULL, waiting_tokens=num_tokens, num_generating=num_generating, context_tokens=500 * num_generating
    )
    return replace_load(load, **changes)


def replace_load(load: Load, **changes: object) -> Load:
    fields = {name: getattr(load, name) for name in load.__struct_fields__}
    return Load(**(fields | changes))  # type: ignore[arg-type]


def test_a_long_uncached_prompt_goes_to_the_prefill_worker() -> None:
    for num_tokens in (300, 2_000, 20_000):
        placed = Cluster(p0=FULL, d0=FULL).place(num_tokens)
        assert (placed.prefill, placed.decode) == ("p0", "d0")


def test_a_short_suffix_is_prefilled_where_it_is_decoded() -> None:
    assert Cluster(p0=FULL, d0=FULL).place(8).prefill is None
    cluster = Cluster(p0=FULL, d0=FULL)
    cluster.held["d0"] = (125, 0, 0)
    placed = cluster.place(2_010)
    assert placed.prefill is None
    assert placed.placement.hit_tokens == 2_000


def test_a_prefill_worker_with_a_long_queue_is_passed_over() -> None:
    assert Cluster(p0=busy(50_000), d0=FULL).place(500).prefill is None
    assert Cluster(p0=busy(5_000), p1=FULL, d0=FULL).place(500).prefill == "p1"


def test_a_queue_of_what_is_due_later_is_no_queue() -> None:
    cluster = Cluster(p0=FULL, p1=FULL, d0=busy(5_000, num_generating=40))
    cluster.fleet.dispatched(0, Fence("a", 0, "prefill", 0), Work(num_tokens=9_000, due_s=50.0), 0.0)
    cluster.fleet.dispatched(1, Fence("b", 0, "prefill", 0), Work(num_tokens=600, due_s=1.0), 0.0)
    assert cluster.place(500, due_s=60.0).prefill == "p1"
    placed = cluster.place(500, due_s=2.0, terms=Terms(others=0.0))
    assert placed.prefill == "p0"
    assert placed.placement.chosen.queue_s == pytest.approx(cluster.fleet.compute_s(0, 9_000, 0) / 9_000 * 512), (
        "its step"
    )
    assert cluster.place(500, due_s=2.0).prefill == "p1", "but who is there already would wait for it"


def test_a_busy_decode_worker_is_spared_a_prefill_that_an_idle_one_would_take() -> None:
    assert Cluster(p0=FULL, d0=FULL).place(30).prefill is None
    assert Cluster(p0=FULL, d0=busy(num_generating=16)).place(30).prefill == "p0"


def test_no_prefill_worker_or_an_order_to_do_without_means_prefill_here() -> None:
    assert Cluster(d0=FULL).place(5_000).prefill is None
    assert Cluster(p0=FULL, d0=FULL).place(5_000, prefill_here_only=True).prefill is None


def test_no_decode_worker_means_no_placement() -> None:
    cluster = Cluster(p0=FULL)
    assert PredictedSeconds().place(Ask(5, 16, 1), cluster.hits(), cluster.fleet, 0.0, random.Random()) is None


def test_workers_that_failed_a_request_are_avoided_while_others_are_there() -> None:
    cluster = Cluster(p0=FULL, p1=FULL, d2=FULL, d3=FULL)
    placed = cluster.place(2_000, avoid=frozenset({0, 3}))
    assert (placed.prefill, placed.decode) == ("p1", "d2")
    assert cluster.place(2_000, avoid=frozenset({0, 1, 2, 3})).prefill in ("p0", "p1")


def test_the_worker_that_holds_the_prefix_is_preferred_while_its_queue_is_short() -> None:
    slow = {"p0": busy(fetch_bytes_per_s=2e8), "p1": busy(fetch_bytes_per_s=2e8), "d0": busy(num_generating=20)}
    cluster = Cluster(**slow)
    cluster.held["p1"] = (100, 0, 0)
    assert cluster.place(2_000).prefill == "p1"
    cluster = Cluster(**slow | {"p1": busy(100_000, fetch_bytes_per_s=2e8)})
    cluster.held["p1"] = (100, 0, 0)
    placed = cluster.place(2_000)
    assert placed.prefill == "p0"
    assert placed.sources(placed.placement.prefill_sources) == [("p1", "DEVICE", 100)]


def test_a_fetch_that_takes_longer_than_computing_is_not_asked_for() -> None:
    cluster = Cluster(p0=busy(fetch_bytes_per_s=1e6), d0=busy(8_000), h1=Load())
    cluster.held["h1"] = (0, 100, 0)
    placed = cluster.place(2_000)
    assert (placed.prefill, placed.placement.prefill_sources, placed.placement.hit_tokens) == ("p0", (), 0)


def test_the_speed_between_two_processes_counts_where_it_is_known() -> None:
    cluster = Cluster(p0=FULL, p1=FULL, d2=busy(num_generating=20), h3=Load())
    cluster.held["h3"] = (0, 100, 0)
    cluster.fleet.reported("p0", FULL, (Link("h3", "tcp", 1, 2e7),), 0.0, 0.0)
    cluster.fleet.reported("p1", FULL, (Link("h3", "shm", 1, 2e10),), 0.0, 0.0)
    assert {cluster.place(2_000, random.Random(seed)).prefill for seed in range(20)} == {"p1"}


def test_a_source_that_is_busy_sending_is_waited_for() -> None:
    cluster = Cluster(p0=FULL, d1=busy(num_generating=20), h2=Load(), h3=Load())
    cluster.held |= {"h2": (0, 100, 0), "h3": (0, 99, 0)}
    assert cluster.place(2_000).placement.hit_tokens == 1_600
    cluster.fleet.table[SENDS_UNTIL, 2] = 5.0
    assert cluster.place(2_000).placement.hit_tokens == 1_584


def test_sources_are_the_places_that_hold_more_longest_first() -> None:
    cluster = Cluster(p0=FULL, d0=busy(num_generating=9), d1=busy(num_generating=30), h2=Load(), h3=Load())
    cluster.held = {"p0": (10, 0, 0), "d0": (5, 0, 0), "d1": (60, 0, 0), "h2": (0, 60, 0), "h3": (0, 60, 20)}
    placed = cluster.place(2_000)
    assert (placed.prefill, placed.decode) == ("p0", "d0")
    expected = [("h3", "DISK", 80), ("d1", "DEVICE", 60), ("h2", "HOST", 60)]
    assert placed.sources(placed.placement.prefill_sources) == expected
    assert placed.sources(placed.placement.decode_sources) == expected
    assert placed.placement.hit_tokens == 80 * 16


def test_a_hot_prefix_is_fetched_by_others_when_its_holder_is_the_bottleneck() -> None:
    cluster = Cluster(p0=FULL, p1=FULL, p2=FULL, d3=busy(num_generating=40))
    cluster.held["p0"] = (120, 0, 0)
    chosen = []
    for number in range(12):
        placed = cluster.place(2_000, random.Random(number), due_s=float(number))
        assert placed.placement.prefill is not None
        assert placed.placement.hit_tokens == 1_920
        work = Work(num_tokens=80, due_s=float(number))
        cluster.fleet.dispatched(placed.placement.prefill, Fence(str(number), 0, "prefill", 0), work, 0.0)
        chosen.append(placed.prefill)
    assert chosen[0] == "p0"
    assert set(chosen) == {"p0", "p1", "p2"}


def test_misses_are_spread_because_what_was_just_sent_counts() -> None:
    cluster = Cluster(p0=FULL, p1=FULL, p2=FULL, p3=FULL, d0=busy(num_generating=9), d1=busy(num_generating=9))
    prefills, decodes = [], []
    for number in range(8):
        placed = cluster.place(1_000, due_s=float(number))
        assert placed.placement.prefill is not None
        fleet, placement = cluster.fleet, placed.placement
        fleet.dispatched(placement.prefill, Fence(str(number), 0, "prefill", 0), Work(1_000, due_s=float(number)), 0.0)  # type: ignore[arg-type]
        fleet.dispatched(
            placement.decode, Fence(str(number), 0, "decode", 0), Work(num_sequences=1, context_tokens=1e3), 0.0
        )
        prefills.append(placed.prefill)
        decodes.append(placed.decode)
    assert sorted(prefills[:4]) == ["p0", "p1", "p2", "p3"]
    assert (decodes.count("d0"), decodes.count("d1")) == (4, 4)


def test_ties_are_spread_by_the_given_generator() -> None:
    cluster = Cluster(p0=FULL, d0=FULL, d1=FULL, d2=FULL, d3=FULL)
    rng = random.Random(3)
    assert {cluster.place(500, rng).decode for _ in range(100)} == {"d0", "d1", "d2", "d3"}
    assert [cluster.place(500, random.Random(7)).decode for _ in range(5)] == [
        cluster.place(500, random.Random(7)).decode
    ] * 5


def test_a_stream_goes_where_its_steps_are_short_and_others_are_slowed_least() -> None:
    cluster = Cluster(p0=FULL, d0=busy(num_generating=9), d1=busy(num_generating=4))
    assert cluster.place(2_000).decode == "d1"
    heavy = busy(num_generating=2, context_tokens=200_000)
    assert Cluster(p0=FULL, d0=busy(num_generating=4), d1=heavy).place(2_000).decode == "d0"


def test_a_promise_for_each_token_keeps_streams_from_where_they_would_break_it() -> None:
    fast = StepPrices(base_s=0.002, token_s=5e-4, sequence_s=1e-3, context_s=0.0)
    slow = StepPrices(base_s=0.006, token_s=5e-4, sequence_s=1e-4, context_s=0.0)
    cluster = Cluster(p0=FULL, d0=busy(num_generating=5, prices=fast), d1=busy(num_generating=40, prices=slow))
    assert cluster.place(2_000).decode == "d0"
    assert cluster.place(2_000, tpot_s=0.0079).decode == "d0"
    cluster = Cluster(p0=FULL, d0=busy(num_generating=8, prices=fast), d1=busy(num_generating=30, prices=slow))
    assert cluster.place(2_000, tpot_s=0.0105).decode == "d1"


def test_a_worker_without_room_for_the_blocks_is_left_alone() -> None:
    cluster = Cluster(p0=FULL, d0=busy(num_generating=2, free_blocks=50), d1=busy(num_generating=3))
    placed = cluster.place(2_000)
    assert (placed.decode, placed.placement.chosen.room_s) == ("d1", 0.0)
    cluster = Cluster(p0=FULL, d0=busy(num_generating=2, free_blocks=50))
    assert cluster.place(2_000).placement.chosen.room_s > 0.0
    assert Cluster(p0=FULL, d0=busy(free_blocks=50)).place(2_000).placement.chosen.room_s == 0.0, (
        "nobody would make room"
    )
    assert Cluster(p0=FULL, d0=busy(num_generating=64)).place(2_000).placement.chosen.room_s > 0.0


def test_a_suffix_costs_more_the_more_it_attends_to() -> None:
    prices = StepPrices(base_s=0.01, token_s=1e-4, pair_s=1e-6, sequence_s=1e-3)
    cluster = Cluster(d0=busy(prices=prices))
    first = cluster.place(1_000).placement.chosen.compute_s
    cluster.held["d0"] = (250, 0, 0)
    after = cluster.place(5_000).placement.chosen.compute_s
    assert first == pytest.approx(0.02 + 0.1 + 1e-6 * 500_500), "two steps"
    assert after == pytest.approx(0.02 + 0.1 + 1e-6 * (4_000_000 + 500_500))


def test_predictions_add_up_and_all_candidates_are_kept() -> None:
    cluster = Cluster(p0=busy(200), d0=FULL)
    cluster.fleet.overhead_s = 0.25
    chosen = (placement := cluster.place(1_000).placement).chosen
    assert chosen.queue_s == pytest.approx(0.102)
    assert chosen.compute_s == pytest.approx(0.5045, abs=1e-6)
    assert placement.predicted_ttft_s == chosen.ttft_s == pytest.approx(0.8565, abs=1e-6)
    assert placement.candidates is not None
    assert [placement.names[number] for number in placement.candidates.numbers] == ["p0", "d0"]
    assert placement.candidates.compute_s.tolist() == pytest.approx([chosen.compute_s] * 2)
    parts = (chosen.ttft_s, chosen.handover_s, chosen.stream_s, chosen.others_s, chosen.room_s)
    assert chosen.total_s == pytest.approx(sum(parts))


def test_a_thousand_workers_are_weighed_and_the_best_is_found() -> None:
    loads = {f"p{i}": busy(1_000 + i) for i in range(640)} | {f"d{i}": busy(num_generating=9) for i in range(384)}
    loads["p333"] = busy(10)
    loads["d77"] = busy(num_generating=1)
    placed = Cluster(**loads).place(3_000)
    assert (placed.prefill, placed.decode) == ("p333", "d77")
    assert placed.placement.candidates is not None
    assert len(placed.placement.candidates.numbers) == 128


def _queue() -> tuple[Cluster, dict[str, object]]:
    """A hit of a hundred tokens behind two seconds of work."""
    cluster = Cluster(p0=busy(5_000), p1=FULL, d0=busy(5_000))
    cluster.fleet.reachable[:] = False
    cluster.held["p0"] = (6, 0, 0)
    return cluster, {}


def _fetch() -> tuple[Cluster, dict[str, object]]:
    """A long hit at the end of a slow line, a short one at a worker that computes a little slower."""
    slow = replace_load(FULL, fetch_bytes_per_s=1e6)
    slower = replace_load(slow, prices=replace_prices(token_s=6e-4))
    cluster = Cluster(p0=slower, p1=slow, d0=busy(5_000), d1=busy(5_000))
    cluster.held["d1"] = (20, 0, 0)
    cluster.held["p0"] = (10, 0, 0)
    return cluster, {}


def _others() -> tuple[Cluster, dict[str, object]]:
    """A worker whose prompts are due later, and one with a little that is due sooner."""
    cluster = Cluster(p0=FULL, p1=FULL, d0=busy(5_000, num_generating=40))
    cluster.fleet.dispatched(0, Fence("a", 0, "prefill", 0), Work(num_tokens=9_000, due_s=50.0), 0.0)
    cluster.fleet.dispatched(1, Fence("b", 0, "prefill", 0), Work(num_tokens=600, due_s=1.0), 0.0)
    return cluster, {"due_s": 2.0}


def _stream() -> tuple[Cluster, dict[str, object]]:
    """A slow worker without streams, and a fast one with one."""
    slow = replace_load(FULL, prices=replace_prices(base_s=0.02))
    return Cluster(p0=FULL, d0=slow, d1=busy(num_generating=1)), {}


def _tpot() -> tuple[Cluster, dict[str, object]]:
    """A worker whose steps are longer than promised, and one with streams that would wait."""
    slow = replace_load(FULL, prices=replace_prices(base_s=0.055))
    return Cluster(p0=FULL, d0=slow, d1=busy(num_generating=30, prices=replace_prices(base_s=0.012))), {"tpot_s": 0.05}


def _room() -> tuple[Cluster, dict[str, object]]:
    """A worker with few streams and no blocks, and one with more streams and blocks."""
    return Cluster(p0=FULL, d0=busy(num_generating=1, free_blocks=0), d1=busy(num_generating=2)), {}


@pytest.mark.parametrize(
    ("term", "scene", "chosen", "otherwise"),
    [
        ("queue", _queue, "p1", "p0"),
        ("fetch", _fetch, "p0", "p1"),
        ("others", _others, "p1", "p0"),
        ("stream", _stream, "d1", "d0"),
        ("tpot", _tpot, "d1", "d0"),
        ("room", _room, "d1", "d0"),
    ],
)
def test_without_any_term_of_the_cost_a_choice_is_another(
    term: str, scene: Callable[[], tuple[Cluster, dict[str, object]]], chosen: str, otherwise: str
) -> None:
    cluster, asked = scene()
    for terms, expected in ((Terms(), chosen), (replace(Terms(), **{term: 0.0}), otherwise)):
        placed = cluster.place(500, terms=terms, **asked)
        assert expected in (placed.prefill, placed.decode), terms


def replace_prices(**changes: float) -> StepPrices:
    fields = {name: getattr(PRICES, name) for name in PRICES.__struct_fields__}
    return StepPrices(**(fields | changes))
