"""SentencePiece's BPE as llama.cpp runs it (`llm_tokenizer_spm`): text to ids out of pieces and their scores.

Owns the merging: of all neighbours whose joint text is a piece, those with the highest score are joined, the leftmost of
equals; a character that ends up in no piece becomes its UTF-8 bytes' tokens. `tokenizers` can't express that exactly: it
ranks pairs, so pieces of equal score are no equals there, and it joins only what are pieces themselves.
Knows nothing of files, and neither adds nor skips special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise

from tandem.tokenizer.vocabulary import SPACE_MARK, inexpressible

# Words repeat, so their ids are kept; 32,768 short ones take some 10 MB.
_KEPT_WORDS = 32_768
_MAX_KEPT_CHARS = 48


class _Inexpressible(Exception):
    """The character at `args[0]` of a word has no piece and not all of its bytes have tokens."""


class SentencePieceEncoder:
    """Text to ids. Immutable but for its cache of words, which threads may share.

    `pieces`: text → (id, score), with ▁ for a space; `marks`: text → id of the tokens that are cut out of the text before
    anything else; `byte_ids`: the id of each byte's token, or None; `space_prefix`: a space is put before the text, and again
    after each mark, as llama.cpp does.
    """

    def __init__(
        self,
        pieces: Mapping[str, tuple[int, float]],
        marks: Mapping[str, int],
        byte_ids: Sequence[int | None],
        *,
        space_prefix: bool,
    ) -> None:
        self._ids = {piece: index for piece, (index, _) in pieces.items()}
        rank_of = {
            score: rank for rank, score in enumerate(sorted({score for _, score in pieces.values()}, reverse=True))
        }
        self._ranks = {piece: rank_of[score] for piece, (_, score) in pieces.items()}
        # Two characters that stand side by side in no piece are never joined: between them a text falls into words.
        self._joined = {pair for piece in pieces for pair in pairwise(piece)}
        self._byte_ids = tuple(byte_ids)
        self._prefix = SPACE_MARK if space_prefix else ""
        self._marks = {mark: index for mark, index in marks.items() if mark}
        self._mark_lengths = sorted({len(mark) for mark in self._marks}, reverse=True)
        self._mark_begin = re.compile("|".join(sorted({re.escape(mark[0]) for mark in self._marks})) or r"(?!)")
        self._kept = lru_cache(_KEPT_WORDS)(self._merge)

    def __call__(self, text: str) -> list[int]:
        """The ids of `text`. Raises InvalidRequest for a character that can't be expressed, with its offset."""
        ids: list[int] = []
        for begin, end, mark in self._parts(text):
            if mark is not None:
                ids.append(mark)
                continue
            part = self._prefix + text[begin:end].replace(" ", SPACE_MARK)
            for at, word in self._words(part):
                try:
                    ids += self._kept(word) if len(word) <= _MAX_KEPT_CHARS else self._merge(word)
                except _Inexpressible as error:
                    raise inexpressible(text, max(begin, begin + at + error.args[0] - len(self._prefix))) from error
        return ids

    def _parts(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """`(begin, end, id)` of each mark, the leftmost and of those the longest first, and `(begin, end, None)` between."""
        done = 0
        for match in self._mark_begin.finditer(text):
            at = match.start()
            if at < done:
                continue
            for length in self._mark_lengths:
                index = self._marks.get(text[at : at + length])
                if index is not None:
                    if done < at:
                        yield done, at, None
                    done = at + length
                    yield at, done, index
                    break
        if done < len(text):
            yield done, len(text), None

    def _words(self, text: str) -> Iterator[tuple[int, str]]:
        begin, joined = 0, self._joined
        for at, pair in enumerate(pairwise(text), 1):
            if pair not in joined:
                yield begin, text[begin:at]
                begin = at
        yield begin, text[begin:]

    def _merge(self, word: str) -> tuple[int, ...]:
        """The ids of one word, in O(n log n), nearly O(n) where merges of one rank come in the order of the text.

        A symbol is known by where it begins: it ends at `ends[begin]`, and the one before it begins at `before[begin]`.
        `pending[begin]` is the rank of the piece that it makes with the next one, -1 if none; a waiting merge of another rank
        is out of date. Merges wait by rank: unsorted until their rank's turn comes (`fresh`); then the last one of a sorted
        list is next, or the first one of the heap of those that came later (`opened`).
        """
        size, rank_of = len(word), self._ranks.get
        ends, before = list(range(1, size + 1)), list(range(-1, size - 1))
        pending = [-1] * size
        fresh: dict[int, list[int]] = {}
        opened: dict[int, tuple[list[int], list[int]]] = {}
        ranks: list[int] = []

        def propose(left: int, end: int) -> None:
            rank = pending[left] = rank_of(word[left:end], -1)
            if rank < 0:
                return
            if rank in opened:
                heappush(opened[rank][1], left)
            elif rank in fresh:
                fresh[rank].append(left)
            else:
                fresh[rank] = [left]
                heappush(ranks, rank)

        for left in range(size - 1):
            propose(left, left + 2)
        while ranks:
            rank = ranks[0]
            if rank in fresh:
                opened[rank] = (sorted(fresh.pop(rank), reverse=True), [])
            waiting, late = opened[rank]
            while ranks[0] == rank:  # until a better one comes up
                if late and not (waiting and waiting[-1] < late[0]):
                    left = heappop(late)
                elif waiting:
                    left = waiting.pop()
                else:
                    del opened[heappop(ranks)]
                    break
                if pending[left] != rank:
                    continue
                middle = ends[left]
                end = ends[left] = ends[middle]
                pending[middle] = -1
                if end < size:
                    before[end] = left
                    propose(left, ends[end])
                else:
                    pending[left] = -1
                if before[left] >= 0:
                    propose(before[left], end)

        ids: list[int] = []
        begin = 0
        while begin < size:
            index = self._ids.get(word[begin : ends[begin]])
            if index is not None:
                ids.append(index)
            else:  # one character: longer symbols are pieces
                for byte in word[begin].encode("utf-8"):
                    if (byte_id := self._byte_ids[byte]) is None:
                        raise _Inexpressible(begin)
                    ids.append(byte_id)
            begin = ends[begin]
        return tuple(ids)
