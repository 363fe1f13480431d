"""Where a request goes, by predicted seconds (design §4.2).

Owns the prediction and nothing else: candidates in, a placement with its predicted parts out. No clock, no socket; ties are
broken by the random generator that the caller passes in.

    remote prefill:  queue(prefill) + fetch(hits) + compute(suffix) + hand-over, then decode's slowdown
    prefill here:    queue(decode)  + fetch(hits) + compute(suffix) + stall, then decode's slowdown

`stall` is the price of computing a prompt where others decode: their steps wait for it, and so do those of streams that arrive
meanwhile; on an idle worker the first tokens are free of it. It is what sends a long uncached prompt to a prefill worker and
keeps a short suffix where its stream will run. A worker that has not measured its speed yet is taken to be like the others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from protos.control import StepPrices
from router.prefix_index import Place

MAX_SOURCES = 8


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What is taken for true before a worker has measured it, and the prices of the model."""

    prices: StepPrices = field(default_factory=lambda: StepPrices(token_s=0.0005))
    fetch_bytes_per_s: float = 3e9
    decode_step_s: float = 0.02
    fetch_setup_s: float = 0.001
    handover_s: float = 0.005
    """Two more hops, and the last blocks' transfer that no compute overlaps."""
    short_suffix_tokens: int = 64
    """So many tokens ride along in one step, as a stream's own first step would."""
    idle_stall: float = 1.0
    """Stall per second of prefill past the short suffix, whatever runs."""
    stall_per_sequence: float = 0.125
    """Stall per second of prefill for each sequence that is there."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as the policy sees it. Speeds and prices are 0 before the first measurement."""

    process: str
    waiting_tokens: int
    num_sequences: int
    prices: StepPrices = field(default_factory=StepPrices)
    fetch_bytes_per_s: float = 0.0
    decode_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted seconds of one choice, in parts. `hit_tokens` is the prefix that need not be computed. `fetch_s` is 0 where
    others hold more of the prefix but recomputing it is faster than fetching."""

    process: str
    prefill_here: bool
    hit_tokens: int
    queue_s: float
    fetch_s: float
    compute_s: float
    handover_s: float
    stall_s: float
    slowdown_s: float

    @property
    def ttft_s(self) -> float:
        """What the client waits for its first token."""
        return self.queue_s + self.fetch_s + self.compute_s

    @property
    def total_s(self) -> float:
        """What the choice costs, others' waiting included: the order of preference."""
        return self.ttft_s + self.handover_s + self.stall_s + self.slowdown_s


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision. `prefill` is None when the decode worker prefills by itself. Sources are in the order to ask; the prefill
    worker, last for decode, is not among `decode_sources`."""

    prefill: str | None
    decode: str
    prefill_sources: tuple[Place, ...]
    decode_sources: tuple[Place, ...]
    chosen: Prediction
    considered: tuple[Prediction, ...]
    hits: Mapping[Place, int] = field(default_factory=dict)
    """Leading blocks that each place holds, as far as the index knows."""

    @property
    def predicted_ttft_s(self) -> float:
        return self.chosen.ttft_s

    @property
    def hit_tokens(self) -> int:
        return self.chosen.hit_tokens


class Policy:
    """Stateless but for its assumptions."""

    def __init__(self, assumptions: Assumptions | None = None) -> None:
        self._assume = assumptions or Assumptions()

    def place(
        self,
        *,
        num_tokens: int,
        block_size: int,
        slab_bytes: int,
        hits: Mapping[Place, int],
        prefills: Sequence[Candidate],
        decodes: Sequence[Candidate],
        rng: random.Random,
        prefill_here_only: bool = False,
    ) -> Placement | None:
        """Chooses workers and sources for `num_tokens` tokens whose KV is wanted. `hits` is in blocks per place.
        None when there is no decode worker."""
        if not decodes:
            return None
        typical = self._typical([worker.prices for worker in (*prefills, *decodes) if worker.prices.token_s])
        shape = _Shape(num_tokens, block_size, slab_bytes, hits, typical)
        here = [self._prefill_on(worker, shape, here=True) for worker in decodes]
        best = _cheapest(here, rng)
        considered = list(here)
        if prefills and not prefill_here_only:
            remote = [self._prefill_on(worker, shape, here=False) for worker in prefills]
            at_prefill = _cheapest(remote, rng)
            handed = [self._hand_over(worker, at_prefill, shape) for worker in decodes]
            at_decode = _cheapest(handed, rng)
            considered += [*remote, *handed]
            if at_prefill.total_s + at_decode.total_s <= best.total_s:
                return Placement(
                    prefill=at_prefill.process,
                    decode=at_decode.process,
                    prefill_sources=shape.sources(at_prefill.process) if at_prefill.fetch_s else (),
                    decode_sources=shape.sources(at_decode.process, but=at_prefill.process),
                    chosen=at_prefill,
                    considered=tuple(considered),
                    hits=hits,
                )
        sources = shape.sources(best.process) if best.fetch_s else ()
        return Placement(None, best.process, (), sources, best, tuple(considered), hits)

    def _typical(self, measured: Sequence[StepPrices]) -> StepPrices:
        """What a worker that has not prefilled yet is taken to cost: as much as the others do."""
        if not measured:
            return self._assume.prices
        base_s, token_s, pair_s = (
            fmean(getattr(prices, name) for prices in measured) for name in ("base_s", "token_s", "pair_s")
        )
        return StepPrices(base_s=base_s, token_s=token_s, pair_s=pair_s)

    def _prefill_on(self, worker: Candidate, shape: _Shape, here: bool) -> Prediction:
        prices = worker.prices if worker.prices.token_s else shape.typical
        local, remote = shape.hit_blocks(worker.process)
        fetch_s = 0.0
        hit_tokens = shape.hit_tokens(local)
        if remote > local:
            fetch_s = self._fetch_s(worker, (remote - local) * shape.slab_bytes)
            if fetch_s < prices.prefill_s(shape.hit_tokens(remote) - hit_tokens, hit_tokens):
                hit_tokens = shape.hit_tokens(remote)
            else:
                fetch_s = 0.0
        suffix_tokens = shape.num_tokens - hit_tokens
        compute_s = prices.prefill_s(suffix_tokens, hit_tokens)
        stall_s = 0.0
        if here:
            part = max(0, suffix_tokens - self._assume.short_suffix_tokens) / suffix_tokens
            stall_s = self._assume.idle_stall * part * compute_s
            stall_s += self._assume.stall_per_sequence * worker.num_sequences * compute_s
        return Prediction(
            process=worker.process,
            prefill_here=here,
            hit_tokens=hit_tokens,
            # Those who wait are many prompts, taken to be as long as this one: none attends to another's tokens.
            queue_s=worker.waiting_tokens * (prices.token_s + prices.pair_s * shape.num_tokens / 2),
            fetch_s=fetch_s,
            compute_s=compute_s,
            handover_s=0.0,
            stall_s=stall_s,
            slowdown_s=self._slowdown_s(worker) if here else 0.0,
        )

    def _hand_over(self, worker: Candidate, prefill: Prediction, shape: _Shape) -> Prediction:
        """The decode side of a remote prefill: its transfer overlaps the prefill, what is longer is waited for."""
        local, _ = shape.hit_blocks(worker.process)
        num_blocks = max(0, -(-shape.num_tokens // shape.block_size) - local)
        fetch_s = self._fetch_s(worker, num_blocks * shape.slab_bytes)
        return Prediction(
            process=worker.process,
            prefill_here=False,
            hit_tokens=shape.hit_tokens(local),
            queue_s=0.0,
            fetch_s=0.0,
            compute_s=0.0,
            handover_s=self._assume.handover_s + max(0.0, fetch_s - prefill.compute_s),
            stall_s=0.0,
            slowdown_s=self._slowdown_s(worker),
        )

    def _fetch_s(self, worker: Candidate, num_bytes: int) -> float:
        return self._assume.fetch_setup_s + num_bytes / (worker.fetch_bytes_per_s or self._assume.fetch_bytes_per_s)

    def _slowdown_s(self, worker: Candidate) -> float:
        return (worker.decode_step_s or self._assume.decode_step_s) * worker.num_sequences


class _Shape:
    """The request's side of a prediction."""

    def __init__(
        self,
        num_tokens: int,
        block_size: int,
        slab_bytes: int,
        hits: Mapping[Place, int],
        typical: StepPrices,
    ) -> None:
        self.num_tokens = num_tokens
        self.block_size = block_size
        self.slab_bytes = slab_bytes
        self.typical = typical
        self._hits = hits
        self._local: dict[str, int] = {}
        for place, num_blocks in hits.items():
            self._local[place.process] = max(num_blocks, self._local.get(place.process, 0))

    def hit_tokens(self, num_blocks: int) -> int:
        """Tokens that `num_blocks` leading blocks spare: the last one is computed in any case, for its logits."""
        return min(num_blocks * self.block_size, self.num_tokens - 1)

    def hit_blocks(self, process: str) -> tuple[int, int]:
        """Leading blocks that `process` holds, and the most that anybody else does."""
        others = (num for name, num in self._local.items() if name != process)
        return self._local.get(process, 0), max(others, default=0)

    def sources(self, process: str, but: str = "") -> tuple[Place, ...]:
        """Places that hold more of the prefix than `process`, longest first; of equal ones faster tiers first."""
        local = self._local.get(process, 0)
        order = {"DEVICE": 0, "HOST": 1, "DISK": 2}
        useful = [
            (place, num) for place, num in self._hits.items() if num > local and place.process not in (process, but)
        ]
        useful.sort(key=lambda item: (-item[1], order[item[0].tier], item[0].process))
        return tuple(place for place, _ in useful[:MAX_SOURCES])


def _cheapest(predictions: Sequence[Prediction], rng: random.Random) -> Prediction:
    best_s = min(prediction.total_s for prediction in predictions)
    return rng.choice([prediction for prediction in predictions if prediction.total_s <= best_s * (1 + 1e-9)])
