"""However tokens arrive, the text shown is exactly the text there is, up to the stop string that is complete first."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import InvalidRequest
from tandem.tokenizer.text_stream import TextStream
from tandem.tokenizer.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, pushes: list[list[int]], stop: list[str]) -> tuple[str, bool, int, list[str]]:
    """All text, whether it stopped, how many tokens were used, and the pieces."""
    text_stream = TextStream(tokenizer, stop)
    pieces: list[str] = []
    used, stopped = 0, False
    for push in pushes:
        delta = text_stream.push(push)
        assert not (stopped and (delta.text or delta.num_tokens_used or not delta.stopped))
        pieces.append(delta.text)
        used += delta.num_tokens_used
        stopped = delta.stopped
    pieces.append(text_stream.finish())
    return "".join(pieces), stopped, used, pieces


def splits(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[begin:end] for begin, end in pairwise(edges)]


def first_complete(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Begin and end of the stop string that is complete first, the longer one of two that end together."""
    found = [(begin + len(stop), begin) for stop in stops if (begin := text.find(stop)) >= 0]
    return (min(found)[1], min(found)[0]) if found else None


ids_of_smollm2 = st.lists(st.integers(0, 49_160), max_size=30)  # a few past the end too
cuts = st.lists(st.integers(0, 100), max_size=8)


@given(ids=ids_of_smollm2, cuts=cuts)
def test_without_stop_strings_all_pieces_are_the_decoded_text(
    smollm2: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    text, stopped, used, _ = stream(smollm2, splits(ids, cuts), [])
    assert text == smollm2.decode(ids)
    assert (stopped, used) == (False, len(ids))


# Bytes of the small vocabulary, with many parts of characters among them: every way to be invalid turns up.
wild_bytes = st.lists(
    st.sampled_from([0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xED, 0xF0, 0x9F, 0x98, 0xF4, 0x90, 0xFF])
)


@given(data=wild_bytes, cuts=cuts)
def test_invalid_bytes_become_what_decoding_at_once_makes_of_them(
    small: Tokenizer, data: list[int], cuts: list[int]
) -> None:
    of_byte = {small.token_bytes(i): i for i in range(small.vocab_size) if len(small.token_bytes(i)) == 1}
    ids = [of_byte[bytes([byte])] for byte in data]
    text, *_ = stream(small, splits(ids, cuts), [])
    assert text == bytes(data).decode("utf-8", "replace") == small.decode(ids)


letters = st.text("ab\n", max_size=12)


@given(text=st.text("ab\n", max_size=40), stops=st.lists(letters.filter(bool), min_size=1, max_size=4), cuts=cuts)
def test_the_text_ends_before_the_stop_string_that_is_complete_first(
    smollm2: Tokenizer, text: str, stops: list[str], cuts: list[int]
) -> None:
    ids = smollm2.encode(text)
    found = first_complete(text, stops)
    shown, stopped, used, _ = stream(smollm2, splits(ids, cuts), stops)
    if found is None:
        assert (shown, stopped, used) == (text, False, len(ids))
    else:
        begin, end = found
        assert (shown, stopped) == (text[:begin], True)
        assert len(smollm2.decode(ids[: used - 1])) < end <= len(smollm2.decode(ids[:used]))


@given(ids=ids_of_smollm2, stop=st.integers(0, 1000), length=st.integers(1, 6), cuts=cuts)
def test_any_piece_of_any_text_is_found_as_a_stop_string(
    smollm2: Tokenizer, ids: list[int], stop: int, length: int, cuts: list[int]
) -> None:
    text = smollm2.decode(ids)
    begin = stop % (len(text) + 1)
    piece = text[begin : begin + length] or "nothing"
    shown, *_ = stream(smollm2, splits(ids, cuts), [piece])
    assert shown == text.split(piece)[0]


@given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=6))
def test_no_more_is_held_back_than_may_begin_a_stop_string(smollm2: Tokenizer, text: str, stop: str) -> None:
    text_stream = TextStream(smollm2, [stop])
    shown, so_far = "", ""
    for token in smollm2.encode(text):
        delta = text_stream.push([token])
        shown += delta.text
        so_far += smollm2.decode([token])
        if delta.stopped:
            break
        held = so_far[len(shown) :]
        assert stop.startswith(held)
        assert not any(stop.startswith(so_far[-n:]) for n in range(len(held) + 1, min(len(stop), len(so_far) + 1)))


def test_half_a_character_waits_for_its_other_half(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("🦜")
    assert len(ids) > 1
    text_stream = TextStream(smollm2)
    assert [text_stream.push([token]).text for token in ids] == [""] * (len(ids) - 1) + ["🦜"]
    half = TextStream(smollm2)
    assert half.push(ids[:-1]).text == ""
    assert half.finish() == "\ufffd"


def test_special_tokens_are_no_text_and_do_not_part_a_stop_string(smollm2: Tokenizer) -> None:
    ids = [*smollm2.encode("one ST"), 2, *smollm2.encode("OP two")]
    assert stream(smollm2, [ids], [])[0] == "one STOP two"
    shown, stopped, used, _ = stream(smollm2, [[token] for token in ids], ["STOP"])
    assert (shown, stopped) == ("one ", True)
    assert smollm2.decode(ids[:used]).startswith("one STOP")


def test_a_stop_string_may_be_complete_only_at_the_end(smollm2: Tokenizer) -> None:
    half = smollm2.encode("🦜")[:-1]
    text_stream = TextStream(smollm2, ["\ufffd"])
    assert text_stream.push([*smollm2.encode("ab"), *half]).text == "ab"
    assert text_stream.finish() == ""
    unstopped = TextStream(smollm2, ["bcd"])
    assert unstopped.push(smollm2.encode("abc")).text == "a"
    assert unstopped.finish() == "bc"
    assert unstopped.finish() == ""
    assert unstopped.push(smollm2.encode("d")).text == ""


def test_an_empty_stop_string_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        TextStream(smollm2, ["x", ""])


def test_adverse_stop_strings_cost_little(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("a" * 20_000)
    begin = time.process_time()
    shown, *_ = stream(smollm2, [[token] for token in ids], ["a" * n + "b" for n in range(240, 256)])
    assert time.process_time() - begin < 3.0
    assert shown == "a" * 20_000
