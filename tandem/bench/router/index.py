"""The prefix index alone: how fast it finds the longest hits and takes events in, and its memory; beside NVIDIA Dynamo's.

Owns the measuring. Ours runs in a child process, so that its memory is the index's alone, on the core that the peer has too.
Events come by ZeroMQ from another process, as workers send them: received, decoded, applied.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Annotated, Any

import msgspec
import psutil
import zmq
from msgspec import Meta, Struct

from kvpool.keys import Key
from protos import kv_events
from protos.kv_events import BlockStored, EventBatch
from router.prefix_index import PrefixIndex
from tandem.bench.peers import Peer, Ready, installed
from tandem.bench.report import percentile
from tandem.bench.router.load import IndexLoad
from tandem.errors import TandemError

BLOCK_SIZE = 16
_EPOCH = b"8 bytes."
_START_S = 120.0
_ANSWER_S = 600.0
_EVENTS_S = 60.0
_MAX_EVENTS = 20_000


class Measure(Struct, tag="measure", tag_field="t"):
    """Parent → child: fill a new index and ask it."""

    workers: int
    entries: int
    holders: int
    queries: int
    seed: int


class Found(Struct, tag="found", tag_field="t"):
    """Child → parent. Latencies in microseconds."""

    hits_per_s: Annotated[float, Meta(gt=0)]
    hit_p50: float
    hit_p99: float
    misses_per_s: Annotated[float, Meta(gt=0)]
    events_per_s: Annotated[float, Meta(gt=0)]
    bytes_per_entry: float
    entries: int


def ours() -> Peer:
    """Our index in a process of its own."""
    return Peer(
        "the index", [sys.executable, "-m", __name__], start_s=_START_S, answer_s=_ANSWER_S, advice="", begins="started"
    )


def dynamo() -> Peer:
    """NVIDIA Dynamo's radix tree through its Python binding. Raises TandemError if it isn't installed."""
    return Peer(
        "dynamo",
        installed("dynamo", "dynamo", "dynamo_peer.py"),
        start_s=_START_S,
        answer_s=_ANSWER_S,
        begins="started",
    )


def measure(peer: Peer, workers: int, entries: int, holders: int, queries: int, seed: int) -> Found:
    """Raises TandemError."""
    return peer.ask(Measure(workers, entries, holders, queries, seed), Found, f"measured {entries} entries")


def name_of(worker: int) -> str:
    return f"decode-{worker}"


def latencies(index: PrefixIndex, queries: Sequence[Sequence[Key]]) -> tuple[float, list[float]]:
    """Queries a second, and the microseconds of each."""
    took = []
    began = time.perf_counter()
    for keys in queries:
        before = time.perf_counter_ns()
        index.longest(keys)
        took.append((time.perf_counter_ns() - before) / 1e3)
    return len(queries) / (time.perf_counter() - began), took


def _batch(parent: Key | None, keys: Sequence[Key]) -> EventBatch:
    return EventBatch(0.0, [BlockStored(list(keys), parent, [], BLOCK_SIZE, medium="DEVICE")], epoch=_EPOCH)


def _measured(request: Measure) -> Found:
    load = IndexLoad(request.workers, request.entries, request.holders, request.seed)
    process = psutil.Process()
    events = [(event.worker, _batch(event.parent, event.keys)) for event in load.events()]
    hits, misses = load.hits(request.queries), load.misses(request.queries)
    gc.collect()
    before = process.memory_info().rss
    index = PrefixIndex(2 * request.entries + 1)
    for worker in range(request.workers):
        index.join(name_of(worker), worker, _EPOCH, "DEVICE", 0.0)
        index.on_replay_end(name_of(worker), _EPOCH)
    seqs = [0] * request.workers
    for worker, batch in events:
        index.on_batch(name_of(worker), _EPOCH, seqs[worker], batch, 0.0)
        seqs[worker] += 1
    bytes_per_entry = (process.memory_info().rss - before) / index.num_entries
    found = index.longest(hits[0])
    if found.longest != load.longest_hit or len(found.holders) != min(request.holders, request.workers):
        raise TandemError(f"a prompt and a tail of it were found at {found.holders}")
    latencies(index, hits[:1000])
    hits_per_s, took = latencies(index, hits)
    misses_per_s, _ = latencies(index, misses)
    return Found(
        hits_per_s=hits_per_s,
        hit_p50=percentile(took, 50),
        hit_p99=percentile(took, 99),
        misses_per_s=misses_per_s,
        events_per_s=_events_per_s(request),
        bytes_per_entry=bytes_per_entry,
        entries=index.num_entries,
    )


def _events_per_s(request: Measure) -> float:
    """From the first event that is here until the last is in the index; another process publishes as fast as it can."""
    spawn = get_context("spawn")
    theirs, mine = spawn.Pipe()
    publisher = spawn.Process(target=_publish, args=(theirs, request), daemon=True)
    publisher.start()
    theirs.close()  # so that its end is noticed

    def said() -> Any:
        if not mine.poll(_EVENTS_S):
            raise TandemError(f"the publisher said nothing for {_EVENTS_S:g} s")
        return mine.recv()

    context = zmq.Context[zmq.Socket[bytes]]()
    socket = context.socket(zmq.SUB)
    try:
        socket.rcvhwm = 0
        socket.subscribe(b"")
        socket.rcvtimeo = int(_EVENTS_S * 1000)
        socket.connect(said())
        index = PrefixIndex(2 * request.entries + 1)
        index.join(name_of(0), 0, _EPOCH, "DEVICE", 0.0)
        index.on_replay_end(name_of(0), _EPOCH)
        num_events: int = said()
        gives_up = time.monotonic() + _EVENTS_S
        while not socket.poll(10):
            mine.send("say something")
            if time.monotonic() > gives_up:
                raise TandemError(f"no event came for {_EVENTS_S:g} s")
        while socket.poll(200):
            socket.recv_multipart()
        mine.send("go")
        socket.poll(int(_EVENTS_S * 1000))
        began = time.perf_counter()
        for _ in range(num_events):
            _, seq, payload = socket.recv_multipart()
            index.on_batch(name_of(0), _EPOCH, kv_events.decode_seq(seq), kv_events.decode_batch(payload), 0.0)
        return num_events / (time.perf_counter() - began)
    finally:
        socket.close(linger=0)
        context.term()
        publisher.terminate()
        publisher.join()


def _publish(parent: Connection, request: Measure) -> None:
    """A worker's side, on any core: says its endpoint and how many events there will be; noise until told to go."""
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    context = zmq.Context[zmq.Socket[bytes]]()
    socket = context.socket(zmq.PUB)
    socket.sndhwm = 0
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    parent.send(f"tcp://127.0.0.1:{port}")
    load = IndexLoad(1, min(request.entries, 32 * _MAX_EVENTS), 1, request.seed)
    payloads = [kv_events.encode_batch(_batch(event.parent, event.keys)) for event in load.events()]
    parent.send(len(payloads))
    while parent.recv() != "go":
        socket.send_multipart([kv_events.TOPIC, kv_events.encode_seq(0), b""])
    for seq, payload in enumerate(payloads):
        socket.send_multipart([kv_events.TOPIC, kv_events.encode_seq(seq), payload])
    parent.recv()


def _child() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.stdout.buffer.write(msgspec.json.encode(Ready("tandem")) + b"\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(msgspec.json.encode(_measured(msgspec.json.decode(line, type=Measure))) + b"\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _child()
