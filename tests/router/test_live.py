"""What those who watch are told: enough to show what goes on, bounded, and never what was asked."""

from __future__ import annotations

import msgspec

from kvpool.keys import prompt_keys
from protos.control import Capacity, Counters, Fence, Heartbeat, Link, Load, RoleReport, Sampling, Started, Tokens
from protos.kv_events import BlockStored, EventBatch
from router.journal import Request
from router.live import MAX_PREFIXES, MAX_REQUESTS, Live
from router.live_views import MAX_LINKS, MAX_PROCESSES, LinkView, Message, RequestView, TierView, for_clients
from tandem.errors import Unavailable
from tests.router.test_router import EPOCH, LONG, ROOT, Bench, D, P, cluster

SHORT = (5, 6, 7)


def request(request_id: str, bench: Bench) -> Request:
    return Request(request_id, SHORT, Sampling(max_tokens=4), 1, bench.now_s + 60.0)


def watched(bench: Bench) -> Live:
    return Live(bench.core, "model")


def only(message: Message) -> RequestView:
    (request,) = message.requests
    return request


def finish(bench: Bench) -> None:
    """The one request goes its whole way in a second."""
    bench.now_s += 0.5
    bench.say("p0", RoleReport(P, 100, 0, 300, [], 0.1, 0.0, 0.3))
    bench.say("p0", Tokens(P, 0, 0, [7]))
    bench.now_s += 0.25
    bench.say("d0", RoleReport(D, 0, 400, 0, [], 0.0, 0.5, 0.0))
    bench.now_s += 0.25
    bench.say("d0", Tokens(D, 0, 1, [8, 9], finish_reason="stop"))


def test_a_request_is_told_when_it_goes_on_and_no_more_when_it_has_ended() -> None:
    bench = cluster()
    live = watched(bench)
    bench.submit(max_tokens=3)
    request = only(live.changes(bench.now_s))
    assert (request.outcome, request.num_prompt_tokens, request.num_generated_tokens) == ("", 400, 0)
    assert (request.prefill, request.decode) == ("p0", "d0")
    assert [span.phase for span in request.spans] == ["queue"]
    assert live.changes(bench.now_s).requests == []
    finish(bench)
    request = only(live.changes(bench.now_s))
    assert (request.outcome, request.num_generated_tokens, request.num_cached_tokens) == ("completed", 3, 100)
    assert (request.ttft_s, request.total_s) == (0.5, 1.0)
    assert [span.phase for span in request.spans] == ["queue", "prefill", "handover", "decode"]
    assert live.changes(bench.now_s).requests == []
    assert only(live.whole(bench.now_s)) == request


def test_whoever_comes_later_is_told_everything_and_the_others_nothing_twice() -> None:
    bench = cluster()
    live = watched(bench)
    live.changes(bench.now_s)
    bench.submit()
    assert only(live.whole(bench.now_s)).id == "q"
    assert only(live.changes(bench.now_s)).id == "q"
    assert live.changes(bench.now_s).requests == []


def test_totals_are_of_the_last_minute() -> None:
    bench = cluster()
    live = watched(bench)
    live.changes(bench.now_s)
    bench.submit(max_tokens=3)
    finish(bench)
    totals = live.changes(bench.now_s).totals
    assert (totals.num_requests, totals.num_failed, totals.found) == (1, 0, 0.25)
    assert (totals.ttft_p50_s, totals.ttft_p95_s, totals.tpot_p50_s) == (0.5, 0.5, 0.25)
    assert totals.tokens_per_s == 3.0
    bench.pass_time(61.0, "p0", "d0")
    totals = live.changes(bench.now_s).totals
    assert (totals.num_requests, totals.found, totals.ttft_p50_s, totals.tokens_per_s) == (0, None, None, 0.0)


def test_blocks_are_shown_by_what_they_hold() -> None:
    bench = cluster()
    bench.join("w0", "decode", capacity=Capacity(num_blocks=100, slab_bytes=1000))
    bench.join("pool-0", "pool", capacity=Capacity(num_blocks=50, slab_bytes=1000))
    load = Load(free_blocks=60, cached_blocks=45, leased_blocks=5, empty_blocks=20, num_running=2)
    bench.say("w0", Heartbeat("w0", EPOCH, 0, 0.0, -1, load, Counters(), [Link("p0", "shm", 4000, 1e9)]))
    load = Load(cached_blocks=30, empty_blocks=18, disk_blocks=500, disk_used_blocks=70)
    bench.say("pool-0", Heartbeat("pool-0", EPOCH, 0, 0.0, -1, load, Counters()))
    shown = watched(bench).whole(bench.now_s).cluster
    processes = {process.name: process for process in shown.processes}
    assert list(processes) == ["p0", "d0", "w0", "pool-0"]
    assert processes["w0"].tiers == [TierView("DEVICE", 100, 35, 45, 5)]
    assert processes["pool-0"].tiers == [TierView("HOST", 50, 2, 30, 0), TierView("DISK", 500, 0, 70, 0)]
    assert processes["p0"].tiers == []
    assert shown.links == [LinkView("p0", "w0", "shm", 4000)]


def test_shared_prefixes_are_told_with_who_holds_them() -> None:
    bench = cluster()
    bench.join("pool-0", "pool")
    live = watched(bench)
    for _ in range(2):
        bench.submit(max_tokens=3)
        finish(bench)
    keys = prompt_keys(ROOT, LONG, 4).full
    bench.core.on_replay_end("pool-0", EPOCH, True)
    bench.core.on_events("pool-0", EPOCH, 0, EventBatch(0.0, [BlockStored(list(keys), None, [], 4)]), bench.now_s)
    first = live.changes(bench.now_s)
    assert first.prefixes is not None
    (prefix,) = first.prefixes
    # Marks are at an eighth of the depth: of 100 blocks the first 96 are known to be shared.
    assert (prefix.begin, prefix.end, prefix.num_requests, prefix.holders) == (0, 96, 2, ["pool-0"])
    assert prefix.name == keys[95][:4].hex()
    assert live.changes(bench.now_s).prefixes is None, "the tree is not made anew with each message"
    assert live.changes(bench.now_s + 2.0).prefixes is not None


def test_clients_are_told_ids_and_numbers_alone() -> None:
    bench = cluster()
    live = watched(bench)
    for _ in range(2):
        bench.submit(max_tokens=3)
        finish(bench)
    bench.submit()
    bench.core.cancel("q", bench.now_s, Unavailable("decode-0 at 10.0.0.7 is gone"))
    message = live.whole(bench.now_s)
    assert message.admin
    assert any(request.error for request in message.requests)
    shown = for_clients(message)
    assert not shown.admin
    assert [request.error for request in shown.requests] == [""] * len(message.requests)
    assert shown.prefixes
    assert {(prefix.name, *prefix.holders) for prefix in shown.prefixes} == {("",)}
    assert str(LONG[:3]).strip("()") not in msgspec.json.encode(message).decode()


def test_a_message_is_bounded_whatever_the_cluster() -> None:
    bench = Bench(max_active_requests=5000)
    for number in range(200):
        bench.join(f"p{number}", "prefill")
        bench.join(f"d{number}", "decode")
    links = [Link(f"p{number}", "shm", 10**15, 1e12) for number in range(200)]
    for number in range(200):
        heartbeat = Heartbeat(f"d{number}", EPOCH, 0, 0.0, -1, Load(free_blocks=10_000), Counters(), links)
        bench.say(f"d{number}", heartbeat)
    live = watched(bench)
    for number in range(300):
        bench.now_s += 0.01
        bench.core.submit(request(f"{number:0128}", bench), bench.now_s)
    message = live.whole(bench.now_s)
    assert len(message.requests) == MAX_REQUESTS
    assert message.requests[-1].id == f"{299:0128}"
    assert 0 < len(message.cluster.processes) <= MAX_PROCESSES
    assert {process.role for process in message.cluster.processes} == {"prefill", "decode"}
    assert message.cluster.num_processes == 400
    assert len(message.cluster.links) == MAX_LINKS
    assert len(message.prefixes or []) <= MAX_PREFIXES
    assert len(msgspec.json.encode(message)) < 100_000


def test_of_one_that_was_forgotten_meanwhile_its_end_is_told() -> None:
    bench = cluster(max_active_requests=5000)
    live = watched(bench)
    bench.submit()
    assert only(live.changes(bench.now_s)).outcome == ""
    bench.core.cancel("q", bench.now_s)
    for number in range(300):
        bench.now_s += 0.01
        bench.core.submit(request(str(number), bench), bench.now_s)
        bench.core.cancel(str(number), bench.now_s)
    assert live.changes(bench.now_s).lost == ["q"]


def test_a_fence_of_another_request_starts_nothing() -> None:
    bench = cluster()
    bench.submit()
    bench.now_s += 0.25
    bench.say("p0", Started(Fence("other", 0, "prefill", 0)))
    assert [span.phase for span in only(watched(bench).whole(bench.now_s)).spans] == ["queue"]
    bench.say("p0", Started(P))
    bench.now_s += 0.25
    assert [(span.phase, span.end_s) for span in only(watched(bench).whole(bench.now_s)).spans] == [
        ("queue", 0.25),
        ("prefill", None),
    ]
