"""RouterCore, one story at a time."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from kvpool.keys import prompt_keys, root_key, tokens_from_bytes
from protos.control import (
    Abort,
    Aborted,
    Ack,
    Capacity,
    Counters,
    Dispatch,
    Endpoints,
    Failed,
    Fence,
    FirstTokens,
    Goodbye,
    Heartbeat,
    Hello,
    Load,
    Peers,
    Refused,
    Resend,
    Role,
    RoleReport,
    RoutingGroup,
    Sampling,
    Started,
    Tokens,
    Welcome,
)
from protos.kv_events import BlockStored, EventBatch
from router.actions import CompletedEvent, Emit, FailedEvent, Replay, Send, Subscribe, TokensEvent, Unsubscribe
from router.admission import Slo
from router.journal import Record, Request
from router.router import RouterCore, Settings
from tandem.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, Quarantined, Unavailable, WorkerLost

GROUP = RoutingGroup(model_fingerprint=b"f" * 16, kv_format="v1", numerics_class=b"n" * 16, block_size=4)
ROOT = root_key(model_fingerprint=b"f" * 16, kv_format="v1", numerics_class=b"n" * 16)
EPOCH = b"1" * 8
LONG = tuple(range(1, 401))


class Bench:
    """A core, its clock, and what it asked for."""

    def __init__(self, *workers: tuple[str, Role], **settings: Any) -> None:
        self.core = RouterCore(Settings("router", b"r" * 8, max_jitter_s=0.0, **settings), random.Random(1))
        self.now_s = 10.0
        for name, role in workers:
            self.join(name, role)

    def join(self, name: str, role: Role, epoch: bytes = EPOCH, **changes: Any) -> list[Any]:
        fields: dict[str, Any] = {
            "version": 1,
            "process": name,
            "role": role,
            "epoch": epoch,
            "pid": 1,
            "endpoints": Endpoints(fetch=f"{name}-fetch", events="e", replay="r"),
            "capacity": Capacity(slab_bytes=1000, max_model_len=1000),
            "group": GROUP,
        }
        return self.core.on_message(name, epoch, Hello(**(fields | changes)), self.now_s)

    def submit(self, prompt: tuple[int, ...] = LONG, n: int = 1, **sampling: Any) -> list[Any]:
        request = Request("q", prompt, Sampling(**({"max_tokens": 8} | sampling)), n, self.now_s + 60.0)
        return self.core.submit(request, self.now_s)

    def say(self, name: str, message: Any) -> list[Any]:
        return self.core.on_message(name, EPOCH, message, self.now_s)

    def pass_time(self, seconds: float, *names: str) -> list[Any]:
        """Ticks while `names` send heartbeats."""
        actions: list[Any] = []
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.05
            for name in names:
                actions += self.say(name, Heartbeat(name, EPOCH, 0, 0.0, -1, Load(free_blocks=10_000), Counters()))
            actions += self.core.tick(self.now_s)
        return actions


def cluster(**settings: Any) -> Bench:
    return Bench(("p0", "prefill"), ("d0", "decode"), **settings)


def sent(actions: list[Any], kind: type) -> list[tuple[str, Any]]:
    return [(a.process, a.message) for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


def emitted(actions: list[Any], kind: type) -> list[Any]:
    return [a.event for a in actions if isinstance(a, Emit) and isinstance(a.event, kind)]


def report(fence: Fence) -> RoleReport:
    return RoleReport(fence, 0, 0, 1, [], 0.0, 0.0, 0.0)


P, D = Fence("q", 0, "prefill", 0), Fence("q", 0, "decode", 0)


def test_a_request_goes_through_hand_over_to_one_terminal_event() -> None:
    bench = cluster()
    dispatches = sent(bench.submit(max_tokens=3), Dispatch)
    assert [(name, d.fence) for name, d in dispatches] == [("p0", P), ("d0", D)]
    prefill, decode = dispatches[0][1], dispatches[1][1]
    assert prefill.root == ROOT
    assert tuple(tokens_from_bytes(prefill.token_ids)) == LONG
    assert (decode.wait_source, decode.prefill_here) == ("p0", False)
    assert [s.process for s in decode.sources] == ["p0"]

    actions = bench.say("p0", Tokens(P, 0, 0, [7]))
    assert sent(actions, Ack) == [("p0", Ack(P, 0, 1, final=False))]
    assert emitted(actions, TokensEvent) == [TokensEvent(0, 0, (7,), (), None)]
    assert sent(actions, FirstTokens) == [("d0", FirstTokens(D, [7]))]
    assert sent(bench.say("d0", report(D)), Abort) == [("p0", Abort(P, "handed over"))]

    bench.say("d0", Tokens(D, 0, 1, [8]))
    actions = bench.say("d0", Tokens(D, 0, 2, [9], finish_reason="length"))
    assert sent(actions, Ack) == [("d0", Ack(D, 0, 3, final=True))]
    (completed,) = emitted(actions, CompletedEvent)
    assert completed.summary.num_generated_tokens == 3
    assert sent(actions, Abort) == []
    assert len(bench.core.journal) == 0
    assert bench.core.fleet.num_dispatched() == 0


def test_hits_elsewhere_are_sources_before_the_prefill_worker() -> None:
    bench = Bench(("p0", "prefill"), ("d0", "decode"), ("d1", "decode"))
    bench.join("pool-0", "pool")
    keys = prompt_keys(ROOT, LONG, 4).full
    bench.core.on_replay_end("pool-0", EPOCH, True)
    bench.core.on_events("pool-0", EPOCH, 0, EventBatch(0.0, [BlockStored(list(keys[:10]), None, [], 4)]), bench.now_s)
    dispatches = dict(sent(bench.submit(), Dispatch))
    assert [(s.process, s.tier) for s in dispatches.pop("p0").sources] == [("pool-0", "HOST")]
    (decode,) = dispatches.values()
    assert [s.process for s in decode.sources] == ["pool-0", "p0"]


def test_a_short_prompt_is_prefilled_on_the_decode_worker() -> None:
    bench = cluster()
    ((name, dispatch),) = sent(bench.submit(prompt=(1, 2, 3)), Dispatch)
    assert (name, dispatch.prefill_here, dispatch.wait_source) == ("d0", True, "")


def test_a_sample_that_its_first_token_ends_is_skipped_by_decode() -> None:
    bench = cluster()
    bench.submit(n=3)
    bench.say("p0", Tokens(P, 0, 0, [7]))
    bench.say("p0", Tokens(P, 1, 0, [], finish_reason="stop"))
    actions = bench.say("p0", Tokens(P, 2, 0, [9]))
    assert sent(actions, FirstTokens) == [("d0", FirstTokens(D, [7, -1, 9]))]
    bench.say("d0", Tokens(D, 0, 1, [], finish_reason="stop"))
    actions = bench.say("d0", Tokens(D, 2, 1, [], finish_reason="stop"))
    assert len(emitted(actions, CompletedEvent)) == 1
    assert sent(actions, Abort) == [], "the worker knows the end of each sample"


def test_a_request_that_its_first_token_ends_aborts_both_roles() -> None:
    bench = cluster()
    bench.submit(max_tokens=1)
    actions = bench.say("p0", Tokens(P, 0, 0, [7], finish_reason="length"))
    assert len(emitted(actions, CompletedEvent)) == 1
    assert {name for name, _ in sent(actions, Abort)} == {"p0", "d0"}


def test_duplicates_overlaps_and_gaps_give_each_token_once() -> None:
    bench = cluster()
    bench.submit(prompt=(1, 2, 3))
    assert emitted(bench.say("d0", Tokens(D, 0, 0, [5, 6])), TokensEvent)[0].token_ids == (5, 6)
    again = bench.say("d0", Tokens(D, 0, 0, [5, 6]))
    assert emitted(again, TokensEvent) == []
    assert sent(again, Ack) == [("d0", Ack(D, 0, 2))]
    assert emitted(bench.say("d0", Tokens(D, 0, 1, [6, 7])), TokensEvent) == [TokensEvent(0, 2, (7,), (), None)]
    gap = bench.say("d0", Tokens(D, 0, 5, [9]))
    assert sent(gap, Resend) == [("d0", Resend(D, 0, 3))]
    assert emitted(gap, TokensEvent) == []


def test_frames_of_another_fence_or_process_are_refused_with_an_abort() -> None:
    bench = cluster()
    bench.submit(prompt=(1, 2, 3))
    for name, fence in (("d0", Fence("q", 0, "decode", 1)), ("p0", D), ("d0", Fence("x", 0, "decode", 0))):
        actions = bench.say(name, Tokens(fence, 0, 0, [5]))
        assert emitted(actions, TokensEvent) == []
        assert [m.fence for _, m in sent(actions, Abort)] == [fence]


def test_no_more_than_max_tokens_are_ever_shown() -> None:
    bench = cluster()
    bench.submit(prompt=(1, 2, 3), max_tokens=2)
    actions = bench.say("d0", Tokens(D, 0, 0, [5, 6, 7]))
    assert emitted(actions, TokensEvent) == [TokensEvent(0, 0, (5, 6), (), "length")]
    assert len(emitted(actions, CompletedEvent)) == 1


def test_a_stop_string_ends_one_sample_by_a_final_ack_and_the_last_by_an_abort() -> None:
    bench = cluster()
    bench.submit(prompt=(1, 2, 3), n=2)
    bench.say("d0", Tokens(D, 0, 0, [5, 6]))
    actions = bench.core.stop_sample("q", 0, 1, bench.now_s)
    assert sent(actions, Ack) == [("d0", Ack(D, 0, 2, final=True))]
    bench.say("d0", Tokens(D, 1, 0, [5, 6]))
    actions = bench.core.stop_sample("q", 1, 2, bench.now_s)
    assert sent(actions, Abort) == [("d0", Abort(D, "the request has ended"))]
    (completed,) = emitted(actions, CompletedEvent)
    assert completed.summary.num_generated_tokens == 3


def test_a_prefill_worker_lost_before_the_first_token_is_replaced() -> None:
    bench = Bench(("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"))
    first = sent(bench.submit(), Dispatch)[0][0]
    other = {"p0": "p1", "p1": "p0"}[first]
    actions = bench.core.on_closed(first, EPOCH, bench.now_s)
    assert [(name, a.fence) for name, a in sent(actions, Abort)] == [("d0", D)]
    dispatches = sent(actions, Dispatch)
    assert [(name, d.fence.role, d.fence.attempt) for name, d in dispatches] == [
        (other, "prefill", 1),
        ("d0", "decode", 1),
    ]
    assert dispatches[1][1].wait_source == other


def test_without_another_prefill_worker_decode_prefills_by_itself() -> None:
    bench = cluster()
    bench.submit()
    dispatches = sent(bench.core.on_closed("p0", EPOCH, bench.now_s), Dispatch)
    assert [(name, d.prefill_here) for name, d in dispatches] == [("d0", True)]


def test_a_prefill_worker_lost_after_the_first_token_changes_nothing() -> None:
    bench = cluster()
    bench.submit()
    bench.say("p0", Tokens(P, 0, 0, [7]))
    assert sent(bench.core.on_closed("p0", EPOCH, bench.now_s), Dispatch) == []
    assert emitted(bench.say("d0", Tokens(D, 0, 1, [8])), TokensEvent) == [TokensEvent(0, 1, (8,), (), None)]


def test_a_decode_worker_lost_mid_stream_is_continued_elsewhere_from_the_accepted_tokens() -> None:
    bench = Bench(("p0", "prefill"), ("d0", "decode"), ("d1", "decode"))
    victim = sent(bench.submit(), Dispatch)[1][0]
    survivor = {"d0": "d1", "d1": "d0"}[victim]
    bench.say("p0", Tokens(P, 0, 0, [7]))
    bench.say(victim, report(D))
    bench.say(victim, Tokens(D, 0, 1, [8, 9]))
    ((name, dispatch),) = sent(bench.core.on_closed(victim, EPOCH, bench.now_s), Dispatch)
    assert name == survivor
    assert (dispatch.prefill_here, dispatch.n, dispatch.index) == (True, 1, 0)
    assert dispatch.num_prompt_tokens == len(LONG)
    assert tuple(tokens_from_bytes(dispatch.token_ids)) == (*LONG, 7, 8, 9)
    assert emitted(bench.say(survivor, Tokens(dispatch.fence, 0, 3, [4])), TokensEvent)[0].position == 3


def test_samples_of_a_lost_decode_worker_go_on_separately() -> None:
    bench = Bench(("d0", "decode"))
    bench.submit(n=3)
    for index in range(3):
        bench.say("d0", Tokens(D, index, 0, [index + 1]))
    bench.say("d0", Tokens(D, 1, 1, [], finish_reason="stop"))
    bench.core.on_closed("d0", EPOCH, bench.now_s)
    assert bench.core.num_waiting == 1
    dispatches = [d for _, d in sent(bench.join("d0", "decode", b"2" * 8), Dispatch)]
    assert [(d.index, d.n, d.fence.attempt) for d in dispatches] == [(0, 1, 1), (2, 1, 2)]
    assert [tokens_from_bytes(d.token_ids)[-1] for d in dispatches] == [1, 3]


def test_a_failed_hand_over_is_recomputed_by_decode() -> None:
    bench = cluster()
    bench.submit()
    bench.say("p0", Tokens(P, 0, 0, [7]))
    actions = bench.say("d0", Failed(D, "fetch_failed", "p0 gave nothing"))
    ((name, dispatch),) = sent(actions, Dispatch)
    assert (name, dispatch.prefill_here, dispatch.fence.attempt) == ("d0", True, 1)
    assert tuple(tokens_from_bytes(dispatch.token_ids)) == (*LONG, 7)
    assert [fence.fence for _, fence in sent(actions, Abort)] == [P]
    assert sent(actions, FirstTokens) == []


def test_a_hand_over_that_fails_before_the_first_token_aborts_prefill_and_starts_in_decode() -> None:
    bench = cluster()
    bench.submit()
    actions = bench.say("d0", Failed(D, "fetch_failed", "p0 gave nothing"))
    ((_, dispatch),) = sent(actions, Dispatch)
    assert dispatch.prefill_here
    assert tuple(tokens_from_bytes(dispatch.token_ids)) == LONG
    assert [fence.fence for _, fence in sent(actions, Abort)] == [P]


def test_attempts_are_bounded() -> None:
    bench = cluster(max_attempts=2)
    bench.submit(prompt=(1, 2, 3))
    bench.core.on_closed("d0", EPOCH, bench.now_s)
    bench.join("d0", "decode")
    (failed,) = emitted(bench.core.on_closed("d0", EPOCH, bench.now_s), FailedEvent)
    assert isinstance(failed.error, WorkerLost)
    assert "limit is 2" in str(failed.error)


def test_an_error_that_no_retry_can_mend_ends_the_request() -> None:
    bench = cluster()
    bench.submit()
    actions = bench.say("p0", Failed(P, "invalid_request", "needs 9 blocks, the arena has 8"))
    (failed,) = emitted(actions, FailedEvent)
    assert isinstance(failed.error, InvalidRequest)
    assert "9 blocks" in str(failed.error)
    assert [a.fence for _, a in sent(actions, Abort)] == [D]


def test_requests_wait_for_a_worker_and_are_served_when_it_comes() -> None:
    bench = Bench()
    assert sent(bench.submit(), Dispatch) == []
    bench.pass_time(5.0)
    assert [name for name, _ in sent(bench.join("d0", "decode"), Dispatch)] == ["d0"]


def test_no_worker_in_time_is_unavailable() -> None:
    bench = Bench(unavailable_after_s=2.0)
    bench.submit()
    (failed,) = emitted(bench.pass_time(2.5), FailedEvent)
    assert isinstance(failed.error, Unavailable)
    assert len(bench.core.journal) == 0


def test_a_passed_deadline_ends_all_parties() -> None:
    bench = cluster()
    bench.submit()
    actions = bench.pass_time(60.5, "p0", "d0")
    (failed,) = emitted(actions, FailedEvent)
    assert isinstance(failed.error, DeadlineExceeded)
    assert {(name, a.fence) for name, a in sent(actions, Abort)} == {("p0", P), ("d0", D)}


def test_cancelling_aborts_everything_once() -> None:
    bench = cluster()
    bench.submit()
    actions = bench.core.cancel("q", bench.now_s)
    assert isinstance(emitted(actions, FailedEvent)[0].error, Cancelled)
    assert len(sent(actions, Abort)) == 2
    assert bench.core.cancel("q", bench.now_s) == []


def test_an_unconfirmed_abort_is_repeated_and_forgotten_at_last() -> None:
    bench = cluster()
    bench.submit()
    bench.core.cancel("q", bench.now_s)
    assert len(sent(bench.pass_time(1.2, "p0", "d0"), Abort)) == 2
    bench.pass_time(15.0, "p0", "d0")
    assert bench.core.num_closing == 0


def test_too_many_active_requests_are_refused() -> None:
    bench = cluster(max_active_requests=1)
    bench.submit()
    with pytest.raises(Overloaded, match="limit is 1"):
        bench.submit()


def test_the_context_bounds_prompt_and_answer() -> None:
    bench = cluster()
    for length in (1000, 1001):  # there must be room for an answer of one token
        with pytest.raises(InvalidRequest, match=f"{length} tokens.* must fit into 1000"):
            bench.submit(prompt=(1,) * length)
    dispatches = sent(bench.submit(prompt=(1,) * 998, max_tokens=50), Dispatch)
    assert dispatches[0][1].sampling.max_tokens == 2


def test_a_prompt_that_waited_is_checked_against_the_context_that_came() -> None:
    bench = Bench()
    bench.submit(prompt=(1,) * 1001)
    (failed,) = emitted(bench.join("d0", "decode"), FailedEvent)
    assert isinstance(failed.error, InvalidRequest)


def test_a_silent_stream_is_asked_for_what_it_owes() -> None:
    bench = cluster()
    bench.submit(prompt=(1, 2, 3))
    bench.say("d0", Tokens(D, 0, 0, [5]))
    assert sent(bench.pass_time(1.2, "d0"), Resend) == [("d0", Resend(D, 0, 1))]


def test_a_dispatch_that_was_lost_is_asked_for_and_made_again() -> None:
    bench = Bench(("d0", "decode"), ("d1", "decode"))
    ((name, _),) = sent(bench.submit(prompt=(1, 2, 3)), Dispatch)
    other = {"d0": "d1", "d1": "d0"}[name]
    assert sent(bench.pass_time(1.2, "d0", "d1"), Resend) == [(name, Resend(D, 0, 0))]
    actions = bench.say(name, Failed(D, "worker_lost", "no such dispatch"))
    assert [process for process, _ in sent(actions, Dispatch)] == [other]


def test_probes_of_a_silent_dispatch_become_rarer() -> None:
    bench = Bench(("d0", "decode"))
    bench.submit(prompt=(1, 2, 3))
    assert len(sent(bench.pass_time(32.0, "d0"), Resend)) == 6, "after 1, 3, 7, 15, 23 and 31 seconds"


def test_lost_first_tokens_are_sent_again_until_decode_generates() -> None:
    bench = cluster()
    bench.submit(n=2)
    bench.say("p0", Tokens(P, 0, 0, [7]))
    assert sent(bench.pass_time(1.2, "p0", "d0"), FirstTokens) == [], "one of two is not known yet"
    bench.say("d0", report(D))
    bench.say("p0", Tokens(P, 1, 0, [], finish_reason="stop"))
    again = sent(bench.pass_time(4.2, "p0", "d0"), FirstTokens)
    assert {(name, tuple(message.token_ids)) for name, message in again} == {("d0", (7, -1))}
    bench.say("d0", Tokens(D, 0, 1, [8]))
    assert sent(bench.pass_time(4.2, "p0", "d0"), FirstTokens) == []


def test_prefill_goes_on_after_decodes_report_until_all_first_tokens_are_known() -> None:
    bench = cluster()
    bench.submit(n=2)
    bench.say("p0", Tokens(P, 0, 0, [7]))
    assert sent(bench.say("d0", report(D)), Abort) == []
    bench.say("p0", Tokens(P, 1, 0, [9]))
    assert sent(bench.say("d0", Tokens(D, 0, 1, [8])), Abort) == [("p0", Abort(P, "handed over"))]


def test_a_prefill_worker_that_gave_its_hold_up_is_no_source_any_more() -> None:
    bench = Bench(("p0", "prefill"), ("d0", "decode"), ("d1", "decode"))
    victim = sent(bench.submit(), Dispatch)[1][0]
    bench.say("p0", Tokens(P, 0, 0, [7]))
    assert bench.say("p0", Aborted(P)) == [], "decode may have fetched it all"
    ((_, dispatch),) = sent(bench.core.on_closed(victim, EPOCH, bench.now_s), Dispatch)
    assert (dispatch.prefill_here, dispatch.wait_source) == (True, "")


def test_a_hold_that_ran_out_before_the_first_token_arrived_is_a_failure_of_prefill() -> None:
    bench = cluster()
    bench.submit()
    actions = bench.say("p0", Aborted(P))
    assert sent(actions, Abort) == [("d0", Abort(D, "the prefill role is dispatched again"))]
    assert [d.fence.attempt for _, d in sent(actions, Dispatch)] == [1, 1]


def test_a_token_in_the_middle_of_a_stream_looks_at_nothing_but_its_own_dispatch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = cluster()
    bench.submit()
    bench.say("p0", Tokens(P, 0, 0, [7]))
    bench.say("d0", report(D))
    bench.say("d0", Tokens(D, 0, 1, [8]))
    for name in ("live", "prefill", "unfinished", "first_tokens_known"):
        monkeypatch.setattr(Record, name, None)
    assert len(emitted(bench.say("d0", Tokens(D, 0, 2, [9])), TokensEvent)) == 1


def test_joining_and_leaving_are_told_to_the_shell_and_to_pool_nodes() -> None:
    bench = Bench()
    bench.join("pool-0", "pool", group=None)
    actions = bench.join("d0", "decode")
    assert [type(a) for a in actions if not isinstance(a, Send)] == [Subscribe, Replay]
    assert len(sent(actions, Welcome)) == 1
    told = dict(sent(actions, Peers))
    assert set(told) == {"pool-0", "d0"}
    peers = told["pool-0"]
    assert ([s.process for s in peers.workers], peers.group) == (["d0"], GROUP)
    actions = bench.say("d0", Goodbye("d0", EPOCH))
    assert Unsubscribe("d0", EPOCH, "said goodbye") in actions
    assert [p.workers for _, p in sent(actions, Peers)] == [[]]


def test_a_pool_node_whose_hello_of_what_it_holds_was_lost_is_told_that_it_is_missing() -> None:
    bench = Bench(("d0", "decode"))
    bench.join("pool-0", "pool", group=None, endpoints=Endpoints("", "", ""))
    heartbeat = Heartbeat("pool-0", EPOCH, 0, 0.0, -1, Load(), Counters())
    assert not sent(bench.say("pool-0", heartbeat), Peers), "it holds nothing yet"
    ((name, peers),) = sent(bench.say("pool-0", msgspec.structs.replace(heartbeat, events_seq=0)), Peers)
    assert (name, peers.pools) == ("pool-0", [])
    bench.join("pool-0", "pool")
    assert not sent(bench.say("pool-0", msgspec.structs.replace(heartbeat, events_seq=1)), Peers)


def test_a_worker_died_of_what_was_called_off_because_others_noticed_its_death_first() -> None:
    bench = cluster()
    bench.submit()
    bench.say("p0", Started(P))
    actions = bench.say("d0", Failed(D, "fetch_failed", "p0 gave nothing"))
    assert "p0" in dict(sent(actions, Abort))
    record = bench.core.journal.get("q")
    assert record is not None
    bench.core.on_closed("p0", EPOCH, bench.now_s)
    assert record.num_deaths == 1
    ((_, again),) = sent(actions, Dispatch)
    bench.say("d0", Started(again.fence))
    (failed,) = emitted(bench.core.on_closed("d0", EPOCH, bench.now_s), FailedEvent)
    assert isinstance(failed.error, Quarantined)


def test_who_has_not_heard_the_last_list_of_peers_is_told_it_once_there_was_time_to_hear_it() -> None:
    bench = Bench(("d0", "decode"))
    (_, last), *_ = sent(bench.join("d1", "decode"), Peers)
    heartbeat = Heartbeat("d0", EPOCH, 0, 0.0, -1, Load(), Counters(), peers=last.number - 1)
    assert not sent(bench.say("d0", heartbeat), Peers), "it may be on its way"
    bench.now_s += 1.0
    assert sent(bench.say("d0", heartbeat), Peers) == [("d0", last)]
    assert not sent(bench.say("d0", msgspec.structs.replace(heartbeat, peers=last.number)), Peers)


def test_members_hear_a_welcome_each_heartbeat_and_strangers_nothing() -> None:
    bench = cluster()
    names = [name for name, _ in sent(bench.pass_time(1.0, "p0", "d0"), Welcome)]
    assert names.count("d0") in (3, 4, 5)
    assert bench.core.on_message("x", EPOCH, Aborted(P), bench.now_s) == []
    assert bench.core.on_message("d0", b"2" * 8, Tokens(D, 0, 0, [1]), bench.now_s) == []


def test_a_message_that_claims_to_be_somebody_else_is_ignored() -> None:
    bench = cluster()
    assert bench.core.on_message("p0", EPOCH, Goodbye("d0", EPOCH), bench.now_s) == []
    assert bench.core.ready


def test_a_wrong_protocol_version_is_refused_in_words() -> None:
    bench = Bench()
    ((_, refused),) = sent(bench.join("d0", "decode", version=9), Refused)
    assert "9" in refused.reason


def test_a_worker_of_another_model_is_refused_with_both_names() -> None:
    bench = Bench(model="smollm2")
    ((name, refused),) = sent(bench.join("d0", "decode", model="qwen3"), Refused)
    assert name == "d0"
    assert "'qwen3'" in refused.reason
    assert "'smollm2'" in refused.reason
    assert not bench.core.ready
    assert sent(bench.join("d1", "decode", model="smollm2"), Welcome)
    assert sent(bench.join("pool-0", "pool"), Welcome), "a pool node serves no model"


def heartbeat_of(bench: Bench, name: str) -> list[Any]:
    return bench.say(name, Heartbeat(name, EPOCH, 0, 0.0, -1, Load(free_blocks=10_000), Counters()))


def test_a_heartbeat_meant_for_the_router_before_is_answered_once_with_our_epoch() -> None:
    bench = Bench()
    ((name, welcome),) = sent(heartbeat_of(bench, "d0"), Welcome)
    assert (name, welcome.epoch) == ("d0", b"r" * 8)
    assert bench.pass_time(5.0, "d0") == []
    assert len(sent(bench.pass_time(2.0, "d0"), Welcome)) == 1, "that answer may have been lost"


def test_a_heartbeat_of_a_worker_that_we_have_lost_is_not_answered() -> None:
    bench = cluster()
    bench.core.on_closed("d0", EPOCH, bench.now_s)
    assert heartbeat_of(bench, "d0") == [], "a welcome of the epoch it knows would keep it from saying hello"


def test_strangers_are_remembered_for_a_bounded_time() -> None:
    bench = Bench()
    for number in range(5000):
        heartbeat_of(bench, f"x{number}")
    assert heartbeat_of(bench, "d0") == []
    bench.pass_time(7.0)
    assert len(sent(heartbeat_of(bench, "d0"), Welcome)) == 1


def test_a_new_group_gets_new_keys() -> None:
    bench = Bench(("d0", "decode"))
    bench.submit(prompt=(1, 2, 3))
    bench.core.on_closed("d0", EPOCH, bench.now_s)
    other = replace_group(GROUP)
    ((_, dispatch),) = sent(bench.join("d1", "decode", group=other), Dispatch)
    assert dispatch.root != ROOT


def replace_group(group: RoutingGroup) -> RoutingGroup:
    return RoutingGroup(b"g" * 16, group.kv_format, group.numerics_class, group.block_size)


def test_prefill_gives_its_first_token_alone() -> None:
    bench = cluster()
    bench.submit()
    assert bench.say("p0", Tokens(P, 0, 0, [7, 8])) == []


def ask(bench: Bench, name: str, num_tokens: int, **changes: Any) -> list[Any]:
    """A request by name, of a prompt that nobody has."""
    prompt = tuple(1 + (hash_of(name) + i) % 1000 for i in range(num_tokens))
    request = Request(name, prompt, Sampling(max_tokens=8), 1, bench.now_s + 600.0, **changes)
    return bench.core.submit(request, bench.now_s)


def hash_of(name: str) -> int:
    return sum(name.encode()) * 7919


def dispatched(actions: list[Any]) -> list[str]:
    return [message.fence.request_id for _, message in sent(actions, Dispatch)]


def test_requests_wait_in_the_router_until_a_worker_has_room_and_go_as_they_are_due() -> None:
    bench = Bench(("d0", "decode"))
    assert dispatched(ask(bench, "first", 900)) == ["first"]  # half a second, as far as anybody knows
    assert dispatched(ask(bench, "long", 900)) == []
    assert dispatched(ask(bench, "batch", 100, batch=True)) == []
    assert dispatched(ask(bench, "short", 50)) == []
    assert (bench.core.num_waiting, bench.core.fleet.num_dispatched()) == (3, 1)
    first = Fence("first", 0, "decode", 0)
    order = dispatched(bench.say("d0", report(first)) + bench.pass_time(0.2, "d0"))
    assert order == ["short", "long"], "a short one leaves room for another"
    order += dispatched(bench.say("d0", report(Fence("long", 0, "decode", 0))) + bench.pass_time(0.2, "d0"))
    assert order == ["short", "long", "batch"]
    assert bench.core.num_waiting == 0


def test_who_leaves_the_line_leaves_nothing() -> None:
    bench = Bench(("d0", "decode"))
    ask(bench, "first", 900)
    ask(bench, "second", 900)
    assert len(emitted(bench.core.cancel("second", bench.now_s), FailedEvent)) == 1
    assert (bench.core.num_waiting, bench.core.num_left_waiting) == (0, 1)
    assert bench.core.fleet.num_dispatched() == 1


def test_those_in_line_outlive_the_last_worker_and_go_to_the_next_one() -> None:
    bench = Bench(("d0", "decode"))
    ask(bench, "first", 900)
    ask(bench, "second", 900)
    bench.core.on_closed("d0", EPOCH, bench.now_s)
    bench.pass_time(0.2)
    order = dispatched(bench.join("d1", "decode")) + dispatched(bench.pass_time(1.0, "d1"))
    assert sorted(order) == ["first", "second"]


def test_what_would_miss_its_slo_is_refused_with_the_time_to_retry_after() -> None:
    slo = Slo(ttft_s=0.6)
    bench = Bench(("d0", "decode"), reject_late=True, interactive=slo)
    ask(bench, "first", 900)
    with pytest.raises(Overloaded, match=r"the SLO is 0\.6 s; retry in") as refused:
        ask(bench, "second", 900)
    assert 0.2 < refused.value.retry_after_s < 0.5
    assert len(bench.core.journal) == 1
    bench.now_s += refused.value.retry_after_s
    assert dispatched(ask(bench, "again", 900) + bench.pass_time(0.3, "d0")) == ["again"]
    ask(bench, "batch", 900, batch=True)  # its class is promised less
    assert bench.core.journal.get("batch") is not None


def test_a_lost_worker_leaves_nothing_in_index_and_fleet() -> None:
    bench = Bench(("d0", "decode"))
    bench.core.on_replay_end("d0", EPOCH, True)
    bench.core.on_events("d0", EPOCH, 0, EventBatch(0.0, [BlockStored([b"k" * 16], None, [], 4)]), bench.now_s)
    bench.core.on_closed("d0", EPOCH, bench.now_s)
    assert bench.core.index.processes() == set()
    assert bench.core.fleet.processes() == set()


def test_a_decode_worker_lost_during_the_hand_over_is_replaced_and_prefill_goes_on() -> None:
    bench = Bench(("p0", "prefill"), ("d0", "decode"), ("d1", "decode"))
    victim = sent(bench.submit(), Dispatch)[1][0]
    survivor = {"d0": "d1", "d1": "d0"}[victim]
    bench.say("p0", Tokens(P, 0, 0, [7]))
    actions = bench.core.on_closed(victim, EPOCH, bench.now_s)
    ((name, dispatch),) = sent(actions, Dispatch)
    assert (name, dispatch.wait_source, dispatch.prefill_here) == (survivor, "p0", False)
    assert sent(actions, FirstTokens) == [(survivor, FirstTokens(dispatch.fence, [7]))]
    assert sent(actions, Abort) == []


def test_a_worker_that_publishes_nothing_is_taken_to_hold_what_was_sent_there_of_late() -> None:
    bench = Bench()
    silent = {
        "endpoints": Endpoints(fetch="f", events="", replay=""),
        "capacity": Capacity(slab_bytes=1000, max_model_len=1000, num_blocks=1000),
    }
    for name in ("d0", "d1", "d2", "d3"):
        assert not any(isinstance(action, Subscribe | Replay) for action in bench.join(name, "decode", **silent))

    def hits() -> tuple[str, int]:
        [(process, dispatch)] = sent(bench.submit(), Dispatch)
        [record] = list(bench.core.journal)
        bench.core.cancel("q", bench.now_s)
        bench.say(process, Aborted(dispatch.fence))
        return process, record.placements[0].hit_tokens

    first, hit_tokens = hits()
    assert hit_tokens == 0
    assert [hits() for _ in range(3)] == [(first, len(LONG) - 1)] * 3
    bench.pass_time(100.0, "d0", "d1", "d2", "d3")
    assert hits() == (first, len(LONG) - 1)
    bench.pass_time(121.0, "d0", "d1", "d2", "d3")
    assert hits()[1] == 0, "nobody used it for two minutes"
    where, _ = hits()
    bench.say(where, Goodbye(where, EPOCH))
    bench.join(where, "decode", epoch=b"2" * 8, **silent)
    assert len(bench.core.index) == 0, "a new one holds nothing"


def test_workers_that_fall_silent_together_are_all_lost_and_the_request_waits_for_others() -> None:
    bench = cluster()
    bench.submit()
    bench.pass_time(4.0)
    assert not list(bench.core.membership)
    assert bench.core.fleet.processes() == set()
    assert bench.core.num_waiting == 1
    bench.join("d1", "decode")
    assert [dispatch.process for record in bench.core.journal for dispatch in record.dispatches.values()] == ["d1"]
