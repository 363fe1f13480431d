"""Events of vLLM, as maps and as arrays, become keys of ours; what can't is counted and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.keys import prompt_keys, root_key
from protos.foreign_events import Cleared, Removed, Stored, decode_foreign_batch
from protos.kv_events import MAX_BATCH_BYTES, AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, decode_seq
from router.foreign import ForeignNames
from router.prefix_index import PrefixIndex

ROOT = root_key(model_fingerprint=b"vllm/model", kv_format="", numerics_class=b"")
DATA = Path(__file__).resolve().parents[1] / "data"
SIZE = 4
TOKENS = list(range(100, 112))
KEYS = prompt_keys(ROOT, TOKENS, SIZE).full


def as_map(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": name, **fields}


def as_array(name: str, **fields: Any) -> list[Any]:
    return [name, *fields.values()]


def batch(*events: Any) -> bytes:
    packed: bytes = msgpack.packb([1700000000.5, list(events), 0])
    return packed


forms = pytest.mark.parametrize("form", [as_map, as_array])
Form = Callable[..., Any]


def stored(form: Form, hashes: list[Any], parent: Any, tokens: list[int], size: int = SIZE, **more: Any) -> Any:
    return form(
        "BlockStored", block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, block_size=size,
        lora_id=more.get("lora_id"), medium="GPU", lora_name=more.get("lora_name"), extra_keys=more.get("extra_keys"),
        group_idx=more.get("group_idx"), kv_cache_spec_kind="full_attention",
    )  # fmt: skip


@forms
@pytest.mark.parametrize("hashes", [[2**63 + 5, 7, 9], [b"a" * 32, b"b" * 32, b"c" * 32]])
def test_blocks_get_the_keys_that_their_tokens_have(form: Form, hashes: list[Any]) -> None:
    names = ForeignNames(ROOT, SIZE)
    first, second = stored(form, hashes[:2], None, TOKENS[:8]), stored(form, hashes[2:], hashes[1], TOKENS[8:])
    events = names.translate(decode_foreign_batch(batch(first, second)))
    assert events == [
        BlockStored(list(KEYS[:2]), ROOT, [], SIZE, None, "GPU"),
        BlockStored([KEYS[2]], KEYS[1], [], SIZE, None, "GPU"),
    ]
    gone = form("BlockRemoved", block_hashes=[hashes[2]], medium="GPU", group_idx=0)
    assert names.translate(decode_foreign_batch(batch(gone))) == [BlockRemoved([KEYS[2]], "GPU")]
    assert names.translate(decode_foreign_batch(batch(gone))) == []
    assert (len(names), names.num_rejected) == (2, 1)
    assert names.translate(decode_foreign_batch(batch(form("AllBlocksCleared")))) == [AllBlocksCleared()]
    assert len(names) == 0


@forms
@pytest.mark.parametrize(
    "event",
    [
        {"parent": 404},
        {"size": 8},
        {"tokens": TOKENS[:7]},
        {"lora_id": 3},
        {"lora_name": "poet"},
        {"extra_keys": [["salt"], None]},
        {"group_idx": 1},
    ],
)
def test_blocks_that_tokens_alone_do_not_determine_have_no_key(form: Form, event: dict[str, Any]) -> None:
    names = ForeignNames(ROOT, SIZE)
    given_event = {"hashes": [1, 2], "parent": None, "tokens": TOKENS[:8]} | event
    assert names.translate(decode_foreign_batch(batch(stored(form, **given_event)))) == []
    assert (len(names), names.num_rejected) == (0, 1)
    child = stored(form, [3], 2, TOKENS[8:])
    assert names.translate(decode_foreign_batch(batch(child))) == [], "nor has what follows them"


def test_names_are_bounded() -> None:
    names = ForeignNames(ROOT, SIZE, max_names=2)
    events = decode_foreign_batch(batch(stored(as_map, [1, 2], None, TOKENS[:8]), stored(as_map, [3], 2, TOKENS[8:])))
    assert len(names.translate(events)) == 1
    assert (len(names), names.num_rejected) == (2, 1)


def held(index: PrefixIndex, keys: Sequence[bytes]) -> int:
    hits = index.longest(keys)
    assert list(hits.holders) == [0]
    return int(hits.counts[0].sum())


def test_what_a_real_vllm_said_names_the_blocks_of_its_prompts() -> None:
    recorded = json.loads((DATA / "vllm_events.json").read_text())
    said = [[bytes.fromhex(frame) for frame in frames] for frames in recorded["frames"]]
    again = [[bytes.fromhex(frame) for frame in frames] for frames in recorded["replay"]]
    assert [frames[-1] for frames in again] == [*(frames[-1] for frames in said), b""], "a replay brings the same"
    index, names = PrefixIndex(), ForeignNames(ROOT, 32)
    index.join("vllm-0", 0, b"epoch...", "DEVICE", 0.0)
    index.on_replay_end("vllm-0", b"epoch...")
    for number, (_, seq, payload) in enumerate(said):
        events = names.translate(decode_foreign_batch(payload))
        assert decode_seq(seq) == number
        index.on_batch("vllm-0", b"epoch...", number, EventBatch(0.0, events), 0.0)
    assert names.num_rejected == index.num_rejected == 0
    for prompt in recorded["prompts"]:
        keys = prompt_keys(ROOT, prompt, 32).full
        assert held(index, keys) == len(prompt) // 32


def test_a_prompt_is_found_at_a_foreign_worker() -> None:
    index, names = PrefixIndex(), ForeignNames(ROOT, SIZE)
    index.join("vllm-0", 0, b"epoch...", "DEVICE", 0.0)
    index.on_replay_end("vllm-0", b"epoch...")
    events = names.translate(decode_foreign_batch(batch(stored(as_map, [1, 2], None, TOKENS[:8]))))
    index.on_batch("vllm-0", b"epoch...", 0, EventBatch(0.0, events), 0.0)
    assert held(index, KEYS) == 2


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgpack.packb({"events": []}),
        msgpack.packb([0.0, [[]]]),
        msgpack.packb([0.0, [{}]]),
        msgpack.packb([0.0, ["BlockStored"]]),
        msgpack.packb([0.0, [["Unheard", 1]]]),
        msgpack.packb([0.0, [{"type": "BlockStored", "block_hashes": "abc"}]]),
        batch(stored(as_map, [1.5], None, TOKENS[:4])),
        batch(stored(as_map, [1], None, [-1, 2, 3, 4])),
        batch(stored(as_array, [1], None, [2**32, 2, 3, 4])),
        batch(stored(as_array, [1], None, [], 0)),
    ],
)
def test_what_is_no_batch_is_an_error(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_foreign_batch(payload)


def test_a_batch_past_the_limit_is_not_looked_at() -> None:
    with pytest.raises(ValueError, match="the limit is"):
        decode_foreign_batch(bytes(MAX_BATCH_BYTES + 1))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_batch_or_an_error(data: bytes) -> None:
    try:
        events = decode_foreign_batch(data)
    except msgspec.DecodeError:
        return
    assert all(isinstance(event, Stored | Removed | Cleared) for event in events)
