"""The tokenizer inside a GGUF file's metadata: byte-level BPE of the families whose splitting rule is known here.

Owns the rules (`tokenizer.ggml.pre` → pre-tokenizer), which follow llama.cpp's `llm_tokenizer_bpe`, so ids equal llama.cpp's.
An unknown rule is refused: a wrong split gives plausible, wrong tokens. Never reads tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from tandem.errors import ModelError
from tandem.tokenizer.gguf_metadata import Metadata, read_metadata
from tandem.tokenizer.vocabulary import END_OF_TURN_NAMES, MAX_VOCAB, Vocabulary, byte_level_bytes, missing_bytes

# Token types of GGUF; the others are normal, unused (5) and byte (6) tokens.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

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


def _build(metadata: Metadata) -> Vocabulary:
    model = _string(metadata, "tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelError(f"tokenizer.ggml.model is {model!r}; only 'gpt2' (byte-level BPE) is supported")
    pre = _string(metadata, "tokenizer.ggml.pre")
    family = FAMILIES.get(pre)
    if family is None:
        raise ModelError(f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join(sorted(FAMILIES))}")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = _types(metadata, len(tokens))
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError(f"tokenizer.ggml.tokens has {len(tokens) - len(vocab)} duplicates")

    backend = _backend(vocab, _merges(metadata, vocab), family)
    special_ids = frozenset(index for index, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL))
    user_ids = frozenset(index for index, kind in enumerate(types) if kind == _USER_DEFINED)
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special_ids)])
    backend.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in sorted(user_ids)])

    eos = _token_id(metadata, "tokenizer.ggml.eos_token_id", len(tokens))
    ends = {
        eos,
        _token_id(metadata, "tokenizer.ggml.eot_token_id", len(tokens)),
        _token_id(metadata, "tokenizer.ggml.eom_token_id", len(tokens)),
        *(index for index in special_ids if tokens[index] in END_OF_TURN_NAMES),
    }
    bos = _token_id(metadata, "tokenizer.ggml.bos_token_id", len(tokens))
    template = metadata.get("tokenizer.chat_template")
    verbatim = special_ids | user_ids
    return Vocabulary(
        backend=backend,
        token_bytes=tuple(
            token.encode("utf-8") if index in verbatim else byte_level_bytes(token)
            for index, token in enumerate(tokens)
        ),
        special_ids=special_ids,
        missing_bytes=missing_bytes({token for index, token in enumerate(tokens) if index not in verbatim}),
        eos_token_ids=frozenset(token for token in ends if token is not None),
        bos_token_id=bos,
        eos_token_id=eos,
        add_bos=bos is not None and bool(metadata.get("tokenizer.ggml.add_bos_token", family.add_bos)),
        chat_template=template if isinstance(template, str) else None,
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


def _types(metadata: Metadata, num_tokens: int) -> list[int]:
    value = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(value, list) or len(value) != num_tokens:
        raise ModelError(f"tokenizer.ggml.token_type is not a list of {num_tokens} numbers, one a token")
    return [int(item) for item in value]


def _token_id(metadata: Metadata, key: str, num_tokens: int) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        raise ModelError(f"{key} is {value!r}, must be a token id below {num_tokens}")
    return value
