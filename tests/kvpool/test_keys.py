"""Names of blocks: golden values that no change may move, and what the derivation promises."""

from __future__ import annotations

import hashlib
import itertools
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool import _chain_keys
from kvpool.keys import (
    KEY_BYTES,
    KeyChain,
    block_key,
    chain_keys,
    chain_keys_ref,
    prompt_keys,
    root_key,
    tokens_as_bytes,
    tokens_from_bytes,
)
from tests.kvpool.child import REPOSITORY

tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=80)


def by_hand(parent: bytes, tokens: list[int], extra: bytes = b"") -> bytes:
    """The formula of the design, written a second time."""
    data = b"".join(struct.pack("<I", token) for token in tokens)
    return hashlib.sha256(parent + struct.pack("<H", len(tokens)) + data + extra).digest()[:16]


def test_golden_values() -> None:
    root = root_key(model_fingerprint=bytes(range(32)), kv_format="v1:bf16:bs16:L2:H3:D4", numerics_class=b"n" * 16)
    assert root.hex() == "fcf739ebe5a5ea8cb2ddfce111c20253"
    keys = prompt_keys(root, list(range(40)), 16)
    assert [key.hex() for key in keys.full] == ["d3b7a7f8ebfead35b3ae7fb6f06a38db", "836a812e837d629f2346599172fb6820"]
    assert keys.partial is not None
    assert keys.partial.hex() == "2060b1521f4e90b7bd9f8934dec1fb5d"


def test_the_root_is_the_hash_of_length_prefixed_fields() -> None:
    fields = [b"tandem/kv/1", b"model", b"format", b"class", b"adapter", b"salt"]
    expected = hashlib.sha256(b"".join(struct.pack("<I", len(f)) + f for f in fields)).digest()[:16]
    root = root_key(
        model_fingerprint=b"model", kv_format="format", numerics_class=b"class", adapter=b"adapter", tenant_salt=b"salt"
    )
    assert root == expected
    assert len(root) == KEY_BYTES


@given(st.lists(st.binary(max_size=6), min_size=4, max_size=4), st.lists(st.binary(max_size=6), min_size=4, max_size=4))
def test_no_two_lists_of_fields_share_a_root(one: list[bytes], other: list[bytes]) -> None:
    def root(fields: list[bytes]) -> bytes:
        return root_key(
            model_fingerprint=fields[0],
            kv_format="f",
            numerics_class=fields[1],
            adapter=fields[2],
            tenant_salt=fields[3],
        )

    assert (root(one) == root(other)) == (one == other)


def test_moving_bytes_between_fields_changes_the_root() -> None:
    def root(model: bytes, numerics: bytes) -> bytes:
        return root_key(model_fingerprint=model, kv_format="", numerics_class=numerics)

    assert root(b"ab", b"c") != root(b"a", b"bc")
    assert root(b"", b"abc") != root(b"abc", b"")


@given(tokens_lists, st.integers(1, 17))
def test_prompt_keys_follow_the_formula_and_the_chain_agrees(tokens: list[int], size: int) -> None:
    root = b"r" * 16
    keys = prompt_keys(root, tokens, size)
    parent = root
    for i, key in enumerate(keys.full):
        parent = by_hand(parent, tokens[i * size : (i + 1) * size])
        assert key == parent
    tail = tokens[len(keys.full) * size :]
    assert len(tail) < size
    assert keys.partial == (by_hand(parent, tail) if tail else None)
    chain = KeyChain(root, size, tokens)
    assert (tuple(chain.keys), chain.partial_key(), chain.num_tokens) == (keys.full, keys.partial, len(tokens))


@given(tokens_lists, st.lists(st.integers(0, 80), max_size=6), st.integers(1, 17))
def test_a_chain_does_not_depend_on_how_it_grew(tokens: list[int], cuts: list[int], size: int) -> None:
    chain = KeyChain(b"r" * 16, size)
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for start, end in itertools.pairwise(bounds):
        chain.extend(tokens[start:end])
    whole = KeyChain(b"r" * 16, size, tokens)
    assert (chain.keys, chain.partial_key()) == (whole.keys, whole.partial_key())
    assert [chain.parent_of(i) for i in range(len(chain.keys))] == [b"r" * 16, *chain.keys][: len(chain.keys)]


def test_a_partial_block_and_the_full_one_it_becomes_have_different_names() -> None:
    root = b"r" * 16
    assert len({block_key(root, [1, 2, 3][:n]) for n in range(1, 4)}) == 3
    assert block_key(root, [1]) != block_key(root, [1, 0])
    assert block_key(root, [1], b"image") != block_key(root, [1])


@given(tokens_lists)
def test_token_bytes_are_little_endian_words_and_come_back(tokens: list[int]) -> None:
    assert tokens_as_bytes(tokens) == b"".join(token.to_bytes(4, "little") for token in tokens)
    assert tokens_from_bytes(tokens_as_bytes(tokens)) == tokens
    assert block_key(b"p" * 16, tokens) == block_key(b"p" * 16, tokens_as_bytes(tokens))


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_bytes_that_are_no_whole_tokens_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length {length}"):
        tokens_from_bytes(bytes(length))


def test_keys_are_the_same_in_a_process_with_another_hash_seed() -> None:
    program = (
        "from kvpool.keys import *;"
        "r = root_key(model_fingerprint=b'm', kv_format='f', numerics_class=b'n');"
        "print(r.hex(), prompt_keys(r, range(20), 16).full[0].hex())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


@given(
    st.binary(min_size=16, max_size=16),
    st.lists(st.integers(0, 2**32 - 1), max_size=200),
    st.sampled_from([1, 2, 13, 14, 16, 27, 64]),
    st.booleans(),
)
def test_native_keys_are_the_plain_ones(parent: bytes, tokens: list[int], size: int, instructions: bool) -> None:
    data = tokens_as_bytes(tokens)
    try:
        _chain_keys.use_instructions(instructions)
        assert _chain_keys.chain_keys(parent, data, size) == chain_keys_ref(parent, data, size)
    finally:
        _chain_keys.use_instructions(True)


def test_native_keys_are_used_and_refuse_what_is_no_chain() -> None:
    assert chain_keys is _chain_keys.chain_keys, "the native part is built wherever the tests run"
    for parent, data, size in (
        (b"short", b"", 16),
        (bytes(16), b"abc", 16),
        (bytes(16), b"", 0),
        (bytes(16), b"", 65536),
    ):
        with pytest.raises(ValueError, match="a parent of"):
            chain_keys(parent, data, size)
