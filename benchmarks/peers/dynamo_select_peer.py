"""NVIDIA Dynamo's whole routing decision as a peer, in this process, through its Python binding (`SelectionService`).

Runs in `.peers/dynamo` (`make peers`). The load is that of `tandem.bench.router.decision`: prompts of 64 blocks at several
workers, tails of 32 on top, asked for with 32 blocks that nobody has. Blocks get there as they do from a real worker: by events
over ZeroMQ in vLLM's format, with their tokens, which the service hashes. A decision is one `select_and_reserve` of 2,048 token
ids and one `free_reservation`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import random
import struct
import time
from typing import Any

import msgpack
import zmq
from child import answer_all, own_stdout

PROMPTS, PROMPT_BLOCKS, TAIL_BLOCKS, BLOCK_SIZE = 200, 64, 32, 16
WARM_UP = 300
WAIT_S = 120.0
MODEL = {"model_name": "m"}
Event = tuple[int, list[int], int | None, list[int]]
"""Worker, names of blocks, the block before them, their tokens."""


class Load:
    """What is stored, and what is asked for."""

    def __init__(self, workers: int, entries: int, holders: int, decisions: int, draw: random.Random) -> None:
        def tokens(blocks: int) -> list[int]:
            return [draw.randrange(1, 32_000) for _ in range(blocks * BLOCK_SIZE)]

        def names(blocks: int) -> list[int]:
            return [draw.getrandbits(63) for _ in range(blocks)]

        self.events: list[Event] = []
        prompts = [(tokens(PROMPT_BLOCKS), names(PROMPT_BLOCKS)) for _ in range(PROMPTS)]
        at = [draw.sample(range(workers), min(holders, workers)) for _ in prompts]
        half = TAIL_BLOCKS * BLOCK_SIZE
        for (held, named), where in zip(prompts, at, strict=True):
            for worker in where:
                self.events.append((worker, named[:TAIL_BLOCKS], None, held[:half]))
                self.events.append((worker, named[TAIL_BLOCKS:], named[TAIL_BLOCKS - 1], held[half:]))
        tails = []
        while len(self.events) * TAIL_BLOCKS < entries:
            number, tail = draw.randrange(PROMPTS), tokens(TAIL_BLOCKS)
            self.events.append((draw.choice(at[number]), names(TAIL_BLOCKS), prompts[number][1][-1], tail))
            tails.append((number, tail))
        self.last = [tokens(TAIL_BLOCKS) for _ in range(workers)]
        """Of each worker: once it is found, so is all before it."""
        self.events += [(worker, names(TAIL_BLOCKS), None, said) for worker, said in enumerate(self.last)]
        chosen = draw.choices(tails, k=decisions + WARM_UP)
        self.asked = [prompts[number][0] + tail + tokens(TAIL_BLOCKS) for number, tail in chosen]


def publish(context: Any, workers: int) -> tuple[list[Any], list[int]]:
    sockets, ports = [], []
    for _ in range(workers):
        socket = context.socket(zmq.PUB)
        socket.setsockopt(zmq.SNDHWM, 0)
        ports.append(socket.bind_to_random_port("tcp://127.0.0.1"))
        sockets.append(socket)
    return sockets, ports


async def store(service: Any, load: Load, sockets: list[Any]) -> None:
    seqs = [0] * len(sockets)
    for number, (worker, names, parent, tokens) in enumerate(load.events):
        body = msgpack.packb([time.time(), [["BlockStored", names, parent, tokens, BLOCK_SIZE, None]], 0])
        sockets[worker].send_multipart([b"", struct.pack(">Q", seqs[worker]), body])
        seqs[worker] += 1
        if number % 1000 == 0:
            await asyncio.sleep(0)
    gives_up = time.monotonic() + WAIT_S
    for worker, tokens in enumerate(load.last):
        while True:
            found = await service.overlap_scores({**MODEL, "token_ids": tokens})
            if any(row["worker_id"] == worker and row["device_blocks"] == TAIL_BLOCKS for row in found["workers"]):
                break
            if time.monotonic() > gives_up:
                raise TimeoutError(f"worker {worker}'s events were not all seen in {WAIT_S:g} s")
            await asyncio.sleep(0.05)


async def decided(request: dict[str, Any]) -> dict[str, Any]:
    from dynamo.llm import SelectionService

    workers = request["workers"]
    load = Load(workers, request["entries"], request["holders"], request["decisions"], random.Random(request["seed"]))
    service = SelectionService(indexer_threads=1)
    context = zmq.Context()
    sockets, ports = publish(context, workers)
    try:
        for worker, port in enumerate(ports):
            told = {
                **MODEL,
                "worker_id": worker,
                "endpoint": f"http://127.0.0.1:{20_000 + worker}",
                "block_size": BLOCK_SIZE,
                "kv_events_endpoints": {0: f"tcp://127.0.0.1:{port}"},
                "total_kv_blocks": 100_000,
                "max_num_batched_tokens": 8192,
            }
            answer = await service.upsert_worker(told)
            if answer.get("not_schedulable_reasons"):
                raise ValueError(f"worker {worker} is not accepted: {answer}")
        await asyncio.sleep(2)  # it says nothing of its subscriptions
        await store(service, load, sockets)
        first = await service.select({**MODEL, "token_ids": load.asked[0]})
        if first["overlap"]["gpu"] != (PROMPT_BLOCKS + TAIL_BLOCKS) * BLOCK_SIZE:
            raise ValueError(f"a prompt and a tail of it were found as {first}")
        took = []
        for number, tokens in enumerate(load.asked):
            name = f"s{number}"
            began = time.perf_counter_ns()
            await service.select_and_reserve({**MODEL, "token_ids": tokens, "selection_id": name})
            await service.free_reservation(name)
            took.append((time.perf_counter_ns() - began) / 1e3)
    finally:
        service.shutdown()
        context.destroy(0)
    took = sorted(took[WARM_UP:])
    return {
        "t": "decided",
        "per_s": 1e6 * len(took) / sum(took),
        "p50": took[len(took) // 2],
        "p99": took[int(len(took) * 0.99)],
    }


if __name__ == "__main__":
    os.environ["DYN_LOG"] = "error"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    answers = own_stdout()
    answer_all(answers, importlib.metadata.version("ai-dynamo-runtime"), lambda request: asyncio.run(decided(request)))
