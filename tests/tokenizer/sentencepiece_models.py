"""A small SentencePiece model, trained here with `sentencepiece` (the reference), written as GGUF and as tokenizer.json."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import sentencepiece
from gguf import GGUFWriter, TokenType

TEXTS = [
    json.loads(line)["text"]
    for line in (Path(__file__).parents[1] / "data" / "smollm2_llama_cpp_ids.jsonl").read_text("utf-8").splitlines()
]
# Runs and periods: pieces of themselves, which more than one pair of neighbours makes.
_RUNS = ["a" * n for n in range(2, 40)] + [" " * n + "x" for n in range(2, 40)] + ["ab" * n + "a" for n in range(1, 20)]
TEMPLATE = "{% for m in messages %}{{ bos_token }}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class Model:
    """`processor` is the reference; `tokens`, `scores` and `types` (of GGUF) are what a GGUF file says of it."""

    processor: sentencepiece.SentencePieceProcessor
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]


@cache
def trained(*, space_prefix: bool = True) -> Model:
    """As Llama 2's was trained: BPE, byte fallback, no normalisation, white space kept. Rare characters have no piece."""
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *_RUNS * 3]),
        model_writer=target,
        model_type="bpe",
        vocab_size=2600,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=space_prefix,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=target.getvalue())
    ids = range(processor.get_piece_size())
    kinds = {
        TokenType.UNKNOWN: processor.is_unknown,
        TokenType.CONTROL: processor.is_control,
        TokenType.BYTE: processor.is_byte,
    }
    return Model(
        processor,
        tuple(processor.id_to_piece(i) for i in ids),
        tuple(processor.get_score(i) for i in ids),
        tuple(next((int(kind) for kind, holds in kinds.items() if holds(i)), int(TokenType.NORMAL)) for i in ids),
    )


def write_spm_gguf(
    path: Path,
    tokens: tuple[str, ...],
    scores: tuple[float, ...] | None,
    types: tuple[int, ...],
    *,
    space_prefix: bool | None = None,
    add_bos: bool | None = None,
    marks: bool = True,
) -> Path:
    """A GGUF file with SentencePiece's metadata; `marks` declares BOS 1 and EOS 2. What is None is left out."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    if marks:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def merges_of(model: Model) -> list[list[str]]:
    """Merges in the order of their scores, as transformers' converter derives them."""
    normal = {token: index for index, token in enumerate(model.tokens) if model.types[index] == int(TokenType.NORMAL)}
    merges: list[list[str]] = []
    for token, _ in sorted(normal.items(), key=lambda item: -model.scores[item[1]]):
        pairs = [[token[:at], token[at:]] for at in range(1, len(token))]
        merges += sorted(
            (p for p in pairs if p[0] in normal and p[1] in normal), key=lambda p: (normal[p[0]], normal[p[1]])
        )
    return merges


def write_spm_hf(directory: Path, model: Model, *, style: str = "llama", without: str = "") -> Path:
    """A Hugging Face directory of `model` as Llama 2 (`llama`), Mistral 0.3 (`mistral`) or Gemma (`gemma`, which puts no space
    before a text) write it; token `without` is left out."""
    directory.mkdir(exist_ok=True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": model.tokens[index], **flags} for index in range(3)],
        "normalizer": {
            "llama": {"type": "Sequence", "normalizers": [prepend, replace]},
            "mistral": None,
            "gemma": replace,
        }[style],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        if style == "mistral"
        else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders[:3] if style == "gemma" else decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(model.tokens) if token != without},
            "merges": merges_of(model),
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
