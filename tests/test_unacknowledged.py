"""What was sent and not acknowledged is never forgotten, and never kept longer than needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protos.control import Fence, Tokens
from tandem.unacknowledged import RESEND_AFTER_S, Unacknowledged

FENCE = Fence("r", 0, "decode", 0)


def tokens(position: int, count: int, end: bool = False) -> Tokens:
    return Tokens(FENCE, 0, position, list(range(position, position + count)), finish_reason="length" if end else None)


def positions(messages: list[Tokens]) -> list[int]:
    return [token for message in messages for token in message.token_ids]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=20), st.data())
def test_a_resend_covers_exactly_what_was_not_acknowledged(sizes: list[int], data: st.DataObject) -> None:
    held = Unacknowledged()
    position = 0
    for i, size in enumerate(sizes):
        held.add(0, tokens(position, size, end=i == len(sizes) - 1), 0.0)
        position += size
    acked = data.draw(st.integers(0, position))
    held.acknowledge(0, FENCE, 0, acked, False, 0.0)
    assert set(range(acked, position)) <= set(positions(held.from_position(0, FENCE, 0, acked)))
    assert held.from_position(0, FENCE, 0, acked)[-1].finish_reason == "length"
    held.acknowledge(0, FENCE, 0, position, True, 0.0)
    assert len(held) == 0


def test_the_end_of_a_stream_stays_until_it_is_confirmed_even_without_a_token() -> None:
    held = Unacknowledged()
    held.add(0, tokens(0, 2), 0.0)
    held.add(0, tokens(2, 0, end=True), 0.0)
    held.acknowledge(0, FENCE, 0, 2, False, 0.0)
    assert [message.finish_reason for message in held.from_position(0, FENCE, 0, 2)] == ["length"]
    held.acknowledge(0, FENCE, 0, 2, True, 0.0)
    assert len(held) == 0


def test_silence_leads_to_a_resend_once_per_period() -> None:
    held = Unacknowledged()
    held.add(3, tokens(0, 1), 10.0)
    assert held.due(10.0 + RESEND_AFTER_S / 2) == []
    assert held.next_due_s() == 10.0 + RESEND_AFTER_S
    assert held.due(10.0 + RESEND_AFTER_S) == [(3, tokens(0, 1))]
    assert held.due(10.0 + RESEND_AFTER_S) == []


def test_a_dispatch_or_router_that_is_gone_leaves_nothing() -> None:
    held = Unacknowledged()
    other = Fence("s", 0, "decode", 0)
    held.add(0, tokens(0, 1), 0.0)
    held.add(0, Tokens(other, 0, 0, [1]), 0.0)
    held.add(1, tokens(0, 1), 0.0)
    held.drop(0, FENCE)
    assert len(held) == 2
    held.drop_router(0)
    assert len(held) == 1
    held.drop_router(1)
    assert held.next_due_s() is None
