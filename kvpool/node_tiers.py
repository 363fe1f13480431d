"""The tiers of one pool node: HOST, DISK below it if there is one, and the service over both.

Owns the arena, the pools and what moves between them (`tiering`, `expiry`); `Opening` makes them beside the node's loop, since
recovering and preallocating a disk may take a while. Never decides which worker's blocks are kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from kernels.cpu import native
from kvpool.arena import Arena
from kvpool.block_pool import BlockId, BlockPool
from kvpool.expiry import Expiry
from kvpool.keys import Key
from kvpool.service import KVService
from kvpool.sink import FetchedBatch, FetchEnded
from kvpool.tiering import Tiering
from kvpool.tiers.disk.tier import DiskTier
from kvpool.transport.base import Transport
from kvpool.transport.build import make_transports
from protos.control import Capacity, Counters, Load, Owned, RoutingGroup
from protos.kv_events import BlockRemoved, Event
from tandem.clock import now_s
from tandem.config import Config
from tandem.curve import Keyring
from tandem.errors import ConfigError

log = logging.getLogger(__name__)

CLOSE_S = 5.0
"""Opening is waited for so long when the node stops meanwhile."""
FLUSH_S = 5.0
"""A clean stop writes for so long what the disk should have, no longer."""


def group_digest(group: RoutingGroup) -> bytes:
    """What a DISK tier calls the group by whose blocks it holds."""
    return hashlib.sha256(msgspec.msgpack.encode(group)).digest()


@dataclass(frozen=True, slots=True)
class Memory:
    """What is opened before anybody can be served. Close it, unless a `NodeTiers` has taken it over."""

    group: RoutingGroup
    arena: Arena
    pool: BlockPool
    disk: DiskTier | None

    @staticmethod
    def open(config: Config, group: RoutingGroup, slab_bytes: int) -> Memory:
        """Raises ConfigError or StorageFault for what can't be had."""
        settings = config.pool
        num_blocks = settings.host_bytes // slab_bytes
        if num_blocks < 1:
            raise ConfigError(f"pool.host_bytes is {settings.host_bytes}, less than one slab of {slab_bytes} bytes")
        arena = Arena(num_blocks, slab_bytes)
        arena.populate()
        try:
            pool = BlockPool(
                num_blocks,
                group.block_size,
                "HOST",
                policy=settings.eviction,
                quota=settings.quota,
                ttl_s=settings.ttl_s or None,
            )
            disk = None
            if settings.disk.dirs:
                disk = DiskTier(
                    [Path(directory) for directory in settings.disk.dirs],
                    bytes_per_directory=settings.disk.bytes,
                    arena=arena,
                    block_size=group.block_size,
                    group=group_digest(group),
                    native=native(),
                    write_bytes_per_s=settings.disk.write_bytes_per_s,
                    policy=settings.eviction,
                    quota=settings.quota,
                )
        except BaseException:
            arena.close()
            raise
        log.info("keeping up to %d blocks of %d bytes in memory", num_blocks, slab_bytes)
        if disk is not None:
            stats = disk.stats()
            slots = sum(directory.num_slots for directory in stats.directories)
            log.info("and up to %d on disk, where %d are found", slots, stats.recovered_blocks)
        return Memory(group, arena, pool, disk)

    def close(self) -> None:
        if self.disk is not None:
            self.disk.close()
        self.arena.close()


class Opening:
    """Opens a `Memory` in a thread of its own. `fileno` is readable when `take` has it. Close it in any case."""

    def __init__(self, config: Config, group: RoutingGroup, slab_bytes: int) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._memory: Memory | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._open, args=(config, group, slab_bytes), name="open-tiers", daemon=True
        )
        self._thread.start()

    def fileno(self) -> int:
        return self._fd

    def take(self) -> Memory:
        """The caller's from now on. Raises what opening raised. Waits if it isn't over."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._memory is not None, "it was taken already"
        memory, self._memory = self._memory, None
        return memory

    def close(self) -> None:
        """What was opened and nobody took is closed. A disk that doesn't answer is not waited for long: its thread ends with the
        process. Idempotent."""
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.error("opening the tiers doesn't end; leaving it")
            return
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, config: Config, group: RoutingGroup, slab_bytes: int) -> None:
        try:
            self._memory = Memory.open(config, group, slab_bytes)
        except BaseException as error:  # for whoever takes it
            self._error = error
        os.eventfd_write(self._fd, 1)


class NodeTiers:
    """Serves what `memory` holds; owns and closes it from now on, also if this raises. One thread calls it. `on_blocks` and
    `on_ended` are `KVService`'s, and so are `keys` and `transports`: those of the configuration if none are given. Raises
    ConfigError or TransportError for what can't be opened."""

    def __init__(
        self,
        memory: Memory,
        config: Config,
        *,
        context: zmq.Context[zmq.Socket[bytes]],
        name: str,
        epoch: bytes,
        machine_id: str,
        on_blocks: Callable[[bytes, FetchedBatch], None],
        on_ended: Callable[[FetchEnded], None],
        transports: Sequence[Transport] | None = None,
        keys: Keyring | None = None,
    ) -> None:
        settings, transfer = config.pool, config.transfer
        self.group = memory.group
        self.arena = memory.arena
        self.pool = memory.pool
        self.disk = memory.disk
        self._memory = memory
        self._events: list[Event] = []
        self._tiering: Tiering | None = None
        self._expiry: Expiry | None = None
        if self.disk is not None:
            if settings.ttl_s:
                self._expiry = Expiry(self.disk, settings.ttl_s)
            self._tiering = Tiering(
                self.pool,
                self.disk,
                policy=settings.disk.policy,
                hits=settings.disk.hits,
                read_ahead_blocks=settings.disk.read_ahead_blocks,
                is_paced=settings.disk.write_bytes_per_s > 0,
                on_up=lambda keys: self._note(self.service.publish_pool_events(now_s())),
                on_absent=lambda keys: self.service.on_absent(keys, now_s()),
                on_used=lambda keys, at_s: self._expiry.used(keys, at_s) if self._expiry is not None else None,
            )
        try:
            # What expired while nobody was there isn't announced.
            if self._expiry is not None:
                self._expiry.tick(now_s(), time.time())
            if transports is None:
                transports = make_transports(transfer, self.arena, epoch, machine_id=machine_id, native=native())
            self.service = KVService(
                context=context,
                pool=self.pool,
                arena=self.arena,
                process=name,
                epoch=epoch,
                bind_host=transfer.host,
                advertised_host=transfer.advertised_host,
                transports=transports,
                machine_id=machine_id,
                lease_s=transfer.lease_s,
                grace_s=transfer.grace_s,
                on_blocks=on_blocks,
                on_ended=on_ended,
                below=self._tiering,
                lower_pools=[self.disk.pool] if self.disk is not None else [],
                peer_bytes_per_s=transfer.peer_bytes_per_s,
                keys=keys,
            )
        except BaseException:
            memory.close()
            raise

    @property
    def capacity(self) -> Capacity:
        return Capacity(num_blocks=self.arena.num_blocks, slab_bytes=self.arena.slab_bytes)

    def register(self, poller: zmq.Poller) -> None:
        """Registers what must be polled for input."""
        self.service.register(poller)
        if self.disk is not None:
            poller.register(self.disk.fileno(), zmq.POLLIN)

    def has(self, key: Key) -> bool:
        """Whether some tier holds the block."""
        return self.pool.contains(key) or (self.disk is not None and self.disk.contains(key))

    def allocate(self, num_blocks: int, now: float) -> list[BlockId] | None:
        """Blocks of HOST for copies of others' blocks. None if there is no room now."""
        if self._tiering is not None and not self._tiering.has_room(num_blocks, now):
            return None
        return self.pool.allocate(num_blocks)

    def take_in(self, batch: FetchedBatch) -> None:
        """Publishes what was fetched into HOST."""
        fresh: list[Key] = []
        for block_id, block in zip(batch.block_ids, batch.blocks, strict=True):
            if self.pool.publish(
                block_id,
                block.key,
                block.parent,
                block.num_tokens,
                block.checksum,
                writer=block.writer,
                owner=block.owner,
            ):
                fresh.append(block.key)
        if self._tiering is not None:
            self._tiering.arrived(fresh)

    def tick(self, ready: Mapping[Any, int], now: float) -> float:
        """Lets the disk go on and ends what lived long enough; when to call again."""
        due = [now + 1.0]
        _, idle_s = self.pool.expire_idle(now)
        due += [idle_s] if idle_s is not None else []
        if self.disk is not None and self._tiering is not None:
            if self.disk.fileno() in ready:
                self._tiering.poll(now)
            tiering_s = self._tiering.tick(now)
            due += [tiering_s] if tiering_s is not None else []
            if self._expiry is not None:
                due.append(self._expiry.tick(now, time.time()))
        return min(due)

    def publish(self, now: float) -> list[Key]:
        """Tells the world what changed since the last call. Which blocks are in no tier any more."""
        self._note(self.service.publish_pool_events(now))
        events, self._events = self._events, []
        gone: dict[Key, None] = {}
        for event in events:
            if not isinstance(event, BlockRemoved):
                continue
            removed = [key for key in event.block_hashes if isinstance(key, bytes)]
            lost = [key for key in removed if not self.has(key)]
            gone |= dict.fromkeys(lost)
            if self._tiering is not None and event.medium == "HOST":
                self._tiering.evicted(lost)
            elif self._tiering is not None:
                self._tiering.evicted_below([key for key in removed if self.disk and not self.disk.contains(key)])
        if self.disk is not None:
            self.disk.pool.take_published()  # nobody waits for a block on disk: it comes up first
        return list(gone)

    def load(self) -> Load:
        stats = self.pool.stats()
        below = self.disk.pool.stats() if self.disk is not None else None
        return Load(
            free_blocks=stats.allocatable,
            cached_blocks=stats.cached,
            leased_blocks=stats.leased,
            empty_blocks=stats.free,
            disk_blocks=below.num_blocks - below.retired if below is not None else 0,
            disk_used_blocks=below.num_blocks - below.retired - below.free if below is not None else 0,
        )

    def counters(self) -> Counters:
        counters = self.service.add_counters(Counters())
        if self.disk is None or self._tiering is None:
            return counters
        stats = self.disk.stats()
        return msgspec.structs.replace(
            counters,
            stored_blocks=stats.stored_blocks,
            loaded_blocks=stats.loaded_blocks,
            not_stored_blocks=self._tiering.num_not_stored,
            corrupt_blocks=stats.corrupt_blocks,
            disk_faults=sum(bool(directory.failed) for directory in stats.directories),
        )

    def account(self, num_fetching: int, now: float) -> Owned:
        """What an audit wants to know. `num_fetching` blocks of HOST are being fetched into."""
        owned, events = self.service.account(now)
        self._note(events)
        num_moving = num_fetching + (self._tiering.num_coming_up if self._tiering is not None else 0)
        num_stray = abs(self.pool.stats().referenced - num_moving)
        return msgspec.structs.replace(owned, num_stray_blocks=num_stray)

    def flush(self, now: float) -> bool:
        """Starts to write what the disk should have and has not. Whether some of it is still being written."""
        return self._tiering is not None and self._tiering.flush(now)

    def close(self, *, flush: bool = True) -> None:
        """Writes what should be on disk, for a moment, and gives all of it up; without `flush` at once."""
        if flush and self.disk is not None and self._tiering is not None:
            deadline_s = now_s() + FLUSH_S
            while self._tiering.flush(now_s()) and (left_s := deadline_s - now_s()) > 0:
                select.select([self.disk], [], [], left_s)
                self._tiering.poll(now_s())
        self.service.close()
        self._memory.close()

    def _note(self, events: Iterable[Event]) -> None:
        self._events += events
