"""Tickets say what they said, or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from protos.control import Grammar, Sampling
from router.tickets import Ticket, Tickets, digest_of
from tandem.errors import InvalidRequest

SAMPLING = Sampling(max_tokens=5, temperature=0.5, seed=7)


def ticket(seed: int = 2**63 - 1, tenant: str = "t" * 128) -> Ticket:
    return Ticket(request_id="r", resume_no=3, asked=b"d" * 32, seed=seed, root=b"r" * 16, tenant=tenant)


@given(st.integers(0, 2**63 - 1), st.text(max_size=128))
def test_what_was_signed_is_read(seed: int, tenant: str) -> None:
    tickets = Tickets(b"s" * 32)
    try:
        said = ticket(seed, tenant)
        signed = tickets.sign(said)
        assert tickets.read(signed) == said
    except UnicodeEncodeError:
        return  # no string of gRPC's


@given(st.data())
def test_a_changed_bit_or_another_secret_is_refused(data: st.DataObject) -> None:
    signed = bytearray(Tickets(b"s" * 32).sign(ticket()))
    with pytest.raises(InvalidRequest, match="not of this cluster"):
        Tickets(b"S" * 32).read(bytes(signed))
    at = data.draw(st.integers(0, 8 * len(signed) - 1))
    signed[at // 8] ^= 1 << at % 8
    with pytest.raises(InvalidRequest, match="not of this cluster"):
        Tickets(b"s" * 32).read(bytes(signed))


@given(st.binary(max_size=2000))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        Tickets(b"s" * 32).read(data)


def test_the_digest_covers_all_that_decides_an_answer_but_the_seed() -> None:
    base = digest_of(b"prompt", SAMPLING, 1, ("a", "b"))
    assert base == digest_of(b"prompt", Sampling(max_tokens=5, temperature=0.5, seed=8), 1, ("a", "b"))
    others = [
        digest_of(b"prompt!", SAMPLING, 1, ("a", "b")),
        digest_of(b"prompt", Sampling(max_tokens=6, temperature=0.5), 1, ("a", "b")),
        digest_of(b"prompt", SAMPLING, 2, ("a", "b")),
        digest_of(b"prompt", SAMPLING, 1, ("ab",)),
        digest_of(b"prompt", structs.replace(SAMPLING, grammar=Grammar("regex", "a")), 1, ("a", "b")),
        digest_of(b"prompt", structs.replace(SAMPLING, grammar=Grammar("regex", "b")), 1, ("a", "b")),
        digest_of(b"prompt", structs.replace(SAMPLING, grammar=Grammar("lark", "b")), 1, ("a", "b")),
    ]
    assert len({base, *others}) == 8
