"""The tokenizer inside a GGUF file's metadata: byte-level BPE of the families whose splitting rule is known here, and
SentencePiece's BPE (Llama 2, Mistral, TinyLlama), whose merging is in `spm`.

Owns the rules (`tokenizer.ggml.pre` → pre-tokenizer), which follow llama.cpp's `llm_tokenizer_bpe`, so ids equal llama.cpp's.
An unknown rule is refused: a wrong split gives plausible, wrong tokens. Never reads tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from tandem.errors import ModelError
from tandem.gguf_header import Metadata, read_metadata
from tandem.tokenizer.spm import SentencePieceEncoder
from tandem.tokenizer.vocabulary import (
    END_OF_TURN_NAMES,
    MAX_VOCAB,
    Vocabulary,
    backend_encode,
    byte_level_bytes,
    byte_of,
    byte_token_ids,
    missing_bytes,
    sentencepiece_bytes,
)

# Token types of GGUF; the others are normal and unused (5) tokens.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False)


def _single_digits() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _split(pattern: str) -> Callable[[], PreTokenizer]:
    return lambda: Sequence(
        [Split(Regex(pattern), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )


@dataclass(frozen=True, slots=True)
class _Family:
    pre_tokenizer: Callable[[], PreTokenizer]
    ignore_merges: bool = False
    """A word that is a token as a whole is that token, even if no merges lead to it."""
    add_bos: bool = False
    """Unless the file says otherwise."""


_LLAMA3 = _Family(_split(_LLAMA3_SPLIT), ignore_merges=True, add_bos=True)
FAMILIES: dict[str, _Family] = {
    "smollm": _Family(_single_digits),
    "gpt-2": _Family(_gpt2),
    "gpt2": _Family(_gpt2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Family(_split(_QWEN2_SPLIT)),
}


def load_gguf(path: Path) -> Vocabulary:
    """The vocabulary of the GGUF file at `path`. Raises ModelError naming the file and the key."""
    try:
        return _build(read_metadata(path))
    except ModelError as error:
        raise error if str(path) in str(error) else ModelError(f"{path}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What both kinds of vocabulary have: the tokens, their types and who is a mark."""

    texts: list[str]
    types: list[int]
    ids: dict[str, int]
    special_ids: frozenset[int]
    user_ids: frozenset[int]

    @property
    def verbatim_ids(self) -> frozenset[int]:
        """Tokens that stand for their own text; they are cut out of a text before it is encoded."""
        return self.special_ids | self.user_ids


@dataclass(frozen=True, slots=True)
class _Kind:
    """What differs between the kinds: see `Vocabulary`. The defaults hold where the file says nothing."""

    encode: Callable[[str], list[int]]
    bytes_of: Callable[[str], bytes]
    missing_bytes: bytes
    default_add_bos: bool
    default_bos: int | None = None
    default_eos: int | None = None
    space_prefix: bool = False


def _build(metadata: Metadata) -> Vocabulary:
    model = _string(metadata, "tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(model)
    if build is None:
        raise ModelError(
            f"tokenizer.ggml.model is {model!r}; supported: 'gpt2' (byte-level BPE), 'llama' (SentencePiece's BPE)"
        )
    tokens = _tokens(metadata)
    kind = build(metadata, tokens)
    num_tokens = len(tokens.texts)
    eos = _token_id(metadata, "tokenizer.ggml.eos_token_id", num_tokens, kind.default_eos)
    bos = _token_id(metadata, "tokenizer.ggml.bos_token_id", num_tokens, kind.default_bos)
    ends = {
        eos,
        _token_id(metadata, "tokenizer.ggml.eot_token_id", num_tokens),
        _token_id(metadata, "tokenizer.ggml.eom_token_id", num_tokens),
        *(index for index in tokens.special_ids if tokens.texts[index] in END_OF_TURN_NAMES),
    }
    template = metadata.get("tokenizer.chat_template")
    return Vocabulary(
        encode=kind.encode,
        token_bytes=tuple(
            text.encode("utf-8") if index in tokens.verbatim_ids else kind.bytes_of(text)
            for index, text in enumerate(tokens.texts)
        ),
        special_ids=tokens.special_ids,
        missing_bytes=kind.missing_bytes,
        eos_token_ids=frozenset(token for token in ends if token is not None),
        bos_token_id=bos,
        eos_token_id=eos,
        add_bos=bos is not None and bool(metadata.get("tokenizer.ggml.add_bos_token", kind.default_add_bos)),
        chat_template=template if isinstance(template, str) else None,
        space_prefix=kind.space_prefix,
    )


def _tokens(metadata: Metadata) -> _Tokens:
    texts = _strings(metadata, "tokenizer.ggml.tokens")
    types = [int(kind) for kind in _numbers(metadata, "tokenizer.ggml.token_type", len(texts))]
    ids = {text: index for index, text in enumerate(texts)}
    if len(ids) != len(texts):
        raise ModelError(f"tokenizer.ggml.tokens has {len(texts) - len(ids)} duplicates")
    return _Tokens(
        texts=texts,
        types=types,
        ids=ids,
        special_ids=frozenset(index for index, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL)),
        user_ids=frozenset(index for index, kind in enumerate(types) if kind == _USER_DEFINED),
    )


def byte_level_backend(metadata: Metadata) -> Tokenizer:
    """What encodes byte-level BPE by the file's vocabulary and merges. Raises ModelError for any other tokenizer."""
    if (model := _string(metadata, "tokenizer.ggml.model")) != "gpt2":
        raise ModelError(f"tokenizer.ggml.model is {model!r}, must be 'gpt2' (byte-level BPE)")
    return _byte_level_backend(metadata, _tokens(metadata), _family(metadata))


def _family(metadata: Metadata) -> _Family:
    pre = _string(metadata, "tokenizer.ggml.pre")
    family = FAMILIES.get(pre)
    if family is None:
        raise ModelError(f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join(sorted(FAMILIES))}")
    return family


def _byte_level_backend(metadata: Metadata, tokens: _Tokens, family: _Family) -> Tokenizer:
    backend = _backend(tokens.ids, _merges(metadata, tokens.ids), family)
    marks = [AddedToken(tokens.texts[i], special=True, normalized=False) for i in sorted(tokens.special_ids)]
    backend.add_special_tokens(marks)
    backend.add_tokens([AddedToken(tokens.texts[i], special=False, normalized=False) for i in sorted(tokens.user_ids)])
    return backend


def _byte_level(metadata: Metadata, tokens: _Tokens) -> _Kind:
    family = _family(metadata)
    verbatim = tokens.verbatim_ids
    return _Kind(
        encode=backend_encode(_byte_level_backend(metadata, tokens, family)),
        bytes_of=byte_level_bytes,
        missing_bytes=missing_bytes({text for text, index in tokens.ids.items() if index not in verbatim}),
        default_add_bos=family.add_bos,
    )


def _sentencepiece(metadata: Metadata, tokens: _Tokens) -> _Kind:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens.texts))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if not isinstance(prefix, bool):
        raise ModelError(f"tokenizer.ggml.add_space_prefix is {prefix!r}, must be true or false")
    bytes_ids = {text: index for text, index in tokens.ids.items() if tokens.types[index] == _BYTE}
    if wrong := [index for text, index in bytes_ids.items() if byte_of(text) is None]:
        raise ModelError(f"token {wrong[0]} is {tokens.texts[wrong[0]][:100]!r}, a byte token must be like '<0x0A>'")
    apart = tokens.verbatim_ids | frozenset(bytes_ids.values())
    encode = SentencePieceEncoder(
        {text: (index, scores[index]) for text, index in tokens.ids.items() if index not in apart},
        {tokens.texts[index]: index for index in tokens.verbatim_ids},
        byte_token_ids(bytes_ids),
        space_prefix=prefix,
    )

    def default(index: int) -> int | None:
        """llama.cpp's ids of the marks, if there is a mark."""
        return index if index < len(tokens.types) and tokens.types[index] == _CONTROL else None

    return _Kind(
        encode=encode,
        bytes_of=sentencepiece_bytes,
        missing_bytes=b"",
        default_add_bos=True,
        default_bos=default(1),
        default_eos=default(2),
        space_prefix=prefix,
    )


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]], family: _Family) -> Tokenizer:
    try:
        backend = Tokenizer(BPE(vocab, merges, ignore_merges=family.ignore_merges))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"tokenizer.ggml.merges don't fit the tokens: {error}") from error
    # The attribute's stub has a getter only.
    setattr(backend, "pre_tokenizer", family.pre_tokenizer())  # noqa: B010
    return backend


def _merges(metadata: Metadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in _strings(metadata, "tokenizer.ggml.merges"):
        left, space, right = line.partition(" ")
        if not (left and space and right) or left + right not in vocab:
            raise ModelError(f"tokenizer.ggml.merges has {line[:100]!r}, which makes no token")
        merges.append((left, right))
    return merges


def _string(metadata: Metadata, key: str) -> str:
    value = metadata.get(key)
    if not isinstance(value, str):
        raise ModelError(f"{key} is {'missing' if value is None else 'not a string'}")
    return value


def _strings(metadata: Metadata, key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ModelError(f"{key} is {'missing' if value is None else 'not a list of strings'}")
    if len(value) > MAX_VOCAB:
        raise ModelError(f"{key} has {len(value)} entries, the limit is {MAX_VOCAB}")
    return [str(item) for item in value]


def _numbers(metadata: Metadata, key: str, num_tokens: int) -> list[float]:
    value = metadata.get(key)
    if not isinstance(value, list) or len(value) != num_tokens or isinstance(value[0], str):
        raise ModelError(f"{key} is not a list of {num_tokens} numbers, one a token")
    numbers = [float(item) for item in value]
    if wrong := [index for index, number in enumerate(numbers) if not math.isfinite(number)]:
        raise ModelError(f"{key} has {numbers[wrong[0]]} for token {wrong[0]}, must be finite numbers")
    return numbers


def _token_id(metadata: Metadata, key: str, num_tokens: int, default: int | None = None) -> int | None:
    value = metadata.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        raise ModelError(f"{key} is {value!r}, must be a token id below {num_tokens}")
    return value
