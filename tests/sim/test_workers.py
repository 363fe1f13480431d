"""Simulated workers: in what order prompts are computed, and how long streams take."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.control import StepPrices
from tandem.sim.cache import new_cache
from tandem.sim.workers import DecodeWorker, PrefillWorker, Prompt, Stream

PRICES = StepPrices(base_s=0.01, token_s=1e-3, pair_s=0.0, sequence_s=0.002, context_s=1e-5)


# --- prefill workers -----------------------------------------------------------------------------------------------------------


def prefill_worker() -> PrefillWorker:
    return PrefillWorker(0, PRICES, 100, new_cache(8))


def prompt(request: int, due_s: float, ready_s: float = 0.0, left_s: float | None = None) -> Prompt:
    return Prompt(request, due_s, ready_s, 100, 5050.0, left_s)


def test_prompts_are_computed_in_the_order_in_which_they_are_due() -> None:
    worker = prefill_worker()
    dues = [5.0, 3.0, 9.0, 1.0, 7.0]
    random.Random(3).shuffle(dues)
    for due_s in dues:
        worker.add(prompt(int(due_s), due_s))
    taken = [worker.next(0.0) for _ in dues]
    assert [one.request for one in taken if one is not None] == [1, 3, 5, 7, 9]
    assert worker.next(0.0) is None
    assert worker.ready_s() is None


def test_those_that_are_due_at_once_go_in_the_order_in_which_they_came() -> None:
    worker = prefill_worker()
    for request in range(4):
        worker.add(prompt(request, 1.0))
    assert [one.request for one in (worker.next(0.0) for _ in range(4)) if one is not None] == [0, 1, 2, 3]


def test_a_prompt_whose_fetch_is_under_way_keeps_nobody_waiting() -> None:
    worker = prefill_worker()
    worker.add(prompt(1, due_s=1.0, ready_s=4.0))
    worker.add(prompt(2, due_s=2.0, ready_s=3.0))
    assert worker.next(2.9) is None
    assert worker.ready_s() == 3.0
    assert [one.request for one in (worker.next(3.0), worker.next(4.0)) if one is not None] == [2, 1]


def test_what_is_stopped_at_the_end_of_a_chunk_has_only_the_rest_left() -> None:
    worker = prefill_worker()
    long = prompt(1, due_s=9.0, left_s=1.0)
    assert worker.begin(long, 2.0) == 3.0
    version = worker.version
    assert worker.next_chunk_s(2.0) == 2.0  # nothing of it is computed yet
    at_s = worker.next_chunk_s(2.25)
    assert at_s == pytest.approx(2.3)  # chunks of 100 tokens take 0.1 s
    assert worker.waiting(at_s) == (100, 5050.0)
    assert worker.stop(at_s) is long
    assert long.left_s == pytest.approx(0.7)
    worker.add(long)
    worker.add(prompt(2, due_s=3.0, left_s=0.05))
    assert worker.waiting(at_s) == (200, 10100.0)
    urgent = worker.next(at_s)
    assert urgent is not None
    assert urgent.request == 2
    done_s = worker.begin(urgent, at_s)
    assert done_s == pytest.approx(2.35)
    assert worker.stop(done_s).left_s == pytest.approx(0.0)
    rest = worker.next(done_s)
    assert rest is long
    assert worker.begin(rest, done_s) == pytest.approx(3.05)
    worker.stop(3.05)
    assert worker.busy_s == pytest.approx(1.05)
    assert worker.version == version + 2  # what was said of an older begin counts no more


# --- decode workers ------------------------------------------------------------------------------------------------------------


class Decoding:
    """A decode worker and what happened when."""

    def __init__(self, num_blocks: int = 100, max_running: int = 8) -> None:
        self.worker = DecodeWorker(0, PRICES, 100, max_running, new_cache(8), num_blocks)
        self.began: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.computed: dict[int, float] = {}

    def stream(
        self, request: int, num_tokens: int, context: float = 0.0, num_blocks: int = 1, at_s: float = 0.0
    ) -> None:
        self.run(at_s)
        self.worker.join(Stream(request, context, num_tokens, num_blocks))
        self._start(at_s)

    def prompt(self, request: int, compute_s: float, num_steps: int, at_s: float = 0.0) -> None:
        self.run(at_s)
        self.worker.compute(request, compute_s, num_steps)

    def run(self, until_s: float = float("inf")) -> Decoding:
        while (due_s := self.worker.due_s()) is not None and due_s <= until_s:
            self.worker.advance(due_s)
            streams, prompts = self.worker.ended()
            assert streams or prompts, "nothing ended when something was to end"
            self.ended.update((stream.request, due_s) for stream in streams)
            self.computed.update((request, due_s) for request in prompts)
            self._start(due_s)
        if until_s != float("inf"):
            self.worker.advance(until_s)
        return self

    def _start(self, at_s: float) -> None:
        self.began.update((stream.request, at_s) for stream in self.worker.start())


def test_a_stream_alone_takes_its_tokens_times_a_step() -> None:
    decoding = Decoding()
    decoding.stream(1, 50, at_s=2.0)
    step_s = decoding.worker.step_s
    assert step_s == pytest.approx(0.012)
    assert decoding.run().ended == {1: pytest.approx(2.0 + 50 * step_s)}
    assert decoding.worker.busy_s == pytest.approx(50 * step_s)


def test_what_a_stream_attends_to_makes_its_steps_longer_and_grows_with_each() -> None:
    decoding = Decoding()
    decoding.stream(1, 50, context=1000.0)
    assert decoding.worker.step_s == pytest.approx(0.022)
    decoding.worker.advance(10 * 0.022)
    assert decoding.worker.context_tokens() == 1010
    assert decoding.worker.step_s == pytest.approx(0.0221)


def test_two_streams_share_longer_steps_and_the_one_left_goes_on_faster() -> None:
    decoding = Decoding()
    decoding.stream(1, 10)
    decoding.stream(2, 30)
    decoding.run()
    both_s = 10 * 0.014
    assert decoding.ended[1] == pytest.approx(both_s)
    # What the other attends to by then is a little: 10 tokens of its own.
    assert decoding.ended[2] == pytest.approx(both_s + 20 * (0.012 + 10 * 1e-5))
    assert decoding.worker.step_s == pytest.approx(PRICES.base_s)


def test_a_stream_that_comes_later_lengthens_only_the_steps_that_are_left() -> None:
    decoding = Decoding()
    decoding.stream(1, 20)
    decoding.stream(2, 100, at_s=10 * 0.012)
    decoding.run(0.4)
    assert decoding.ended == {1: pytest.approx(10 * 0.012 + 10 * (0.014 + 10 * 1e-5))}


def test_a_stream_without_blocks_waits_until_another_gives_its_back_and_nobody_overtakes() -> None:
    decoding = Decoding(num_blocks=10)
    decoding.stream(1, 10, num_blocks=8)
    decoding.stream(2, 10, num_blocks=3)
    decoding.stream(3, 10, num_blocks=1)
    assert decoding.began == {1: 0.0}
    assert decoding.worker.free_blocks == 2
    decoding.run()
    assert decoding.began[2] == decoding.began[3] == decoding.ended[1]


def test_more_streams_than_may_run_wait() -> None:
    decoding = Decoding(max_running=2)
    for request in range(5):
        decoding.stream(request, 10)
    assert sorted(decoding.began) == [0, 1]
    assert decoding.worker.num_streams == 2
    decoding.run()
    assert sorted(decoding.ended) == [0, 1, 2, 3, 4]
    assert decoding.ended[0] <= decoding.began[2] < decoding.ended[2] <= decoding.began[4]


def test_a_stream_that_needs_more_blocks_than_there_are_runs_alone() -> None:
    decoding = Decoding(num_blocks=10)
    decoding.stream(1, 10, num_blocks=11)
    decoding.stream(2, 10, num_blocks=1)
    assert list(decoding.began) == [1]
    decoding.run()
    assert decoding.began[2] == decoding.ended[1]
    assert decoding.worker.free_blocks == 10


def test_a_prompt_computed_there_makes_steps_longer_until_it_is_done() -> None:
    decoding = Decoding()
    decoding.stream(1, 20)
    decoding.prompt(7, compute_s=0.4, num_steps=4)
    assert decoding.worker.step_s == pytest.approx(0.112)
    decoding.run()
    assert decoding.computed == {7: pytest.approx(4 * 0.112)}
    assert decoding.ended[1] == pytest.approx(4 * 0.112 + 16 * (0.012 + 4 * 1e-5))


def test_prompts_are_computed_there_one_after_the_other() -> None:
    decoding = Decoding()
    decoding.prompt(1, compute_s=0.4, num_steps=4)
    decoding.prompt(2, compute_s=0.1, num_steps=1)
    decoding.run()
    assert decoding.computed == {1: pytest.approx(0.4 + 4 * 0.01), 2: pytest.approx(0.55)}


def test_an_answer_of_one_token_ends_at_once() -> None:
    decoding = Decoding()
    decoding.stream(1, 0, context=100.0, at_s=3.0)
    assert decoding.run().ended == {1: 3.0}


@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.integers(0, 60), st.integers(0, 3000), st.integers(1, 30), st.integers(0, 3)),
        min_size=1,
        max_size=25,
    )
)
def test_everything_is_given_back_at_the_end(arrivals: list[tuple[float, int, int, int, int]]) -> None:
    decoding = Decoding(num_blocks=40, max_running=4)
    at_s = 0.0
    for request, (after_s, num_tokens, context, num_blocks, num_steps) in enumerate(arrivals):
        at_s += after_s
        if num_steps:
            decoding.prompt(request, 0.05 * num_steps, num_steps, at_s)
        decoding.stream(request, num_tokens, context, num_blocks, at_s)
        worker = decoding.worker
        assert worker.num_streams <= 4
        assert worker.free_blocks == 40 - sum(
            arrivals[running][3] for running in decoding.began if running not in decoding.ended
        )
    decoding.run()
    worker = decoding.worker
    assert sorted(decoding.ended) == list(range(len(arrivals)))
    assert sorted(decoding.computed) == [request for request, arrival in enumerate(arrivals) if arrival[4]]
    assert (worker.free_blocks, worker.num_streams, len(worker.waiting), len(worker.prompts)) == (40, 0, 0, 0)
    assert worker.context_tokens() == 0
    assert worker.due_s() is None
