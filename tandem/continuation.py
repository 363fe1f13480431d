"""How a call of Generate goes on when its router is lost: what has come so far, and what to ask next.

Owns what a client has of one answer, and the rules of trying again. Pure: it sends nothing and reads no clock. An answer goes on
with the ticket of its last `Accepted`; one of which no `Accepted` has come is asked for again.
"""

from __future__ import annotations

import random

from protos import tandem_pb2 as pb
from tandem.errors import Draining, Overloaded, RouterLost, TandemError

FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 1.0


class Continuation:
    """One call, from its first request to its end.

    `patience_s` is how long it is tried to reach a router when nothing new comes; `overload_retries` how often a request that was
    refused for lack of room is asked again, when the router says it is worth it.
    """

    def __init__(
        self,
        request: pb.GenerateRequest,
        *,
        deadline_s: float | None,
        patience_s: float,
        overload_retries: int,
        rng: random.Random,
    ) -> None:
        self._request = request
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._overload_retries = overload_retries
        self._rng = rng
        num_samples = request.sampling.n or 1
        self._tokens: list[list[int]] = [[] for _ in range(num_samples)]
        self._reasons = [""] * num_samples
        self._ticket = b""
        self._accepted = False
        self._lost_at_s: float | None = None
        self._pause_s = 0.0
        self._num_lost = 0
        self.num_resumes = 0
        """How often the answer went on at another router, or at the same one after it had been lost."""
        self.completed = False

    def next_request(self) -> pb.GenerateRequest:
        """What to ask now."""
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        if self._ticket:
            request.resume.ticket = self._ticket
            for tokens, reason in zip(self._tokens, self._reasons, strict=True):
                request.resume.samples.add(token_ids=tokens, finish_reason=reason)
        return request

    def remaining_s(self, now_s: float) -> float | None:
        """Until the call's deadline; None if it has none."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - now_s)

    def take(self, response: pb.GenerateResponse) -> bool:
        """Takes what came; whether it is to be shown: a second `Accepted` is not. Raises TandemError for an answer that goes on
        in the wrong place."""
        self._lost_at_s, self._pause_s = None, 0.0
        match response.WhichOneof("event"):
            case "accepted":
                first = not self._accepted
                self._accepted = True
                self._ticket = response.accepted.ticket
                self.num_resumes += not first
                return first
            case "chunk":
                chunk = response.chunk
                if chunk.index >= len(self._tokens):
                    raise TandemError(f"the router sent sample {chunk.index} of {len(self._tokens)}")
                tokens = self._tokens[chunk.index]
                if chunk.position != len(tokens):
                    raise TandemError(f"the answer goes on at token {chunk.position}, {len(tokens)} have come")
                tokens.extend(chunk.token_ids)
                self._reasons[chunk.index] = chunk.finish_reason or self._reasons[chunk.index]
            case "completed":
                self.completed = True
        return True

    def after(self, error: TandemError, now_s: float, *, num_targets: int, reached: bool) -> float | None:
        """The call broke off. Seconds until it is tried again, at the next target unless it was `Overloaded`; None: it is over.
        `reached`: some router has answered this client before. A cluster that never did is not waited for."""
        if self.completed or (self._accepted and not self._ticket):
            return None
        if isinstance(error, Overloaded):
            if self._accepted or self._overload_retries <= 0:
                return None
            self._overload_retries -= 1
            return self._if_in_time(error.retry_after_s, now_s)
        if not isinstance(error, RouterLost | Draining):
            return None
        self._num_lost += 1
        if not reached and self._num_lost >= num_targets:
            return None
        if self._lost_at_s is None:
            self._lost_at_s = now_s
            # Whoever has another router to ask asks it at once; all clients of a lost one must not come in the same instant.
            self._pause_s = FIRST_PAUSE_S
            pause_s = self._rng.uniform(0.0, FIRST_PAUSE_S) if num_targets > 1 else FIRST_PAUSE_S
        else:
            pause_s = self._rng.uniform(0.5, 1.0) * self._pause_s
            self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)
        if now_s + pause_s > self._lost_at_s + self._patience_s:
            return None
        return self._if_in_time(pause_s, now_s)

    def _if_in_time(self, pause_s: float, now_s: float) -> float | None:
        remaining_s = self.remaining_s(now_s)
        return pause_s if remaining_s is None or pause_s < remaining_s else None
