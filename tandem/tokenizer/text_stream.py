"""TextStream: the text of one growing token stream, piece by piece, ended by stop strings.

Owns what may be shown already: never half a UTF-8 character, and never text that may turn out to be the beginning of a stop
string. What it shows does not depend on how the tokens were split into pushes. Knows nothing of requests and samples.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.errors import InvalidRequest
from tandem.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What one push added: `text` to show now; whether a stop string ended the stream; and how many of the pushed tokens belong
    to the stream, up to and including the one that completed the stop string (all of them if none did)."""

    text: str
    stopped: bool
    num_tokens_used: int


class _StopString:
    """Knuth, Morris and Pratt's automaton (1977): how much of the stop string the text so far ends with."""

    __slots__ = ("_borders", "_string", "matched")

    def __init__(self, string: str) -> None:
        self._string = string
        self.matched = 0
        # _borders[n]: the longest proper beginning of string[:n] that is also its end.
        self._borders = [0, 0]
        length = 0
        for character in string[1:]:
            while length and string[length] != character:
                length = self._borders[length]
            length += string[length] == character
            self._borders.append(length)

    def advance(self, character: str) -> bool:
        """Takes one more character; whether it completes the stop string, after which it must not be used again."""
        while self.matched and self._string[self.matched] != character:
            self.matched = self._borders[self.matched]
        self.matched += self._string[self.matched] == character
        return self.matched == len(self._string)


class TextStream:
    """The text of one sample. The stop string that is complete first ends it (of two that end together, the longer one), and
    the text ends before it. Special tokens are no text. Without stop strings, all deltas and `finish` make `decode` of all ids.

    With `continues` they are the text that follows another one, so the space that SentencePiece writes before a word is kept at
    the beginning too: `decode(before) + deltas == decode(before + ids)`, if `before` shows a text of whole characters.

    Raises InvalidRequest for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continues: bool = False) -> None:
        if "" in stop:
            raise InvalidRequest("a stop string is empty, needs at least 1 character")
        self._tokenizer = tokenizer
        self._stops = [_StopString(string) for string in stop]
        # Bytes that can't become a character turn into U+FFFD as soon as that is certain, as in `bytes.decode`.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.space_prefix and not continues
        self._held = ""
        self._ended = False

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Takes the stream's next tokens. After the end nothing is used any more."""
        if self._ended:
            return Delta("", True, 0)
        for index, token_id in enumerate(token_ids):
            if self._take(self._decoder.decode(self._bytes_of(token_id))):
                return Delta(self._show(), True, index + 1)
        return Delta(self._show(), False, len(token_ids))

    def finish(self) -> str:
        """The rest of the text; to be called once the last token was pushed. Empty if the stream has ended already."""
        if self._ended:
            return ""
        if not self._take(self._decoder.decode(b"", final=True)):
            self._ended = True
        return self._show()

    def _bytes_of(self, token_id: int) -> bytes:
        data = self._tokenizer.token_bytes(token_id)
        if self._drop_space and data:
            self._drop_space = False
            return data.removeprefix(b" ")
        return data

    def _take(self, text: str) -> bool:
        """Adds decoded text to what is held; whether a stop string is complete, in which case it and all behind it are gone."""
        if not self._stops:
            self._held += text
            return False
        for index, character in enumerate(text, 1):
            complete = [stop.matched for stop in self._stops if stop.advance(character)]
            if complete:
                self._held = (self._held + text[:index])[: -max(complete)]
                self._ended = True
                return True
        self._held += text
        return False

    def _show(self) -> str:
        """Everything held that can be shown now: at the end all, else all but the possible beginning of a stop string."""
        keep = 0 if self._ended else max((stop.matched for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown
