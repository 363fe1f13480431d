"""Two real vLLM servers feed the prefix index by their own KV events, and a prompt goes to the one that holds its prefix.

What the index says is compared with what vLLM says that it had cached. Needs vLLM's environment (`make peers`) and fails without.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
import zmq.asyncio

from kvpool.keys import prompt_keys, root_key
from protos.control import Capacity
from router.fleet import Fleet
from router.foreign_feed import ForeignFeed
from router.foreign_link import ForeignLink
from router.policy.base import Ask, Placement
from router.policy.seconds import PredictedSeconds
from router.prefix_index import PrefixIndex
from tandem.bench.chat.vllm_system import Server, VLLMSession, server_command
from tandem.bench.peer_models import vllm_model
from tandem.bench.peers import free_port
from tandem.clock import now_s
from tandem.model_files import resolve_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BLOCK_SIZE = 128
"""vLLM's default on a CPU, and not ours."""
NUM_BLOCKS = 24
MAX_LEN = 2048
SLAB_BYTES = 30 * 2 * 3 * 64 * BLOCK_SIZE * 2
GROUP = "vllm"
ROOT = root_key(model_fingerprint=b"smollm2-135m", kv_format="", numerics_class=GROUP.encode())
LIMIT_S = 60.0
DRAWN = random.Random(5)
"""One for all tests: no prompt comes twice."""


@dataclass(frozen=True)
class Running:
    """A server, and where its events are for us."""

    server: Server
    port: int
    events: str
    replay: str


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Running]]:
    """The publisher of the first binds, that of the second connects to us."""
    model = vllm_model(resolve_model("smollm2-135m"), lambda _: None)
    cpus = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # has the request that resets the cache
    with ExitStack() as stack:
        stack.callback(os.environ.pop, "VLLM_SERVER_DEV_MODE")
        found = []
        for number in range(2):
            port, events, replay = free_port(), free_port(), free_port()
            theirs, ours = f"tcp://*:{events}", f"tcp://127.0.0.1:{events}"
            if number:
                theirs, ours = ours, theirs
            config = {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": theirs,
                "replay_endpoint": f"tcp://127.0.0.1:{replay}",
            }
            command = [
                *server_command(model, [cpus[number % len(cpus)]], port, MAX_LEN, 2**30),
                "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(NUM_BLOCKS),
                "--enforce-eager",
                "--kv-events-config", json.dumps(config),
            ]  # fmt: skip
            server = stack.enter_context(Server(command, port))
            found.append(Running(server, port, ours, f"tcp://127.0.0.1:{replay}"))
        for running in found:
            running.server.wait(threading.Event(), 300.0)
        yield found


class World:
    """What a router has of the two servers: fleet, index, feeds."""

    def __init__(self, servers: Sequence[Running]) -> None:
        self.servers = servers
        self.index = PrefixIndex()
        self.fleet = Fleet()
        self.feeds: list[ForeignFeed] = []
        self.links: list[ForeignLink] = []
        self.context = zmq.asyncio.Context()
        self.fleet.serve(GROUP)
        capacity = Capacity(num_blocks=NUM_BLOCKS, slab_bytes=SLAB_BYTES)
        for at, server in enumerate(servers):
            number = self.fleet.join(f"vllm-{at}", "decode", "", capacity, GROUP, 0.0, serves_blocks=False)
            self.feeds.append(ForeignFeed(self.index, f"vllm-{at}", number, ROOT, BLOCK_SIZE))
            self.links.append(ForeignLink(self.context, self.feeds[at], server.events, server.replay))
        self.fleet.reachable[:] = False  # they serve no blocks to others

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        """Never seen before."""
        return tuple(DRAWN.randrange(100, 40_000) for _ in range(num_tokens))

    def hit_blocks(self, at: int, prompt: Sequence[int]) -> int:
        hits = self.index.longest(prompt_keys(ROOT, prompt, BLOCK_SIZE).full)
        return int(hits.counts[self.fleet.number(f"vllm-{at}")].sum())

    def place(self, prompt: Sequence[int]) -> Placement:
        keys = prompt_keys(ROOT, prompt, BLOCK_SIZE).full
        ask = Ask(len(prompt), BLOCK_SIZE, SLAB_BYTES, keys, answer_tokens=4.0)
        placement = PredictedSeconds().place(ask, self.index.longest(keys), self.fleet, now_s(), DRAWN)
        assert placement is not None
        return placement

    async def ask(self, at: int, prompt: tuple[int, ...]) -> int:
        """Tokens of the prompt that the server had cached, as it says."""
        session = VLLMSession(self.servers[at].port)
        return (await asyncio.to_thread(session.ask, prompt, 2)).num_cached_tokens

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def following(servers: Sequence[Running]) -> AsyncIterator[World]:
    world = World(servers)
    for link in world.links:
        link.open()
    try:
        yield world
    finally:
        for link in world.links:
            await link.close()
        world.context.term()
    assert world.index.processes() == set()


def post(port: int, path: str) -> dict[str, bool]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("POST", path)
        response = connection.getresponse()
        assert response.status == 200
        body: dict[str, bool] = json.loads(response.read())
        return body
    finally:
        connection.close()


@pytest.mark.parametrize("holder", [0, 1])
def test_a_prompt_goes_to_the_server_that_holds_its_prefix_with_the_hit_that_vllm_then_has(
    servers: list[Running], holder: int
) -> None:
    async def story() -> None:
        async with following(servers) as world:
            for shared, own in ((100, 60), (BLOCK_SIZE, 1), (300, 77), (700, 5), (1300, 200)):
                prefix = world.prompt(shared)
                blocks = shared // BLOCK_SIZE
                assert world.hit_blocks(holder, prefix) == 0
                assert await world.ask(holder, prefix) == 0
                await world.until(lambda: world.hit_blocks(holder, prefix) == blocks)  # noqa: B023
                prompt = prefix + world.prompt(own)
                placement = world.place(prompt)
                if blocks:
                    assert placement.names[placement.decode] == f"vllm-{holder}"
                assert placement.hit_tokens == blocks * BLOCK_SIZE
                assert await world.ask(holder, prompt) == placement.hit_tokens
                assert world.hit_blocks(1 - holder, prompt) == 0
            assert [feed.num_undecodable for feed in world.feeds] == [0, 0]

    asyncio.run(story())


def test_what_is_evicted_or_reset_is_no_hit_any_more(servers: list[Running]) -> None:
    async def story() -> None:
        async with following(servers) as world:
            prompt = world.prompt(1500)
            await world.ask(0, prompt)
            await world.until(lambda: world.hit_blocks(0, prompt) == len(prompt) // BLOCK_SIZE)
            hits = set()
            for _ in range(3):
                await world.ask(0, other := world.prompt(1100))
                await world.until(lambda: world.hit_blocks(0, other) == len(other) // BLOCK_SIZE)
                hits.add(world.hit_blocks(0, prompt))
            assert 0 in hits, "it has room for three times as much, and no more"
            assert await world.ask(0, prompt) == 0
            again = world.prompt(1900)
            await world.ask(0, again)
            await world.until(lambda: world.hit_blocks(0, again) == len(again) // BLOCK_SIZE)
            left = world.hit_blocks(0, prompt)
            assert 0 < left < len(prompt) // BLOCK_SIZE, "a part is left: chains go from their ends"
            assert await world.ask(0, prompt) == left * BLOCK_SIZE
            assert (await asyncio.to_thread(post, servers[0].port, "/reset_prefix_cache"))["success"]
            await world.ask(0, world.prompt(BLOCK_SIZE + 1))  # it publishes at the end of a step, the reset too
            await world.until(lambda: world.index.num_blocks_of("vllm-0") == 1)
            assert world.hit_blocks(0, prompt) == 0
            assert await world.ask(0, prompt) == 0

    asyncio.run(story())


def test_who_follows_late_learns_what_is_there_and_a_frozen_server_holds_nothing(servers: list[Running]) -> None:
    async def story() -> None:
        async with following(servers[1:]) as world:
            prompt = world.prompt(900)
            await world.ask(0, prompt)
        async with following(servers[1:]) as world:
            await world.until(lambda: world.hit_blocks(0, prompt) == len(prompt) // BLOCK_SIZE)
            os.killpg(servers[1].server.pid, signal.SIGSTOP)
            try:
                await world.until(lambda: world.index.processes() == set())
                assert world.hit_blocks(0, prompt) == 0
            finally:
                os.killpg(servers[1].server.pid, signal.SIGCONT)
            await world.until(lambda: world.hit_blocks(0, prompt) == len(prompt) // BLOCK_SIZE)
            longer = prompt + world.prompt(10)
            assert (
                await world.ask(0, longer) == world.place(longer).hit_tokens == len(prompt) // BLOCK_SIZE * BLOCK_SIZE
            )

    asyncio.run(story())
