"""Ids and text equal those of the `sentencepiece` package, from GGUF and from tokenizer.json, and streaming changes nothing."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from random import Random

import pytest
import sentencepiece
import tokenizers
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from tandem.errors import InvalidRequest, ModelError
from tandem.tokenizer.chat_template import Message
from tandem.tokenizer.spm import SentencePieceEncoder
from tandem.tokenizer.text_stream import TextStream
from tandem.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.sentencepiece_models import TEXTS, Model, trained, write_spm_gguf, write_spm_hf

CONTROL, UNKNOWN, USER = int(TokenType.CONTROL), int(TokenType.UNKNOWN), int(TokenType.USER_DEFINED)
NORMAL, BYTE = int(TokenType.NORMAL), int(TokenType.BYTE)
MARKS = re.compile("<unk>|<s>|</s>")

anything = st.text(st.characters(codec="utf-8"), max_size=40)
repetitive = st.text(st.sampled_from("aab  \n\t\0\x7f1é天🦜\u200d\ufeff\u2028the▁"), max_size=60)
texts = (anything | repetitive | st.lists(st.sampled_from(TEXTS), max_size=3).map(" ".join)).filter(
    lambda text: not MARKS.search(text)
)


@pytest.fixture(scope="session")
def model() -> Model:
    return trained()


@pytest.fixture(scope="session")
def from_gguf(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    return load_tokenizer(write_spm_gguf(path, model.tokens, model.scores, model.types))


@pytest.fixture(scope="session")
def from_hf(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_spm_hf(tmp_path_factory.mktemp("spm") / "hf", model))


@given(text=texts)
def test_ids_and_text_are_sentencepieces(model: Model, from_gguf: Tokenizer, from_hf: Tokenizer, text: str) -> None:
    expected = model.processor.encode(text)
    assert from_gguf.encode(text) == expected
    assert from_hf.encode(text) == expected
    assert model.processor.decode(expected) == text.replace("▁", " ")
    assert from_gguf.decode(expected) == from_hf.decode(expected) == text.replace("▁", " ")


def test_the_model_of_these_tests_has_pieces_and_falls_back_to_bytes(model: Model) -> None:
    ids = [index for text in TEXTS for index in model.processor.encode(text)]
    assert sum(model.processor.is_byte(index) for index in ids) > 1000
    assert sum(len(model.tokens[index]) > 1 and not model.processor.is_byte(index) for index in ids) > 5000


@given(text=texts)
def test_without_a_space_before_the_text_they_are_too(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    model = trained(space_prefix=False)
    path = tmp_path_factory.getbasetemp() / "bare.gguf"
    if not path.exists():
        write_spm_gguf(path, model.tokens, model.scores, model.types, space_prefix=False)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text)
    assert ids == model.processor.encode(text)
    assert tokenizer.decode(ids) == model.processor.decode(ids) == text.replace("▁", " ")


def reference_of(pieces: dict[str, float]) -> sentencepiece.SentencePieceProcessor:
    proto = sentencepiece_model_pb2.ModelProto()
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    proto.pieces.add(piece="<unk>", score=0.0, type=kind.UNKNOWN)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=kind.BYTE)
    for piece, score in pieces.items():
        proto.pieces.add(piece=piece, score=score, type=kind.NORMAL)
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_any_pieces_with_any_scores_merge_as_in_sentencepiece() -> None:
    """Equal scores, pieces that no two pieces make or that several pairs make, pieces that score higher than their parts."""
    random = Random(0)
    for _ in range(400):
        letters = random.choice(["ab▁", "abc▁"])
        made = {"".join(random.choices(letters, k=random.randint(1, 6))) for _ in range(random.randint(1, 40))}
        if random.random() < 0.7:
            made |= set(letters)
        pieces = {piece: float(-random.randrange(random.choice([3, 1000]))) for piece in sorted(made)}
        reference = reference_of(pieces)
        ours = SentencePieceEncoder(
            {piece: (257 + index, score) for index, (piece, score) in enumerate(pieces.items())},
            {},
            range(1, 257),
            space_prefix=False,
        )
        for _ in range(20):
            text = "".join(random.choices("abc ", weights=[5, 5, 1, 1], k=random.randint(1, 60)))
            assert ours(text) == reference.encode(text), (pieces, text)


# --- Text of ids -------------------------------------------------------------------------------------------------------

ids_of_model = st.lists(st.integers(0, 2605) | st.integers(0, 270), max_size=30)  # bytes often, a few past the end too
pushes = st.lists(ids_of_model, max_size=6)


def streamed(stream: TextStream, parts: list[list[int]]) -> str:
    return "".join(stream.push(part).text for part in parts) + stream.finish()


def collapsed(text: str) -> str:
    """The packages differ in how many U+FFFD a run of bad bytes is."""
    return re.sub("\ufffd+", "\ufffd", text)


@given(parts=pushes)
def test_all_pieces_of_a_stream_are_the_decoded_text(
    from_gguf: Tokenizer, from_hf: Tokenizer, parts: list[list[int]]
) -> None:
    ids = [index for part in parts for index in part]
    for tokenizer in (from_gguf, from_hf):
        assert streamed(TextStream(tokenizer), parts) == tokenizer.decode(ids)
        with_stop = TextStream(tokenizer, ["no text has this"])
        assert streamed(with_stop, parts) == tokenizer.decode(ids)


@given(ids=ids_of_model)
def test_decoded_text_is_sentencepieces(model: Model, from_gguf: Tokenizer, from_hf: Tokenizer, ids: list[int]) -> None:
    space = model.tokens.index(
        "<0x20>"
    )  # as the first token that package keeps it, others take it for the space put there
    ids = [index for index in ids if 3 <= index < len(model.tokens) and index != space]
    expected = collapsed(model.processor.decode(ids))
    assert collapsed(from_gguf.decode(ids)) == collapsed(from_hf.decode(ids)) == expected


@given(before=ids_of_model, parts=pushes)
def test_a_stream_that_continues_a_text_goes_on_where_it_ended(
    from_gguf: Tokenizer, before: list[int], parts: list[list[int]]
) -> None:
    before = [*before, *from_gguf.encode("end")]
    ids = [index for part in parts for index in part]
    shown = streamed(TextStream(from_gguf, continues=True), parts)
    assert from_gguf.decode(before) + shown == from_gguf.decode([*before, *ids])


def test_the_space_of_the_first_word_goes_and_all_others_stay(from_gguf: Tokenizer) -> None:
    ids = from_gguf.encode("the the")
    assert [from_gguf.token_bytes(index) for index in ids] == [b" the", b" the"]
    assert from_gguf.decode(ids) == "the the"
    assert [TextStream(from_gguf).push([index]).text for index in ids] == ["the", "the"]
    assert [TextStream(from_gguf, continues=True).push([index]).text for index in ids] == [" the", " the"]
    assert from_gguf.decode([1, *ids]) == "the the"
    assert from_gguf.decode([1, *ids], skip_special=False) == "<s> the the"
    assert from_gguf.decode(from_gguf.encode("  the")) == "  the"


# --- Marks, BOS, ends --------------------------------------------------------------------------------------------------


def test_marks_are_tokens_and_a_word_after_one_gets_its_space(from_gguf: Tokenizer, from_hf: Tokenizer) -> None:
    the = from_gguf.encode("the")
    for tokenizer in (from_gguf, from_hf):
        assert tokenizer.encode("<s>the</s>the") == [1, *the, 2, *the]
        assert tokenizer.encode("") == []
        assert tokenizer.encode_prompt("the") == tokenizer.encode_prompt("<s>the") == [1, *the]
        assert (tokenizer.bos_token_id, tokenizer.add_bos, tokenizer.eos_token_ids) == (1, True, {2})
        assert [tokenizer.is_special(index) for index in range(4)] == [True, True, True, False]
        assert tokenizer.token_bytes(3 + 10) == b"\n"
        assert tokenizer.render_chat([Message("user", "Hi")]) == "<s>[INST] Hi [/INST]</s>"


def test_a_file_may_say_otherwise(tmp_path: Path, model: Model) -> None:
    told = load_tokenizer(write_spm_gguf(tmp_path / "a.gguf", model.tokens, model.scores, model.types, add_bos=False))
    assert not told.add_bos
    silent = load_tokenizer(write_spm_gguf(tmp_path / "b.gguf", model.tokens, model.scores, model.types, marks=False))
    assert (silent.bos_token_id, silent.add_bos, silent.eos_token_ids) == (1, True, {2})
    assert silent.render_chat([Message("user", "Hi")]) == "<s>[INST] Hi [/INST]</s>"


def small(**changes: object) -> dict[str, object]:
    """Byte tokens, three marks, of which one is a part of another, and two letters."""
    tokens = ["<unk>", "<s>", "</s>", "<|a|>", "<|a|>b", "▁", "a", "b", "▁a"]
    types = [UNKNOWN, CONTROL, CONTROL, CONTROL, USER, NORMAL, NORMAL, NORMAL, NORMAL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256) if byte != 0xF0]
    types += [BYTE] * 255
    scores = [0.0] * 8 + [-1.0] + [0.0] * 255
    return {"tokens": tuple(tokens), "scores": tuple(scores), "types": tuple(types), **changes}


def test_the_longest_mark_counts_and_user_defined_tokens_are_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_spm_gguf(tmp_path / "m.gguf", **small()))  # type: ignore[arg-type]
    assert tokenizer.encode("a<|a|>b<|a|>a<|a") == [8, 4, 3, 8, *(tokenizer.encode("<|a")[1:])]
    assert tokenizer.decode([4, 3]) == "<|a|>b"


def test_the_name_of_a_byte_token_is_text_even_if_pieces_lead_to_it(tmp_path: Path) -> None:
    plain = small()
    more = ("<", "0", "x", "4", "1", ">", "<0", "<0x", "<0x4", "1>")
    tokens, scores = plain["tokens"] + more, plain["scores"] + (0.0,) * len(more)  # type: ignore[operator]
    types = plain["types"] + (NORMAL,) * len(more)  # type: ignore[operator]
    tokenizer = load_tokenizer(write_spm_gguf(tmp_path / "m.gguf", tokens, scores, types))
    assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"
    assert tokenizer.decode([tokens.index("<0x41>")]) == "A"


def test_a_character_without_byte_tokens_is_refused_with_its_offset(tmp_path: Path, model: Model) -> None:
    directory = write_spm_hf(tmp_path / "hf", model, without="<0xF0>")
    ours = load_tokenizer(write_spm_gguf(tmp_path / "m.gguf", **small()))  # type: ignore[arg-type]
    for tokenizer in (ours, load_tokenizer(directory)):
        for before in ("", "a", "a<s>aé", "é" * 100):
            with pytest.raises(InvalidRequest, match=rf"U\+1F99C at character {len(before)} "):
                tokenizer.encode(before + "🦜b")
        assert tokenizer.decode(tokenizer.encode("é天")) == "é天"
        tokenizer.encode("a<unk>a")
        with pytest.raises(InvalidRequest, match=r"U\+D83D at character 2"):
            tokenizer.encode("ab\ud83dcd")


@pytest.mark.parametrize("text", ["a" * 2**18, " " * 2**18, "ab" * 2**17, "🦜" * 2**17, "<" * 2**18, "<s>" * 2**16])
def test_long_monotonous_text_takes_seconds_not_minutes(from_gguf: Tokenizer, from_hf: Tokenizer, text: str) -> None:
    begin = time.process_time()
    ids = from_gguf.encode(text)
    assert time.process_time() - begin < 5
    assert ids == from_hf.encode(text)
    assert len(ids) >= len(text.encode()) / from_gguf.max_token_bytes


# --- Refused files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is not a list of 264 numbers"),
        ({"scores": (0.0,) * 3}, "tokenizer.ggml.scores is not a list of 264 numbers"),
        ({"scores": (0.0,) * 7 + (float("nan"),) * 257}, "tokenizer.ggml.scores has nan for token 7"),
        ({"types": (BYTE,) * 264}, "token 0 is '<unk>', a byte token must be like"),
    ],
)
def test_a_gguf_that_cannot_be_right_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_tokenizer(write_spm_gguf(tmp_path / "m.gguf", **small(**changes)))  # type: ignore[arg-type]


# --- tokenizer.json ----------------------------------------------------------------------------------------------------


@given(text=texts | st.lists(st.sampled_from(["<s>", "the", " ", "</s>", "\n"])).map("".join))
@pytest.mark.parametrize("style", ["llama", "mistral", "gemma"])
def test_a_directorys_ids_and_text_are_those_of_its_own_library(
    tmp_path_factory: pytest.TempPathFactory, model: Model, style: str, text: str
) -> None:
    directory = tmp_path_factory.getbasetemp() / style
    if not directory.exists():
        write_spm_hf(directory, model, style=style)
    ours, own = load_tokenizer(directory), tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = ours.encode(text)
    assert ids == own.encode(text, add_special_tokens=False).ids
    assert ours.encode_prompt(text) == (ids if ids[:1] == [1] else [1, *ids])
    assert ours.decode(ids) == own.decode(ids)
    assert ours.decode(ids, skip_special=False) == own.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "decoder",
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
            "only byte-level BPE",
        ),
        ("decoder", None, "only byte-level BPE"),
        ("byte_fallback", False, "only byte-level BPE .* with byte fallback"),
        ("unk_token", None, "drops characters silently"),
    ],
)
def test_a_directory_whose_text_would_not_come_back_is_refused(
    tmp_path: Path, model: Model, part: str, value: object, message: str
) -> None:
    directory = write_spm_hf(tmp_path / "hf", model, without="<0xF0>")
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    (spec if part == "decoder" else spec["model"])[part] = value
    path.write_text(json.dumps(spec))
    with pytest.raises(ModelError, match=message):
        load_tokenizer(directory)
