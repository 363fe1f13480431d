"""Whatever a foreign worker's frames do, get lost, come twice, begin anew, be nonsense: the index ends up with what it holds, or
with less, and never with what it doesn't hold."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.keys import prompt_keys, root_key
from router.foreign_feed import ForeignFeed
from router.prefix_index import REPLAY_RETRY_S, PrefixIndex

ROOT = root_key(model_fingerprint=b"vllm/model", kv_format="", numerics_class=b"")
SIZE = 4
TOKENS = list(range(100, 100 + 8 * SIZE))
KEYS = prompt_keys(ROOT, TOKENS, SIZE).full
NUMBER = 5
RECORDED = Path(__file__).resolve().parents[1] / "data" / "vllm_events.json"
END = (-1).to_bytes(8, "big", signed=True)


def seq_frame(seq: int) -> bytes:
    return seq.to_bytes(8, "big")


def as_map(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": name, **fields}


def as_array(name: str, **fields: Any) -> list[Any]:
    return [name, *fields.values()]


Form = Callable[..., Any]


class Worker:
    """One chain of blocks that a vLLM holds up to somewhere, and its publisher: batches from 0 on, the last few remembered."""

    def __init__(self, form: Form = as_map, buffer: int = 1000) -> None:
        self._form = form
        self.num_blocks = 0
        self.num_batches = 0
        self.buffer: deque[list[bytes]] = deque(maxlen=buffer)

    def grow(self, num: int) -> list[bytes]:
        first, self.num_blocks = self.num_blocks, min(self.num_blocks + num, len(KEYS))
        numbers = range(first, self.num_blocks)
        return self._publish(
            self._form(
                "BlockStored", block_hashes=[number + 1 for number in numbers], parent_block_hash=first or None,
                token_ids=TOKENS[first * SIZE : self.num_blocks * SIZE], block_size=SIZE, lora_id=None, medium="GPU",
            )
        ) if numbers else self._publish()  # fmt: skip

    def shrink(self, num: int) -> list[bytes]:
        last, self.num_blocks = self.num_blocks, max(0, self.num_blocks - num)
        hashes = [number + 1 for number in range(self.num_blocks, last)]
        return self._publish(*[self._form("BlockRemoved", block_hashes=hashes, medium="GPU")] if hashes else [])

    def clear(self, num: int) -> list[bytes]:
        """And begins again in the same batch."""
        self.num_blocks = min(num, len(KEYS))
        stored = self._form(
            "BlockStored", block_hashes=[number + 1 for number in range(num)], parent_block_hash=None,
            token_ids=TOKENS[: num * SIZE], block_size=SIZE, lora_id=None, medium="GPU",
        )  # fmt: skip
        return self._publish(self._form("AllBlocksCleared"), *[stored] if num else [])

    def _publish(self, *events: Any) -> list[bytes]:
        frames = [b"", seq_frame(self.num_batches), msgpack.packb([0.0, list(events), 0])]
        self.num_batches += 1
        self.buffer.append(frames)
        return frames

    def replay(self, from_seq: int) -> list[list[bytes]]:
        return [frames for frames in self.buffer if int.from_bytes(frames[1], "big") >= from_seq]


class World:
    def __init__(self, has_replay: bool = True) -> None:
        self.index = PrefixIndex()
        self.feed = ForeignFeed(self.index, "vllm-0", NUMBER, ROOT, SIZE, has_replay)

    def num_blocks(self) -> int:
        return int(self.index.longest(KEYS).counts[NUMBER].sum())

    def connect(self, worker: Worker, now_s: float = 0.0) -> None:
        self.replayed(worker, self.feed.connected(now_s), now_s)

    def replayed(self, worker: Worker, from_seq: int | None, now_s: float = 0.0) -> None:
        if from_seq is not None:
            for frames in worker.replay(from_seq):
                self.feed.on_replayed(frames, now_s)
            self.feed.on_replay_end(True)

    def live(self, worker: Worker, frames: Sequence[bytes], now_s: float = 0.0) -> None:
        self.replayed(worker, self.feed.on_live(frames, now_s), now_s)


@pytest.mark.parametrize("form", [as_map, as_array])
def test_events_are_followed_in_order(form: Form) -> None:
    world, worker = World(), Worker(form)
    worker.grow(1)
    world.connect(worker)
    assert world.num_blocks() == 1, "what was there before"
    for frames, num in ((worker.grow(3), 4), (worker.shrink(2), 2), (worker.clear(1), 1), (worker.grow(2), 3)):
        world.live(worker, frames)
        assert world.num_blocks() == num
    assert (world.index.num_rejected, world.feed.num_undecodable) == (0, 0)
    world.feed.disconnected()
    assert world.num_blocks() == 0
    assert world.index.processes() == set()


@pytest.mark.parametrize("form", ["maps", "arrays"])
@pytest.mark.parametrize("way", ["live", "replayed"])
def test_what_a_real_vllm_said_is_found_by_its_prompts_in_either_encoding(form: str, way: str) -> None:
    recorded = json.loads(RECORDED.read_text())
    index = PrefixIndex()
    feed = ForeignFeed(index, "vllm-0", NUMBER, ROOT, 32)
    assert feed.connected(0.0) == 0
    for hex_frames in recorded["frames"]:
        topic, seq, payload = map(bytes.fromhex, hex_frames)
        if form == "arrays":
            payload = with_arrays(payload)
        if way == "live":
            assert feed.on_live([topic, seq, payload], 0.0) is None
        else:
            feed.on_replayed([b"", topic, seq, payload], 0.0)
    feed.on_replay_end(True)
    assert (feed.num_undecodable, index.num_rejected) == (0, 0)
    for prompt in recorded["prompts"]:
        assert index.longest(prompt_keys(ROOT, prompt, 32).full).counts[NUMBER].tolist() == [len(prompt) // 32, 0, 0]


def with_arrays(payload: bytes) -> bytes:
    """The same batch as vLLM encoded it until 0.10: an event is its name and its values in order."""
    ts, events, rank = msgpack.unpackb(payload)
    packed: bytes = msgpack.packb([ts, [[event.pop("type"), *event.values()] for event in events], rank])
    return packed


def test_live_batches_wait_for_the_replay_of_those_before_them() -> None:
    world, worker = World(), Worker()
    worker.grow(2)
    assert world.feed.connected(0.0) == 0
    assert world.feed.on_live(worker.grow(2), 0.0) is None, "the replay is under way"
    assert world.num_blocks() == 0
    world.replayed(worker, 0)
    assert world.num_blocks() == 4


def test_a_gap_is_replayed_from_where_it_begins() -> None:
    world, worker = World(), Worker()
    world.connect(worker)
    world.live(worker, worker.grow(2))
    worker.shrink(1)
    assert world.feed.on_live(worker.grow(3), 1.0) == 1
    world.replayed(worker, 1, 1.0)
    assert world.num_blocks() == 4


@pytest.mark.parametrize("complete", [True, False])
def test_what_a_replay_does_not_bring_is_given_up(complete: bool) -> None:
    world, worker = World(), Worker()
    world.connect(worker)
    world.live(worker, worker.grow(2))
    worker.shrink(1)
    assert world.feed.on_live(worker.clear(3), 1.0) == 1
    world.feed.on_replay_end(complete)
    assert world.num_blocks() == 3
    world.live(worker, worker.grow(1))
    assert world.num_blocks() == 4


def test_a_replay_that_breaks_off_after_some_is_asked_for_again() -> None:
    world, worker = World(), Worker()
    world.connect(worker)
    world.live(worker, worker.grow(2))
    lost = worker.grow(1)
    worker.grow(1)
    assert world.feed.on_live(worker.grow(1), 1.0) == 1
    world.feed.on_replayed(lost, 1.0)
    world.feed.on_replay_end(False)
    assert world.num_blocks() == 3
    assert world.feed.catch_up(2.0) == 1
    world.replayed(worker, 1, 2.0)
    assert world.num_blocks() == 5


def test_a_worker_without_a_replay_begins_anew_after_a_gap() -> None:
    world, worker = World(has_replay=False), Worker()
    worker.grow(1)
    assert world.feed.connected(0.0) is None
    assert world.feed.on_live(worker.clear(2), 0.0) is None
    assert world.num_blocks() == 2
    worker.shrink(1)
    world.live(worker, worker.clear(3))
    assert world.num_blocks() == 3
    assert world.feed.catch_up(100.0) is None


def test_what_follows_lost_blocks_has_no_name_either() -> None:
    world, worker = World(has_replay=False), Worker()
    world.connect(worker)
    world.live(worker, worker.grow(2))
    worker.grow(1)
    world.live(worker, worker.shrink(1))
    assert world.index.num_blocks_of("vllm-0") == 0
    world.live(worker, worker.grow(2))
    assert world.index.num_blocks_of("vllm-0") == 0
    assert world.index.num_rejected == 2


def test_numbers_that_go_back_are_another_incarnation() -> None:
    world, worker = World(), Worker()
    world.connect(worker)
    world.live(worker, worker.grow(3))
    world.live(worker, worker.grow(3))
    worker = Worker()
    worker.grow(1)
    frames = worker.grow(1)
    assert world.feed.on_live(frames, 1.0) == 0
    assert world.num_blocks() == 0
    world.replayed(worker, 0, 1.0)
    assert world.num_blocks() == 2


def test_a_lost_last_batch_is_found_by_catching_up_and_one_replay_runs_at_a_time() -> None:
    world, worker = World(), Worker()
    world.connect(worker)
    world.live(worker, worker.grow(2))
    worker.grow(1)
    assert world.feed.catch_up(1.0) == 1
    assert world.feed.catch_up(1.0 + REPLAY_RETRY_S / 2) is None
    world.replayed(worker, 1, 2.0)
    assert world.num_blocks() == 3


@pytest.mark.parametrize("payload", [b"", b"\xc1", msgpack.packb([0.0, [{"type": "Unheard"}], 0])])
@pytest.mark.parametrize("replayed", [True, False])
def test_a_batch_that_cannot_be_read_leaves_nothing_known_and_is_counted(payload: bytes, replayed: bool) -> None:
    world, worker = World(), Worker()
    world.connect(worker)
    world.live(worker, worker.grow(2))
    if replayed:
        world.feed.catch_up(1.0)
        world.feed.on_replayed([b"", b"", seq_frame(1), payload], 1.0)
        world.feed.on_replay_end(True)
    else:
        assert world.feed.on_live([b"", seq_frame(1), payload], 1.0) is None, "its number is known: nothing is missing"
    assert world.num_blocks() == 0
    assert (world.feed.num_undecodable, world.index.num_rejected) == (1, 1)
    worker.num_batches = 2
    world.live(worker, worker.clear(1))
    assert world.num_blocks() == 1


@pytest.mark.parametrize(
    "frames", [[], [b"", b""], [b"", b"short", b""], [b"", END, b""], [b"", b"\x7f" + bytes(7), b"\x93"]]
)
def test_frames_that_are_no_batch_change_nothing_and_are_counted(frames: list[bytes]) -> None:
    world, worker = World(), Worker()
    world.connect(worker)
    world.live(worker, worker.grow(2))
    assert world.feed.on_live(frames, 1.0) is None
    world.feed.on_replayed(frames, 1.0)
    assert world.num_blocks() == 2
    assert (world.feed.num_undecodable, world.index.num_rejected) == (2, 2)


steps = st.lists(
    st.tuples(
        st.sampled_from(["grow", "shrink", "clear"]),
        st.integers(0, 4),
        st.sampled_from(["heard", "heard", "lost", "late", "restart", "reconnect", "broken replay"]),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(steps, st.sampled_from([1, 3, 1000]), st.booleans())
def test_after_any_history_the_index_holds_what_the_worker_does(
    history: list[tuple[str, int, str]], buffer: int, has_replay: bool
) -> None:
    """Replays may break off after some of what they lack; who connects may find the begin forgotten. Once everything that was
    published has come, nothing is believed that isn't so, and nothing is missing if the worker remembers all of it."""
    world, worker = World(has_replay), Worker(buffer=buffer)
    world.connect(worker)
    now_s = 0.0
    late: list[list[bytes]] = []
    for what, num, fate in history:
        now_s += 1.0
        frames = getattr(worker, what)(num)
        if fate == "late":
            late.append(frames)
            continue
        if fate == "restart":
            worker, late = Worker(buffer=buffer), []
            worker.grow(num)
            world.feed.disconnected()
            world.connect(worker, now_s)
        elif fate == "reconnect":
            world.feed.disconnected()
            late = []
            world.connect(worker, now_s)
        elif fate == "broken replay":
            from_seq = world.feed.on_live(frames, now_s)
            if from_seq is not None:
                for again in worker.replay(from_seq)[: num + 2]:
                    world.feed.on_replayed(again, now_s)
                world.feed.on_replay_end(False)
        elif fate == "heard":
            for each in [*late, frames]:
                world.live(worker, each, now_s)
            late = []
    now_s += 1.0
    whole = buffer == 1000 and has_replay
    for each in [*late, worker.grow(1)]:
        world.live(worker, each, now_s)
    world.replayed(worker, world.feed.catch_up(now_s), now_s)
    if whole:
        assert world.num_blocks() == worker.num_blocks
    else:
        assert world.num_blocks() in (0, worker.num_blocks)
    assert world.index.num_blocks_of("vllm-0") <= len(KEYS)
    assert world.index.sound()
