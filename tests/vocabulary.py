"""A small vocabulary, as `tandem.grammar` reads one of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence


class SmallVocabulary:
    """The printable ASCII characters are tokens 0 to 94, then come a mark, two that end an answer, and the `words`."""

    MARK, EOS, OTHER_EOS = 95, 96, 97

    def __init__(self, words: Sequence[str] = ()) -> None:
        marks = ["<|mark|>", "<|end|>", "<|stop|>"]
        self._bytes = [bytes([byte]) for byte in range(32, 127)] + [text.encode() for text in (*marks, *words)]
        self.eos_token_ids = frozenset({self.EOS, self.OTHER_EOS})
        self.vocab_size = len(self._bytes)

    def is_special(self, token_id: int) -> bool:
        return self.MARK <= token_id <= self.OTHER_EOS

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return b"" if skip_special and self.is_special(token_id) else self._bytes[token_id]

    def encode(self, text: str) -> list[int]:
        """Character by character."""
        return [byte - 32 for byte in text.encode()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(token_id) for token_id in token_ids).decode()
