"""What a loaded tokenizer consists of, whichever file it came from: `Vocabulary`; and how tokens write bytes: the byte
alphabet of byte-level BPE, ▁ and byte tokens of SentencePiece.

Owns no file format and no encoding: `gguf_tokenizer` and `hf_tokenizer` fill a `Vocabulary`, `tokenizer` uses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import tokenizers

from tandem.errors import InvalidRequest

MAX_VOCAB = 4 * 2**20
"""More tokens than this in a file are a corrupted file."""

END_OF_TURN_NAMES = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>"}
)
"""Special tokens that end an answer in every family that has them; GGUF files declare only one of them (as llama.cpp does)."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`token_bytes[id]` are the exact bytes of a token (of a special one: its text), b"" where an id has no token.

    `missing_bytes` are those that no token expresses, so a text with one of them is never given to `encode`. `encode` makes ids
    of a text, without BOS, and raises InvalidRequest for any other character that it can't express. `space_prefix`: it puts a
    space before a text, which decoding takes away.
    """

    encode: Callable[[str], list[int]]
    token_bytes: tuple[bytes, ...]
    special_ids: frozenset[int]
    missing_bytes: bytes
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    eos_token_id: int | None
    add_bos: bool
    chat_template: str | None
    space_prefix: bool = False


def backend_encode(backend: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    """`Vocabulary.encode` by the `tokenizers` package."""

    def encode(text: str) -> list[int]:
        # The batch call without offsets takes half the time and memory: 4 MiB of digits are 4,194,304 tokens, 5 s, 1.2 GB.
        return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    return encode


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: each byte is one printable character; those that are printable in Latin-1 stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = sorted(set(range(256)) - set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


BYTE_ALPHABET = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a token with a foreign character stands for its own UTF-8."""
    try:
        return bytes(BYTE_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode("utf-8", "replace")


def missing_bytes(tokens: set[str]) -> bytes:
    """The bytes that a byte-level vocabulary has no token for."""
    return bytes(sorted(byte for character, byte in BYTE_ALPHABET.items() if character not in tokens))


SPACE_MARK = "▁"
"""How SentencePiece writes a space."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of(token: str) -> int | None:
    """The byte that a byte token such as `<0x0A>` stands for; None for any other token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return None if match is None else int(match[1], 16)


def sentencepiece_bytes(token: str) -> bytes:
    """The bytes that a token of SentencePiece stands for: a byte token its byte, any other its text with spaces for ▁."""
    byte = byte_of(token)
    return token.replace(SPACE_MARK, " ").encode("utf-8") if byte is None else bytes([byte])


def byte_token_ids(vocab: Mapping[str, int]) -> tuple[int | None, ...]:
    """For each byte the id of its byte token."""
    return tuple(vocab.get(f"<0x{byte:02X}>") for byte in range(256))


def inexpressible(text: str, offset: int) -> InvalidRequest:
    """The refusal of a character that the vocabulary has no tokens for."""
    return InvalidRequest(
        f"the model's vocabulary can't express U+{ord(text[offset]):04X} at character {offset} of the text"
    )
