"""What `tandem capacity` says a load needs, simulated: it is enough, and not much more than that."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from tandem.capacity.arithmetic import Worker, Workload, plan
from tandem.capacity.devices import device_named
from tandem.capacity.shapes import shape_of
from tandem.sim.policies.registry import policy_named
from tandem.sim.presets import PRESETS
from tandem.sim.replay import Job, Outcome, Replay

PROMPT, ANSWER, TTFT_S, TPOT_S = 4096, 300, 2.0, 0.05
PER_S = 20.0
NUM = 6_000


def simulated(num_prefill: int, num_decode: int, per_s: float) -> Outcome:
    """Prompts that share nothing come at random, and go to workers at random: what the formulas assume."""
    draw = random.Random(1)
    now_s, jobs = 0.0, []
    for number in range(NUM):
        now_s += draw.expovariate(per_s)
        keys = tuple(number.to_bytes(12, "big") + block.to_bytes(4, "big") for block in range(PROMPT // 512))
        jobs.append(Job(now_s, PROMPT, ANSWER, keys, PROMPT))
    workers = num_prefill + num_decode
    preset = dataclasses.replace(PRESETS["h100-llama-70b"], prefill_part=num_prefill / workers)
    return Replay(preset, workers, policy_named("random").make(), jobs, hold=False, ordered=False).run()


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    worker = Worker(shape_of("llama-3.1-70b"), device_named("h100"), 4)
    load = Workload(PER_S, PROMPT, ANSWER, ttft_s=TTFT_S, tpot_s=TPOT_S)
    return {
        figure.name: figure.value
        for figure in plan(worker, load, host_bytes=1e12, disk_bytes=1e13, price_per_gpu_hour=None)
    }


def test_so_many_workers_keep_the_promises_on_average(figures: dict[str, float]) -> None:
    found = simulated(int(figures["prefill_workers"]), int(figures["decode_workers"]), PER_S)
    assert float(found.ttft_s.mean()) <= TTFT_S
    assert float(np.median(found.tpot_s)) <= TPOT_S
    assert float(found.prefill_busy.mean()) == pytest.approx(figures["prefill_busy"], rel=0.1)


def test_one_worker_less_of_either_kind_does_not(figures: dict[str, float]) -> None:
    num_prefill, num_decode = int(figures["prefill_workers"]), int(figures["decode_workers"])
    assert float(simulated(num_prefill - 1, num_decode, PER_S).ttft_s.mean()) > TTFT_S
    assert float(np.median(simulated(num_prefill, num_decode - 1, PER_S).tpot_s)) > TPOT_S
