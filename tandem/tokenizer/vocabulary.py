"""What a loaded tokenizer consists of, whichever file it came from: `Vocabulary`, and the byte alphabet of byte-level BPE.

Owns no file format and no encoding: `gguf_tokenizer` and `hf_tokenizer` fill a `Vocabulary`, `tokenizer` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers

MAX_VOCAB = 4 * 2**20
"""More tokens than this in a file are a corrupted file."""

END_OF_TURN_NAMES = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>"}
)
"""Special tokens that end an answer in every family that has them; GGUF files declare only one of them (as llama.cpp does)."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`token_bytes[id]` are the exact bytes of a token (of a special one: its text), b"" where an id has no token.

    `missing_bytes` are those that no token expresses. `backend` encodes only, without adding BOS.
    """

    backend: tokenizers.Tokenizer
    token_bytes: tuple[bytes, ...]
    special_ids: frozenset[int]
    missing_bytes: bytes
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    eos_token_id: int | None
    add_bos: bool
    chat_template: str | None


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
