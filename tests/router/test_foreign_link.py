"""A worker of another system is followed over real sockets: one that speaks as vLLM does, and may die, come back, be silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgpack
import pytest
import zmq
import zmq.asyncio

from kvpool.keys import prompt_keys, root_key
from router import foreign_link
from router.foreign_feed import ForeignFeed
from router.foreign_link import ForeignLink
from router.prefix_index import PrefixIndex
from tandem.bench.peers import free_port
from tandem.errors import ConfigError

ROOT = root_key(model_fingerprint=b"vllm/model", kv_format="", numerics_class=b"")
SIZE = 4
TOKENS = list(range(100, 112))
KEYS = prompt_keys(ROOT, TOKENS, SIZE).full
LIMIT_S = 20.0


def block(number: int) -> bytes:
    """The batch that says that block `number` of TOKENS is there."""
    event = {
        "type": "BlockStored", "block_hashes": [number + 1], "parent_block_hash": number or None,
        "token_ids": TOKENS[number * SIZE : (number + 1) * SIZE], "block_size": SIZE, "lora_id": None, "medium": "GPU",
    }  # fmt: skip
    packed: bytes = msgpack.packb([0.0, [event], 0])
    return packed


class Worker:
    """vLLM's publisher: sockets on these ports, batches numbered from 0, all of them replayed when asked."""

    def __init__(self, context: zmq.asyncio.Context, events: str, replay: str, answers: bool = True) -> None:
        self._pub = context.socket(zmq.PUB)
        self._replay = context.socket(zmq.ROUTER)
        for socket in (self._pub, self._replay):
            socket.linger = 0
        if "*" in events:
            self._pub.bind(events)
        else:
            self._pub.connect(events)
        self._replay.bind(replay)
        self._batches: list[bytes] = []
        self.asked: list[int] = []
        self._answering = asyncio.create_task(self._answer(answers))

    async def say(self, batch: bytes, heard: bool = True) -> None:
        if heard:
            await self._pub.send_multipart([b"", len(self._batches).to_bytes(8, "big"), batch])
        self._batches.append(batch)

    async def _answer(self, answers: bool) -> None:
        while True:
            asker, _, start = await self._replay.recv_multipart()
            first = int.from_bytes(start, "big")
            self.asked.append(first)
            if not answers:
                continue
            for seq, batch in list(enumerate(self._batches))[first:]:
                await self._replay.send_multipart([asker, b"", b"", seq.to_bytes(8, "big"), batch])
            await self._replay.send_multipart([asker, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    async def die(self) -> None:
        self._answering.cancel()
        await asyncio.gather(self._answering, return_exceptions=True)
        self._pub.close()
        self._replay.close()


class World:
    def __init__(self, context: zmq.asyncio.Context, they_bind: bool) -> None:
        port = free_port()
        self.theirs, self.ours = f"tcp://*:{port}", f"tcp://127.0.0.1:{port}"
        if not they_bind:
            self.theirs, self.ours = self.ours, self.theirs
        self.replay = f"tcp://127.0.0.1:{free_port()}"
        self.context = context
        self.index = PrefixIndex()
        self.feed = ForeignFeed(self.index, "vllm-0", 3, ROOT, SIZE)
        self.link = ForeignLink(context, self.feed, self.ours, self.replay)

    def worker(self, answers: bool = True) -> Worker:
        return Worker(self.context, self.theirs, self.replay, answers)

    def num_blocks(self) -> int:
        return int(self.index.longest(KEYS).counts[3].sum())

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def following(they_bind: bool = True) -> AsyncIterator[World]:
    context = zmq.asyncio.Context()
    world = World(context, they_bind)
    world.link.open()
    try:
        yield world
    finally:
        await world.link.close()
        context.destroy(linger=0)
    assert world.index.processes() == set(), "who isn't followed any more holds nothing"


@pytest.mark.parametrize("they_bind", [True, False])
def test_a_worker_is_followed_from_when_it_is_there_until_it_is_gone_and_when_it_comes_back(they_bind: bool) -> None:
    async def story() -> None:
        async with following(they_bind) as world:
            worker = world.worker()
            await worker.say(block(0), heard=False)
            await world.until(lambda: world.num_blocks() == 1)
            await worker.say(block(1))
            await world.until(lambda: world.num_blocks() == 2)
            await worker.die()
            await world.until(lambda: world.index.processes() == set())
            assert world.num_blocks() == 0
            worker = world.worker()
            await worker.say(block(0), heard=False)
            await worker.say(block(1), heard=False)
            await worker.say(block(2), heard=False)
            await world.until(lambda: world.num_blocks() == 3)
            await worker.die()

    asyncio.run(story())


def test_batches_that_got_lost_are_asked_for_again() -> None:
    async def story() -> None:
        async with following() as world:
            worker = world.worker()
            await worker.say(block(0))
            await world.until(lambda: world.num_blocks() == 1)
            await worker.say(block(1), heard=False)
            await worker.say(block(2))
            await world.until(lambda: world.num_blocks() == 3)
            assert worker.asked == [0, 1]
            await worker.die()

    asyncio.run(story())


def test_a_lost_last_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_link, "CATCH_UP_S", 0.05)

    async def story() -> None:
        async with following() as world:
            worker = world.worker()
            await worker.say(block(0))
            await world.until(lambda: world.num_blocks() == 1)
            await worker.say(block(1), heard=False)
            await world.until(lambda: world.num_blocks() == 2)
            await worker.die()

    asyncio.run(story())


def test_where_no_replay_answers_it_goes_on_with_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_link, "REPLAY_TIMEOUT_S", 0.1)

    async def story() -> None:
        async with following() as world:
            worker = world.worker(answers=False)
            await worker.say(block(1), heard=False)
            await world.until(lambda: worker.asked == [0])
            await worker.say(block(0))
            await world.until(lambda: world.num_blocks() == 1)
            await worker.die()

    asyncio.run(story())


def test_an_endpoint_that_is_none_is_said() -> None:
    async def story() -> None:
        context = zmq.asyncio.Context()
        link = ForeignLink(context, ForeignFeed(PrefixIndex(), "vllm-0", 0, ROOT, SIZE), "tcp://nobody", None)
        with pytest.raises(ConfigError, match="events of vllm-0 at 'tcp://nobody'"):
            link.open()
        await link.close()
        context.destroy(linger=0)

    asyncio.run(story())
