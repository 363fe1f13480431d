"""Ids equal those of the model's own tokenizer, bytes come back exactly, and nothing is dropped silently."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import InvalidRequest, ModelError
from tandem.model_files import resolve_model
from tandem.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.conftest import MERGES, small_vocab, write_gguf, write_hf

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "smollm2_llama_cpp_ids.jsonl").read_text("utf-8").splitlines()
]
SMOLLM2_HAS_NO = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D])


def test_smollm2_ids_are_llama_cpps_and_decode_back(smollm2: Tokenizer) -> None:
    assert len(CASES) == 400
    wrong = [
        case["text"]
        for case in CASES
        if smollm2.encode(case["text"]) != case["ids"]
        or smollm2.decode(case["ids"], skip_special=False) != case["text"]
    ]
    assert wrong == []


def test_smollm2_knows_its_marks(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49_152
    assert smollm2.eos_token_ids == {0, 2}
    assert (smollm2.bos_token_id, smollm2.add_bos) == (1, False)
    assert smollm2.encode_prompt("Hi") == smollm2.encode("Hi")
    assert [smollm2.is_special(i) for i in (0, 2, 16, 17, 504)] == [True, True, True, False, False]
    assert smollm2.token_bytes(2) == b""
    assert smollm2.token_bytes(2, skip_special=False) == b"<|im_end|>"
    assert smollm2.decode([1, *smollm2.encode("Hi"), 2, 10**9, -1]) == "Hi"


@pytest.mark.parametrize("byte", SMOLLM2_HAS_NO)
def test_a_control_character_without_a_token_is_refused_with_its_offset(smollm2: Tokenizer, byte: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"U\+{byte:04X} at character 3 "):
        smollm2.encode("äöü" + chr(byte) + "x")


@pytest.mark.parametrize("first", ["\U00040000", "\U00080000"])
def test_a_character_whose_first_byte_has_no_token_is_refused(smollm2: Tokenizer, first: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"U\+{ord(first):X} at character 1 "):
        smollm2.encode("a" + first)


def test_every_other_control_character_comes_back(smollm2: Tokenizer) -> None:
    for byte in set(range(0x80)) - set(SMOLLM2_HAS_NO):
        assert smollm2.decode(smollm2.encode(f"a{chr(byte)}b")) == f"a{chr(byte)}b"


def test_a_lone_surrogate_is_refused_with_its_offset(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"U\+D83D at character 2"):
        smollm2.encode("ab\ud83dcd")


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back_or_is_refused(smollm2: Tokenizer, text: str) -> None:
    try:
        ids = smollm2.encode(text)
    except InvalidRequest:
        assert any(byte in smollm2._vocabulary.missing_bytes for byte in text.encode())
    else:
        assert smollm2.decode(ids, skip_special=False) == text
        assert b"".join(smollm2.token_bytes(i, skip_special=False) for i in ids) == text.encode()


@pytest.mark.parametrize("text", ["a" * 2**20, " " * 2**20, "1" * 2**18, "\n" * 2**20, "<|im_end|>" * 2**16])
def test_long_monotonous_text_takes_seconds_not_minutes(smollm2: Tokenizer, text: str) -> None:
    begin = time.monotonic()
    ids = smollm2.encode(text)
    assert time.monotonic() - begin < 20
    assert len(ids) >= len(text) / smollm2.max_token_bytes


def test_loading_reads_the_real_file_in_a_second(smollm2: Tokenizer) -> None:
    begin = time.process_time()
    load_tokenizer(resolve_model("smollm2-135m"))
    assert time.process_time() - begin < 1.0


def test_the_router_gets_no_torch_with_its_tokenizer() -> None:
    code = (
        "import sys, tandem.model_files, tandem.tokenizer.tokenizer, tandem.tokenizer.text_stream\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"


# --- GGUF, other families and broken files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "12 hello", ["1", "2", " ", "hello"]),
        ("gpt-2", "12 hello", ["12", " ", "hello"]),
        ("qwen2", "12 hello", ["1", "2", " ", "hello"]),
        ("llama-bpe", "12 hello", ["12", " ", "hello"]),
        ("gpt-2", "x.\n\nx", ["x", ".", "\n", "\n", "x"]),  # GPT-2 keeps a word's last white space apart
        ("llama-bpe", "x.\n\nx", ["x", ".", "\n\n", "x"]),
        ("smollm", "hello world<|im_end|>", ["hello", " world", "<|im_end|>"]),
        ("smollm", "<think>hello", ["<think>", "hello"]),
    ],
)
def test_each_family_splits_as_it_was_trained(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre))
    ids = tokenizer.encode(text)
    assert [tokenizer.decode([i], skip_special=False) for i in ids] == pieces


def test_llama3_takes_a_whole_word_that_is_a_token(tmp_path: Path) -> None:
    merges = [merge for merge in MERGES if merge != "hell o"]  # nothing leads to "hello" any more
    whole = load_tokenizer(write_gguf(tmp_path / "a.gguf", pre="llama-bpe", merges=merges))
    merged = load_tokenizer(write_gguf(tmp_path / "b.gguf", pre="qwen2", merges=merges))
    assert len(whole.encode("hello")) == 1
    assert len(merged.encode("hello")) == 2


def test_user_defined_tokens_are_text_and_marks_are_not(small: Tokenizer) -> None:
    ids = small.encode("<think>hello<|im_end|>")
    assert small.decode(ids) == "<think>hello"
    assert small.decode(ids, skip_special=False) == "<think>hello<|im_end|>"


def test_bos_is_added_once_where_the_model_wants_it(tmp_path: Path) -> None:
    by_family = load_tokenizer(write_gguf(tmp_path / "a.gguf", pre="llama-bpe"))
    by_file = load_tokenizer(write_gguf(tmp_path / "b.gguf", pre="smollm", add_bos=True))
    told_not_to = load_tokenizer(write_gguf(tmp_path / "c.gguf", pre="llama-bpe", add_bos=False))
    for tokenizer in (by_family, by_file):
        plain = tokenizer.encode("hello")
        assert tokenizer.encode_prompt("hello") == [1, *plain]
        assert tokenizer.encode_prompt("<|im_start|>hello") == [1, *plain]
    assert told_not_to.encode_prompt("hello") == told_not_to.encode("hello")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'; supported: .*smollm"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; supported: 'gpt2'"),
        ({"drop": "tokens"}, "tokenizer.ggml.tokens is missing"),
        ({"drop": "types"}, "tokenizer.ggml.token_type is not a list of"),
        ({"types": [1, 2, 3]}, "tokenizer.ggml.token_type is not a list of"),
        ({"merges": ["h e", "x y"]}, "tokenizer.ggml.merges has 'x y'"),
        ({"merges": ["h e", "he"]}, "tokenizer.ggml.merges has 'he'"),
        ({"eos": 100_000}, "tokenizer.ggml.eos_token_id is 100000, must be a token id below"),
        ({"tokens": ["a"] * len(small_vocab()[0])}, "duplicates"),
    ],
)
def test_a_gguf_that_cannot_be_right_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", **changes)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_truncated_gguf_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(200), *range(200, len(whole), 97)]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            load_tokenizer(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (4, 9, "version 9 is not supported"),
        (16, 2**60, "keys, the limit is"),
        (24, 2**60, "a key's name is a string of 1152921504606846976 bytes, the limit is"),
        (24, 60_000, r"a key's name needs 60000 bytes, the file has \d+ left"),
    ],
)
def test_a_gguf_whose_lengths_lie_is_refused_before_they_are_believed(
    tmp_path: Path, field: int, value: int, message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    data[field : field + 8] = value.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(path)


@given(data=st.data())
def test_a_corrupted_gguf_loads_or_is_refused_and_never_hangs(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = bytearray(write_gguf(folder / "whole.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(whole) - 1, data.draw(st.sampled_from([200, len(whole)])))))
        whole[at] = data.draw(st.integers(0, 255))
    path = folder / "corrupt.gguf"
    path.write_bytes(whole)
    try:
        load_tokenizer(path)
    except ModelError:
        pass


def test_a_file_that_is_not_there_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be read"):
        load_tokenizer(tmp_path / "none.gguf")


# --- Hugging Face directories ------------------------------------------------------------------------------------------


@given(text=st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from([case["text"] for case in CASES]))
def test_a_directorys_ids_are_those_of_its_own_library(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    directory = write_hf(tmp_path_factory.getbasetemp() / "hf")
    ours, own = load_tokenizer(directory), tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = ours.encode(text)
    assert ids == own.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == own.decode(ids)
    assert ours.decode(ids, skip_special=False) == own.decode(ids, skip_special_tokens=False) == text


@given(text=st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from([case["text"] for case in CASES]))
@pytest.mark.parametrize(("pre", "normalizer"), [("llama-bpe", None), ("qwen2", {"type": "NFC"})])
def test_directories_that_split_like_llama_3_and_qwen2_are_read(
    tmp_path_factory: pytest.TempPathFactory, pre: str, normalizer: object, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / pre
    if not folder.exists():
        path = write_hf(folder) / "tokenizer.json"
        spec = json.loads(path.read_text())
        digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
        pattern = (
            rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        spec["normalizer"] = normalizer
        spec["model"]["ignore_merges"] = pre == "llama-bpe"
        spec["pre_tokenizer"]["use_regex"] = False
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
        path.write_text(json.dumps(spec))
        write_gguf(folder / "same.gguf", pre=pre)
    ours, own = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = ours.encode(text)
    assert ids == own.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == own.decode(ids)
    if normalizer is None:
        assert ids == load_tokenizer(folder / "same.gguf").encode(text)
        assert ours.decode(ids, skip_special=False) == text


def test_ends_come_from_all_files_of_a_directory(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "hf")
    assert load_tokenizer(directory).eos_token_ids == {2}
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert load_tokenizer(directory).eos_token_ids == {0, 2}
    (directory / "config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(directory).eos_token_ids == {0, 2, 5}


def test_a_directorys_bos_is_as_configured(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "hf", add_bos_token=True)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode_prompt("hello") == [1, *tokenizer.encode("hello")]
    assert not load_tokenizer(write_hf(tmp_path / "hf")).add_bos


def test_a_bos_of_the_post_processor_is_found(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "hf")
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    template = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    setattr(own, "post_processor", template)  # noqa: B010
    own.save(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode_prompt("hello") == own.encode("hello").ids
    assert tokenizer.encode("hello") == own.encode("hello").ids[1:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json is missing"),
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ("{}", "can't be used"),
        ("[" * 100_000, "is not JSON"),
        (
            json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}}),
            "only byte-level BPE",
        ),
    ],
)
def test_a_directory_that_cannot_be_right_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    directory = write_hf(tmp_path / "hf")
    (directory / "tokenizer.json").unlink()
    if content is not None:
        (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(directory)
