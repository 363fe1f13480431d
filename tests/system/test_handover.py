"""KV crosses processes by key: the prefill worker computes it, the decode worker and the pool node fetch it."""

from __future__ import annotations

import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.keys import KEY_BYTES, prompt_keys, root_key
from kvpool.service import KVService
from kvpool.sink import FetchEnded, FetchPlan, WantedBlock
from kvpool.transport.build import make_transports
from protos.control import Endpoints, Sampling, Source
from tandem.clock import now_s
from tandem.config import TransferConfig, WorkerConfig
from tandem.drills.processes import REPOSITORY
from tandem.engine.local import LocalEngine
from tandem.machine import machine_id
from tandem.model_files import resolve_model
from tests import golden
from tests.system.harness import RunningCluster, wait_until

pytestmark = pytest.mark.timeout(300)
_SALT = 7919


def prompt_of(length: int, variant: int) -> list[int]:
    """Token ids that no other test has in its prompts."""
    return [1000 + (variant * _SALT + 31 * i * i + i) % 40_000 for i in range(length)]


@pytest.fixture(scope="module")
def alone() -> LocalEngine:
    return LocalEngine(resolve_model("smollm2-135m"), worker=WorkerConfig(arena_bytes=2**30))


def alone_tokens(alone: LocalEngine, prompt: Sequence[int], max_tokens: int) -> list[int]:
    return alone.generate([prompt], [Sampling(max_tokens=max_tokens)])[0][0].token_ids


def test_a_long_prompt_is_computed_by_prefill_and_fetched_whole_by_decode(
    cluster: RunningCluster, alone: LocalEngine
) -> None:
    prompt = prompt_of(700, 1)
    answer = cluster.generate(prompt, max_tokens=24)
    prefill, decode = answer.run("prefill"), answer.run("decode")
    assert (prefill.process, prefill.computed_tokens) == ("prefill-0", 700)
    assert (decode.process, decode.fetched_tokens, decode.computed_tokens) == ("decode-0", 700, 0)
    assert [(f.process, f.transport, f.num_blocks) for f in decode.fetched] == [("prefill-0", "shm", 44)]
    assert answer.tokens[0] == alone_tokens(alone, prompt, 24)


def test_a_second_request_fetches_the_shared_prefix_and_starts_sooner(cluster: RunningCluster) -> None:
    prefix = prompt_of(2000, 2)
    first = cluster.generate([*prefix, 5, 6, 7], max_tokens=4)
    second = cluster.generate([*prefix, 8, 9, 10], max_tokens=4)
    assert first.completed is not None
    assert second.completed is not None
    assert first.completed.num_cached_tokens == 0
    assert second.completed.num_cached_tokens == 2000
    assert second.completed.ttft_s < 0.25 * first.completed.ttft_s
    assert sum(run.computed_tokens for run in second.completed.runs) < 64
    url = f"http://127.0.0.1:{cluster.config.router.admin_port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    hits = [value for line, value in lines.items() if line.startswith("tandem_prefix_hit_tokens_total{")]
    assert sum(map(float, hits)) >= 2000
    assert float(lines['tandem_ttft_seconds_count{class="interactive"}']) >= 2


def test_the_pool_node_keeps_what_workers_announce(cluster: RunningCluster) -> None:
    before = cluster.status("pool-0").cached_blocks
    cluster.generate(prompt_of(320, 3), max_tokens=2)
    wait_until(lambda: cluster.status("pool-0").cached_blocks >= before + 20, 10, "the pool node fetched the prompt")


def test_every_process_holds_the_same_bytes_under_the_same_key(cluster: RunningCluster) -> None:
    prompt = prompt_of(330, 4)
    before = cluster.status("pool-0").cached_blocks
    answer = cluster.generate(prompt, max_tokens=2)
    assert answer.run("decode").fetched_tokens == 330
    wait_until(lambda: cluster.status("pool-0").cached_blocks >= before + 20, 10, "the pool node fetched the prompt")
    seen = cluster.client.cluster()
    root = root_key(
        model_fingerprint=bytes.fromhex(seen.model_fingerprint),
        kv_format=seen.kv_format,
        numerics_class=bytes.fromhex(seen.numerics_class),
    )
    keys = prompt_keys(root, prompt, seen.block_size).full
    assert len(keys) == 20
    slabs = {}
    for process in seen.processes:
        endpoints = Endpoints(
            fetch=process.fetch_endpoint, events="", replay="", shm=process.shm_endpoint, machine_id=machine_id()
        )
        source = Source(process.name, bytes.fromhex(process.epoch), "DEVICE", endpoints)
        slabs[process.name] = fetch(source, root, keys, process.slab_bytes, seen.block_size)
    assert set(slabs) == {"prefill-0", "decode-0", "pool-0"}
    assert len(slabs["prefill-0"]) == 20 * seen.processes[0].slab_bytes
    assert any(slabs["prefill-0"])
    assert slabs["decode-0"] == slabs["prefill-0"] == slabs["pool-0"]


def fetch(source: Source, root: bytes, keys: Sequence[bytes], slab_bytes: int, block_size: int) -> bytes:
    """The bytes of `keys` as a third party gets them from `source`, by the protocol that everybody uses."""
    assert all(len(key) == KEY_BYTES for key in keys)
    arena = Arena(len(keys), slab_bytes)
    pool = BlockPool(len(keys), block_size, "DEVICE")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ended: list[FetchEnded] = []
    epoch = secrets.token_bytes(8)
    service = KVService(
        context=context,
        pool=pool,
        arena=arena,
        process="test-sink",
        epoch=epoch,
        bind_host="127.0.0.1",
        transports=make_transports(
            TransferConfig(transports=["shm"]), arena, epoch, machine_id=machine_id(), native=native()
        ),
        machine_id=machine_id(),
        lease_s=5.0,
        grace_s=1.0,
        on_blocks=lambda fetch_id, batch: None,
        on_ended=ended.append,
    )
    try:
        poller = zmq.Poller()
        service.register(poller)
        ids = pool.allocate(len(keys))
        assert ids is not None
        parents = [root, *keys[:-1]]
        wanted = tuple(
            WantedBlock(key, parent, block_size, block) for key, parent, block in zip(keys, parents, ids, strict=True)
        )
        service.start_fetch(FetchPlan(b"f" * 16, "test", wanted, (source,), "", now_s() + 10.0), now_s())
        while not ended:
            service.register(poller)
            service.handle(dict(poller.poll(20)), now_s())
            service.tick(now_s())
        assert not ended[0].missing, f"{source.process} misses {len(ended[0].missing)} of {len(keys)} blocks"
        return b"".join(bytes(arena.slab(block)) for block in ids)
    finally:
        service.close()
        context.term()
        arena.close()


@pytest.mark.timeout(400)
def test_bf16_answers_of_the_cluster_equal_the_engine_alone_token_for_token(
    cluster: RunningCluster, alone: LocalEngine
) -> None:
    prompts = [case["ids"] for case in golden.load() if len(case["ids"]) <= 1000]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda prompt: cluster.generate(prompt, max_tokens=32, ignore_eos=True), prompts))
    outputs = alone.generate(prompts, [Sampling(max_tokens=32)] * len(prompts))
    assert [answer.tokens[0] for answer in answers] == [output.token_ids for (output,) in outputs]


def test_sampled_streams_with_logprobs_and_parallel_samples_equal_the_engine_alone(
    cluster: RunningCluster, alone: LocalEngine
) -> None:
    prompt = prompt_of(400, 5)
    answer = cluster.generate(
        prompt, max_tokens=12, temperature=0.9, top_p=0.9, seed=11, n=3, repetition_penalty=1.1, num_logprobs=2
    )
    sampling = Sampling(max_tokens=12, temperature=0.9, top_p=0.9, seed=11, repetition_penalty=1.1, num_logprobs=2)
    outputs = alone.generate([prompt], [sampling], n=3)[0]
    assert {i: output.token_ids for i, output in enumerate(outputs)} == answer.tokens
    assert len({tuple(tokens) for tokens in answer.tokens.values()}) == 3
    assert answer.accepted is not None
    assert answer.accepted.seed == 11
    assert len(answer.logprobs) == 36
    assert answer.run("decode").fetched_tokens == 400


def test_without_a_transport_everything_is_recomputed_and_the_tokens_are_the_same(
    tmp_path: Path, alone: LocalEngine
) -> None:
    running = RunningCluster(tmp_path, {"transfer": {"transports": []}})
    try:
        running.start()
        prompt = prompt_of(700, 6)
        answer = running.generate(prompt, max_tokens=24)
        assert answer.tokens[0] == alone_tokens(alone, prompt, 24)
        assert answer.run("decode").fetched_tokens == 0
        assert answer.run("decode").computed_tokens >= 700
        assert running.status("decode-0").fetched_blocks == 0
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, running.logs()


def test_a_second_process_of_a_name_is_refused_with_a_sentence(cluster: RunningCluster) -> None:
    command = [sys.executable, "-m", "decode_worker", "--config", str(cluster.config_file), "--name", "decode-0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("decode-0: the router refused decode-0"), done.stderr
    assert cluster.status("decode-0").pid == cluster.processes["decode-0"].pid


def test_a_pool_node_smaller_than_a_long_prompt_keeps_what_fits(tmp_path: Path) -> None:
    running = RunningCluster(tmp_path, {"pool": {"host_bytes": 20 * 368_640}})
    try:
        running.start()
        running.generate(prompt_of(700, 8), max_tokens=2)
        wait_until(lambda: running.status("pool-0").cached_blocks >= 10, 10, "the small pool node holds something")
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, running.logs()
