"""Blocks through a socket, with every backend: whatever the socket takes at a time, and what is refused."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.block_copy import Blocks
from kernels.socket_io import Receiving, Sending
from tests.backends import ALL, backend

every_backend = pytest.mark.parametrize("name", ALL)
NUM_BLOCKS = 9


def blocks(slab_bytes: int, seed: int) -> Blocks:
    """Further apart than they are long, at an odd address."""
    memory = np.random.default_rng(seed).integers(0, 256, (NUM_BLOCKS, slab_bytes + 5), dtype=np.uint8)
    return memory[:, 3 : 3 + slab_bytes]


@every_backend
@settings(max_examples=30)
@given(
    slab_bytes=st.sampled_from([1, 240, 241, 1025, 50_001]),
    ids=st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=NUM_BLOCKS),
    into=st.permutations(range(NUM_BLOCKS)),
    head=st.binary(max_size=40),
    limits=st.lists(st.integers(1, 60_000), min_size=1, max_size=5),
)
def test_a_head_and_blocks_arrive_in_order_through_a_narrow_socket(
    name: str, slab_bytes: int, ids: list[int], into: list[int], head: bytes, limits: list[int]
) -> None:
    native, into = backend(name), into[: len(ids)]
    source, target = blocks(slab_bytes, 1), blocks(slab_bytes, 2)
    whole = target.base
    assert whole is not None
    expected = whole.copy()
    expected[:, 3 : 3 + slab_bytes][into] = source[ids]
    out, back = socket.socketpair()
    with out, back:
        for one in (out, back):
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sending, receiving = Sending(native, source, ids, head), Receiving(native, target, into)
        heard = b""
        turn = 0
        while sending.left_bytes or receiving.left_bytes or len(heard) < len(head):
            turn += 1
            limit = limits[turn % len(limits)]
            before = (sending.position, receiving.position)
            if sending.left_bytes:
                assert sending.send(out.fileno(), limit) == sending.position - before[0] <= limit
            if len(heard) < len(head):
                heard += back.recv(len(head) - len(heard))
            elif receiving.left_bytes:
                assert receiving.receive(back.fileno(), limit) == receiving.position - before[1] <= limit
    assert heard == head
    assert np.array_equal(whole, expected), "and nothing between the blocks changed"
    assert receiving.checksums.tolist() == [xxhash.xxh3_64_intdigest(source[i].tobytes()) for i in ids]


@every_backend
def test_a_socket_that_takes_or_has_nothing_now_is_no_error_and_its_end_is_one(name: str) -> None:
    native = backend(name)
    source, target = blocks(300_000, 1), blocks(300_000, 2)
    out, back = socket.socketpair()
    with back:
        with out:
            out.setblocking(False)
            back.setblocking(False)
            sending, receiving = Sending(native, source, [0, 1, 2]), Receiving(native, target, [3])
            assert receiving.receive(back.fileno(), 1000) == 0
            while sending.send(out.fileno(), 10**9):
                pass
            assert 0 < sending.position < sending.num_bytes
            assert receiving.receive(back.fileno(), 1000) == 1000
        while receiving.left_bytes and receiving.position < sending.position:
            receiving.receive(back.fileno(), 10**9)
        assert receiving.position == sending.position
        with pytest.raises(EOFError):
            receiving.receive(back.fileno(), 1)
        with pytest.raises(BrokenPipeError):
            Sending(native, source, [0]).send(back.fileno(), 1)


@every_backend
@pytest.mark.parametrize("bad", [-1, NUM_BLOCKS])
def test_blocks_outside_the_memory_are_refused(name: str, bad: int) -> None:
    memory = blocks(300, 1)
    for kind in (Sending, Receiving):
        with pytest.raises(IndexError):
            kind(backend(name), memory, [0, bad])
    with pytest.raises(ValueError):
        Sending(backend(name), memory[:, ::2], [0])
    memory.flags.writeable = False
    with pytest.raises(ValueError):
        Receiving(backend(name), memory, [0])
    with pytest.raises(ValueError):
        Receiving(backend(name), blocks(300, 1), [0], position=301)
