"""The tokenizer of a Hugging Face directory: `tokenizer.json` and the files beside it.

Owns which of those files says what: `tokenizer.json` the vocabulary, `generation_config.json` (else `config.json` and
`tokenizer_config.json`) the tokens that end an answer, `chat_template.jinja` (else `tokenizer_config.json`) the chat
template. Byte-level BPE, and BPE in SentencePiece's manner: there, exact bytes of every token are known. Never imports
transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tandem.errors import ModelError
from tandem.tokenizer.vocabulary import (
    MAX_VOCAB,
    SPACE_MARK,
    Vocabulary,
    backend_encode,
    byte_level_bytes,
    byte_token_ids,
    inexpressible,
    missing_bytes,
    sentencepiece_bytes,
)

MAX_FILE_BYTES = 256 * 2**20


def load_hf(directory: Path) -> Vocabulary:
    """The vocabulary of the Hugging Face directory. Raises ModelError naming the file and what is wrong in it."""
    path = directory / "tokenizer.json"
    text = _read(path)
    if text is None:
        raise ModelError(f"{path} is missing")
    spec = _parse(path, text)
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} can't be used: {error}") from error
    sentencepiece = _is_sentencepiece(path, spec)
    # Files may carry the limits of a training run; a prompt is neither cut nor padded.
    backend.no_truncation()
    backend.no_padding()

    vocab = backend.get_vocab(with_added_tokens=True)
    if not vocab or max(vocab.values()) >= MAX_VOCAB:
        raise ModelError(f"{path} has no tokens, or ids past the limit of {MAX_VOCAB}")
    added = backend.get_added_tokens_decoder()
    token_bytes = [b""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if sentencepiece:  # whose decoder doesn't tell added tokens from others
            token_bytes[index] = sentencepiece_bytes(token)
        else:
            token_bytes[index] = token.encode("utf-8") if index in added else byte_level_bytes(token)

    settings = _object(directory / "tokenizer_config.json")
    eos, ends = _ends(directory, settings, vocab)
    prefix = backend.encode("", add_special_tokens=True).ids
    bos = vocab.get(_content(settings.get("bos_token")) or "", prefix[0] if prefix else None)
    add_bos = settings.get("add_bos_token")
    return Vocabulary(
        encode=_refusing(path, backend, spec) if sentencepiece else backend_encode(backend),
        token_bytes=tuple(token_bytes),
        special_ids=frozenset(index for index, token in added.items() if token.special),
        missing_bytes=b"" if sentencepiece else missing_bytes(set(backend.get_vocab(with_added_tokens=False))),
        eos_token_ids=ends,
        bos_token_id=bos,
        eos_token_id=eos,
        add_bos=bos is not None and (add_bos if isinstance(add_bos, bool) else prefix[:1] == [bos]),
        chat_template=_chat_template(directory, settings),
        space_prefix=sentencepiece and _DROP_SPACE in _stages(spec, "decoder", "decoders"),
    )


# What SentencePiece's decoder is made of, in this order: ▁ is a space, byte tokens are bytes, all is one text, and the space
# before it goes (in models that put one there).
_DECODERS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_DROP_SPACE: dict[str, Any] = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _is_sentencepiece(path: Path, spec: dict[str, Any]) -> bool:
    """Whether it is SentencePiece's BPE rather than byte-level BPE. Only these two say which bytes a token stands for without
    its neighbours."""
    model = spec.get("model") or {}
    before, decoders = _stages(spec, "pre_tokenizer", "pretokenizers"), _stages(spec, "decoder", "decoders")
    if model.get("type", "BPE") == "BPE":
        if [stage.get("type") for stage in decoders] == ["ByteLevel"] and any(
            stage.get("type") == "ByteLevel" for stage in before
        ):
            return False
        if decoders in (_DECODERS, [*_DECODERS, _DROP_SPACE]) and model.get("byte_fallback"):
            return True
    raise ModelError(
        f"{path} is a {model.get('type')} tokenizer with decoder {[stage.get('type') for stage in decoders]}; only byte-level "
        "BPE (ByteLevel) and SentencePiece's BPE with byte fallback (Replace, ByteFallback, Fuse, perhaps Strip) are supported"
    )


def _stages(spec: dict[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    """The stages of a component, which is one stage, a sequence of them, or absent."""
    value = spec.get(key) or {}
    return list(value.get(inner) or []) if value.get("type") == "Sequence" else [value]


def _refusing(path: Path, backend: Tokenizer, spec: dict[str, Any]) -> Callable[[str], list[int]]:
    """The backend's encoding; what would become its unknown token is refused."""
    encode, vocab = backend_encode(backend), backend.get_vocab(with_added_tokens=False)
    if None not in byte_token_ids(vocab):
        return encode
    mark = spec["model"].get("unk_token")
    if mark not in vocab:
        raise ModelError(
            f"{path} has neither a token for every byte nor an unknown token: it drops characters silently"
        )
    unknown = vocab[mark]

    def refuse_unknown(text: str) -> list[int]:
        ids = encode(text)
        if unknown in ids:
            encoding = backend.encode(text, add_special_tokens=False)
            for index, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if index == unknown and text[begin:end] != mark:
                    raise inexpressible(text, begin)
        return ids

    return refuse_unknown


def _ends(directory: Path, settings: dict[str, Any], vocab: dict[str, int]) -> tuple[int | None, frozenset[int]]:
    """The end-of-sequence id, and all ids that end an answer."""
    declared = vocab.get(_content(settings.get("eos_token")) or "")
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _object(directory / name).get("eos_token_id")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < MAX_VOCAB:
                ends.append(item)
    first = declared if declared is not None else (ends[0] if ends else None)
    return first, frozenset([*ends, *([declared] if declared is not None else [])])


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    if (text := _read(directory / "chat_template.jinja")) is not None:
        return text
    value = settings.get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _content(token: object) -> str | None:
    """A special token is written as its text or as an AddedToken object."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _object(path: Path) -> dict[str, Any]:
    text = _read(path)
    return {} if text is None else _parse(path, text)


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, must hold an object")
    return value


def _read(path: Path) -> str | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes, the limit is {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
