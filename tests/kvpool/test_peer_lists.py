"""One list of peers out of what several routers say."""

from __future__ import annotations

import msgspec

from kvpool.peer_lists import GRACE_S, PeerLists
from protos.control import Endpoints, Peers, RoutingGroup, Source

GROUP = RoutingGroup(b"m" * 16, "format", b"n" * 16, 16)
OTHER = RoutingGroup(b"o" * 16, "format", b"n" * 16, 16)


def source(name: str, epoch: int = 1) -> Source:
    return Source(name, bytes([epoch]) * 8, "DEVICE", Endpoints("", "", ""))


def peers(*workers: str | Source, pools: tuple[str, ...] = (), group: RoutingGroup | None = GROUP) -> Peers:
    listed = [source(worker) if isinstance(worker, str) else worker for worker in workers]
    return Peers(listed, group, 4096, [source(pool) for pool in pools])


def names(found: Peers | None) -> list[str]:
    assert found is not None
    return sorted(one.process for one in (*found.workers, *found.pools))


def test_without_a_group_there_is_nothing() -> None:
    assert PeerLists().said(0, peers(group=None), 0.0) is None


def test_a_router_alone_is_believed_at_once() -> None:
    lists = PeerLists()
    assert names(lists.said(0, peers("a", "b", pools=("p",)), 0.0)) == ["a", "b", "p"]
    assert names(lists.said(0, peers("b", "c"), GRACE_S)) == ["b", "c"]
    assert lists.due_s() is None


def test_somebody_whom_one_router_lists_is_there() -> None:
    lists = PeerLists()
    lists.said(0, peers("a"), 0.0)
    lists.said(1, peers("b"), 0.0)
    assert names(lists.said(0, peers(), 2 * GRACE_S)) == ["b"]
    assert names(lists.said(1, peers(), 2 * GRACE_S)) == []


def test_a_router_that_is_back_forgets_nobody_at_once() -> None:
    lists = PeerLists()
    lists.said(0, peers("a", "b", pools=("p",)), 0.0)
    lists.lost(0)
    assert names(lists.merged(100.0)) == ["a", "b", "p"]
    assert names(lists.said(0, peers("b"), 100.0)) == ["a", "b", "p"]
    assert [one.process for one in lists.merged(100.0).pools] == ["p"]  # type: ignore[union-attr]
    assert names(lists.said(0, peers("b", pools=("p",)), 101.0)) == ["a", "b", "p"]
    assert lists.due_s() == 100.0 + GRACE_S
    assert names(lists.merged(100.0 + GRACE_S)) == ["b", "p"]
    assert lists.due_s() is None


def test_a_new_incarnation_takes_the_place_of_the_old_one_at_once() -> None:
    lists = PeerLists()
    lists.said(0, peers("a", "b"), 0.0)
    lists.lost(0)
    lists.said(0, peers("b"), 100.0)
    found = lists.said(0, peers(source("a", 2), "b"), 100.5)
    assert found is not None
    assert sorted((one.process, one.epoch[0]) for one in found.workers) == [("a", 2), ("b", 1)]
    assert lists.due_s() is None


def test_what_a_lost_router_said_counts_no_more_where_another_one_speaks() -> None:
    lists = PeerLists()
    lists.said(0, peers("a"), 0.0)
    lists.said(1, peers("b"), 0.0)
    lists.lost(0)
    assert names(lists.merged(10.0)) == ["b"]
    lists.lost(1)
    assert names(lists.merged(10.0)) == ["b"]


def test_routers_of_another_group_are_not_mixed_in() -> None:
    lists = PeerLists()
    lists.said(0, peers("a"), 0.0)
    found = lists.said(1, peers("b", group=OTHER), 0.0)
    assert names(found) == ["b"]
    assert found is not None
    assert found.group == OTHER
    assert names(lists.said(0, peers("a", "c"), 10.0)) == ["a", "c"]


def test_a_list_that_comes_after_a_later_one_changes_nothing_until_its_router_is_another() -> None:
    lists = PeerLists()
    told = msgspec.structs.replace
    lists.said(0, told(peers("a", "b"), number=2), 100.0)
    assert names(lists.said(0, told(peers("a"), number=1), 200.0)) == ["a", "b"]
    assert names(lists.said(0, told(peers(), number=2), 200.0)) == ["a", "b"]
    assert names(lists.said(1, told(peers("c"), number=1), 200.0)) == ["a", "b", "c"]
    assert (lists.number(0), lists.number(1)) == (2, 1)
    lists.lost(0)
    assert lists.number(0) == 0
    assert "d" in names(lists.said(0, told(peers("d"), number=1), 300.0))
