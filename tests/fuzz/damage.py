"""What may come instead of a message: noise, and messages that were cut, flipped, doubled, or whose numbers grew."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

NUMBERS = (
    b"\x00" * 8,
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\xff" * 7 + b"\x7f",
    b"\x80" + b"\x00" * 7,
    b"\xff" * 4,
    b"\x00" * 4,
)
"""Sizes and counts as somebody hostile writes them, in either byte order."""


@st.composite
def _changed(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(1, 64))
        match draw(st.sampled_from(["flip", "cut", "drop", "double", "insert", "number", "splice"])):
            case "flip" if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + size]
            case "double":
                data[at:at] = data[at : at + size] * draw(st.integers(1, 50))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=64))
            case "number":
                number = draw(st.sampled_from(NUMBERS))
                data[at : at + len(number)] = number
            case "splice":
                other = draw(st.sampled_from(seeds))
                data[at:] = other[draw(st.integers(0, len(other))) :]
            case _:
                pass
    return bytes(data)


def damaged(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Any bytes, and most often changes of `seeds`, which are valid."""
    return st.one_of(_changed(seeds), _changed(seeds), _changed(seeds), st.binary(max_size=4096))
