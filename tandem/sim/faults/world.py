"""Virtual time: the clock, what happens when, and whose turn it is.

Owns the heap of events, the clock and the process that runs now: `tandem.clock.now_s` is its clock, wherever production code
reads it. Everything random comes from generators of one seed, so a seed is a run. It knows nothing of what processes do.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from itertools import count

from tandem.sim.faults.story import Story

Act = Callable[[], None]

BEGIN_S = 1000.0
"""No process' clock begins at 0."""
SHORTEST_WAIT_S = 0.001
"""A loop that asks to be called at once is called after so long, as the system would."""


class Violation(AssertionError):
    """Something happened that must never happen. It names what."""


class World:
    """One run. `run_until` makes it go."""

    def __init__(self, seed: int, story: Story) -> None:
        self.seed = seed
        self.story = story
        self.now_s = BEGIN_S
        self.current: Process | None = None
        self.num_events = 0
        self._heap: list[tuple[float, int, Act]] = []
        self._order = count()

    def generator(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose, so that more use of one changes no other."""
        return random.Random(f"{self.seed} {purpose}")

    def at(self, time_s: float, act: Act) -> None:
        """`act` happens then, after all that was to happen at that time before."""
        heapq.heappush(self._heap, (time_s, next(self._order), act))

    def after(self, delay_s: float, act: Act) -> None:
        heapq.heappush(self._heap, (self.now_s + delay_s, next(self._order), act))

    def local_now_s(self) -> float:
        """The clock of the process that runs."""
        current = self.current
        return self.now_s if current is None else self.now_s + current.offset_s + current.lead_s

    def tell(self, text: str) -> None:
        """A line of the story."""
        self.story.add(self.now_s - BEGIN_S, text)

    def run_until(self, time_s: float) -> None:
        """Everything up to then."""
        heap = self._heap
        while heap and heap[0][0] <= time_s:
            self.now_s, _, act = heapq.heappop(heap)
            self.num_events += 1
            act()
        self.now_s = time_s


class Process:
    """One incarnation of a process, which has turns: at the latest when its last turn said, at once when something is `ready`.

    A frozen one does nothing until it thaws; a dead one nothing ever. Its clock is the world's plus `offset_s`, which only grows,
    and within a step plus what the step has taken so far, `lead_s`.
    """

    def __init__(self, world: World, name: str, machine: str, offset_s: float) -> None:
        self.world = world
        self.name = name
        self.machine = machine
        self.epoch = b""
        self.offset_s = offset_s
        self.lead_s = 0.0
        self.alive = True
        self.frozen = False
        self.unreachable = False
        """It died with its machine: nobody is told that its connections are closed."""
        self.ready: dict[object, int] = {}
        self._due_s: float | None = None
        self._deferred: list[Act] = []

    # --- what a process does --------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Some part of it takes nothing in at the moment."""
        return self.frozen

    def turn(self) -> float:
        """What it does when something is ready or due; when to be called again, by its own clock."""
        raise NotImplementedError

    def died(self) -> None:
        """Gives up what the simulation holds for it."""

    # --- when -----------------------------------------------------------------------------------------------------------

    def run(self, act: Act) -> None:
        """`act` as this process, now, or when it thaws."""
        if not self.alive:
            return
        if self.frozen:
            self._deferred.append(act)
            return
        before, self.world.current = self.world.current, self
        try:
            act()
        finally:
            self.world.current = before

    def after(self, delay_s: float, act: Act) -> None:
        self.world.after(delay_s, lambda: self.run(act))

    def wake(self) -> None:
        """It gets a turn now."""
        self._wake_at(self.world.now_s)

    def _wake_at(self, time_s: float) -> None:
        if self._due_s is None or time_s < self._due_s:
            self._due_s = time_s
            self.world.at(time_s, self._on_due)

    def _on_due(self) -> None:
        if self._due_s is None or self._due_s > self.world.now_s or self.frozen or not self.alive:
            return
        self._due_s = None
        world = self.world
        before, world.current = world.current, self
        try:
            due_s = self.turn() - self.offset_s
        finally:
            world.current = before
        if self.alive:
            self._wake_at(max(due_s, world.now_s + SHORTEST_WAIT_S))

    # --- what happens to it ---------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        deferred, self._deferred = self._deferred, []
        for act in deferred:
            self.run(act)
        self._due_s = None
        self.wake()

    def jump(self, seconds: float) -> None:
        """Its clock goes ahead."""
        self.offset_s += seconds
        self._due_s = None
        self.wake()

    def kill(self, *, unreachable: bool) -> None:
        """It is gone, at once."""
        self.alive = False
        self.unreachable = unreachable
        self._deferred.clear()
        self.died()
