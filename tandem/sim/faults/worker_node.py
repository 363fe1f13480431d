"""A worker in virtual time: the production threads of `tandem/worker_loop.py`, each driven step by step.

Owns the arena, pool and engine of one incarnation and when its two threads get their turns. The threads, the sockets' users, the
engine and everything below are production code; what is virtual is the model (`fake_model`), the sockets, the transports, and how
long a step takes. A step's results are there when its time is over; between its begin and its end the engine takes nothing in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

from kvpool.arena import Arena
from kvpool.block_pool import BlockPool
from kvpool.layout import KVLayout
from tandem.config import Config
from tandem.engine.build import EngineParts
from tandem.engine.engine import Engine
from tandem.engine.limits import EngineLimits
from tandem.engine.output import Output
from tandem.sim.faults.fake_model import BLOCK_SIZE, GROUP, SLAB_BYTES, VOCAB, ArenaMemory, FakeRunner, sample
from tandem.sim.faults.network import Context, Network, NoPoller
from tandem.sim.faults.shape import Shape
from tandem.sim.faults.transport import Memories, Memory, VirtualTransport
from tandem.sim.faults.world import SHORTEST_WAIT_S, Process, World
from tandem.worker_loop import EngineThread, Input, TransferThread

IDLE_WAIT_S = 0.05
"""As in the worker's loop."""
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=BLOCK_SIZE, dtype="bf16")


class _Engine(EngineThread):
    """The engine thread, without a thread."""

    def __init__(self, parts: EngineParts, node: WorkerNode) -> None:
        super().__init__(parts)
        self._node = node

    def post(self, message: Input) -> None:
        super().post(message)
        self._node.wake_engine()

    def take_in(self) -> None:
        self._intake(block=False)

    @property
    def has_input(self) -> bool:
        return not self._inbox.empty()


class _Transfer(TransferThread):
    """The transfer thread, without a thread."""

    node: WorkerNode

    def wake(self) -> None:
        self.node.wake()

    def _open_incarnation(self) -> None:
        super()._open_incarnation()
        self.node.opened()

    @property
    def service(self) -> Any:
        return self._service

    @property
    def link(self) -> Any:
        return self._link

    @property
    def unacknowledged(self) -> Any:
        return self._unacknowledged


class WorkerNode(Process):
    """One process of a worker; `epoch` is its present incarnation."""

    def __init__(
        self,
        world: World,
        network: Network,
        memories: Memories,
        config: Config,
        shape: Shape,
        *,
        role: Literal["prefill", "decode"],
        name: str,
        machine: str,
        offset_s: float,
        transports: tuple[str, ...],
        serves: Callable[[str, Memory], None],
    ) -> None:
        super().__init__(world, name, machine, offset_s)
        rng = world.generator(f"{name} {world.now_s}")
        self.epoch = rng.randbytes(8)
        self.role = role
        self.arena = Arena(shape.worker_blocks, SLAB_BYTES)
        self.arena.array[:] = 0xDD
        self.pool = BlockPool(shape.worker_blocks, BLOCK_SIZE, "DEVICE")
        self.runner = FakeRunner(self.arena, self._took)
        limits = EngineLimits(
            max_model_len=shape.max_model_len,
            vocab_size=VOCAB,
            max_running=shape.max_running,
            max_step_tokens=shape.max_step_tokens,
            recompute_limit_tokens=shape.recompute_limit_tokens,
            fetch_timeout_s=config.transfer.fetch_timeout_s,
            block_size=BLOCK_SIZE,
            slab_bytes=SLAB_BYTES,
        )
        self.engine = Engine(
            pool=self.pool,
            memory=ArenaMemory(self.arena),
            runner=cast(Any, self.runner),
            limits=limits,
            new_fetch_id=lambda: rng.randbytes(16),
            writer=self.epoch,
            sampler=cast(Any, sample),
        )
        nothing = cast(Any, None)
        parts = EngineParts(
            engine=self.engine,
            runner=nothing,
            model=nothing,
            layout=LAYOUT,
            arena=self.arena,
            pool=self.pool,
            limits=limits,
            group=GROUP,
            numerics=nothing,
            native=None,
            compiling=nothing,
        )
        self._context = Context(network, self)
        self._step_s = 0.0
        self._is_stepping = False
        self._engine_due_s: float | None = None
        self.stuck_s = 0.0
        """The next step takes so much longer."""
        self.engine_thread = _Engine(parts, self)
        self.transfer = _Transfer(
            config, parts, self.engine_thread, role, name, "", self.epoch, lambda: rng.randbytes(8)
        )
        self.transfer.node = self
        self.engine_thread.connect(self.transfer)
        self._memories = memories
        self._serves = serves
        self._kinds = transports
        self.run(self._open)

    def _open(self) -> None:
        self.transfer.open(cast(Any, self._context), self._transports_of, self.machine, cast(Any, NoPoller()))
        self.wake()

    def _transports_of(self, epoch: bytes) -> list[VirtualTransport]:
        self.epoch = epoch
        self._memory = Memory(self, self.arena, self.pool)
        return [VirtualTransport(kind, self._memories, self._memory) for kind in self._kinds]

    def opened(self) -> None:
        """An incarnation listens."""
        self._serves(self.transfer.service.endpoints.fetch, self._memory)

    @property
    def is_busy(self) -> bool:
        return self.frozen or self._is_stepping

    # --- the transfer thread ---------------------------------------------------------------------------------------------

    def turn(self) -> float:
        ready, self.ready = self.ready, {}
        return self.transfer.turn(cast(Any, ready))

    # --- the engine thread -----------------------------------------------------------------------------------------------

    def wake_engine(self) -> None:
        """There is something for it to take in, when the running step is over."""
        if not self._is_stepping:
            self._step_at(self.world.now_s)

    def _step_at(self, time_s: float) -> None:
        if self._engine_due_s is None or time_s < self._engine_due_s:
            self._engine_due_s = time_s
            self.world.at(time_s, lambda: self.run(self._on_engine_due))

    def _on_engine_due(self) -> None:
        if self._is_stepping or self._engine_due_s is None or self._engine_due_s > self.world.now_s:
            return
        self._engine_due_s = None
        self._step_s = 0.0
        self.engine_thread.take_in()
        output = self.engine_thread.begin_step()
        self.lead_s = 0.0
        if not output.computed:
            self._end_step(output)
            return
        self._is_stepping = True
        self.after(self._step_s, lambda: self._end_step(output))

    def _end_step(self, output: Output) -> None:
        self._is_stepping = False
        self.engine_thread.end_step(output)
        if self.engine_thread.has_input:
            self._step_at(self.world.now_s)
        elif self.engine.has_work:
            self._step_at(self.world.now_s + (0.0 if output.computed else SHORTEST_WAIT_S))
        elif not self.engine.is_idle:
            self._step_at(self.world.now_s + IDLE_WAIT_S)

    def _took(self, seconds: float) -> None:
        seconds += self.stuck_s
        self.stuck_s = 0.0
        self._step_s = self.lead_s = seconds

    def died(self) -> None:
        self._context.destroy()
        self.transfer.close()
