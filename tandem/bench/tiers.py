"""What KV that exists somewhere is worth to a whole cluster: time to first token by tier, what a hand-over adds, and what keeping
copies costs each step.

Owns the small clusters that force a prompt's KV into one tier, and the prompts. It speaks the public API alone and believes
nothing: a prompt that was not found where it should be is an error.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from statistics import median

from protos import tandem_pb2 as pb
from tandem.bench.ask import ask, random_tokens
from tandem.bench.names import named
from tandem.bench.report import Metric, Say, metric
from tandem.client import Client
from tandem.clock import now_s
from tandem.config import Config, DiskConfig
from tandem.errors import DeadlineExceeded, TandemError

PROMPT_TOKENS = 2000
NUM_PROMPTS = 6
NUM_ROUNDS = 3
NUM_TURNS = 6
_HANDOVERS = 8
_STREAM_PROMPT_TOKENS = 128
_STREAM_TOKENS = 256
_STREAMS_PER_TURN = 3
_KEPT_WITHIN_S = 60.0
_LOOK_S = 0.05
_ASK_S = 120.0

OwnCluster = Callable[[Config], AbstractContextManager[str]]
"""A cluster of a configuration, for as long as the context lasts; it gives the target."""

PARTS = ("ttft", "handover", "checkpoints")


def parts_named(names: Sequence[str]) -> list[str]:
    """Each once. Raises ConfigError for a name that is none, or for none at all."""
    return named(names, PARTS, "measurement")


def slab_bytes_of(model: Path, config: Config) -> int:
    """The size of a block of that model."""
    from tandem.engine.runner import layout_for
    from tandem.models.loader import open_weights

    return layout_for(open_weights(model).config, config.model.dtype, config.decode.block_size).slab_bytes


def run(
    parts: Sequence[str], config: Config, own_cluster: OwnCluster, slab_bytes: int, disk_dir: str, say: Say
) -> Iterator[Metric]:
    """The chosen parts, one after the other."""
    for part in parts:
        match part:
            case "ttft":
                yield from ttft_by_tier(config, own_cluster, slab_bytes, disk_dir, say)
            case "handover":
                yield from exposed_transfer(config, own_cluster, say)
            case "checkpoints":
                yield from checkpoint_cost(config, own_cluster, say)


def ttft_by_tier(config: Config, own_cluster: OwnCluster, slab_bytes: int, disk_dir: str, say: Say) -> Iterator[Metric]:
    """Time to first token of a prompt that nobody has, that HOST has, and that only DISK has. The worker has room for one prompt
    and a quarter, so that the next one pushes it out; so has HOST where DISK is measured."""
    num_blocks = -(-PROMPT_TOKENS // config.decode.block_size)
    one = (num_blocks + num_blocks // 4) * slab_bytes
    recomputed: list[float] = []
    found: dict[str, list[float]] = {}
    for tier in ("HOST", "DISK"):
        disk = DiskConfig(dirs=[disk_dir], bytes=4 * NUM_PROMPTS * one) if tier == "DISK" else DiskConfig()
        pool = config.pool.model_copy(
            update={"replicas": 1, "host_bytes": one if tier == "DISK" else 2 * NUM_PROMPTS * one, "disk": disk}
        )
        small = config.model_copy(
            update={
                "prefill": config.prefill.model_copy(update={"replicas": 0}),
                "decode": config.decode.model_copy(update={"replicas": 1, "arena_bytes": one}),
                "pool": pool,
            }
        )
        with own_cluster(small) as target, Client(target) as client:
            prompts = _prompts(NUM_PROMPTS, seed=len(tier))
            for i, prompt in enumerate(prompts):
                say(f"{tier}: computing prompt {i + 1} of {len(prompts)}")
                done = ask(client, prompt, 2, _ASK_S).completed
                recomputed.append(done.ttft_s)
                _wait_until_kept(client, tier, (i + 1) * num_blocks - i - 1)
            for _ in range(NUM_ROUNDS):
                for prompt in prompts[:-2]:
                    done = ask(client, prompt, 2, _ASK_S).completed
                    found.setdefault(tier, []).append(done.ttft_s)
                    _check_tier(done, tier)
    reference = "the same prompts, computed, in the same clusters"
    for tier, goal in (("HOST", 20), ("DISK", 8)):
        faster = median(recomputed) / median(found[tier])
        yield metric(
            f"ttft_{PROMPT_TOKENS}_tokens_in_{tier.lower()}",
            found[tier],
            "s",
            reference=reference,
            reference_values=recomputed,
            goal=f"{goal} x faster",
            ok=faster >= goal,
        )


def exposed_transfer(config: Config, own_cluster: OwnCluster, say: Say) -> Iterator[Metric]:
    """How long after prefill's first token the prompt's KV is complete at the decode worker."""
    workers = {role: getattr(config, role).model_copy(update={"replicas": 1}) for role in ("prefill", "decode")}
    exposed: list[float] = []
    with own_cluster(config.model_copy(update=workers)) as target, Client(target) as client:
        for i, prompt in enumerate(_prompts(_HANDOVERS + 2, seed=1)):
            say(f"hand-over {i + 1} of {_HANDOVERS + 2}")
            done = ask(client, prompt, 8, _ASK_S).completed
            if not done.HasField("exposed_transfer_s"):
                raise TandemError(f"prompt {i + 1} was not handed over: {done}")
            if i >= 2:  # the first ones learn the speeds that placement goes by
                exposed.append(done.exposed_transfer_s)
    yield metric(
        f"exposed_transfer_{PROMPT_TOKENS}_tokens",
        exposed,
        "s",
        goal="at most 0.005",
        ok=median(exposed) <= 0.005,
    )


def checkpoint_cost(config: Config, own_cluster: OwnCluster, say: Say, num_turns: int = NUM_TURNS) -> Iterator[Metric]:
    """Seconds a token of one stream, with a pool node that keeps each block and without: one worker throughout (two differ by
    more than the cost, by where their memory lies), and the node is stopped and goes on in turns."""
    parts = {
        "prefill": config.prefill.model_copy(update={"replicas": 0}),
        "decode": config.decode.model_copy(update={"replicas": 1}),
        "pool": config.pool.model_copy(update={"replicas": 1}),
    }
    prompts = iter(_prompts(1 + 2 * num_turns * _STREAMS_PER_TURN, seed=2))
    steps: dict[bool, list[float]] = {False: [], True: []}
    with own_cluster(config.model_copy(update=parts)) as target, Client(target) as client:
        _step_s(client, next(prompts))  # processes that have just begun have other things to do
        node = _node(client)
        assert node is not None, "a cluster without its pool node"
        try:
            for number in range(num_turns):
                for kept in (False, True):
                    say(f"turn {number + 1} of {num_turns}, {'with' if kept else 'without'} the pool node")
                    os.kill(node.pid, signal.SIGCONT if kept else signal.SIGSTOP)
                    _wait_for_node(client, kept)
                    before = _num_kept(client)
                    steps[kept] += [_step_s(client, next(prompts)) for _ in range(_STREAMS_PER_TURN)]
                    least = _STREAMS_PER_TURN * _STREAM_TOKENS // config.decode.block_size
                    _wait_until_kept(client, "HOST", before + (least if kept else 0))
        finally:
            os.kill(node.pid, signal.SIGCONT)
    yield metric(
        "decode_step_with_checkpoints",
        steps[True],
        "s",
        reference="the same worker while its pool node is stopped",
        reference_values=steps[False],
        goal="at most 1.02 x",
        ok=median(steps[True]) <= 1.02 * median(steps[False]),
    )


def _step_s(client: Client, prompt: Sequence[int]) -> float:
    times_s = ask(client, prompt[:_STREAM_PROMPT_TOKENS], _STREAM_TOKENS, _ASK_S).times_s
    return (times_s[-1] - times_s[0]) / (len(times_s) - 1)


def _node(client: Client) -> pb.ProcessStatus | None:
    return next((process for process in client.cluster().processes if process.role == "pool"), None)


def _wait_for_node(client: Client, there: bool) -> None:
    """Until the router counts the pool node among the living, or no longer."""
    deadline_s = now_s() + _KEPT_WITHIN_S
    while (_node(client) is not None) != there:
        if now_s() > deadline_s:
            raise DeadlineExceeded(
                f"a pool node was {'not back' if there else 'still there'} after {_KEPT_WITHIN_S:.0f} s"
            )
        time.sleep(_LOOK_S)


def _num_kept(client: Client) -> int:
    node = _node(client)
    return node.fetched_blocks if node is not None else 0


def _prompts(count: int, seed: int) -> list[list[int]]:
    random = Random(seed)
    return [random_tokens(random, PROMPT_TOKENS) for _ in range(count)]


def _check_tier(done: pb.Completed, tier: str) -> None:
    fetched = {(item.process, item.tier): item.num_blocks for run in done.runs for item in run.fetched}
    in_tier = sum(num for (_, found), num in fetched.items() if found == tier)
    total = sum(fetched.values())
    if done.num_cached_tokens < PROMPT_TOKENS * 0.95 or in_tier < 0.9 * total:
        raise TandemError(
            f"a prompt was to be found in {tier}; found: {fetched}, {done.num_cached_tokens} tokens in all"
        )


def _wait_until_kept(client: Client, tier: str, num_blocks: int) -> None:
    deadline_s = now_s() + _KEPT_WITHIN_S
    kept = 0
    while now_s() < deadline_s:
        pool = _node(client)
        if pool is not None:
            kept = pool.counters["stored_blocks"] if tier == "DISK" else pool.fetched_blocks
        if kept >= num_blocks:
            return
        time.sleep(_LOOK_S)
    raise DeadlineExceeded(f"the pool node kept {kept} of {num_blocks} blocks in {tier} within {_KEPT_WITHIN_S:.0f} s")
