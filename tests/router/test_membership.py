"""Membership: who is let in, who is lost, and who routes together."""

from __future__ import annotations

from typing import Any

from protos.control import Capacity, Counters, Endpoints, Heartbeat, Hello, Load, Role, RoutingGroup
from router.membership import Changed, Joined, Lost, Membership, Rejected

GROUP = RoutingGroup(model_fingerprint=b"a" * 16, kv_format="v1", numerics_class=b"n" * 16, block_size=16)
OTHER = RoutingGroup(model_fingerprint=b"b" * 16, kv_format="v1", numerics_class=b"n" * 16, block_size=16)


def hello(name: str, role: Role = "decode", epoch: bytes = b"1" * 8, **changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "version": 1,
        "process": name,
        "role": role,
        "epoch": epoch,
        "pid": 1,
        "endpoints": Endpoints(fetch="f", events="e", replay="r"),
        "capacity": Capacity(slab_bytes=64, max_model_len=100),
        "group": GROUP,
    }
    return Hello(**(fields | changes))


def heartbeat(name: str, epoch: bytes = b"1" * 8, step_age_s: float = 0.0) -> Heartbeat:
    return Heartbeat(name, epoch, step_id=1, step_age_s=step_age_s, events_seq=-1, load=Load(), counters=Counters())


def membership() -> Membership:
    return Membership(heartbeat_s=0.25, liveness_s=3.0, progress_s=60.0)


def kinds(events: list[Any]) -> list[type]:
    return [type(event) for event in events]


def run(members: Membership, until_s: float, *names: str, start_s: float = 0.0) -> list[Lost]:
    """Lets time pass in ticks while `names` send heartbeats."""
    lost: list[Lost] = []
    now_s = start_s
    while now_s < until_s:
        now_s += 0.25
        for name in names:
            members.heartbeat(heartbeat(name), now_s)
        lost += members.expired(now_s)
    return lost


def test_silence_past_the_liveness_deadline_is_a_loss_and_heartbeats_prevent_it() -> None:
    members = membership()
    members.hello(hello("d0"), 0.0)
    members.hello(hello("d1"), 0.0)
    assert [lost.name for lost in run(members, 4.0, "d1")] == ["d0"]
    assert [m.name for m in members.workers("decode")] == ["d1"]


def test_time_in_which_the_router_slept_is_held_against_nobody() -> None:
    members = membership()
    members.hello(hello("d0"), 0.0)
    members.expired(0.1)
    assert members.expired(50.0) == []
    assert [lost.name for lost in run(members, 55.0, start_s=50.0)] == ["d0"]


def test_a_step_that_never_ends_is_a_loss_although_heartbeats_come() -> None:
    members = membership()
    members.hello(hello("d0"), 0.0)
    members.heartbeat(heartbeat("d0", step_age_s=59.0), 0.1)
    assert members.expired(0.2) == []
    members.heartbeat(heartbeat("d0", step_age_s=61.0), 0.3)
    (lost,) = members.expired(0.4)
    assert "61.0 s" in lost.reason
    assert "60.0 s" in lost.reason


def test_other_protocol_versions_and_nameless_groups_are_rejected() -> None:
    members = membership()
    assert kinds(members.hello(hello("d0", version=2), 0.0)) == [Rejected]
    assert kinds(members.hello(hello("d0", group=None), 0.0)) == [Rejected]
    assert kinds(members.hello(hello("r", role="router"), 0.0)) == [Rejected]
    assert len(members) == 0


def test_a_second_process_of_a_live_name_is_rejected_only_once_the_first_has_spoken_later_than_a_message_takes() -> (
    None
):
    members = membership()
    members.hello(hello("d0"), 0.0)
    members.heartbeat(heartbeat("d0"), 1.0)
    assert members.hello(hello("d0", epoch=b"2" * 8), 1.1) == []
    members.heartbeat(heartbeat("d0"), 1.25)
    assert members.hello(hello("d0", epoch=b"2" * 8), 1.3) == [], "it may have died, and this was on its way"
    members.heartbeat(heartbeat("d0"), 1.1 + 3.0)
    assert members.hello(hello("d0", epoch=b"2" * 8), 1.2 + 3.0) == []
    members.heartbeat(heartbeat("d0"), 1.2 + 3.0)
    assert kinds(members.hello(hello("d0", epoch=b"2" * 8), 1.3 + 3.0)) == [Rejected]
    assert members.is_member("d0", b"1" * 8)


def test_a_restarted_process_replaces_its_silent_predecessor_before_the_liveness_deadline() -> None:
    members = membership()
    members.hello(hello("d0"), 0.0)
    assert members.hello(hello("d0", epoch=b"2" * 8), 0.2) == []
    assert kinds(members.hello(hello("d0", epoch=b"2" * 8), 1.2)) == [Lost, Joined]
    assert members.is_member("d0", b"2" * 8)
    assert members.heartbeat(heartbeat("d0"), 1.3) is None


def test_a_worker_that_says_hello_again_had_lost_us_but_a_repeated_first_hello_is_nothing() -> None:
    members = membership()
    assert kinds(members.hello(hello("d0"), 0.0)) == [Joined]
    assert kinds(members.hello(hello("d0"), 1.0)) == [Changed]
    members.heartbeat(heartbeat("d0"), 1.2)
    assert kinds(members.hello(hello("d0"), 2.0)) == [Lost, Joined]


def test_a_new_incarnation_that_names_its_former_one_takes_its_place_at_once() -> None:
    members = membership()
    members.hello(hello("d0"), 0.0)
    members.heartbeat(heartbeat("d0"), 1.0)
    lost, joined = members.hello(hello("d0", epoch=b"2" * 8, former_epochs=[b"0" * 8, b"1" * 8]), 1.0)
    assert isinstance(lost, Lost)
    assert isinstance(joined, Joined)
    assert (lost.cause, lost.epoch) == ("rejoined", b"1" * 8)
    assert members.is_member("d0", b"2" * 8)


def test_a_hello_that_comes_late_or_twice_loses_nobody() -> None:
    members = membership()
    assert kinds(members.hello(hello("d0", number=2), 0.0)) == [Joined]
    members.heartbeat(heartbeat("d0"), 1.2)
    assert members.hello(hello("d0", number=1), 1.3) == []
    assert members.hello(hello("d0", number=2), 1.3) == []
    assert kinds(members.hello(hello("d0", number=3), 2.0)) == [Lost, Joined]


def test_only_the_served_group_routes_and_the_next_takes_over_when_its_last_worker_goes() -> None:
    members = membership()
    members.hello(hello("old"), 0.0)
    members.hello(hello("new0", group=OTHER), 0.0)
    members.hello(hello("new1", group=OTHER), 0.0)
    assert [m.name for m in members.workers("decode")] == ["old"]
    members.leave("old", b"1" * 8, 0.0, goodbye=True)
    assert [m.name for m in members.workers("decode")] == ["new0", "new1"]


def test_the_served_group_is_told_of_each_other_and_pool_nodes_without_a_group_of_it() -> None:
    members = membership()
    members.hello(hello("pool-0", role="pool", group=None), 0.0)
    assert members.peers(1).group is None
    members.hello(hello("p0", role="prefill"), 0.0)
    members.hello(hello("x", group=OTHER), 0.0)
    peers = members.peers(1)
    assert [source.process for source in peers.workers] == ["p0"]
    assert peers.group == GROUP
    assert peers.slab_bytes == 64
    assert peers.pools == []
    assert [m.name for m in members.to_tell()] == ["pool-0", "p0"]
    (event,) = members.hello(hello("pool-0", role="pool", group=GROUP), 1.0)
    assert isinstance(event, Changed)
    assert event.group_changed
    assert [(source.process, source.tier) for source in members.peers(1).pools] == [("pool-0", "HOST")]
