"""Which request is blamed for the death of the workers that computed it, and which is not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from protos.control import (
    Capacity,
    Dispatch,
    Endpoints,
    Failed,
    Fence,
    Goodbye,
    Heartbeat,
    Hello,
    Load,
    RoutingGroup,
    Sampling,
    Started,
    Tokens,
)
from protos.control import Counters as ControlCounters
from router.actions import Action, Emit, FailedEvent, Send
from router.journal import DispatchRecord, Record, Request
from router.poison import QUARANTINE_S, Poison
from router.router import RouterCore, Settings
from tandem.errors import Quarantined

GROUP = RoutingGroup(model_fingerprint=b"f" * 16, kv_format="v1", numerics_class=b"n" * 16, block_size=4)
WORKERS = ("d0", "d1", "d2", "d3")


class Story:
    """Four decode workers. A worker dies when it computes a prompt that begins with 13, or, once, with 99."""

    def __init__(self) -> None:
        self.core = RouterCore(Settings("router", b"r" * 8, max_jitter_s=0.0), random.Random(1))
        self.now_s = 10.0
        self.alive = dict.fromkeys(WORKERS, b"1" * 8)
        self.at: dict[str, tuple[str, Fence]] = {}
        """Where each request is, by its last dispatch."""
        self.ends: dict[str, Any] = {}
        self.num_tokens: dict[str, int] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        for name in WORKERS:
            self.join(name)

    def join(self, name: str) -> None:
        endpoints = Endpoints(fetch=f"{name}-fetch", events="e", replay="r")
        hello = Hello(1, name, "decode", self.alive[name], 1, endpoints, Capacity(max_model_len=1000), GROUP)
        self.do(self.core.on_message(name, self.alive[name], hello, self.now_s))

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, Dispatch):
                self.at[action.message.fence.request_id] = (action.process, action.message.fence)
            elif isinstance(action, Emit) and not hasattr(action.event, "token_ids"):
                self.ends[action.request_id] = action.event

    def submit(self, name: str, *prompt: int) -> None:
        self.prompts[name] = prompt
        self.do(self.core.submit(Request(name, prompt, Sampling(max_tokens=50), 1, self.now_s + 500.0), self.now_s))

    def say(self, name: str, kind: type, *fields: Any) -> None:
        """What the worker that has `name` says of it."""
        process, fence = self.at[name]
        self.do(self.core.on_message(process, self.alive[process], kind(fence, *fields), self.now_s))

    def generate(self, name: str) -> None:
        position = self.num_tokens.get(name, 0)
        self.num_tokens[name] = position + 1
        self.say(name, Tokens, 0, position, [5])

    def die(self, process: str) -> None:
        self.do(self.core.on_closed(process, self.alive.pop(process), self.now_s))

    def pass_time(self, seconds: float = 0.1) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.05
            for name, epoch in self.alive.items():
                beat = Heartbeat(name, epoch, 0, 0.0, -1, Load(free_blocks=1000), ControlCounters())
                self.do(self.core.on_message(name, epoch, beat, self.now_s))
            self.do(self.core.tick(self.now_s))

    def where(self, name: str) -> str:
        return self.at[name][0]


@pytest.fixture
def story() -> Story:
    return Story()


def test_a_request_of_which_two_workers_died_is_quarantined_and_its_prompt_refused(story: Story) -> None:
    story.submit("bad", 13, 1, 2)
    for _ in range(2):
        story.say("bad", Started)
        story.die(story.where("bad"))
        story.pass_time()
    end = story.ends["bad"]
    assert isinstance(end, FailedEvent)
    assert isinstance(end.error, Quarantined)
    assert "2 workers died" in str(end.error)
    with pytest.raises(Quarantined):
        story.submit("again", 13, 1, 2)
    story.submit("other", 13, 1, 3)
    story.pass_time(QUARANTINE_S + 1.0)
    story.submit("later", 13, 1, 2)
    assert "later" not in story.ends


def test_who_had_not_begun_is_no_suspect(story: Story) -> None:
    story.submit("waits", 1, 2, 3)
    for _ in range(2):
        story.die(story.where("waits"))
        story.pass_time()
    assert "waits" not in story.ends
    assert story.core.poison.num_suspects == 0


def test_streams_that_moved_away_from_a_dead_worker_are_not_blamed_for_the_next_one(story: Story) -> None:
    """They begin anew elsewhere, and the killer must not get there while they have not shown that they can be computed."""
    story.submit("bad", 13, 1, 2)
    first = story.where("bad")
    others = [f"good{i}" for i in range(8)]
    for i, name in enumerate(others):
        story.submit(name, 20 + i, 1, 2)
    neighbours = [name for name in others if story.where(name) == first]
    assert neighbours
    for name in others:
        story.say(name, Started)
        story.generate(name)
    story.say("bad", Started)
    story.die(first)
    story.pass_time()
    assert all(story.where(name) != first for name in neighbours)
    for name in neighbours:
        story.say(name, Started)
    assert story.where("bad") == first, "it waits until they go on"
    for name in neighbours:
        assert story.where("bad") == first
        story.generate(name)
        story.pass_time()
    second = story.where("bad")
    assert second != first
    story.say("bad", Started)
    story.die(second)
    story.pass_time()
    assert isinstance(story.ends["bad"].error, Quarantined)
    assert set(story.ends) == {"bad"}


def test_suspects_are_tried_one_at_a_time(story: Story) -> None:
    for i, name in enumerate("abcdefgh"):
        story.submit(name, 20 + i, 1, 2)
    first = story.where("a")
    suspects = [name for name in "abcdefgh" if story.where(name) == first]
    assert len(suspects) > 1
    for name in suspects:
        story.say(name, Started)
    story.die(first)
    for num_tried in range(1, len(suspects) + 1):
        story.pass_time()
        tried = [name for name in suspects if story.where(name) != first]
        assert len(tried) == num_tried
        story.generate(tried[-1])
    assert not story.ends


def test_a_worker_that_leaves_or_gives_back_accuses_nobody(story: Story) -> None:
    story.submit("slow", 1, 2, 3)
    for _ in range(3):
        story.say("slow", Started)
        process = story.where("slow")
        story.say("slow", Failed, "draining", "this worker is leaving")
        story.do(
            story.core.on_message(
                process, story.alive[process], Goodbye(process, story.alive.pop(process)), story.now_s
            )
        )
        story.pass_time()
    assert story.core.poison.num_suspects == 0
    assert not story.ends
    story.generate("slow")


def test_a_suspect_whose_other_role_dies_with_a_worker_too_holds_nobody_up() -> None:
    poison = Poison()
    first, second = (cast(Record, SimpleNamespace(request_id=name, num_deaths=0)) for name in ("first", "second"))
    begun = cast(DispatchRecord, SimpleNamespace(started=True, generates=False))
    proven = cast(DispatchRecord, SimpleNamespace(started=True, generates=True))
    poison.on_death([(first, begun), (second, begun)], 0.0)
    poison.on_death([(first, proven)], 1.0)
    assert poison.may_go("first")
    poison.cleared("first")
    assert poison.may_go("second")
