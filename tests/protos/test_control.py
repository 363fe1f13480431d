"""Control messages against an independent MessagePack decoder, and against bytes that are no messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import control
from protos.control import (
    Abort,
    Aborted,
    Ack,
    Audit,
    Cancel,
    Capacity,
    Counters,
    Dispatch,
    Done,
    Endpoints,
    Failed,
    Fence,
    Fetch,
    FetchedFrom,
    FirstTokens,
    FollowedHoldings,
    Goodbye,
    Grammar,
    Heartbeat,
    Hello,
    Kept,
    Leave,
    Load,
    Lost,
    Miss,
    Owned,
    Parked,
    Peers,
    Ready,
    ReadyBlock,
    Refused,
    Resend,
    RoleReport,
    RoutingGroup,
    Sampling,
    Source,
    Started,
    TierHoldings,
    TokenLogprobs,
    Tokens,
    Welcome,
)

KEY, EPOCH = b"k" * 16, b"\xff" * 8
FENCE = Fence("request", 1, "decode", 2)
ENDPOINTS = Endpoints("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", "tcp://127.0.0.1:3", "@tandem-x", "machine")
SOURCE = Source("p", EPOCH, "DEVICE", ENDPOINTS)
GROUP = RoutingGroup(b"m" * 16, "format", b"n" * 16, 16)

HOLDINGS = TierHoldings("DEVICE", 9, 1, 2, 3, 1, 2, 1, 1, 1, 0.5, 0.0, 5, KEY, "a fault")

TO_ROUTER = [
    Hello(1, "p", "decode", EPOCH, 42, ENDPOINTS, Capacity(1, 2, 3, 4, 5), GROUP, "model"),
    Heartbeat("p", EPOCH, 7, 0.5, -1, Load(1, 2), Counters(3)),
    Started(FENCE),
    Tokens(FENCE, 0, 5, [1, 2], [TokenLogprobs(-0.5, [(3, -1.0)])], "stop", 64),
    RoleReport(FENCE, 1, 2, 3, [FetchedFrom("p", "HOST", "shm", 4, 5)], 0.1, 0.2, 0.3),
    Failed(FENCE, "internal", "why"),
    Aborted(FENCE),
    Owned(3, 7, [HOLDINGS], 1, [FENCE], 2, [FollowedHoldings("p", EPOCH, 5, 1, KEY)], 12, [12, 13]),
    Goodbye("p", EPOCH),
]
FROM_ROUTER = [
    Welcome(1, "router", EPOCH, 0.25, 3.0),
    Refused("why"),
    Dispatch(
        FENCE, KEY, b"\1\0\0\0", 1, Sampling(max_tokens=5, logit_bias=[(1, 2.0)]), 2, [SOURCE], 60.0, wait_source="p"
    ),
    Dispatch(FENCE, KEY, b"", 1, Sampling(5, grammar=Grammar("regex", "ä+")), 1, [], 60.0),
    FirstTokens(FENCE, [1, -1]),
    Ack(FENCE, 0, 5, True),
    Resend(FENCE, 0, 5),
    Abort(FENCE, "why"),
    Peers([SOURCE], GROUP, 4096),
    Audit(3),
    Leave("why"),
]
TO_SOURCE = [Fetch(KEY, "request", [KEY], True, 5.0), Done(KEY, 1), Cancel(KEY), Kept([KEY]), Lost([KEY])]
TO_SINK = [Ready(KEY, 0, EPOCH, 5.0, [ReadyBlock(KEY, 2**40, 16, EPOCH, KEY)], 1.5), Miss(KEY, [KEY, KEY]), Parked(KEY)]

Decode = Callable[[bytes], Any]
FAMILIES: list[tuple[list[Any], Decode, Any]] = [
    (TO_ROUTER, control.decode_to_router, control.ToRouter),
    (FROM_ROUTER, control.decode_from_router, control.FromRouter),
    (TO_SOURCE, control.decode_to_source, control.ToSource),
    (TO_SINK, control.decode_to_sink, control.ToSink),
]
ALL = [(message, decode) for messages, decode, _ in FAMILIES for message in messages]
DECODERS = [decode for _, decode, _ in FAMILIES]


def plain(value: Any) -> Any:
    """What an independent decoder should see: structs as maps or, where they are `array_like`, arrays."""
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        given = {name: getattr(value, name) for name in value.__struct_fields__}
        fields = {name: plain(inner) for name, inner in given.items() if inner is not msgspec.UNSET}
        if config.array_like:
            return list(fields.values())
        return fields if config.tag is None else {config.tag_field: config.tag, **fields}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def test_there_is_an_example_of_every_message() -> None:
    for messages, _, union in FAMILIES:
        assert {type(message) for message in messages} == set(get_args(union))


@pytest.mark.parametrize(("message", "decode"), ALL, ids=[type(m).__name__ for m, _ in ALL])
def test_messages_come_back_equal_and_mean_the_same_to_another_decoder(message: Any, decode: Decode) -> None:
    data = control.encode(message)
    assert decode(data) == message
    assert msgpack.unpackb(data, raw=False, strict_map_key=True) == plain(message)
    assert decode(msgpack.packb(plain(message), use_bin_type=True)) == message


@pytest.mark.parametrize(("message", "decode"), ALL, ids=[type(m).__name__ for m, _ in ALL])
def test_fields_of_a_later_version_are_passed_over(message: Any, decode: Decode) -> None:
    later = {**msgpack.unpackb(control.encode(message)), "added_later": [1, {"x": 2}]}
    assert decode(msgpack.packb(later)) == message


@pytest.mark.parametrize(("message", "decode"), ALL, ids=[type(m).__name__ for m, _ in ALL])
def test_a_message_of_another_family_is_refused(message: Any, decode: Decode) -> None:
    for other in DECODERS:
        if other is not decode:
            with pytest.raises(msgspec.DecodeError):
                other(control.encode(message))


@pytest.mark.parametrize(
    "wrong",
    [
        Fetch(b"k" * 15, "r", [KEY], True, 1.0),
        Fetch(KEY, "r", [KEY[:-1]], True, 1.0),
        Fetch(KEY, "r" * 129, [KEY], True, 1.0),
        Fetch(KEY, "r", [KEY] * 65_537, True, 1.0),
        Done(KEY, -1),
    ],
)
def test_bounds_hold_at_the_decoder(wrong: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        control.decode_to_source(control.encode(wrong))


def test_a_grammar_is_bounded_and_of_a_known_kind_and_costs_nothing_where_there_is_none() -> None:
    plainly, held = (control.encode(message) for message in FROM_ROUTER if isinstance(message, Dispatch))
    assert b"grammar" not in plainly
    for changed in (
        held.replace(b"regex", b"xeger"),
        control.encode(
            Dispatch(FENCE, KEY, b"", 1, Sampling(5, grammar=Grammar("lark", "x" * (2**20 + 1))), 1, [], 60.0)
        ),
        control.encode(Dispatch(FENCE, KEY, b"", 1, Sampling(5, grammar=Grammar("lark", "")), 1, [], 60.0)),
    ):
        with pytest.raises(msgspec.ValidationError):
            control.decode_from_router(changed)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from(DECODERS))
def test_random_bytes_raise_only_decode_errors(data: bytes, decode: Decode) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(data)


@settings(max_examples=500)
@given(st.data())
def test_damaged_messages_raise_only_decode_errors(data: st.DataObject) -> None:
    message, decode = data.draw(st.sampled_from(ALL))
    frame = bytearray(control.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    try:
        decode(damaged)
    except msgspec.DecodeError:
        pass  # the promise: this and nothing else


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.binary(max_size=20)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from(["fetch", "ready", "hello", "dispatch", "tokens"]),
    st.sampled_from(DECODERS),
)
def test_well_formed_messagepack_that_is_no_message_raises_only_decode_errors(
    value: Any, tag: str, decode: Decode
) -> None:
    for shape in (value, {"t": tag, "keys": value, "fence": value, "fetch_id": value}):
        with pytest.raises(msgspec.DecodeError):
            decode(msgpack.packb(shape))


@pytest.mark.parametrize(("message", "decode"), ALL, ids=[type(m).__name__ for m, _ in ALL])
def test_deep_nesting_in_a_field_that_would_be_passed_over_is_refused(message: Any, decode: Decode) -> None:
    fields = msgpack.unpackb(control.encode(message))
    deep = bytearray(msgpack.packb({**fields, "added_later": None}))
    deep[-1:] = b"\x91" * 200_000
    with pytest.raises(msgspec.DecodeError):
        decode(bytes(deep))
