"""What is wanted, who is told to leave, and what has come: SetReplicas, Drain and the totals of GetCluster."""

from __future__ import annotations

import grpc
import pytest

from protos import tandem_pb2 as pb
from protos.control import Leave
from router.access import Caller
from router.traffic import Traffic
from router.wanted import Wanted
from tandem.errors import InvalidRequest, PermissionDenied
from tests.router.fake_cluster import LONG, Router, collect, wait_for


def cluster(router: Router) -> pb.GetClusterResponse:
    found: pb.GetClusterResponse = router.stub.GetCluster(pb.GetClusterRequest())
    return found


def refused(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    return caught.value.code(), caught.value.details()


def test_what_is_wanted_is_kept_with_its_revision_and_shown(router: Router) -> None:
    assert cluster(router).wanted.revision == 0
    both = pb.SetReplicasRequest(prefill=2, decode=3, reason="the evening")
    assert router.stub.SetReplicas(both) == pb.Replicas(prefill=2, decode=3, revision=1, reason="the evening")
    one = router.stub.SetReplicas(pb.SetReplicasRequest(decode=1))
    assert (one.prefill, one.decode, one.revision) == (2, 1, 2)
    assert cluster(router).wanted == one


def test_what_can_not_be_served_is_refused_and_changes_nothing(router: Router) -> None:
    half = refused(lambda: router.stub.SetReplicas(pb.SetReplicasRequest(decode=3)))
    assert half == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "nobody keeps this cluster's replicas yet: say both prefill and decode",
    )
    none = refused(lambda: router.stub.SetReplicas(pb.SetReplicasRequest(prefill=1, decode=0)))
    assert none == (grpc.StatusCode.INVALID_ARGUMENT, "decode is 0, must be at least 1 to serve")
    many = refused(lambda: router.stub.SetReplicas(pb.SetReplicasRequest(prefill=5000, decode=1)))
    assert many == (grpc.StatusCode.INVALID_ARGUMENT, "prefill is 5000, the limit is 4096")
    assert cluster(router).wanted.revision == 0


def test_an_older_word_passed_on_changes_nothing() -> None:
    wanted = Wanted()
    wanted.set(pb.SetReplicasRequest(prefill=1, decode=4, revision=7))
    for revision in (6, 7):
        wanted.set(pb.SetReplicasRequest(prefill=9, decode=9, revision=revision))
    assert (wanted.prefill, wanted.decode, wanted.revision) == (1, 4, 7)


def test_only_an_admin_may_change_the_cluster(router: Router) -> None:
    nobody = Caller("somebody", is_admin=False)
    with pytest.raises(PermissionDenied, match="SetReplicas needs a key of the role admin"):
        router.server.set_replicas(pb.SetReplicasRequest(prefill=1, decode=1), nobody)
    with pytest.raises(PermissionDenied, match="Drain needs a key of the role admin"):
        router.server.drain("decode-0", nobody)


def test_a_drained_worker_finishes_what_it_has_takes_nothing_more_and_is_told_until_it_says_so(router: Router) -> None:
    first = router.add("decode-0", "decode", step_s=0.01)
    call = router.ask(max_tokens=40)
    next(call)
    next(call)
    second = router.add("decode-1", "decode")
    router.stub.SetReplicas(pb.SetReplicasRequest(prefill=0, decode=2))
    answer = router.stub.Drain(pb.DrainRequest(process="decode-0"))
    assert answer.num_dispatches == 1
    assert (answer.wanted.decode, answer.wanted.revision) == (1, 2)
    assert router.stub.Drain(pb.DrainRequest(process="decode-0")).wanted.decode == 1  # told twice, one leaves
    wait_for(lambda: len(first.seen(Leave)) >= 3)  # its heartbeats don't say that it leaves: it has not heard
    assert not second.seen(Leave)
    for _ in range(3):
        collect(router.ask(max_tokens=3))
    assert len(second.dispatches) == 3
    assert len(first.dispatches) == 1
    assert [event.WhichOneof("event") for event in call][-1] == "completed"


def test_only_workers_can_be_drained(router: Router) -> None:
    router.add("decode-0", "decode")
    router.add("pool-0", "pool")
    for name in ("pool-0", "decode-7"):
        code, said = refused(lambda name=name: router.stub.Drain(pb.DrainRequest(process=name)))
        assert (code, said) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"'{name}' is no worker that is connected to this router; those are: decode-0",
        )


def test_each_request_is_counted_once_with_what_nobody_held(router: Router) -> None:
    router.add("decode-0", "decode")
    for _ in range(3):
        collect(router.ask(max_tokens=5, n=2))
    traffic = cluster(router).traffic
    tokens = len(LONG)
    assert (traffic.num_requests, traffic.num_samples) == (3, 6)
    assert traffic.prompt_tokens == traffic.uncached_tokens == traffic.here_tokens == 3 * tokens
    assert traffic.uncached_squares == 3 * tokens**2
    assert traffic.answer_tokens == 5.0
    assert cluster(router).router_epoch


def test_totals_are_of_uncached_tokens_and_their_pairs() -> None:
    traffic = Traffic()
    traffic.arrived(100, 30, 2)
    assert traffic == Traffic(1, 2, 100, 30, 30 * 85.0, 900.0)


def test_wanted_does_not_fall_below_what_serves() -> None:
    wanted = Wanted()
    wanted.without_one("decode", "nobody has said anything yet")
    assert wanted.revision == 0
    wanted.set(pb.SetReplicasRequest(prefill=1, decode=1))
    wanted.without_one("decode", "the last one")
    wanted.without_one("prefill", "it leaves")
    assert (wanted.prefill, wanted.decode, wanted.revision) == (0, 1, 2)
    with pytest.raises(InvalidRequest):
        wanted.set(pb.SetReplicasRequest(decode=0))
