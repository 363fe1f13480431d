"""Tokenizer: text to token ids and back, and a conversation to text, as one model does it.

Owns the promises: ids equal those of the model's own tokenizer, every token's exact bytes are known, and nothing is ever
dropped silently: a character that the vocabulary can't express is refused with its offset. Never imports torch or
transformers; immutable after loading, so threads may share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tandem.errors import InvalidRequest
from tandem.tokenizer.chat_template import ChatTemplate, Message
from tandem.tokenizer.gguf_tokenizer import load_gguf
from tandem.tokenizer.hf_tokenizer import load_hf
from tandem.tokenizer.vocabulary import Vocabulary, inexpressible


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file or a Hugging Face directory. Raises ModelError naming the file and what is wrong."""
    return Tokenizer(load_hf(path) if path.is_dir() else load_gguf(path))


class Tokenizer:
    """One model's tokenizer. Build it with `load_tokenizer`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._bytes = vocabulary.token_bytes
        self._special = vocabulary.special_ids
        self._max_token_bytes = max(map(len, self._bytes), default=1)
        self._chat = (
            ChatTemplate(
                vocabulary.chat_template,
                bos_token=self._text_of(vocabulary.bos_token_id),
                eos_token=self._text_of(vocabulary.eos_token_id),
            )
            if vocabulary.chat_template is not None
            else None
        )

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self.token_bytes(token_id, skip_special=False).decode("utf-8", "replace")

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return len(self._bytes)

    @property
    def max_token_bytes(self) -> int:
        """The length of the longest token: n bytes of text are at least `n / max_token_bytes` tokens, so a text that is far
        too long can be refused before it is encoded."""
        return self._max_token_bytes

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends an answer."""
        return self._vocabulary.eos_token_ids

    @property
    def bos_token_id(self) -> int | None:
        return self._vocabulary.bos_token_id

    @property
    def add_bos(self) -> bool:
        """Whether the model wants its BOS token before a plain prompt (`encode_prompt` puts it there)."""
        return self._vocabulary.add_bos

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    @property
    def chat_template(self) -> str:
        """The template's source, by which one sees how the model calls tools; empty without one."""
        return self._vocabulary.chat_template or ""

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a mark (end of turn and the like) rather than text."""
        return token_id in self._special

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which special tokens' texts are those tokens. Adds nothing.

        Raises InvalidRequest for a lone surrogate and for a character that the vocabulary can't express, with its offset.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
            ) from error
        missing = self._vocabulary.missing_bytes
        if missing and len(data.translate(None, missing)) != len(data):
            self._refuse(text, missing)
        return self._vocabulary.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """As `encode`, with the BOS token first if the model wants it and the text doesn't begin with it.

        For plain prompts; a chat template writes its BOS itself, so `encode` is for `render_chat`'s text.
        """
        ids = self.encode(text)
        bos = self.bos_token_id
        return [bos, *ids] if self.add_bos and bos is not None and ids[:1] != [bos] else ids

    def _refuse(self, text: str, missing: bytes) -> None:
        unknown = set(missing)
        for offset, character in enumerate(text):
            if not unknown.isdisjoint(character.encode("utf-8")):
                raise inexpressible(text, offset)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The exact bytes of a token: a part of UTF-8 text, perhaps cut inside a character.

        A special token is b"", or its text if not `skip_special`; so is an id that has no token (models pad their vocabulary).
        """
        if not 0 <= token_id < len(self._bytes) or (skip_special and token_id in self._special):
            return b""
        return self._bytes[token_id]

    @property
    def space_prefix(self) -> bool:
        """Whether `encode` puts a space before a text, as SentencePiece does. Where a text begins, that space is not shown:
        `decode` drops the first byte of all its bytes if it is a space; `token_bytes`, which knows no neighbours, keeps it."""
        return self._vocabulary.space_prefix

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, taken as a whole text (see `space_prefix`); bytes that are not UTF-8 become U+FFFD. Total: no id
        raises."""
        data = b"".join(self.token_bytes(token_id, skip_special=skip_special) for token_id in ids)
        if self.space_prefix:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def render_chat(self, messages: Sequence[Message], tools_json: str = "") -> str:
        """The text of a conversation, up to where the assistant's answer begins. `tools_json`: a JSON array of the tools that the
        model may call, in OpenAI's form.

        Special tokens written inside a message are tokens, as everywhere. Raises InvalidRequest if the model has no chat
        template, its template refuses the conversation, or it shows no tools and there are some.
        """
        if self._chat is None:
            raise InvalidRequest("the model has no chat template: send a plain prompt")
        return self._chat.render(messages, tools_json)
