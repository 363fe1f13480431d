"""The requests of a drill: their prompts, their clients, what came when.

Owns the clients' threads. A client reads its answer as it comes, notes each token's time and how often what it was sent breaks a
rule; it judges nothing. The truth is the same requests at a cluster that nobody hurts.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from protos import tandem_pb2 as pb
from tandem.client import Client
from tandem.clock import now_s
from tandem.drills.spec import RequestSpec
from tandem.errors import TandemError

_TEXT = """
the ship left harbour at dawn with all its sails and a heavy load of grain while people on shore waved their hats until fog took
her from sight and only a bell was heard far out where old charts show neither rock nor island nor light
"""
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `key` tells it from all others of the drill: its name, and its number among those of that name."""

    spec: RequestSpec
    number: int
    prompt: str
    stop: str = ""

    @property
    def key(self) -> str:
        return f"{self.spec.name}-{self.number}"

    @property
    def variant(self) -> int:
        """Its number among those that differ."""
        return self.number % (self.spec.distinct or self.spec.count)

    def sampling(self) -> pb.SamplingParams:
        spec = self.spec
        sampling = pb.SamplingParams(
            max_tokens=spec.max_tokens,
            temperature=spec.temperature,
            seed=spec.seed + self.variant,
            n=spec.n,
            ignore_eos=True,
        )
        if spec.logprobs >= 0:
            sampling.num_logprobs = spec.logprobs
        if self.stop:
            sampling.stop.append(self.stop)
        return sampling


@dataclass(slots=True)
class Got:
    """What a client has of an answer. Lists by sample."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)
    """When tokens came."""
    faults: list[str] = field(default_factory=list)
    """What broke a rule."""
    began_s: float = 0.0
    accepted_s: float | None = None
    ended_s: float | None = None
    num_ends: int = 0
    completed: pb.Completed | None = None
    error: TandemError | None = None
    left: bool = False
    num_resumes: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.tokens.values())

    def take(self, event: pb.GenerateResponse) -> None:
        """One message of the answer."""
        if self.completed is not None:
            self.faults.append(f"{event.WhichOneof('event')} after the end")
        match event.WhichOneof("event"):
            case "accepted":
                if self.accepted_s is not None:
                    self.faults.append("accepted twice")
                self.accepted_s = now_s()
            case "chunk":
                self._take_chunk(event.chunk)
            case "completed":
                self.completed = event.completed
                self.num_ends += 1

    def _take_chunk(self, chunk: pb.Chunk) -> None:
        tokens = self.tokens.setdefault(chunk.index, [])
        if chunk.position != len(tokens):
            self.faults.append(f"sample {chunk.index} goes on at {chunk.position}, {len(tokens)} tokens have come")
        if chunk.index in self.reasons:
            self.faults.append(f"sample {chunk.index} goes on after its end")
        tokens.extend(chunk.token_ids)
        self.text[chunk.index] = self.text.get(chunk.index, "") + chunk.text
        self.logprobs.setdefault(chunk.index, []).extend((item.token_id, item.logprob) for item in chunk.logprobs)
        if chunk.finish_reason:
            self.reasons[chunk.index] = chunk.finish_reason
        if chunk.token_ids:
            self.times_s.append(now_s())


class Asking(threading.Thread):
    """A client that asks and reads. It has a connection of its own if it is told where to ask. It waits for one of `turns`, if
    given."""

    def __init__(
        self,
        client: Client | str,
        asked: Asked,
        delay_s: float = 0.0,
        turns: contextlib.AbstractContextManager[object] | None = None,
    ) -> None:
        super().__init__(name=asked.key, daemon=True)
        self.asked = asked
        self.got = Got()
        self._own = client if isinstance(client, str) else ""
        self._client = Client(client) if isinstance(client, str) else client
        self._delay_s = delay_s
        self._turns = turns or contextlib.nullcontext()
        self._pause = threading.Event()

    def run(self) -> None:
        self._pause.wait(self._delay_s)
        with self._turns:
            self._ask()

    def _ask(self) -> None:
        spec, got = self.asked.spec, self.got
        got.began_s = now_s()
        try:
            stream = self._client.generate(self.asked.prompt, self.asked.sampling(), timeout_s=spec.timeout_s)
            for event in stream:
                got.take(event)
                got.num_resumes = stream.num_resumes
                if spec.leaves_at is not None and got.accepted_s is not None and got.num_tokens >= spec.leaves_at:
                    got.left = True
                    break
                if spec.pause_s and got.num_tokens >= spec.pause_at and not self._pause.is_set():
                    self._pause.wait(spec.pause_s)
                    self._pause.set()
        except TandemError as error:
            got.error = error
            got.num_ends += 1
        finally:
            got.ended_s = now_s()
            if self._own:
                self._client.close()


def prompts(specs: Sequence[RequestSpec], nonce: int) -> list[Asked]:
    """The requests of a drill. Those of another nonce share no prefix with them."""
    by_name: dict[str, list[str]] = {}
    asked: list[Asked] = []
    for spec in specs:
        rng = random.Random(f"{nonce}/{spec.name}")
        texts = by_name.get(spec.again) or [_prompt(rng, spec.words) for _ in range(spec.distinct or spec.count)]
        by_name[spec.name] = texts
        asked += [Asked(spec, number, texts[number % len(texts)]) for number in range(spec.count)]
    return asked


def _prompt(rng: random.Random, num_words: int) -> str:
    return f"Story {rng.randrange(10**9)}: " + " ".join(rng.choice(_WORDS) for _ in range(num_words))


class Truth:
    """What the fault-free cluster behind `client` answers."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def of(self, asked: Sequence[Asked]) -> tuple[list[Asked], dict[str, Got]]:
        """The answers by key, and the requests with their stop strings. Raises TandemError if one does not complete."""
        different = [one for one in asked if one.variant == one.number]
        free = self._ask([_without_stop(one) for one in different])
        stopping = {
            one.key: _with_stop(one, free[one.key], self._client) if one.spec.stop_at else one for one in different
        }
        truth = free | self._ask([one for one in stopping.values() if one.stop])
        same = {one.key: f"{one.spec.name}-{one.variant}" for one in asked}
        with_stops = [Asked(one.spec, one.number, one.prompt, stopping[same[one.key]].stop) for one in asked]
        return with_stops, {key: truth[other] for key, other in same.items()}

    def _ask(self, asked: Sequence[Asked]) -> dict[str, Got]:
        asking = [Asking(self._client, _patient(one)) for one in asked]
        for one in asking:
            one.start()
        for one in asking:
            one.join()
            if one.got.completed is None or one.got.faults:
                raise TandemError(f"the fault-free run of {one.asked.key}: {one.got.error or one.got.faults}")
        return {one.asked.key: one.got for one in asking}


def _patient(asked: Asked) -> Asked:
    """Its client stays to the end."""
    spec = msgspec.structs.replace(asked.spec, leaves_at=None, pause_s=0.0, timeout_s=120.0)
    return Asked(spec, asked.number, asked.prompt, asked.stop)


def _without_stop(asked: Asked) -> Asked:
    return Asked(asked.spec, asked.number, asked.prompt)


def _with_stop(asked: Asked, free: Got, client: Client) -> Asked:
    """What comes after the text of the first `stop_at` tokens, as much of it as has not come before."""
    spec = msgspec.structs.replace(
        asked.spec, max_tokens=asked.spec.stop_at, leaves_at=None, pause_s=0.0, n=1, logprobs=-1
    )
    short = Asking(client, Asked(spec, asked.number, asked.prompt))
    short.run()
    text = free.text[0]
    begin = len(short.got.text.get(0, "").rstrip("\ufffd"))
    for length in range(3, 65):
        if text.find(stop := text[begin : begin + length]) == begin:
            return Asked(asked.spec, asked.number, asked.prompt, stop)
    raise TandemError(f"{asked.key}: nothing new comes after its {asked.spec.stop_at}-th token")
