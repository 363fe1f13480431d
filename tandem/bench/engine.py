"""The engine alone, in this process: tokens a second of prefill and decode, beside what the cores allow at best.

Owns which batches and contexts are measured, in which order and with how much memory. A decode step can't be faster than
reading every weight and its sequences' KV once; a prefill can't be faster than its multiplications at the speed of a plain
matrix product.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import psutil

from kernels.linear import WeightFormat
from kvpool.layout import DTYPE_BYTES
from tandem.bench import memory
from tandem.bench.breakdown import breakdown
from tandem.bench.cases import DECODE_TOKENS, Case, kv_tokens, plan
from tandem.bench.limits import MemoryReader, matmul_flops_per_s
from tandem.bench.report import Metric, Say, metric
from tandem.bench.roofline import kv_read_bytes, prefill_flops, weight_read_bytes
from tandem.bench.workload import EngineLoad
from tandem.clock import now_s
from tandem.config import WorkerConfig
from tandem.engine.local import LocalEngine
from tandem.engine.runner import layout_for
from tandem.models.config import ModelConfig
from tandem.models.loader import TORCH_DTYPES, Dtype, open_weights

BATCHES = (1, 4, 8, 16)
CONTEXTS = (128, 512, 2048, 6000)
_ARENA_SHARE = 0.5
"""Of the memory that is available, what the KV of a run may take."""


def fitted_engine(
    path: Path, dtype: Dtype, weights: WeightFormat, worker: WorkerConfig, num_tokens: int, max_batch: int, max_len: int
) -> LocalEngine:
    """The engine of `worker`, with an arena for `num_tokens` of KV, and a block to spare for each sequence at each end."""
    layout = layout_for(open_weights(path).config, dtype, worker.block_size)
    num_blocks = layout.num_blocks_for(num_tokens) + 4 * max_batch + 2
    arena_bytes = max(2**20, num_blocks * layout.slab_bytes)
    fitted = worker.model_copy(update={"arena_bytes": arena_bytes, "max_running": max(worker.max_running, max_batch)})
    return LocalEngine(path, dtype=dtype, weights=weights, worker=fitted, max_len=max_len)


class Roofline:
    """What the machine could do, measured anew before every repetition of what is held against it."""

    def __init__(self, model: ModelConfig, dtype: Dtype, weights: WeightFormat, threads: int) -> None:
        self._model = model
        self._dtype: Dtype = dtype
        self._weight_bytes = weight_read_bytes(model, weights)
        self._threads = threads
        self._reader = MemoryReader(threads)
        self.read_bytes_per_s: list[float] = []
        self.flops_per_s: list[float] = []

    @property
    def cores(self) -> str:
        """For the text of references."""
        return "one core" if self._threads == 1 else f"{self._threads} cores"

    def bound(self, case: Case) -> float:
        """Tokens a second that `case` can't exceed, from one new measurement."""
        if case.what == "prefill":
            self.flops_per_s.append(matmul_flops_per_s(TORCH_DTYPES[self._dtype], self._threads))
            flops = prefill_flops(self._model, case.batch, case.context)
            return case.batch * case.context * self.flops_per_s[-1] / flops
        self.read_bytes_per_s.append(self._reader.bytes_per_s())
        return case.batch * self.read_bytes_per_s[-1] / (self._weight_bytes + self.kv_bytes(case))

    def kv_bytes(self, case: Case) -> int:
        """What attention reads in the average step of a decode case."""
        context = case.context + DECODE_TOKENS // 2
        return kv_read_bytes(self._model, case.batch, context, DTYPE_BYTES[self._dtype])

    def text(self, case: Case) -> str:
        """What `bound` stands for."""
        if case.what == "prefill":
            return (
                f"all multiplications, attention's too, at the speed of a {self._dtype} matrix product on {self.cores}"
            )
        return f"every weight and the KV of all sequences read once from memory by {self.cores}"

    def metrics(self) -> Iterator[Metric]:
        """The measurements themselves, as far as there were any."""
        where = self.cores.replace(" ", "_")
        if self.read_bytes_per_s:
            yield metric(f"memory_read_{where}", [rate / 1e9 for rate in self.read_bytes_per_s], "GB/s")
        if self.flops_per_s:
            yield metric(f"matmul_{self._dtype}_{where}", [rate / 1e9 for rate in self.flops_per_s], "GFLOP/s")


def run(
    path: Path,
    dtype: Dtype,
    weights: WeightFormat,
    worker: WorkerConfig,
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    repetitions: int,
    max_seconds: float,
    say: Say,
) -> Iterator[Metric]:
    """Measures case by case and yields the metrics, the machine's limits last; `say` hears what is skipped and why. Nothing
    begins after `max_seconds`, nor if computing its prompts would last longer. The smallest and the largest batch come with
    a breakdown of their steps; before all of them comes the memory of two workers."""
    began_s = now_s()
    model = open_weights(path).config
    slab_bytes = layout_for(model, dtype, worker.block_size).slab_bytes
    limit_tokens = int(psutil.virtual_memory().available * _ARENA_SHARE) // slab_bytes * worker.block_size
    planned = plan(
        batches,
        contexts,
        max_position=model.max_position,
        step_tokens=worker.max_step_tokens,
        limit_tokens=limit_tokens,
    )
    for reason in planned.skipped:
        say(f"skipped: {reason}")
    if not planned.cases:
        return
    yield from memory.run(path, dtype, weights, worker, say)
    engine = fitted_engine(path, dtype, weights, worker, kv_tokens(planned.cases), planned.max_batch, planned.max_len)
    load = EngineLoad(engine, planned.max_batch, worker.block_size)
    roofline = Roofline(model, dtype, weights, worker.threads)
    load.rate(Case("prefill", 1, planned.cases[0].context))  # first calls build and warm what later ones reuse
    slowest = 0.0
    for case in planned.cases:
        elapsed_s = now_s() - began_s
        needed_s = load.missing_tokens(case) / slowest if slowest else 0.0
        if elapsed_s + needed_s > max_seconds:
            say(
                f"skipped: {case.name}: after {elapsed_s:.0f} s its prompts would take another {needed_s:.0f} s to compute, "
                f"the limit is {max_seconds:g} s"
            )
            continue
        if case.what == "prefill":
            rates = yield from _measure_prefill(case, load, roofline, repetitions)
            slowest = min(slowest or rates[0], *rates)
        else:
            yield from _measure_decode(
                case, load, roofline, repetitions, case.batch in (min(batches), planned.max_batch)
            )
    yield from roofline.metrics()


def _measure_prefill(
    case: Case, load: EngineLoad, roofline: Roofline, repetitions: int
) -> Generator[Metric, None, list[float]]:
    rates, bounds = [], []
    for _ in range(repetitions):
        bounds.append(roofline.bound(case))
        rates.append(load.rate(case))
    yield metric(case.name, rates, "tokens/s", reference=roofline.text(case), reference_values=bounds)
    return rates


def _measure_decode(
    case: Case, load: EngineLoad, roofline: Roofline, repetitions: int, with_breakdown: bool
) -> Iterator[Metric]:
    load.prepare(case)
    runs, bounds = [], []
    for _ in range(repetitions):
        bounds.append(roofline.bound(case))
        runs.append(load.decode(case))
    rates = [case.batch / run.seconds for run in runs]
    yield metric(case.name, rates, "tokens/s", reference=roofline.text(case), reference_values=bounds)
    if with_breakdown:
        yield from breakdown(case, runs, roofline.kv_bytes(case), roofline.read_bytes_per_s[-repetitions:])
