"""What goes wrong, and when: a schedule drawn from the seed.

Owns the faults that are on, and their ends: every one ends, at the latest when all is healed. A fault comes once in so many
requests; several may be on at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from tandem.sim.faults.clients import Clients
from tandem.sim.faults.cluster import Cluster, Node
from tandem.sim.faults.network import Weather
from tandem.sim.faults.transport import Read
from tandem.sim.faults.world import World

NodeT = TypeVar("NodeT", bound=Node)

PATIENCE_S = 1.5
"""Clients of a router that doesn't answer for so long go elsewhere."""


class Faults:
    """The faults of one run. `strike` lets one happen."""

    def __init__(self, world: World, cluster: Cluster, clients: Clients) -> None:
        self._world = world
        self._cluster = cluster
        self._clients = clients
        self._rng = world.generator("faults")
        self._heals: dict[int, Callable[[], None]] = {}
        self._num = 0
        self.counts: Counter[str] = Counter()
        self._kinds: dict[str, tuple[int, Callable[[], str | None]]] = {
            "crash of a worker": (4, self._crash_worker),
            "freeze": (4, self._freeze),
            "interrupted read": (4, self._interrupt_read),
            "late last words": (2, self._crash_with_late_words),
            "crash of a pool node": (1, self._crash_pool),
            "crash of a machine": (1, self._crash_machine),
            "crash of a router": (2, self._crash_router),
            "freeze of a router": (1, self._freeze_router),
            "partition from a router": (3, self._part_from_router),
            "partition between two": (2, self._part_two),
            "weather": (4, self._weather),
            "slow lines": (2, self._slow_lines),
            "slow worker": (1, self._slow_worker),
            "damaged bytes": (2, self._damage),
            "clock jump": (3, self._jump),
            "endless step": (1, self._stick),
        }

    def strike(self) -> None:
        """One fault, of a kind that is possible now."""
        kinds = list(self._kinds)
        weights = [weight for weight, _ in self._kinds.values()]
        for _ in range(10):
            kind = self._rng.choices(kinds, weights)[0]
            text = self._kinds[kind][1]()
            if text is not None:
                self.counts[kind] += 1
                self._world.tell(f"FAULT {kind}: {text}")
                return

    def heal(self) -> None:
        """Everything is well from now on."""
        self._world.tell("everything heals")
        for heal in list(self._heals.values()):
            heal()

    # --- when it ends ---------------------------------------------------------------------------------------------------

    def _until(self, seconds: float, text: str, heal: Callable[[], None]) -> None:
        """It ends after so long."""
        self._num += 1
        number = self._num

        def end() -> None:
            if self._heals.pop(number, None) is not None:
                self._world.tell(text)
                heal()

        self._heals[number] = end
        self._world.after(seconds, end)

    # --- crashes --------------------------------------------------------------------------------------------------------

    def _crash(self, node: Node, seconds: float, *, unreachable: bool) -> None:
        """Dies now, comes back after so long."""
        name = node.name
        self._cluster.kill(node, unreachable=unreachable)
        self._until(seconds, f"{name} starts again", lambda: self._cluster.start(name))

    def _one(self, nodes: Sequence[NodeT]) -> NodeT | None:
        """One of these that runs."""
        running = [node for node in nodes if node.alive and not node.frozen]
        return self._rng.choice(running) if running else None

    @property
    def _served(self) -> list[Node]:
        """Workers and pool nodes."""
        return [*self._cluster.workers, *self._cluster.pools]

    def _crash_worker(self) -> str | None:
        return self._crash_one(self._one(self._cluster.workers), unreachable=self._rng.random() < 0.3)

    def _crash_pool(self) -> str | None:
        return self._crash_one(self._one(self._cluster.pools), unreachable=self._rng.random() < 0.3)

    def _crash_router(self) -> str | None:
        return self._crash_one(self._one(self._cluster.routers), unreachable=False)

    def _crash_one(self, node: Node | None, *, unreachable: bool) -> str | None:
        if node is None:
            return None
        seconds = self._rng.choice((0.05, self._rng.uniform(0.1, 4.0)))
        self._crash(node, seconds, unreachable=unreachable)
        return f"{node.name}, for {seconds:.2f} s" + (", and nobody is told" if unreachable else "")

    def _crash_with_late_words(self) -> str | None:
        """What it sends before it dies arrives when its successor is there."""
        worker, slow = self._one(self._cluster.workers), self._cluster.network.slow
        if worker is None or worker.name in slow:
            return None
        name, late_s = worker.name, self._rng.uniform(1.0, 3.0)
        slow[name] = late_s

        def die() -> None:
            del slow[name]
            if worker.alive:
                self._crash(worker, 0.05, unreachable=False)

        self._until(0.3, f"{name} dies", die)
        return f"{name}, whose messages take {late_s:.2f} s, dies in a moment"

    def _crash_machine(self) -> str | None:
        pool = self._one(self._cluster.pools)
        if pool is None:
            return None
        on_it = [node for node in self._cluster.nodes.values() if node.machine == pool.machine and node.alive]
        seconds = self._rng.uniform(0.5, 4.0)
        for node in on_it:
            self._crash(node, seconds, unreachable=True)
        return f"{pool.machine} with {', '.join(node.name for node in on_it)}, for {seconds:.2f} s"

    # --- freezes --------------------------------------------------------------------------------------------------------

    def _freeze(self) -> str | None:
        return self._freeze_one(self._one(self._served), self._rng.uniform(0.1, 6.0))

    def _freeze_router(self) -> str | None:
        router, seconds = self._one(self._cluster.routers), self._rng.uniform(0.1, 4.0)
        text = self._freeze_one(router, seconds)
        if router is not None and seconds > PATIENCE_S:
            self._world.after(PATIENCE_S, lambda: self._clients.give_up(router) if router.alive else None)
        return text

    def _freeze_one(self, node: Node | None, seconds: float) -> str | None:
        if node is None:
            return None
        node.freeze()
        self._until(seconds, f"{node.name} thaws", node.thaw)
        return f"{node.name}, for {seconds:.2f} s"

    def _interrupt_read(self) -> str | None:
        memories = self._cluster.memories
        if memories.interrupt is not None:
            return None
        seconds = self._rng.uniform(1.0, 8.0)
        what = self._rng.choice((self._freeze_source, self._part_source))
        memories.interrupt = lambda read: what(read, seconds)
        return "the next one between machines"

    def _freeze_source(self, read: Read, seconds: float) -> None:
        source = read.channel.theirs.process
        if source.alive and not source.frozen:
            source.freeze()
            self._until(seconds, f"{source.name} thaws", source.thaw)
            self._world.tell(f"{source.name} freezes for {seconds:.2f} s while it is read")

    def _part_source(self, read: Read, seconds: float) -> None:
        names = (read.channel.theirs.process.name, read.channel.transport.ours.process.name)
        network = self._cluster.network
        if not network.are_parted(*names):
            network.part(*names, holds=True)
            self._until(seconds, f"{names[0]} and {names[1]} reach each other again", lambda: network.join(*names))
            self._world.tell(f"{names[0]} and {names[1]} are parted for {seconds:.2f} s in the middle of a read")

    # --- lines ----------------------------------------------------------------------------------------------------------

    def _part_from_router(self) -> str | None:
        router = self._one(self._cluster.routers)
        other = self._one(self._served)
        return self._part(router, other)

    def _part_two(self) -> str | None:
        two = self._rng.sample(self._served, 2)
        return self._part(two[0], two[1])

    def _part(self, one: Node | None, other: Node | None) -> str | None:
        if one is None or other is None or self._cluster.network.are_parted(one.name, other.name):
            return None
        names = (one.name, other.name)
        seconds, holds = self._rng.uniform(0.1, 5.0), self._rng.random() < 0.5
        network = self._cluster.network
        network.part(*names, holds=holds)
        self._until(seconds, f"{names[0]} and {names[1]} reach each other again", lambda: network.join(*names))
        what = "held back" if holds else "lost"
        return f"{names[0]} and {names[1]}, for {seconds:.2f} s; messages are {what}"

    def _weather(self) -> str | None:
        network, rng = self._cluster.network, self._rng
        if network.weather != Weather():
            return None
        weather = network.weather = Weather(
            loss=rng.choice((0.0, 0.02, 0.2)),
            doubling=rng.choice((0.0, 0.05, 0.3)),
            reordering=rng.choice((0.0, 0.05, 0.3)),
            late_s=rng.choice((0.01, 0.3, 2.0)),
        )
        seconds = rng.uniform(0.5, 3.0)

        def clear() -> None:
            network.weather = Weather()

        self._until(seconds, "the weather clears", clear)
        return (
            f"for {seconds:.2f} s {weather.loss:.0%} of messages are lost, {weather.doubling:.0%} doubled, "
            f"{weather.reordering:.0%} up to {weather.late_s:g} s late"
        )

    def _slow_lines(self) -> str | None:
        node = self._one(self._served)
        slow = self._cluster.network.slow
        if node is None or node.name in slow:
            return None
        name, delay_s, seconds = node.name, self._rng.choice((0.005, 0.05, 0.3)), self._rng.uniform(0.5, 4.0)
        slow[name] = delay_s
        self._until(seconds, f"the lines of {name} are fast again", lambda: slow.__delitem__(name))
        return f"of {name}, {delay_s:g} s for each message and block, for {seconds:.2f} s"

    def _damage(self) -> str | None:
        memories = self._cluster.memories
        if memories.corruption:
            return None
        memories.corruption = self._rng.choice((0.02, 0.3))
        seconds = self._rng.uniform(0.5, 3.0)

        def stop() -> None:
            memories.corruption = 0.0

        self._until(seconds, "bytes arrive as they were sent", stop)
        return f"{memories.corruption:.0%} of all blocks that are read, for {seconds:.2f} s"

    # --- processes that are not well --------------------------------------------------------------------------------------

    def _slow_worker(self) -> str | None:
        worker = self._one(self._cluster.workers)
        if worker is None:
            return None
        runner, seconds = worker.runner, self._rng.uniform(1.0, 4.0)
        usual_s, runner.base_s = runner.base_s, 0.15

        def hurry() -> None:
            runner.base_s = usual_s

        self._until(seconds, f"{worker.name} is fast again", hurry)
        return f"{worker.name}, for {seconds:.2f} s"

    def _jump(self) -> str | None:
        node = self._one(self._rng.choice((self._cluster.workers, [*self._cluster.routers, *self._served])))
        if node is None:
            return None
        # Within what is tolerated, or so far that all others seem to be silent.
        seconds = self._rng.choice((self._rng.uniform(0.0, 1.0), self._rng.uniform(2.1, 9.0)))
        node.jump(seconds)
        return f"{node.name} is {seconds:.2f} s ahead of before"

    def _stick(self) -> str | None:
        worker = self._one(self._cluster.workers)
        if worker is None:
            return None
        worker.stuck_s = self._rng.uniform(1.0, 8.0)
        return f"{worker.name}, its next step takes {worker.stuck_s:.2f} s longer"
