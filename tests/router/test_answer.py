"""An answer's outgoing side: stop strings cut frames, and what a slow client has not taken is merged."""

from __future__ import annotations

import asyncio

from protos import tandem_pb2
from router.actions import CompletedEvent, TokensEvent
from router.answer import Answer
from router.journal import Summary


class ByteTokenizer:
    space_prefix = False

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return bytes([token_id])


SUMMARY = Summary("q", "completed", "", 1, 4, 4, 0.1, 0.2, (0, 0), (), (), ())


def answer(*stop: str, n: int = 1) -> Answer:
    return Answer("q", ByteTokenizer(), stop, n)  # type: ignore[arg-type]


def tokens(text: str, position: int = 0, finish: str | None = None, index: int = 0) -> TokensEvent:
    return TokensEvent(index, position, tuple(text.encode()), (), finish)  # type: ignore[arg-type]


async def _read(item: Answer) -> list[tandem_pb2.Chunk]:
    return [chunk async for chunk in item.chunks()]


def test_tokens_behind_a_stop_string_in_the_same_frame_are_not_shown() -> None:
    item = answer("cd")
    assert item.take(tokens("abcdef", finish="length")) == 4
    item.take(CompletedEvent(SUMMARY))
    (chunk,) = asyncio.run(_read(item))
    assert (chunk.text, bytes(chunk.token_ids), chunk.finish_reason) == ("ab", b"abcd", "stop")
    assert item.num_generated_tokens == 4


def test_what_was_not_taken_is_one_chunk_a_sample() -> None:
    item = answer(n=2)
    for position, letter in enumerate("abcdefgh"):
        for index in range(2):
            assert item.take(tokens(letter, position, "length" if letter == "h" else None, index)) is None
    item.take(CompletedEvent(SUMMARY))
    chunks = asyncio.run(_read(item))
    assert [(chunk.index, chunk.position, chunk.text) for chunk in chunks] == [(0, 0, "abcdefgh"), (1, 0, "abcdefgh")]


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    item = answer("xyz")
    item.take(tokens("abxy", finish="length"))
    item.take(CompletedEvent(SUMMARY))
    (chunk,) = asyncio.run(_read(item))
    assert (chunk.text, chunk.finish_reason) == ("abxy", "length")
