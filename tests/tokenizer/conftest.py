"""The tokenizers under test: SmolLM2's own, and a small byte-level one built here, as GGUF and as a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType

from tandem.errors import ModelError
from tandem.model_files import resolve_model
from tandem.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tandem.tokenizer.vocabulary import BYTE_ALPHABET

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġwor l", "Ġworl d", "1 2", "Ċ Ċ"]


def byte_tokens(without: bytes = b"") -> list[str]:
    return [character for character, byte in BYTE_ALPHABET.items() if byte not in without]


def small_vocab(without: bytes = b"") -> tuple[list[str], list[int]]:
    """Tokens and GGUF types: three marks, one user-defined token, the bytes, the merges."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    types = [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED]
    tokens += byte_tokens(without) + [merge.replace(" ", "") for merge in MERGES]
    return tokens, [int(kind) for kind in types] + [int(TokenType.NORMAL)] * (len(tokens) - len(types))


def write_gguf(path: Path, *, pre: str = "smollm", without: bytes = b"", drop: str = "", **changes: object) -> Path:
    """A GGUF file of the small vocabulary; `changes` replace tokens, types, merges; `drop` leaves out a key."""
    tokens, types = small_vocab(without)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(str(changes.get("model", "gpt2")))
    writer.add_tokenizer_pre(pre)
    if drop != "tokens":
        writer.add_token_list(changes.get("tokens", tokens))
    if drop != "types":
        writer.add_token_types(changes.get("types", types))
    writer.add_token_merges(changes.get("merges", MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(int(changes.get("eos", 2)))  # type: ignore[call-overload]
    if "add_bos" in changes:
        writer.add_add_bos_token(bool(changes["add_bos"]))
    if drop != "template":
        writer.add_chat_template(str(changes.get("template", CHATML)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_hf(directory: Path, **config: object) -> Path:
    """A Hugging Face directory of the small vocabulary, split as GPT-2 does; `config` goes to tokenizer_config.json."""
    directory.mkdir(exist_ok=True)
    tokens, _ = small_vocab()
    ids = {token: index for index, token in enumerate(tokens)}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": tokens[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": index < 3,
            }
            for index in range(4)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": ids,
            "merges": MERGES,
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHATML, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """SmolLM2-135M-Instruct's tokenizer, from the file that `tandem pull smollm2-135m` brings."""
    try:
        return load_tokenizer(resolve_model("smollm2-135m"))
    except ModelError as error:
        pytest.fail(f"the tests need the model: {error}")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("small") / "small.gguf"))
