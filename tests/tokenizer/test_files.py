"""The files that gateways tokenize with give the ids that the model's own tokenizer gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from tandem.errors import ModelError
from tandem.model_files import resolve_model
from tandem.tokenizer.files import tokenizer_files
from tandem.tokenizer.tokenizer import load_tokenizer
from tests.tokenizer.sentencepiece_models import trained, write_spm_gguf

TEXTS = ("", "Hello world", "  two  spaces\n\n\ttab 12345 ", "naïve – 中文 🙂", "<|im_start|>user\nhi<|im_end|>\n")


def test_a_gguf_files_tokenizer_has_the_same_ids_and_texts() -> None:
    path = resolve_model("smollm2-135m")
    files = tokenizer_files(path)
    own = load_tokenizer(path)
    written = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in TEXTS:
        ids = own.encode(text)
        assert written.encode(text, add_special_tokens=False).ids == ids
        assert written.encode(text).ids == own.encode_prompt(text)
        assert written.decode(ids, skip_special_tokens=False) == text
    config = json.loads(files["tokenizer_config.json"])
    assert config["eos_token"] == "<|im_end|>"
    assert "messages" in config["chat_template"]


def test_a_directorys_files_are_those_that_decide_about_tokens(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    assert tokenizer_files(tmp_path) == {name: name.encode() for name in ("tokenizer.json", "tokenizer_config.json")}


def test_a_gguf_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = trained()
    path = write_spm_gguf(tmp_path / "spm.gguf", model.tokens, model.scores, model.types)
    with pytest.raises(ModelError, match="tokenizer.ggml.model is 'llama'"):
        tokenizer_files(path)
