"""Clients: what they ask, what they do when a router dies, and whether what they get is right.

Owns every request from its first submission to its terminal message. A client whose router dies, or doesn't answer for long, goes
on at another one with the tokens that it has. Some leave early, some have no time, some end at a stop string.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from protos.control import FinishReason, Sampling
from router.actions import CompletedEvent, FailedEvent, RequestEvent, TokensEvent
from router.journal import Request, Resumed, SoFar
from tandem.errors import TandemError
from tandem.sim.faults.cluster import Cluster
from tandem.sim.faults.fake_model import EOS, ROOT, VOCAB
from tandem.sim.faults.router_node import RouterNode
from tandem.sim.faults.shape import Shape
from tandem.sim.faults.truth import Asked
from tandem.sim.faults.world import Violation, World

STREAM_S = 0.001
"""From a router to its client."""
RESUME_S = (0.05, 0.3)
ACCEPTED_FAILURES = frozenset({"worker_lost", "unavailable", "quarantined", "fetch_failed"})
"""How a request may end that was unlucky: its workers died too often, or none was there for long."""


@dataclass(eq=False, slots=True)
class Waiting:
    """One request whose client waits."""

    asked: Asked
    deadline_s: float
    short: bool
    """Its deadline is one that it may miss."""
    cancel_after: int
    """It is cancelled when so many tokens have come; 0: it isn't."""
    tokens: list[list[int]]
    reasons: list[FinishReason | None]
    router: RouterNode | None = None
    resume_no: int = 0
    cancelled: bool = False


@dataclass(slots=True)
class Totals:
    """How requests ended."""

    num_asked: int = 0
    num_completed: int = 0
    num_resumed: int = 0
    num_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


class Clients:
    """All clients of one run. `connect` first."""

    def __init__(self, world: World, shape: Shape) -> None:
        self._world = world
        self._shape = shape
        self._rng: random.Random = world.generator("clients")
        self.waiting: dict[str, Waiting] = {}
        self._over: dict[str, tuple[RouterNode | None, int]] = {}
        """Ended requests: who ended them, in which call."""
        self.totals = Totals()
        prefixes = [self._tokens(self._rng.choice((4, 8, 12))) for _ in range(6)]
        self._prefixes = prefixes
        self._cluster: Cluster

    def connect(self, cluster: Cluster) -> None:
        self._cluster = cluster

    # --- asking ---------------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """One more request comes."""
        rng, shape = self._rng, self._shape
        length = rng.randrange(*shape.prompt_tokens)
        prefix = rng.choice(self._prefixes) if rng.random() < 0.6 else []
        prompt = [*prefix, *self._tokens(length - len(prefix))]
        sampling = Sampling(
            max_tokens=rng.randrange(*shape.answer_tokens),
            seed=rng.randrange(1000),
            stop_token_ids=[EOS] if rng.random() < 0.3 else [],
        )
        n = 2 if rng.random() < 0.05 else 1
        stop = frozenset(rng.sample(range(1, VOCAB), 4)) if rng.random() < 0.1 else frozenset[int]()
        request_id = f"request-{self.totals.num_asked}"
        self.totals.num_asked += 1
        asked = self._cluster.truth.add(request_id, prompt, sampling, n, stop)
        short = rng.random() < 0.03
        waiting = Waiting(
            asked,
            self._world.now_s + (rng.uniform(0.05, 0.8) if short else shape.deadline_s),
            short,
            rng.randrange(1, 10) if rng.random() < 0.04 else 0,
            [[] for _ in range(n)],
            [None] * n,
        )
        self.waiting[request_id] = waiting
        self._submit(waiting)

    def _tokens(self, num: int) -> list[int]:
        return [self._rng.randrange(VOCAB) for _ in range(num)]

    def _submit(self, waiting: Waiting) -> None:
        """At a router that answers; later, if none does."""
        asked, world = waiting.asked, self._world
        if self.waiting.get(asked.request_id) is not waiting:
            return
        routers = [router for router in self._cluster.routers if router.alive and not router.frozen]
        if not routers:
            world.after(self._rng.uniform(*RESUME_S), lambda: self._submit(waiting))
            return
        router = waiting.router = self._rng.choice(routers)
        resumed = None
        if waiting.resume_no:
            had = [SoFar(tuple(t), r) for t, r in zip(waiting.tokens, waiting.reasons, strict=True)]
            resumed = Resumed(waiting.resume_no, ROOT, tuple(had))
            self.totals.num_resumed += 1
        left_s = max(0.0, waiting.deadline_s - world.now_s)
        request = Request(
            asked.request_id,
            asked.prompt,
            asked.sampling,
            asked.n,
            world.now_s + router.offset_s + left_s,
            resumed=resumed,
        )
        errors: list[TandemError | None] = []
        router.run(lambda: errors.append(router.submit(request, asked.stop)))
        if errors[0] is not None:
            self._end(waiting, FailedEvent(errors[0]))

    # --- routers --------------------------------------------------------------------------------------------------------

    def lost(self, router: RouterNode) -> None:
        """The streams of this router broke off; it doesn't answer any more."""
        for waiting in self.waiting.values():
            if waiting.router is router:
                self._go_elsewhere(waiting)

    def _go_elsewhere(self, waiting: Waiting) -> None:
        waiting.router = None
        waiting.resume_no += 1
        self._world.after(self._rng.uniform(*RESUME_S), lambda: self._submit(waiting))

    def give_up(self, router: RouterNode) -> None:
        """The router has been silent for long: clients go elsewhere, and it learns that their connections are closed."""
        for waiting in self.waiting.values():
            if waiting.router is router:
                call = waiting.asked.request_id, waiting.resume_no
                router.run(lambda call=call: router.cancel(*call))  # type: ignore[misc]
                self._go_elsewhere(waiting)

    # --- what comes -----------------------------------------------------------------------------------------------------

    def show(self, router: RouterNode, request_id: str, resume_no: int, event: RequestEvent) -> None:
        """A router has something for a client, whom it reaches a moment later if the router lives so long and the client still
        reads that call."""
        self._world.after(STREAM_S, lambda: self._see(router, request_id, resume_no, event))

    def _see(self, router: RouterNode, request_id: str, resume_no: int, event: RequestEvent) -> None:
        waiting = self.waiting.get(request_id)
        if waiting is None:
            if self._over.get(request_id) == (router, resume_no):
                raise Violation(f"{request_id} was sent {event} after its terminal message")
            return
        if waiting.router is not router or waiting.resume_no != resume_no or not router.alive:
            return
        if isinstance(event, TokensEvent):
            self._take(waiting, event)
        else:
            self._end(waiting, event)

    def _take(self, waiting: Waiting, event: TokensEvent) -> None:
        asked, tokens = waiting.asked, waiting.tokens[event.index]
        name = f"{asked.request_id}[{event.index}]"
        if waiting.reasons[event.index] is not None:
            raise Violation(f"{name} was sent tokens after its end")
        if event.position != len(tokens):
            raise Violation(f"{name} was sent position {event.position} and has {len(tokens)} tokens")
        tokens.extend(event.token_ids)
        self.totals.num_tokens += len(event.token_ids)
        shown = asked.shown[event.index]
        if tuple(tokens) != shown[: len(tokens)]:
            raise Violation(f"{name} was sent {tokens}, the truth is {list(shown)}")
        waiting.reasons[event.index] = event.finish_reason
        if event.finish_reason is not None and tuple(tokens) != shown:
            raise Violation(f"{name} ended with {len(tokens)} tokens, the truth has {len(shown)}")
        if waiting.cancel_after and not waiting.cancelled and len(tokens) >= waiting.cancel_after:
            waiting.cancelled = True
            router = waiting.router
            assert router is not None
            resume_no = waiting.resume_no
            router.run(lambda: router.cancel(asked.request_id, resume_no))

    def _end(self, waiting: Waiting, event: RequestEvent) -> None:
        asked = waiting.asked
        request_id = asked.request_id
        del self.waiting[request_id]
        self._over[request_id] = (waiting.router, waiting.resume_no)
        match event:
            case CompletedEvent():
                self.totals.num_completed += 1
                for index, tokens in enumerate(waiting.tokens):
                    if tuple(tokens) != asked.shown[index]:
                        raise Violation(
                            f"{request_id}[{index}] is complete with {tokens}, the truth is {asked.shown[index]}"
                        )
                outcome = "completed"
            case FailedEvent(error=error):
                outcome = error.code
                expected = (
                    outcome in ACCEPTED_FAILURES
                    or (outcome == "cancelled" and waiting.cancelled)
                    or (outcome == "deadline_exceeded" and waiting.short)
                )
                if not expected:
                    raise Violation(f"{request_id} ended with {outcome}: {error}")
        self.totals.outcomes[outcome] += 1
        if outcome != "completed":
            self._world.tell(
                f"{request_id} ends: {outcome}" + (f" ({event.error})" if isinstance(event, FailedEvent) else "")
            )
