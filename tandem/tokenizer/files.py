"""A model's tokenizer as the files that Hugging Face's libraries read: for gateways that tokenize before they ask.

Owns which files those are, and how they are made of a GGUF file's metadata. Ids are those of `load_tokenizer`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers.decoders import ByteLevel
from tokenizers.processors import TemplateProcessing

from tandem.errors import ModelError
from tandem.gguf_header import read_metadata
from tandem.tokenizer.gguf_tokenizer import byte_level_backend, load_gguf

MAX_FILE_BYTES = 64 * 2**20
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
)
"""Of a Hugging Face directory, those that decide about tokens."""


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files by name, of a Hugging Face directory or a GGUF file. Raises ModelError for a GGUF file whose tokenizer is not
    byte-level BPE (a gateway needs the original's files then), and for files that can't be read or are too large."""
    return _of_directory(path) if path.is_dir() else _of_gguf(path)


def _of_directory(directory: Path) -> dict[str, bytes]:
    files = {}
    for name in NAMES:
        path = directory / name
        if not path.is_file():
            continue
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ModelError(f"{path} has {size} bytes, the limit is {MAX_FILE_BYTES}")
        files[name] = path.read_bytes()
    return files


def _of_gguf(path: Path) -> dict[str, bytes]:
    vocabulary = load_gguf(path)
    backend = byte_level_backend(read_metadata(path))
    setattr(backend, "decoder", ByteLevel())  # noqa: B010 (the attribute's stub has a getter only)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": vocabulary.add_bos}
    for name, token_id in (("bos_token", vocabulary.bos_token_id), ("eos_token", vocabulary.eos_token_id)):
        if token_id is not None:
            config[name] = vocabulary.token_bytes[token_id].decode("utf-8", "replace")
    if vocabulary.add_bos:
        bos = config["bos_token"], vocabulary.bos_token_id
        setattr(backend, "post_processor", TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos]))  # noqa: B010
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
