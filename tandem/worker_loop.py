"""The two threads of a worker: the engine thread computes, the transfer thread talks (design §7).

Owns the worker's process: builds the engine, joins the routers, moves blocks, and leaves as `tandem/drain.py` says. The
threads share the `BlockPool` (under its lock) and two queues; nothing else. A long step never delays a heartbeat or a fetch.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import zmq

from kvpool.peer_lists import PeerLists
from kvpool.service import KVService
from kvpool.sink import FetchedBatch, FetchEnded
from kvpool.transport.base import Transport
from kvpool.transport.build import make_transports
from protos import control
from protos.control import (
    Abort,
    Aborted,
    Ack,
    Audit,
    Capacity,
    Counters,
    Dispatch,
    Failed,
    FirstTokens,
    FromRouter,
    Goodbye,
    Heartbeat,
    Hello,
    Leave,
    Load,
    Owned,
    Peers,
    Resend,
    Started,
    Tokens,
)
from tandem.clock import now_s
from tandem.config import Config, WorkerConfig
from tandem.cores import Cores, claim_cores
from tandem.curve import Keyring, load_keyring
from tandem.drain import Drain, Step
from tandem.engine.build import EngineParts, build_engine
from tandem.engine.output import Output
from tandem.engine.runner import Runner
from tandem.errors import ConfigError
from tandem.machine import check_memory, machine_id
from tandem.model_files import default_model_name, resolve_model
from tandem.state_file import StateFile
from tandem.stop import ends_at_once
from tandem.unacknowledged import Unacknowledged
from tandem.zap import Zap
from tandem.zmq_io import RouterLink, identity

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.05
"""How long the engine thread sleeps at most: deadlines, stops and room that another thread freed are noticed so late."""
_GOODBYE_LINGER_MS = 200
_MAX_FORMER_EPOCHS = 64
_STARTED_WAIT_S = 0.1
"""A step waits at most so long until the word that it begins has been sent: some 0.1 ms when the transfer thread is idle."""

SWITCH_INTERVAL_S = 0.0005
"""A thread that wants to run Python waits at most so long for the other one. The default, 5 ms, is a good part of a step: blocks
that are ready would wait for it."""

Input = Callable[[], None]


class WorkerLoop:
    """One worker. `run` returns when `stop` is set and the worker has left, and raises what ended it otherwise."""

    def __init__(self, config: Config, worker: WorkerConfig, *, role: Literal["prefill", "decode"], name: str) -> None:
        self._config = config
        self._worker = worker
        self._role: Literal["prefill", "decode"] = role
        self._name = name

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop`, then finishes what it has, or gives it back after `drain_s`.

        Raises TandemError if the model can't be loaded or a router refuses this worker."""
        with StateFile(self._config.run_path, self._name) as state_file:
            self._run(stop, state_file)

    def _run(self, stop: threading.Event, state_file: StateFile) -> None:
        check_memory(f"{self._role}.arena_bytes", self._worker.arena_bytes)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        keys = load_keyring(self._config.control.curve, self._name, self._role)
        path = resolve_model(self._config.model.path)
        log.info("loading %s", path.name)
        epoch = secrets.token_bytes(8)
        parts = build_engine(
            path,
            self._config.model.dtype,
            self._worker,
            weights=self._config.model.weights,
            max_len=self._config.model.max_len,
            fetch_timeout_s=self._config.transfer.fetch_timeout_s,
            epoch=epoch,
        )
        log.info(
            "holding %d blocks of %d bytes; joining %s",
            parts.pool.num_blocks,
            parts.layout.slab_bytes,
            ", ".join(self._config.router.control_endpoints),
        )
        parts.arena.populate()
        model_name = self._config.model.name or default_model_name(path)
        engine_thread = EngineThread(parts)
        transfer = TransferThread(
            self._config,
            parts,
            engine_thread,
            self._role,
            self._name,
            model_name,
            epoch,
            keys=keys,
            state_file=state_file,
        )
        engine_thread.connect(transfer)
        parts.compiling.on_ready = lambda: engine_thread.post(lambda: None)
        transfer.on_leave = stop.set
        cores = claim_cores(self._worker.threads) if self._worker.pin else None
        thread = threading.Thread(target=transfer.run, name="transfer")
        thread.start()
        ended_well = False
        try:
            if self._worker.pin:
                self._pin(parts.runner, cores)
            engine_thread.run(stop, transfer, self._worker.drain_s)
            ended_well = True
        finally:
            transfer.stop(goodbye=ended_well)
            thread.join()
            transfer.close()
            parts.compiling.close()
            parts.arena.close()
            if cores is not None:
                cores.close()
        if transfer.error is not None:
            raise transfer.error

    @staticmethod
    def _pin(runner: Runner, cores: Cores | None) -> None:
        """The threads that compute, not those that talk: they are short of work and go where there is room."""
        if cores is None:
            log.info("too few cores are left for one each: threads run where the system puts them")
        elif runner.pin(cores.ids):
            log.info("computing on core %s", ", ".join(map(str, cores.ids)))
        else:
            log.info("threads are not pinned to cores %s: the system doesn't let it, or torch computes", cores.ids)
            cores.close()


class EngineThread:
    """schedule → run → postprocess, and a queue of what others want the engine to know."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._engine = parts.engine
        self._inbox: queue.SimpleQueue[Input] = queue.SimpleQueue()
        self._publish: Callable[[Output], None] = lambda output: None
        self.step_id = 0
        self.step_began_s: float | None = None
        self.loads: dict[int, Load] = {}
        self.counters = Counters()
        self._checked = True

    def connect(self, transfer: TransferThread) -> None:
        self._publish = transfer.take_output
        self._engine.on_output = transfer.take_output
        self._engine.on_published = transfer.wake

    def post(self, message: Input) -> None:
        """From any thread: `message` is called on the engine thread before its next step."""
        self._inbox.put(message)

    def run(self, stop: threading.Event, transfer: TransferThread, drain_s: float) -> None:
        self._engine.on_output = transfer.take_before_step
        drain: Drain | None = None
        while transfer.error is None and not ends_at_once(stop):
            if stop.is_set() and drain is None:
                drain = Drain(now_s(), drain_s)
                self._engine.leave()
                transfer.leave()
            self._intake(block=not self._engine.has_work)
            if drain is not None and self._has_left(drain):
                break
            self.end_step(self.begin_step())
        self._publish(self._engine.take_output())

    def _has_left(self, drain: Drain) -> bool:
        is_read = self._parts.pool.stats().leased > 0
        step = drain.step(now_s(), has_work=not self._engine.is_idle, is_read=is_read)
        if step is Step.GIVE_BACK:
            log.info("giving back what isn't finished")
            self._engine.give_back()
        return step is Step.END

    def begin_step(self) -> Output:
        """Computes a step; `end_step` has to follow."""
        self.step_id += 1
        self.step_began_s = now_s()
        return self._engine.step(self.step_began_s, now_s)

    def end_step(self, output: Output) -> None:
        """The step is over: says what came of it."""
        self.step_began_s = None
        self.loads = self._engine.loads()
        self.counters = self._engine.counters()
        if not output.is_empty:
            self._publish(output)
        if not self._engine.is_idle:
            self._checked = False
        elif not self._checked and self._inbox.empty():
            self._parts.pool.check()
            self._checked = True

    def _intake(self, *, block: bool) -> None:
        try:
            if block:
                self._inbox.get(timeout=_IDLE_WAIT_S)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass


class TransferThread:
    """Sockets, copies, checksums, heartbeats. Everything it owns is touched by its thread alone, but for `take_output`,
    `leave`, `stop` and `error`.

    Between `open` and its end it is one incarnation after the other, each with an epoch, a service and a link of its own
    (docs/decisions/0026). What the engine says for a former one is not sent.
    """

    def __init__(
        self,
        config: Config,
        parts: EngineParts,
        engine: EngineThread,
        role: Literal["prefill", "decode"],
        name: str,
        model: str,
        epoch: bytes,
        new_epoch: Callable[[], bytes] = lambda: secrets.token_bytes(8),
        keys: Keyring | None = None,
        state_file: StateFile | None = None,
    ) -> None:
        self._config = config
        self._parts = parts
        self._state_file = state_file
        self._new_epoch = new_epoch
        self._keys = keys
        self._zap: Zap | None = None
        self._former_epochs: list[bytes] = []
        self._is_fenced = False
        """The engine still has work of a former incarnation."""
        self._polled: list[zmq.Socket[bytes]] = []
        self._lost_all = False
        """There was a router, and there is none left."""
        self._engine = engine
        self._role: Literal["prefill", "decode"] = role
        self._name = name
        self._model = model
        self._epoch = epoch
        self._outputs: queue.SimpleQueue[Output | Callable[[], None]] = queue.SimpleQueue()
        """What the engine said, and what to call when all before it was sent."""
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._says_goodbye = False
        self._leaving = False
        self._told_leaving = False
        self._unacknowledged = Unacknowledged()
        self._peer_lists = PeerLists()
        self._peers: set[tuple[str, bytes]] = set()
        self.error: BaseException | None = None

        self.on_leave: Callable[[], None] = lambda: None
        """A router asked this worker to leave."""

    # --- from other threads ------------------------------------------------------------------------------------------

    def take_output(self, output: Output) -> None:
        """What the engine has to say, to be sent."""
        self._outputs.put(output)
        self.wake()

    def take_before_step(self, output: Output) -> None:
        """What the engine has to say before it computes. What the step begins to compute has been sent when this returns, if
        that goes soon: the step may be the last thing that this process does."""
        self.take_output(output)
        if any(isinstance(reply, Started) for _, reply in output.replies):
            sent = threading.Event()
            self._outputs.put(sent.set)
            sent.wait(_STARTED_WAIT_S)

    def wake(self) -> None:
        """There is something new in the pool."""
        os.eventfd_write(self._wake_fd, 1)

    def leave(self) -> None:
        """Tells the routers at once, and with every heartbeat, that this worker takes no more dispatches."""
        self._leaving = True
        self.wake()

    def stop(self, *, goodbye: bool) -> None:
        """Ends the thread after it has sent all that the engine said. Without `goodbye` the process has failed, and its end is to
        be taken for the death that it is."""
        self._says_goodbye = goodbye
        self._stopping = True
        self.wake()

    def close(self) -> None:
        """Gives up what other threads reach it by. The thread must have ended, and nobody may call any more."""
        os.close(self._wake_fd)

    # --- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            log.exception("the transfer thread ended")
            self.error = error
            self._engine.post(lambda: None)

    def _serve(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        transfer = self._config.transfer
        machine = transfer.machine_id or machine_id()
        native = self._parts.native
        try:
            self.open(
                context,
                lambda epoch: make_transports(transfer, self._parts.arena, epoch, machine_id=machine, native=native),
                machine,
                zmq.Poller(),
            )
            try:
                self._poll_until_stopped()
                self._send_outputs()
                if self._says_goodbye:
                    self._link.send_all(Goodbye(self._name, self._epoch))
            finally:
                self._close_incarnation()
        finally:
            if self._zap is not None:
                self._zap.close()
            context.term()

    def open(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        transports_of: Callable[[bytes], Sequence[Transport]],
        machine: str,
        poller: zmq.Poller,
    ) -> None:
        """Listens, and begins to dial the routers. `transports_of` makes those of an epoch, which end with it; `poller` is what
        learns of all that can become `ready`. Closes what it opened if it raises."""
        self._context = context
        self._transports_of = transports_of
        self._machine = machine
        self._poller = poller
        if self._keys is not None:
            self._zap = Zap(context, self._keys.allowed)
            poller.register(self._zap.socket, zmq.POLLIN)
        self._open_incarnation()

    def _open_incarnation(self) -> None:
        context, machine, transfer = self._context, self._machine, self._config.transfer
        self._service = KVService(
            context=context,
            pool=self._parts.pool,
            arena=self._parts.arena,
            process=self._name,
            epoch=self._epoch,
            bind_host=transfer.host,
            advertised_host=transfer.advertised_host,
            transports=self._transports_of(self._epoch),
            machine_id=machine,
            lease_s=transfer.lease_s,
            grace_s=transfer.grace_s,
            on_blocks=self._on_blocks,
            on_ended=self._on_ended,
            on_kept=lambda: self._engine.post(lambda: None),
            peer_bytes_per_s=transfer.peer_bytes_per_s,
            keys=self._keys,
        )
        try:
            self._link = RouterLink(
                context,
                self._config.router.control_endpoints,
                identity=identity(self._name, self._epoch),
                make_hello=self._hello,
                make_heartbeat=self._heartbeat,
                on_message=self._on_message,
                on_refused=self._on_refused,
                on_lost=self._on_router_lost,
                keys=self._keys,
            )
        except BaseException:
            self._service.close()
            raise
        self._polled = self._link.sockets()
        for socket in self._polled:
            self._poller.register(socket, zmq.POLLIN)
        self._service.register(self._poller)

    def _close_incarnation(self) -> None:
        for socket in self._polled:
            self._poller.unregister(socket)
        self._polled = []
        self._link.close(_GOODBYE_LINGER_MS)
        self._service.close()

    def _fence(self, why: str) -> None:
        """Becomes another incarnation. What routers dispatched to the former one is theirs to dispatch again; the blocks stay and
        are announced anew. Nobody is told of the new one before the engine has dropped the work of the former."""
        log.warning("%s: going on as a new incarnation", why)
        self._former_epochs = [*self._former_epochs, self._epoch][-_MAX_FORMER_EPOCHS:]
        self._lost_all, self._is_fenced = False, True
        epoch = self._new_epoch()
        self._engine.post(lambda: self._fence_engine(epoch))
        self._service.cancel_all(now_s())
        self._link.send_all(Goodbye(self._name, self._epoch))
        self._close_incarnation()
        self._epoch = epoch
        self._unacknowledged = Unacknowledged()
        self._peer_lists = PeerLists()
        self._open_incarnation()

    def _fence_engine(self, epoch: bytes) -> None:
        """On the engine thread."""
        engine = self._parts.engine
        engine.fence(epoch)
        self._outputs.put(engine.take_output())
        self._outputs.put(lambda: self._on_engine_fenced(epoch))
        self.wake()

    def _on_engine_fenced(self, epoch: bytes) -> None:
        """What the engine says from now on is this incarnation's."""
        if epoch == self._epoch:
            self._is_fenced = False

    def _poll_until_stopped(self) -> None:
        self._poller.register(self._wake_fd, zmq.POLLIN)
        due_s = 0.0
        while not self._stopping:
            timeout_ms = max(0, int((due_s - now_s()) * 1000) + 1)
            ready = dict(self._poller.poll(min(timeout_ms, 1000)))
            if ready.pop(self._wake_fd, 0):
                os.eventfd_read(self._wake_fd)
            due_s = self.turn(ready)
            if self._state_file is not None:
                self._show(self._state_file, now_s())

    def _show(self, state_file: StateFile, now_s: float) -> None:
        """A step that doesn't end is no life: the file grows old with it, as for the routers the worker does."""
        began_s = self._engine.step_began_s
        if began_s is None or now_s - began_s <= self._config.router.progress_s:
            state_file.show("leaving" if self._leaving else "joined" if self._link.welcomed else "alone", now_s)

    def turn(self, ready: dict[Any, int]) -> float:
        """Takes in what is `ready`, says and does what the engine wants said and done; when to call again at the latest."""
        if silent_s := self._link.silent_s(now_s()):
            self._fence(f"no router has heard of this process for {silent_s:.1f} s, in which it did not run")
            return now_s()
        if self._zap is not None and ready.pop(self._zap.socket, 0):
            self._zap.handle()
        for socket in self._link.sockets():
            if ready.pop(socket, 0):
                self._link.handle(socket, now_s())
        self._service.handle(ready, now_s())
        self._send_outputs()
        now = now_s()
        if self._leaving and not self._told_leaving:
            self._told_leaving = True
            self._link.heartbeat_now()
        if (gone_s := self._peer_lists.due_s()) is not None and gone_s <= now:
            self._take_peers(self._peer_lists.merged(now), now)
        due_s = min(self._service.tick(now), self._resend(now))
        if not self._is_fenced:
            due_s = min(due_s, self._link.tick(now))
        if self._lost_all:
            self._fence("every router is lost")
            return now_s()
        return due_s

    def _send_outputs(self) -> None:
        while True:
            try:
                output = self._outputs.get_nowait()
            except queue.Empty:
                break
            if not isinstance(output, Output):
                output()
                continue
            now = now_s()
            for fetch_id in output.cancels:
                self._service.cancel_fetch(fetch_id, now)
            for owner, keys in output.promises:
                self._service.promise(owner, keys)
            for plan in output.fetches:
                self._service.start_fetch(plan, now)
            if output.withdrawals:
                self._service.publish_pool_events(
                    now
                )  # who waited for what is there gets it, before the rest is missed
            for owner in output.withdrawals:
                self._service.withdraw(owner, now)
            for router, reply in output.replies if not self._is_fenced else ():
                match reply:
                    case Tokens():
                        self._unacknowledged.add(router, reply, now)
                    case Failed() | Aborted():
                        self._unacknowledged.drop(router, reply.fence)
                    case Owned():
                        reply = self._account(router, reply, now)
                self._link.send(router, reply)
        self._service.publish_pool_events(now_s())

    def _account(self, router: int, jobs: Owned, now: float) -> Owned:
        """What this worker owns: `jobs` is what the engine said of it."""
        owned, _ = self._service.account(now)
        fences = dict.fromkeys([*jobs.fences, *self._unacknowledged.fences(router)])
        return msgspec.structs.replace(
            owned,
            number=jobs.number,
            num_jobs=jobs.num_jobs,
            fences=list(fences)[: control.MAX_AUDITED_FENCES],
            num_stray_blocks=jobs.num_stray_blocks,
        )

    def _resend(self, now: float) -> float:
        for router, tokens in self._unacknowledged.due(now):
            self._link.send(router, tokens)
        due_s = self._unacknowledged.next_due_s()
        return now + 1.0 if due_s is None else due_s

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _on_message(self, router: int, message: FromRouter) -> None:
        engine = self._parts.engine
        post = self._engine.post
        now = now_s()
        match message:
            case Dispatch():
                post(lambda: engine.on_dispatch(router, message, now))
            case FirstTokens(fence=fence, token_ids=token_ids):
                post(lambda: engine.on_first_tokens(router, fence, token_ids, now))
            case Abort(fence=fence, reason=reason):
                self._unacknowledged.drop(router, fence)
                post(lambda: engine.on_abort(router, fence, reason))
            case Ack(fence=fence, index=index, position=position, final=final):
                self._unacknowledged.acknowledge(router, fence, index, position, final, now)
                if final:
                    post(lambda: engine.on_stop_sample(router, fence, index))
            case Peers():
                self._take_peers(self._peer_lists.said(router, message, now), now)
            case Leave(reason=reason):
                log.info("a router asked this worker to leave: %s", reason)
                self.on_leave()
            case Audit(number=number):
                post(lambda: engine.on_audit(router, number))
            case Resend(fence=fence, index=index, position=position):
                kept = self._unacknowledged.from_position(router, fence, index, position)
                for tokens in kept:
                    self._link.send(router, tokens)
                if not kept:
                    post(lambda: engine.on_probe(router, fence))
            case _:
                log.warning("a worker has no use for %s", type(message).__name__)

    def _take_peers(self, peers: Peers | None, now: float) -> None:
        """Pool nodes that left hold nothing of ours any more, and nobody who left answers what we have asked."""
        if peers is None:
            return
        told = {(source.process, source.epoch) for source in (*peers.workers, *peers.pools)}
        for name in sorted(self._peers - told):
            self._service.drop_peer(*name, now)
        for name in told - self._peers:
            self._service.peer_is_back(*name)
        self._peers = told
        self._engine.post(lambda: self._parts.engine.on_pools(peers.pools))

    def _on_router_lost(self, router: int) -> None:
        self._peer_lists.lost(router)
        self._unacknowledged.drop_router(router)
        self._engine.post(lambda: self._parts.engine.on_router_lost(router))
        self._lost_all = not self._link.welcomed

    def _on_refused(self, reason: str) -> None:
        raise ConfigError(f"the router refused {self._name}: {reason}")

    def _on_blocks(self, fetch_id: bytes, batch: FetchedBatch) -> None:
        self._engine.post(lambda: self._parts.engine.on_blocks(fetch_id, batch))

    def _on_ended(self, ended: FetchEnded) -> None:
        now = now_s()
        self._engine.post(lambda: self._parts.engine.on_fetch_ended(ended, now))

    # --- what is said of this worker -----------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        limits = self._parts.limits
        return Hello(
            version=control.PROTOCOL_VERSION,
            process=self._name,
            role=self._role,
            epoch=self._epoch,
            pid=os.getpid(),
            endpoints=self._service.endpoints,
            capacity=Capacity(
                num_blocks=self._parts.pool.num_blocks,
                slab_bytes=self._parts.layout.slab_bytes,
                max_model_len=limits.max_model_len,
                max_running=limits.max_running,
                max_step_tokens=limits.max_step_tokens,
                recompute_limit_tokens=limits.recompute_limit_tokens,
            ),
            group=self._parts.group,
            model=self._model,
            former_epochs=self._former_epochs,
        )

    def _heartbeat(self, router: int) -> Heartbeat:
        stats = self._parts.pool.stats()
        began_s = self._engine.step_began_s
        load = msgspec.structs.replace(
            self._engine.loads.get(router, Load()),
            free_blocks=stats.allocatable,
            cached_blocks=stats.cached,
            leased_blocks=stats.leased,
            empty_blocks=stats.free,
        )
        return Heartbeat(
            process=self._name,
            epoch=self._epoch,
            step_id=self._engine.step_id,
            step_age_s=0.0 if began_s is None else max(0.0, now_s() - began_s),
            events_seq=self._service.events_seq,
            load=load,
            counters=self._service.add_counters(self._engine.counters),
            links=self._service.links(),
            draining=self._leaving,
            peers=self._peer_lists.number(router),
        )
