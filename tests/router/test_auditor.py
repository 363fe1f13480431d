"""An audit: what agrees passes, and each thing that doesn't is found and named."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvpool.keys import digest_of
from protos.control import Audit, Fence, FollowedHoldings, Owned, TierHoldings
from protos.kv_events import BlockStored, EventBatch
from router.auditor import Auditor
from tests.router.test_router import EPOCH, Bench, D, P

KEYS = [bytes([number]) * 16 for number in range(1, 6)]
POOL = b"2" * 8


def tier(name: str = "DEVICE", keys: list[bytes] = KEYS, **changes: Any) -> TierHoldings:
    fields: dict[str, Any] = {
        "num_blocks": 10, "free": 5, "referenced": 0, "cached": 5, "lent": 0, "retired": 0, "leased": 0, "pinned": 0,
        "num_leases": 0, "lease_left_s": 0.0, "lease_overdue_s": 0.0, "num_keys": len(keys), "digest": digest_of(keys),
    }  # fmt: skip
    return TierHoldings(name, **(fields | changes))


class Audited:
    """A prefill worker with blocks, a decode worker and a pool node with none, and one request at the first two."""

    def __init__(self) -> None:
        self.bench = Bench(("p0", "prefill"), ("d0", "decode"))
        self.bench.join("pool-0", "pool", POOL)
        core = self.bench.core
        for name, epoch in (("p0", EPOCH), ("d0", EPOCH), ("pool-0", POOL)):
            core.on_replay_end(name, epoch, True)
        core.on_events("p0", EPOCH, 0, EventBatch(0.0, [BlockStored(list(KEYS), None, [], 4)]), self.bench.now_s)
        self.bench.submit()
        self.auditor = Auditor(core)
        self.owned = {
            "p0": Owned(1, 0, [tier()], 1, [P], segment=11, mapped=[11]),
            "d0": Owned(1, -1, [tier(keys=[])], 1, [D], segment=12, mapped=[11, 12]),
            "pool-0": Owned(
                1,
                -1,
                [tier("HOST", keys=[])],
                followed=[FollowedHoldings("p0", EPOCH, 0, 5, digest_of(KEYS))],
                segment=13,
                mapped=[13],
            ),
        }

    def wrong(self) -> dict[str, str]:
        """The checks that fail, and why."""
        assert [send.message for send in self.auditor.ask(1)] == [Audit(1)] * 3
        for name, owned in self.owned.items():
            self.auditor.take(name, POOL if name == "pool-0" else EPOCH, owned)
        self.is_complete = self.auditor.is_complete()
        return {finding.check: finding.evidence for finding in self.auditor.findings() if not finding.ok}


def test_what_agrees_passes() -> None:
    audited = Audited()
    assert audited.wrong() == {}
    assert audited.is_complete
    assert {"2 dispatches", "5 keys"} <= {finding.evidence for finding in audited.auditor.findings()}


@pytest.mark.parametrize(
    ("name", "changes", "check", "evidence"),
    [
        ("p0", {"fences": []}, "every dispatch is known", "p0 doesn't know prefill 0 of q"),
        ("d0", {"fences": [D, Fence("x", 0, "decode", 1)]}, "every dispatch is known", "d0 holds decode 1 of x"),
        ("p0", {"tiers": [tier(keys=KEYS[:4])]}, "the index holds", "p0 holds 4 keys in DEVICE, the index 5"),
        ("p0", {"tiers": [tier(keys=[*KEYS[:4], b"x" * 16])]}, "the index holds", "the index as many others"),
        ("pool-0", {"tiers": [tier("DISK")]}, "the index holds", "pool-0 holds 5 keys in DISK, the index 0"),
        ("p0", {"events_seq": 3}, "the index holds", "the index is at batch 0 of p0, which is at 3"),
        ("d0", {"num_stray_blocks": 2}, "every block is", "d0 references 2 blocks for nobody"),
        ("p0", {"tiers": [tier(free=4)]}, "every block is", "p0 has 10 blocks in DEVICE, counted 9"),
        ("p0", {"tiers": [tier(lease_overdue_s=2.0)]}, "no lease outlives", "a lease in DEVICE that is over since 2.0 s"),
        ("p0", {"tiers": [tier(fault="a block is lost")]}, "every pool's books", "p0: a block is lost"),
        ("d0", {"mapped": [12, 99]}, "no memory of a dead", "d0 maps 1 arenas of nobody"),
        ("pool-0", {"followed": [FollowedHoldings("p0", EPOCH, 0, 3, bytes(16))]}, "pool nodes know", "p0 to hold 3 keys"),
    ],
)  # fmt: skip
def test_each_disagreement_is_found_alone(name: str, changes: dict[str, Any], check: str, evidence: str) -> None:
    audited = Audited()
    audited.owned[name] = msgspec.structs.replace(audited.owned[name], **changes)
    wrong = audited.wrong()
    (found,) = [found for found in wrong if found.startswith(check)]
    assert evidence in wrong[found]
    # The pool node heard of a worker's blocks as the router did: it differs with it.
    assert set(wrong) <= {found, "pool nodes know what workers hold"}


def test_a_process_that_does_not_answer_fails_the_audit_until_it_is_no_member() -> None:
    audited = Audited()
    del audited.owned["d0"]
    assert audited.wrong() == {"every process says what it owns": "silent: d0"}
    assert not audited.is_complete
    audited.bench.core.on_closed("d0", EPOCH, audited.bench.now_s)
    assert audited.auditor.is_complete()


def test_answers_to_another_round_or_of_another_epoch_are_none() -> None:
    audited = Audited()
    audited.auditor.ask(2)
    audited.auditor.take("p0", EPOCH, audited.owned["p0"])
    audited.auditor.take("p0", b"x" * 8, msgspec.structs.replace(audited.owned["p0"], number=2))
    assert any("silent: p0" in finding.evidence for finding in audited.auditor.findings())


def test_what_ended_or_began_while_the_answer_was_under_way_is_no_finding() -> None:
    audited = Audited()
    audited.auditor.ask(1)
    core = audited.bench.core
    core.cancel("q", audited.bench.now_s)  # its aborts are under way
    audited.auditor.take("p0", EPOCH, audited.owned["p0"])
    audited.auditor.take("d0", EPOCH, msgspec.structs.replace(audited.owned["d0"], fences=[]))
    assert [f for f in audited.auditor.findings() if f.check.startswith("every dispatch") and not f.ok] == []


def test_an_account_that_is_not_the_journals_is_found() -> None:
    audited = Audited()
    audited.bench.core.fleet.ended("d0", D, audited.bench.now_s)
    assert audited.wrong() == {"the ledger counts what is dispatched": "d0 has 1 dispatches, its account 0"}
