"""The ladder compares what it says it compares: the same requests, the same tokens, memory counted as defined."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from protos import tandem_pb2 as pb
from tandem.bench.ladder import climb, continuous, disaggregated, rungs
from tandem.bench.ladder.kv_meter import KVMeter, slots
from tandem.bench.ladder.picture import draw
from tandem.bench.ladder.results import Results
from tandem.bench.ladder.workload import MAX_TOKENS, Answer, Playback, Request, Run, requests, sample
from tandem.cli.bench import app
from tandem.config import Config, WorkerConfig, load_config
from tandem.engine.build import EngineParts, build_engine
from tandem.engine.runner import Chunk
from tandem.errors import ConfigError, TandemError, Unavailable
from tests.models import tiny_models

LOWER = climb.lower_rungs()
BLOCKS = MAX_TOKENS // 16


def at_once(*lengths: tuple[int, int]) -> list[Request]:
    """Requests of `(prompt, answer)` tokens that are there from the beginning, each with tokens of its own."""
    return [
        Request(number, 0.0, tuple((7 * number + i) % 90 + 3 for i in range(prompt)), answer)
        for number, (prompt, answer) in enumerate(lengths)
    ]


class FakeComputer:
    """The next token is the last one plus one; every call takes a second of `clock`, however much it computes."""

    max_rows = 512

    def __init__(self) -> None:
        self.time_s = 0.0
        self.rows: list[int] = []

    def clock(self) -> float:
        return self.time_s

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.time_s += 1
        self.rows.append(sum(len(chunk.token_ids) for chunk in chunks))
        logits = torch.zeros(sum(chunk.want_logits for chunk in chunks), 100)
        for row, chunk in enumerate(chunk for chunk in chunks if chunk.want_logits):
            logits[row, (chunk.token_ids[-1] + 1) % 100] = 1
        return logits


# --- the workload ------------------------------------------------------------------------------------------------------


def test_requests_are_the_same_each_time_and_spread_as_promised() -> None:
    found = requests(49_152)
    assert found == requests(49_152)
    assert all(32 <= len(request.prompt) <= 480 and 8 <= request.num_answer_tokens <= 128 for request in found)
    heads = [request.prompt[:150] for request in found]
    assert len({head for head in heads if heads.count(head) > 1}) == 2
    assert len({len(request.prompt) for request in found}) > 20
    assert [request.arrival_s for request in found] == sorted(request.arrival_s for request in found)
    assert found[0].arrival_s == 0
    assert set(sample(found)) < set(found)


def test_a_request_is_taken_once_it_has_arrived_and_timed_from_its_arrival() -> None:
    computer = FakeComputer()
    early, late = Request(0, 0.0, (1, 2), 2), Request(1, 2.5, (3,), 1)
    playback = Playback([early, late], computer.clock)
    assert playback.take(5) == [early]
    computer.time_s = 1.0
    assert not playback.draw(early, [8])
    assert playback.take(5) == []
    computer.time_s = 4.0
    assert playback.take(5) == [late]
    assert playback.draw(early, [9])
    assert playback.draw(late, [7])
    run = playback.run(None)
    assert [answer.token_ids for answer in run.answers] == [[8, 9], [7]]
    assert run.ttft_s == [1.0, 1.5]
    assert run.gaps_s == [3.0]
    assert run.tokens_per_s == 3 / 4


# --- memory ------------------------------------------------------------------------------------------------------------


def test_waste_is_the_share_of_reserved_slot_seconds_without_kv() -> None:
    meter = KVMeter()
    assert meter.wasted is None
    meter.add(2.0, 10, 5)
    meter.add(1.0, 20, 20)
    assert meter.wasted == pytest.approx(1 - (2 * 5 + 20) / (2 * 10 + 20))


def test_a_shared_block_counts_once_and_as_full_as_its_fullest_user_made_it() -> None:
    assert slots([([4, 7], 20), ([4, 9, 2], 33)], 16) == (4 * 16, 16 + 4 + 16 + 1)
    assert slots([([4], 9), ([4], 3)], 16) == (16, 9)
    assert slots([([1, 2], 0)], 16) == (32, 0)
    assert slots([], 16) == (0, 0)


def test_a_static_batch_keeps_all_its_memory_until_its_last_sequence_ends() -> None:
    computer = FakeComputer()
    run = LOWER.reserved_batches(computer, at_once((3, 2), (5, 4), (4, 1)), BLOCKS, 2, computer.clock)
    assert computer.rows == [8, 2, 1, 1, 4]
    used = 8 + 10 + 7 + 8 + 4  # the first sequence ends after the second step: its four tokens are of no use then
    assert run.wasted == pytest.approx(1 - used / (4 * 2 * MAX_TOKENS + MAX_TOKENS))
    assert run.ttft_s == [1.0, 1.0, 5.0]
    assert run.answers[1].times_s == [1.0, 2.0, 3.0, 4.0]


def test_batches_of_one_are_a_plain_kv_cache() -> None:
    computer = FakeComputer()
    run = LOWER.reserved_batches(computer, at_once((3, 2), (5, 4)), BLOCKS, 1, computer.clock)
    assert computer.rows == [3, 1, 5, 1, 1, 1]
    assert run.wasted == pytest.approx(1 - (3 + 4 + 5 + 6 + 7 + 8) / (6 * MAX_TOKENS))
    assert run.ttft_s == [1.0, 3.0]


def test_prompts_of_a_batch_that_exceed_a_call_are_computed_whole_in_several() -> None:
    computer = FakeComputer()
    LOWER.reserved_batches(computer, at_once((300, 1), (212, 1), (400, 1), (113, 1)), BLOCKS, 4, computer.clock)
    assert computer.rows == [512, 400, 113]


def test_without_a_kv_cache_every_token_computes_all_before_it() -> None:
    computer = FakeComputer()
    run = LOWER.no_kv_cache(computer, at_once((3, 3), (511, 3)), BLOCKS, computer.clock)
    assert computer.rows == [3, 4, 5, 511, 512, 512, 1]
    assert run.wasted is None
    assert [len(answer.token_ids) for answer in run.answers] == [3, 3]


# --- the product's engine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama", {}), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> EngineParts:
    worker = WorkerConfig(arena_bytes=2**20, max_step_tokens=512, max_running=32)
    return build_engine(tiny_path, "bf16", worker, max_len=MAX_TOKENS, keep_events=False)


class RecordingMeter(KVMeter):
    """Keeps what it is given."""

    seen: list[tuple[int, int]]

    def add(self, seconds: float, reserved_slots: int, used_slots: int) -> None:
        assert seconds > 0
        self.seen.append((reserved_slots, used_slots))
        super().add(seconds, reserved_slots, used_slots)


def test_the_engines_memory_is_seen_as_each_step_reserves_and_writes_it(
    tiny: EngineParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "KVMeter", RecordingMeter)
    RecordingMeter.seen = []
    run = continuous.continuous(tiny, at_once((20, 3), (31, 3), (16, 1)), whole_prompts=True, share_prefixes=False)
    assert RecordingMeter.seen == [
        (32, 20),
        (64, 21 + 31),  # one whole prompt a step
        (80, 22 + 32 + 16),  # the first and the third end with this step
        (48, 33),
    ]
    assert run.wasted is not None
    assert 0 < run.wasted < 1


def test_prompts_are_shared_only_where_they_may_be(tiny: EngineParts) -> None:
    same = [dataclasses.replace(request, prompt=tuple(range(3, 60))) for request in at_once((57, 2), (57, 2), (57, 2))]
    before = tiny.engine.counters().prefix_hit_tokens
    continuous.continuous(tiny, same, whole_prompts=True, share_prefixes=False)
    assert tiny.engine.counters().prefix_hit_tokens == before
    continuous.continuous(tiny, same, whole_prompts=True, share_prefixes=True)
    assert tiny.engine.counters().prefix_hit_tokens == before + 2 * 48


def test_a_request_that_the_engine_refuses_is_an_error(tiny: EngineParts) -> None:
    with pytest.raises(TandemError, match="at most 608"):
        continuous.continuous(tiny, at_once((600, 100)), whole_prompts=False, share_prefixes=True)


def test_all_rungs_in_this_process_give_the_same_tokens(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [dataclasses.replace(request, arrival_s=0.0) for request in requests(tiny_models.VOCAB, 12, seed=3)]
    monkeypatch.setattr(climb, "requests", lambda vocab_size: few)
    started: list[Config] = []

    def start(config: Config) -> AbstractContextManager[str]:
        started.append(config)
        raise Unavailable("no cluster here")

    results = Results()
    steps = climb.climb(tiny_path, load_config(), start)
    for rung, run in itertools.islice(steps, 6):
        results.add(rung, run)
        assert all(result.ok for result in results.metrics() if "same_tokens" in result.metric)
    with pytest.raises(Unavailable):
        next(steps)
    everything = [rungs.NO_CACHE, rungs.CACHE, rungs.STATIC, rungs.PAGED, rungs.CHUNKED, rungs.PREFIX]
    assert [step.rung for step in results.steps] == everything
    assert [step.same_tokens for step in results.steps] == [None, *[1.0] * 5]
    wasted = {step.rung: step.wasted for step in results.steps}
    assert wasted[rungs.NO_CACHE] is None
    assert min(wasted[rungs.CACHE], wasted[rungs.STATIC]) > 0.3
    assert wasted[rungs.PAGED] < 0.06
    (config,) = started
    assert (config.prefill.replicas, config.decode.replicas, config.pool.replicas) == (1, 1, 0)
    assert config.prefill.arena_bytes == config.decode.arena_bytes


def test_outside_a_checkout_the_ladder_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(climb, "__file__", "/nowhere/tandem/bench/ladder/climb.py")
    with pytest.raises(ConfigError, match="runs from a checkout"):
        climb.lower_rungs()


# --- the cluster -------------------------------------------------------------------------------------------------------


class FakeClient:
    """A cluster whose decode worker has 4 blocks, 2 of them taken while anybody is answered."""

    refuse = False

    def __init__(self, target: str) -> None:
        self.polled = threading.Semaphore(0)
        self.active = 0

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def cluster(self) -> pb.GetClusterResponse:
        self.polled.release()
        workers = [("decode", 2 if self.active else 4), ("prefill", 0)]
        processes = [pb.ProcessStatus(role=role, num_blocks=4, free_blocks=free) for role, free in workers]
        return pb.GetClusterResponse(block_size=16, processes=processes)

    def generate(
        self, prompt: Sequence[int], sampling: pb.SamplingParams, *, timeout_s: float
    ) -> Iterator[pb.GenerateResponse]:
        if self.refuse:
            raise Unavailable("gone")
        yield pb.GenerateResponse(accepted=pb.Accepted())
        self.active += 1
        for position in range(sampling.max_tokens):
            yield pb.GenerateResponse(chunk=pb.Chunk(position=position, token_ids=[5 + position]))
            if position == 0:  # the memory is looked at several times while one token is there
                assert all(self.polled.acquire(timeout=10) for _ in range(6))
        self.active -= 1


def test_the_cluster_rung_asks_every_request_and_watches_the_decode_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disaggregated, "Client", FakeClient)
    run = disaggregated.disaggregated("nowhere:1", at_once((20, 3)))
    assert [answer.token_ids for answer in run.answers] == [[5, 6, 7]]
    assert run.wasted == pytest.approx(1 - 20 / 32, abs=0.15)  # a look before or after that token sees none


def test_what_streams_share_and_what_is_not_computed_takes_no_slots() -> None:
    asked = [Request(number, 0.0, tuple(range(3, 23)), 4) for number in range(4)]
    streams = disaggregated.Streams(FakeClient(""), asked)  # type: ignore[arg-type]
    assert streams.slots(16) == 0
    streams.answers[0].token_ids = [7]  # drawn, not computed
    assert streams.slots(16) == 20
    streams.answers[1].token_ids = [8, 9, 9]
    assert streams.slots(16) == 16 + 4 + 6
    streams.answers[2].token_ids = [1, 2, 3, 4]  # it has ended
    assert streams.slots(16) == 16 + 4 + 6


def test_a_request_that_fails_fails_the_cluster_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disaggregated, "Client", FakeClient)
    monkeypatch.setattr(FakeClient, "refuse", True)
    with pytest.raises(Unavailable):
        disaggregated.disaggregated("nowhere:1", at_once((20, 3), (5, 2)))


# --- what is said of it ------------------------------------------------------------------------------------------------


def a_run(tokens: Sequence[int], wasted: float | None, number: int = 0) -> Run:
    times_s = [0.5 + 0.1 * position for position in range(len(tokens))]
    return Run((Request(number, 0.0, (1, 2), len(tokens)),), (Answer(list(tokens), times_s),), wasted)


def metrics_of(results: Results) -> dict[str, Any]:
    return {result.metric: result for result in results.metrics()}


def test_each_rung_stands_beside_the_one_before_and_must_give_its_tokens() -> None:
    results = Results()
    results.add(rungs.CACHE, a_run([1, 2, 3], 0.6))
    first = metrics_of(results)
    assert "kv_cache_same_tokens" not in first
    assert first["kv_cache_throughput"].reference_value is None
    assert first["kv_cache_kv_wasted"].ok
    results.add(rungs.STATIC, a_run([1, 2, 3], 0.7))
    second = metrics_of(results)
    assert second["static_batches_throughput"].ratio == 1.0
    assert second["static_batches_kv_wasted"].reference_value == 0.6
    assert second["static_batches_same_tokens"].ok
    results.add(rungs.CHUNKED, a_run([1, 2, 4], 0.01))
    third = metrics_of(results)
    assert not third["chunked_prefill_same_tokens"].ok
    assert not results.steps[-1].ok


@pytest.mark.parametrize(("wasted", "ok"), [(0.04, True), (0.041, False), (None, False)])
def test_paging_may_waste_four_percent(wasted: float | None, ok: bool) -> None:
    results = Results()
    step = results.add(rungs.PAGED, a_run([1, 2], wasted))
    assert step.ok is ok
    found = metrics_of(results)
    assert wasted is None or found["paged_kv_kv_wasted"].ok is ok


def test_the_picture_is_a_document_with_every_rung_and_its_labels_inside() -> None:
    results = Results()
    results.add(rungs.NO_CACHE, a_run([1, 2], None))
    results.add(rungs.STATIC, a_run([1, 2, 3, 4], 0.7))
    results.add(rungs.PAGED, a_run([1, 2, 3, 4], 0.02))
    root = ElementTree.fromstring(draw(results.steps))
    texts = [element for element in root.iter() if element.tag.endswith("text")]
    said = " ".join(element.text or "" for element in texts)
    assert all(word in said for word in ("no KV cache", "static batches", "paged KV", "70.0 %", "2.0 %"))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    spans = sorted(
        (float(text.attrib["y"]), float(text.attrib["x"]), float(text.attrib["x"]) + 6.5 * len(text.text or ""))
        for text in texts
    )
    assert all(y < height and right < width for y, _, right in spans)
    for (y, _, right), (next_y, left, _) in itertools.pairwise(spans):
        assert y != next_y or right <= left


def test_a_picture_that_can_not_be_written_is_refused_before_anything_runs() -> None:
    done = CliRunner().invoke(app, ["ladder", "--picture", "/nowhere/ladder.svg"])
    assert isinstance(done.exception, ConfigError)
    assert "there is no folder /nowhere" in str(done.exception)
