"""An error crosses a call whole, and nobody else's details are taken for a router's."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from protos.rich_errors import MAX_MESSAGE_CHARS, error_of, status_details
from tandem.errors import InvalidRequest, Overloaded, Quarantined, TandemError, WorkerLost


@pytest.mark.parametrize("kind", [InvalidRequest, WorkerLost, Quarantined, TandemError])
def test_an_error_comes_back_as_it_went(kind: type[TandemError]) -> None:
    found = error_of(status_details(kind("max_tokens is 0, must be in [1, 5]")))
    assert type(found) is kind
    assert str(found) == "max_tokens is 0, must be in [1, 5]"


def test_when_to_try_again_comes_along() -> None:
    found = error_of(status_details(Overloaded("no room", retry_after_s=2.25)))
    assert isinstance(found, Overloaded)
    assert found.retry_after_s == 2.25


def test_a_message_past_the_room_for_it_is_cut() -> None:
    assert len(status_details(InvalidRequest("x" * 100_000))) < 2 * MAX_MESSAGE_CHARS


def test_another_services_details_are_not_ours() -> None:
    status = status_pb2.Status(code=3)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="elsewhere"))
    assert error_of(status.SerializeToString()) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_details_or_none(data: bytes) -> None:
    error_of(data)
