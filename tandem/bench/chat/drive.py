"""One trial for real: the open loop under the wall clock, a thread for each turn that is being answered.

Owns the threads of a trial and its end: when a trial is over, nothing of it runs, here or in the system.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from tandem.bench.chat.loop import Answer, OpenLoop, Trial, Turn
from tandem.clock import now_s
from tandem.errors import Cancelled

TAIL_S = 10.0
"""How long after the last turn was sent answers are waited for; those that aren't complete then are missed."""
_LOOK_S = 0.25
_JOIN_S = 30.0


class Session(Protocol):
    """What asks one system for the time of a trial. Threads share it."""

    def ask(self, prompt: tuple[int, ...], num_tokens: int) -> Answer:
        """Exactly so many greedy tokens after `prompt`, their times on `now_s`'s clock. Raises TandemError for anything less."""

    def cancel(self) -> None:
        """Ends every `ask` that is under way with an error, and what the system does for it."""


class System(Protocol):
    """A system under load."""

    name: str

    def session(self) -> AbstractContextManager[Session]:
        """For one trial; nothing may be under way when it is left."""


_Outcome = tuple[Turn, Answer | str]


def drive(
    session: Session,
    loop: OpenLoop,
    num_tokens: int,
    stop: threading.Event,
    *,
    patient: bool = False,
    tail_s: float = TAIL_S,
) -> Trial:
    """Runs `loop` from now until its end, or, unless `patient`, until it can't hold any more.

    Raises Cancelled if `stop` is set meanwhile.
    """
    outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
    threads: list[threading.Thread] = []
    began_s = now_s()
    last_due_s = 0.0
    try:
        while not loop.finished:
            if stop.is_set():
                raise Cancelled("stopped while a load was running")
            if loop.hopeless and not patient:
                return loop.trial(given_up=True)
            elapsed_s = now_s() - began_s
            for turn in loop.due(elapsed_s):
                last_due_s = turn.due_s
                threads.append(_sent(session, turn, num_tokens, began_s, outcomes.put))
            if loop.next_s is None and elapsed_s > last_due_s + tail_s:
                session.cancel()  # every turn under way now ends with an error
            wait_s = _LOOK_S if loop.next_s is None else min(_LOOK_S, loop.next_s - (now_s() - began_s))
            _take(loop, outcomes, max(0.0, wait_s))
        return loop.trial()
    finally:
        session.cancel()
        for thread in threads:
            thread.join(_JOIN_S)


def _sent(
    session: Session, turn: Turn, num_tokens: int, began_s: float, put: Callable[[_Outcome], None]
) -> threading.Thread:
    def run() -> None:
        try:
            answer = session.ask(turn.prompt, num_tokens)
        except Exception as error:  # whatever it is, the turn has ended
            put((turn, f"{type(error).__name__}: {error}"))
        else:
            times_s = tuple(time_s - began_s for time_s in answer.times_s)
            put((turn, Answer(answer.token_ids, times_s, answer.num_cached_tokens)))

    thread = threading.Thread(target=run, name="turn", daemon=True)
    thread.start()
    return thread


def _take(loop: OpenLoop, outcomes: queue.SimpleQueue[_Outcome], wait_s: float) -> None:
    """Tells the loop what has ended, the first of it within `wait_s`."""
    try:
        turn, outcome = outcomes.get(timeout=wait_s) if wait_s else outcomes.get_nowait()
    except queue.Empty:
        return
    if isinstance(outcome, str):
        loop.failed(turn, outcome)
    else:
        loop.answered(turn, outcome)
