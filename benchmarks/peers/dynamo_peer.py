"""The radix tree of NVIDIA Dynamo's KV router as a peer, in this process, through its Python binding.

Runs in `.peers/dynamo` (`make peers`). The load is that of `tandem.bench.router.load`: prompts of 64 blocks that several
workers hold, tails of 32 on top; blocks have 63-bit numbers here. Events are the JSON bytes that the binding takes; making
them isn't timed. The binding hands every call to a thread of its own and waits: both share one core, since waking another one
costs more than a query.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from child import answer_all, own_stdout

PROMPTS, PROMPT_BLOCKS, TAIL_BLOCKS = 200, 64, 32
Block = tuple[int, int]
"""Hash of the block after all before it, hash of its tokens."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stored(number: int, parent: int | None, blocks: list[Block]) -> bytes:
    items = [{"block_hash": block, "tokens_hash": tokens} for block, tokens in blocks]
    return json.dumps({"event_id": number, "data": {"stored": {"parent_hash": parent, "blocks": items}}}).encode()


def timed(tree: Any, queries: list[list[int]]) -> tuple[float, list[float]]:
    """Queries a second, the microseconds of each. The scores are read: that is the answer that a router needs."""
    took = []
    began = time.perf_counter()
    for keys in queries:
        before = time.perf_counter_ns()
        tree.find_matches(keys).scores  # noqa: B018  built when it is read
        took.append((time.perf_counter_ns() - before) / 1e3)
    return len(queries) / (time.perf_counter() - began), sorted(took)


def measured(request: dict[str, Any]) -> dict[str, Any]:
    from dynamo.llm import RadixTree

    workers, count, draw = request["workers"], request["queries"], random.Random(request["seed"])

    def new_blocks(num: int) -> list[Block]:
        return [(draw.getrandbits(63), draw.getrandbits(63)) for _ in range(num)]

    prompts = [new_blocks(PROMPT_BLOCKS) for _ in range(PROMPTS)]
    holders = [draw.sample(range(workers), min(request["holders"], workers)) for _ in prompts]
    events: list[tuple[int, bytes]] = []
    for prompt, at in zip(prompts, holders, strict=True):
        for worker in at:
            for first in range(0, PROMPT_BLOCKS, TAIL_BLOCKS):
                parent = prompt[first - 1][0] if first else None
                events.append((worker, stored(len(events), parent, prompt[first : first + TAIL_BLOCKS])))
    tails: list[tuple[int, list[Block]]] = []
    while len(events) * TAIL_BLOCKS < request["entries"]:
        number = draw.randrange(PROMPTS)
        tail = new_blocks(TAIL_BLOCKS)
        tails.append((number, tail))
        events.append((draw.choice(holders[number]), stored(len(events), prompts[number][-1][0], tail)))

    def unknown(num: int) -> list[int]:
        return [draw.getrandbits(63) for _ in range(num)]

    hits = [
        [tokens for _, tokens in prompts[number] + tail] + unknown(TAIL_BLOCKS)
        for number, tail in draw.choices(tails, k=count)
    ]
    misses = [unknown(PROMPT_BLOCKS + 2 * TAIL_BLOCKS) for _ in range(count)]
    tree = RadixTree()
    before, began = resident_bytes(), time.perf_counter()
    for worker, event in events:
        tree.apply_event(worker, event)
    tree.find_matches(misses[0])  # its queue is empty once this is answered
    seconds = time.perf_counter() - began
    bytes_per_entry = (resident_bytes() - before) / (len(events) * TAIL_BLOCKS)
    scores = tree.find_matches(hits[0]).scores
    if max(scores.values()) != PROMPT_BLOCKS + TAIL_BLOCKS or len(scores) != min(request["holders"], workers):
        raise ValueError(f"a prompt and a tail of it were found as {scores}")
    timed(tree, hits[:1000])
    hits_per_s, took = timed(tree, hits)
    misses_per_s, _ = timed(tree, misses)
    return {
        "t": "found",
        "hits_per_s": hits_per_s,
        "hit_p50": took[len(took) // 2],
        "hit_p99": took[int(len(took) * 0.99)],
        "misses_per_s": misses_per_s,
        "events_per_s": len(events) / seconds,
        "bytes_per_entry": bytes_per_entry,
        "entries": len(events) * TAIL_BLOCKS,
    }


if __name__ == "__main__":
    os.environ["DYN_LOG"] = "error"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    answers = own_stdout()
    answer_all(answers, importlib.metadata.version("ai-dynamo-runtime"), measured)
