"""Judges the reads between processes: each under a lease, of memory that stays what it was, over before it is said to be.

Owns what sources have promised on the wire and what sinks have said about it; knows nothing of anybody's lease table.
"""

from __future__ import annotations

from dataclasses import dataclass

import zmq

from kvpool.keys import Key
from protos import control
from protos.control import Cancel, Done, Ready
from tandem.sim.faults.network import Frames, Socket
from tandem.sim.faults.transport import Memory, Read
from tandem.sim.faults.world import Violation
from tandem.zmq_io import identity

JUDGED_AGAIN_S = 0.003
"""Longer than a worker that is free takes to hear what came meanwhile."""

GrantName = tuple[bytes, bytes, int]
"""Sink, fetch id, batch."""


@dataclass(eq=False, slots=True)
class Grant:
    """One batch under its lease: what `Ready` promised."""

    source: Memory
    keys: dict[int, Key]
    """By location."""
    expires_s: float
    """By the source's clock."""
    offset_s: float
    """Of that clock, when it was granted."""
    given_back: bool = False
    """The sink has said that it is done, or has been given up by the source."""


class ReadWatch:
    """Told of all that passes on lines of fetches, and of all reads. Raises Violation."""

    def __init__(self) -> None:
        self._sources: dict[str, Memory] = {}
        """By the endpoint that serves fetches."""
        self._readers: dict[bytes, Memory] = {}
        self._grants: dict[str, dict[GrantName, Grant]] = {}
        self._running: dict[Read, dict[int, list[Grant]]] = {}
        """The grants under which each location is being read."""
        self.num_grants = 0
        self.num_reads = 0

    def serves(self, endpoint: str, memory: Memory) -> None:
        """An incarnation of a process serves its memory at this endpoint."""
        self._readers[identity(memory.process.name, memory.epoch)] = memory
        self._sources[endpoint] = memory
        self._grants[endpoint] = {}

    # --- messages -------------------------------------------------------------------------------------------------------

    def sent(self, socket: Socket, frames: Frames) -> None:
        """A message leaves."""
        source = self._sources.get(socket.endpoint)
        if source is None:
            return
        grants = self._grants[socket.endpoint]
        if socket.kind == zmq.ROUTER:
            message = control.decode_to_sink(frames[-1])
            if isinstance(message, Ready):
                process = source.process
                keys = {block.location: block.key for block in message.blocks}
                expires_s = process.world.now_s + process.offset_s + message.lease_s
                grant = Grant(source, keys, expires_s, process.offset_s)
                grants[frames[0], message.fetch_id, message.batch] = grant
                self.num_grants += 1
                self._check_source(source, grants)
            return
        said = control.decode_to_source(frames[-1])
        if isinstance(said, Done | Cancel):
            for _, grant in self._of(grants, socket.identity, said):
                grant.given_back = True
                self._check_not_read(socket, grant)

    def taken(self, socket: Socket, frames: Frames) -> None:
        """A message is taken in."""
        if socket.kind != zmq.ROUTER or socket.endpoint not in self._sources:
            return
        said = control.decode_to_source(frames[-1])
        if isinstance(said, Done | Cancel):
            grants = self._grants[socket.endpoint]
            for name, _ in self._of(grants, frames[0], said):
                del grants[name]

    @staticmethod
    def _of(grants: dict[GrantName, Grant], sink: bytes, said: Done | Cancel) -> list[tuple[GrantName, Grant]]:
        if isinstance(said, Done):
            name = (sink, said.fetch_id, said.batch)
            return [(name, grants[name])] if name in grants else []
        return [(name, grant) for name, grant in grants.items() if name[:2] == (sink, said.fetch_id)]

    # --- reads ----------------------------------------------------------------------------------------------------------

    def began(self, read: Read) -> None:
        self.num_reads += 1
        under = self._running[read] = {location: self._covering(read, location) for location in read.locations}
        if not read.channel.theirs.process.alive:
            return  # nothing will come of it
        for covering in under.values():
            if not any(self._stands(grant) or grant.offset_s != grant.source.process.offset_s for grant in covering):
                raise Violation(f"{_reader(read)} reads from {_source(read)} without a lease")

    def ended(self, read: Read) -> None:
        for location, covering in self._running.pop(read).items():
            for grant in covering:
                if self._stands(grant) and grant.source.process.alive:
                    self._check_held(grant, location, f"while {_reader(read)} read it")

    def given_up(self, read: Read) -> None:
        self._running.pop(read, None)

    def wrote_late(self, read: Read) -> None:
        """What a cancelled receive still writes lands where nobody looks. Whoever has not heard yet that it was cancelled,
        because its step goes on, has not used the memory for anything else either: it is judged when it has heard."""
        ours = read.channel.transport.ours
        if not ours.process.alive:
            return
        if ours.process.is_busy:
            ours.process.world.after(JUDGED_AGAIN_S, lambda: self.wrote_late(read))
            return
        for block_id in read.block_ids:
            if block_id not in ours.pool._retired:
                raise Violation(f"{_reader(read)} reused block {block_id}, which a cancelled receive may still write")

    # --- inside ---------------------------------------------------------------------------------------------------------

    def check_all(self) -> None:
        """Every promise that stands is kept. Forgets those that don't."""
        for endpoint, grants in self._grants.items():
            source = self._sources[endpoint]
            if not source.process.alive:
                grants.clear()
            for name in [name for name, grant in grants.items() if not self._stands(grant)]:
                del grants[name]
            self._check_source(source, grants)

    def _check_source(self, source: Memory, grants: dict[GrantName, Grant]) -> None:
        locations: set[int] = set()
        for name, grant in grants.items():
            if self._stands(grant) and not self._readers[name[0]].is_gone:
                locations.update(grant.keys)
                for location in grant.keys:
                    self._check_held(grant, location, "under a lease")
        num_leased = source.pool.stats().leased
        if num_leased < len(locations):
            raise Violation(
                f"{source.process.name} has promised {len(locations)} blocks to readers, and leases {num_leased}"
            )

    @staticmethod
    def _stands(grant: Grant) -> bool:
        process = grant.source.process
        return process.world.now_s + process.offset_s < grant.expires_s

    def _check_held(self, grant: Grant, location: int, when: str) -> None:
        source, key = grant.source, grant.keys[location]
        record = source.pool.lookup(key)
        if record is None or record.block_id != location:
            raise Violation(f"{source.process.name} freed block {location} ({key.hex()[:8]}) {when}")

    def _covering(self, read: Read, location: int) -> list[Grant]:
        theirs, sink = read.channel.theirs, _identity(read)
        return [
            grant
            for endpoint, grants in self._grants.items()
            if self._sources[endpoint] is theirs
            for name, grant in grants.items()
            if name[0] == sink and location in grant.keys and not grant.given_back
        ]

    def _check_not_read(self, socket: Socket, grant: Grant) -> None:
        for under in self._running.values():
            for location, covering in under.items():
                if grant in covering and all(other.given_back for other in covering):
                    raise Violation(f"{socket.process.name} says that it is done with block {location}, and reads it")


def _identity(read: Read) -> bytes:
    ours = read.channel.transport.ours
    return identity(ours.process.name, ours.epoch)


def _reader(read: Read) -> str:
    return read.channel.transport.ours.process.name


def _source(read: Read) -> str:
    return read.channel.theirs.process.name
