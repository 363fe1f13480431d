"""Answers held to a grammar: valid, and the same in any company, after any interruption, by whatever workers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvpool.block_pool import BlockPool
from kvpool.keys import tokens_as_bytes
from protos.control import Dispatch, Failed, Fence, FinishReason, Grammar, Sampling, TokenLogprobs, Tokens
from tandem.engine.compiling import Compiling
from tandem.engine.engine import Engine
from tandem.engine.limits import EngineLimits
from tandem.grammar.matcher import Grammars, Matcher, MatcherSource
from tests.engine import fake_model
from tests.vocabulary import SmallVocabulary

BLOCK = 4
ROOT = b"r" * 16
WORDS = ["ab", "abc", "ba", "cab", '{"', '":', "true"]
TOKENIZER = SmallVocabulary(WORDS)
EOS, OTHER_EOS = TOKENIZER.EOS, TOKENIZER.OTHER_EOS
VOCAB = TOKENIZER.vocab_size
GRAMMARS = Grammars(lambda: TOKENIZER)  # type: ignore[arg-type, return-value]

SCHEMA = Grammar(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": -99, "maximum": 9999},
                "b": {"enum": ["x", "yy", "abc"]},
                "c": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
            },
            "required": ["a", "b", "c"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False},
        }
    ),
)
WORD = Grammar("regex", "(ab|c){1,6}")


class Model(fake_model.FakeRunner):
    """As FakeRunner, with logits for every token: each depends on all tokens before."""

    def run(self, chunks: Sequence[Any]) -> torch.Tensor:
        peaks = super().run(chunks)
        rows = [torch.randn(VOCAB, generator=torch.Generator().manual_seed(int(peak.argmax()))) * 2.0 for peak in peaks]
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)


@dataclass
class Answer:
    tokens: list[int]
    reason: FinishReason | None
    logprobs: list[TokenLogprobs]

    @property
    def text(self) -> str:
        return TOKENIZER.decode(self.tokens)


class Worker:
    """An engine, a hand on its clock, and what it says of each sample."""

    def __init__(self, num_blocks: int = 256, matchers: MatcherSource | None = GRAMMARS, max_running: int = 16) -> None:
        self.pool = BlockPool(num_blocks, BLOCK, "DEVICE")
        memory = fake_model.FakeMemory(num_blocks, BLOCK)
        self.now_s = 100.0
        self.engine = Engine(
            pool=self.pool,
            memory=memory,
            runner=Model(memory, BLOCK),
            limits=EngineLimits(
                max_model_len=num_blocks * BLOCK,
                vocab_size=VOCAB,
                max_running=max_running,
                max_step_tokens=16,
                recompute_limit_tokens=256,
                fetch_timeout_s=5.0,
                block_size=BLOCK,
                slab_bytes=64,
            ),
            new_fetch_id=lambda: b"f" * 16,
            matchers=matchers,
        )
        self.answers: dict[tuple[str, int], Answer] = {}
        self.failed: dict[str, Failed] = {}

    def step(self) -> None:
        self.now_s += 0.01
        for _, message in self.engine.step(self.now_s, lambda: self.now_s).replies:
            match message:
                case Tokens():
                    key = (message.fence.request_id, message.index)
                    answer = self.answers.setdefault(key, Answer([], None, []))
                    answer.tokens += message.token_ids
                    answer.logprobs += message.logprobs
                    answer.reason = message.finish_reason
                case Failed():
                    self.failed[message.fence.request_id] = message
        self.pool.check()

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            self.step()
            if self.engine.is_idle:
                stats = self.pool.stats()
                assert stats.free + stats.cached == stats.num_blocks
                return
        raise AssertionError(f"not idle after {limit} steps")

    def start(
        self,
        name: str,
        prompt: Sequence[int],
        sampling: Sampling,
        so_far: Sequence[int] = (),
        *,
        role: str = "decode",
        here: bool = True,
        n: int = 1,
        **more: Any,
    ) -> Fence:
        fence = Fence(name, 0, role, 0)  # type: ignore[arg-type]
        dispatch = Dispatch(
            fence=fence,
            root=ROOT,
            token_ids=tokens_as_bytes([*prompt, *so_far]),
            num_prompt_tokens=len(prompt),
            sampling=sampling,
            n=n,
            sources=[],
            deadline_s=more.pop("deadline_s", 1000.0),
            prefill_here=here,
            **more,
        )
        self.engine.on_dispatch(0, dispatch, self.now_s)
        return fence


def asked(grammar: Grammar | None = SCHEMA, seed: int = 0, **values: Any) -> Sampling:
    """Sampled, so that the mask leaves something to choose."""
    given: dict[str, Any] = {"max_tokens": 200, "temperature": 3.0, "seed": seed, "stop_token_ids": [EOS, OTHER_EOS]}
    if grammar is not None:
        given["grammar"] = grammar
    return Sampling(**given | values)


def prompt_of(number: int) -> list[int]:
    return [(7 * number + 3 * i) % VOCAB for i in range(3 + number % 9)]


def alone(prompt: Sequence[int], sampling: Sampling, so_far: Sequence[int] = (), **more: Any) -> Answer:
    worker = Worker()
    worker.start("a", prompt, sampling, so_far, **more)
    worker.run()
    assert not worker.failed, worker.failed
    return worker.answers["a", more.get("index", 0)]


def assert_valid(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"a", "b", "c"}
    assert type(value["a"]) is int
    assert -99 <= value["a"] <= 9999
    assert value["b"] in ("x", "yy", "abc")
    assert 1 <= len(value["c"]) <= 4
    assert all(type(item) is bool for item in value["c"])


def test_every_answer_is_valid_and_ends_by_itself() -> None:
    worker = Worker()
    for number in range(24):
        worker.start(f"r{number}", prompt_of(number), asked(seed=number))
    worker.run()
    assert not worker.failed
    answers = [worker.answers[f"r{number}", 0] for number in range(24)]
    for answer in answers:
        assert answer.reason == "stop"
        assert_valid(answer.text)
        assert not {EOS, OTHER_EOS} & set(answer.tokens)
    assert len({answer.text for answer in answers}) > 20


def test_a_stream_does_not_depend_on_its_company_and_preemptions() -> None:
    samplings = [asked(SCHEMA if number % 3 else None, seed=number, max_tokens=60) for number in range(12)]
    truth = [alone(prompt_of(number), sampling) for number, sampling in enumerate(samplings)]
    num_preemptions = 0
    for seed in range(4):
        rng = random.Random(seed)
        worker = Worker(num_blocks=rng.choice([28, 40, 256]), max_running=rng.randint(2, 12))
        order = list(range(12))
        rng.shuffle(order)
        for number in order:
            worker.start(f"r{number}", prompt_of(number), samplings[number])
            for _ in range(rng.randrange(6)):
                worker.step()
        worker.run()
        assert [worker.answers[f"r{number}", 0] for number in range(12)] == truth
        num_preemptions += worker.engine.scheduler.num_preemptions
    assert num_preemptions > 0


def test_an_answer_that_is_taken_up_at_any_position_goes_on_with_the_same_tokens() -> None:
    prompt, sampling = prompt_of(5), asked(seed=11)
    whole = alone(prompt, sampling)
    assert len(whole.tokens) > 20
    for cut in range(1, len(whole.tokens) + 1):
        rest = alone(prompt, sampling, whole.tokens[:cut])
        assert (rest.tokens, rest.reason) == (whole.tokens[cut:], "stop")


def test_samples_share_the_prompt_and_are_each_what_they_are_alone() -> None:
    prompt, sampling = prompt_of(4), asked(seed=5)
    worker = Worker(num_blocks=60)
    worker.start("a", prompt, sampling, n=4)
    worker.run()
    answers = [worker.answers["a", index] for index in range(4)]
    for answer in answers:
        assert_valid(answer.text)
    assert len({answer.text for answer in answers}) == 4
    assert [alone(prompt, sampling, index=index) for index in range(4)] == answers


def test_decode_goes_on_where_prefill_drew_the_first_token() -> None:
    prompt, sampling = prompt_of(6), asked(seed=2)
    truth = [alone(prompt, sampling, index=index) for index in range(3)]
    prefill, decode = Worker(), Worker()
    fence = prefill.start("a", prompt, sampling, role="prefill", n=3)
    while len(prefill.answers) < 3:
        prefill.step()
    first = [prefill.answers["a", index].tokens for index in range(3)]
    assert [len(tokens) for tokens in first] == [1, 1, 1]
    prefill.engine.on_abort(0, fence, "handed over")
    prefill.run()
    fence = decode.start("a", prompt, sampling, here=False, n=3)
    for _ in range(3):
        decode.step()
    decode.engine.on_first_tokens(0, fence, [tokens[0] for tokens in first], decode.now_s)
    decode.run()
    rest = [decode.answers["a", index].tokens for index in range(3)]
    assert [[*tokens, *more] for tokens, more in zip(first, rest, strict=True)] == [one.tokens for one in truth]


def test_an_answer_that_only_can_end_ends_though_min_tokens_asks_for_more() -> None:
    answer = alone(prompt_of(1), asked(Grammar("regex", "abc"), min_tokens=50))
    assert (answer.text, answer.reason) == ("abc", "stop")
    longest = alone(prompt_of(1), asked(WORD, min_tokens=50, logit_bias=[(EOS, 50.0), (OTHER_EOS, 50.0)]))
    assert longest.text.count("ab") + longest.text.replace("ab", "").count("c") == 6
    short = alone(prompt_of(1), asked(WORD, logit_bias=[(EOS, 50.0)]))
    assert len(short.text) <= 2


def test_an_ignored_end_is_drawn_only_where_the_grammar_can_only_end() -> None:
    bias = [(EOS, 50.0), (OTHER_EOS, 50.0)]
    answer = alone(prompt_of(1), asked(WORD, stop_token_ids=[], logit_bias=bias))
    assert answer.reason == "stop"
    assert answer.text.count("ab") + answer.text.replace("ab", "").count("c") == 6


def test_neither_bias_nor_penalties_allow_what_the_grammar_does_not() -> None:
    x = TOKENIZER.encode("x")[0]
    answer = alone(
        prompt_of(2),
        asked(WORD, logit_bias=[(x, 100.0)], repetition_penalty=1.5, presence_penalty=2.0, frequency_penalty=-2.0),
    )
    assert answer.reason == "stop"
    assert set(answer.text) <= set("abc")


def test_a_stop_token_ends_an_answer_before_it_matches() -> None:
    b = TOKENIZER.encode("b")[0]
    words = [TOKENIZER.vocab_size - len(WORDS) + i for i in range(len(WORDS))]
    bias = [(word, -100.0) for word in words]
    answer = alone(prompt_of(2), asked(Grammar("regex", "ab{5}"), stop_token_ids=[b, EOS], logit_bias=bias))
    assert (answer.text, answer.reason) == ("a", "stop")


def test_max_tokens_cuts_an_answer_off() -> None:
    answer = alone(prompt_of(2), asked(max_tokens=7))
    assert (len(answer.tokens), answer.reason) == (7, "length")


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_log_probabilities_are_of_what_is_allowed(temperature: float) -> None:
    answer = alone(prompt_of(3), asked(Grammar("regex", "[ab]c"), num_logprobs=5, temperature=temperature))
    first, second = answer.logprobs
    allowed = {TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]}
    assert {token_id for token_id, _ in first.top} == allowed
    assert sum(2.718281828459045**logprob for _, logprob in first.top) == pytest.approx(1.0)
    assert dict(first.top)[answer.tokens[0]] == first.chosen
    assert second.top == [(TOKENIZER.encode("c")[0], pytest.approx(0.0))]


def test_an_answer_whose_grammar_ends_nowhere_fails_and_others_go_on() -> None:
    worker = Worker()
    dead = Grammar("lark", 'start: "a" B\nB: /b/ & /c/')
    worker.start("dead", prompt_of(1), asked(dead), n=3)
    worker.start("good", prompt_of(2), asked(seed=4))
    worker.run()
    failed = worker.failed["dead"]
    assert failed.code == "invalid_request"
    assert "after 1 tokens: no token can follow" in failed.message
    assert worker.answers["good", 0] == alone(prompt_of(2), asked(seed=4))


def test_tokens_that_do_not_match_are_refused() -> None:
    worker = Worker()
    worker.start("a", prompt_of(1), asked(), TOKENIZER.encode("x"))
    worker.run()
    assert worker.failed["a"].code == "invalid_request"
    assert "token 0 of the answer" in worker.failed["a"].message


def test_a_worker_without_a_vocabulary_refuses_a_grammar_and_takes_the_rest() -> None:
    worker = Worker(matchers=None)
    worker.start("a", prompt_of(1), asked())
    worker.start("b", prompt_of(1), asked(None, max_tokens=3))
    worker.run()
    assert worker.failed["a"].code == "invalid_request"
    assert worker.answers["b", 0].reason is not None


class Later:
    """A MatcherSource whose answers come when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Grammar, list[int], Future[Matcher]]] = []

    def begin(self, grammar: Grammar, token_ids: Sequence[int]) -> Future[Matcher]:
        future: Future[Matcher] = Future()
        self.asked.append((grammar, list(token_ids), future))
        return future


def test_nobody_waits_for_anothers_grammar() -> None:
    later = Later()
    worker = Worker(matchers=later)
    waiting = worker.start("a", prompt_of(1), asked(seed=3))
    worker.start("b", prompt_of(2), asked(None, max_tokens=5))
    for _ in range(20):
        worker.step()
    assert worker.answers["b", 0].reason is not None
    assert ("a", 0) not in worker.answers
    assert not worker.engine.has_work
    (grammar, token_ids, future) = later.asked[0]
    future.set_result(GRAMMARS.matcher(grammar, token_ids))
    worker.run()
    assert worker.answers["a", 0] == alone(prompt_of(1), asked(seed=3))
    assert waiting.request_id == "a"


@pytest.mark.parametrize("end", ["abort", "deadline", "give back", "router lost"])
def test_whoever_waits_for_a_grammar_may_end(end: str) -> None:
    later = Later()
    worker = Worker(matchers=later)
    fence = worker.start("a", prompt_of(1), asked(), deadline_s=1.0)
    worker.step()
    match end:
        case "abort":
            worker.engine.on_abort(0, fence, "its client went away")
        case "deadline":
            worker.now_s += 2.0
        case "give back":
            worker.engine.give_back()
        case "router lost":
            worker.engine.on_router_lost(0)
    worker.run()
    assert later.asked[0][2].cancelled()
    assert {"deadline": "deadline_exceeded", "give back": "draining"}.get(end) == (
        worker.failed["a"].code if "a" in worker.failed else None
    )


def test_what_goes_wrong_while_a_grammar_is_compiled_ends_its_request_alone() -> None:
    later = Later()
    worker = Worker(matchers=later)
    worker.start("a", prompt_of(1), asked())
    later.asked[0][2].set_exception(OSError("the file is gone"))
    worker.run()
    assert worker.failed["a"].code == "internal"
    assert "the file is gone" in worker.failed["a"].message


def test_grammars_are_compiled_on_a_thread_and_what_comes_next_finds_them_compiled() -> None:
    compiling = Compiling(Grammars(lambda: TOKENIZER))  # type: ignore[arg-type, return-value]
    ready: list[int] = []
    compiling.on_ready = lambda: ready.append(1)
    try:
        worker = Worker(matchers=compiling)
        worker.start("a", prompt_of(1), asked(seed=3))
        worker.run(limit=10_000_000)
        assert worker.answers["a", 0] == alone(prompt_of(1), asked(seed=3))
        assert ready
        begun = compiling.begin(Grammar("regex", "("), [])
        assert "unclosed group" in str(begun.exception(10.0))
    finally:
        compiling.close()
    assert not compiling._grammars._kept or len(compiling._grammars._kept) == 1
