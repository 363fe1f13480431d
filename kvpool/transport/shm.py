"""The shared-memory transport: a source's sealed arena, passed over a Unix socket and mapped read-only.

Owns the listener that hands out our arena's memfd and the channels that map others'. Never maps anything writable, and
never keeps a mapping of a process that is gone: the connection stays open for as long as the mapping, and its end drops
the mapping at once. The sink copies once, block by block, and hashes each block while it is warm in the cache.

The listener is an abstract socket (no file, gone with its process). Both sides check with SO_PEERCRED that the other runs
under our user. The source sends one header with the memfd and nothing else, ever; the sink sends nothing:

    magic 4s | version u16 | epoch 8s | num_blocks u64 | slab_bytes u64          big-endian, 30 bytes
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import secrets
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.arena import F_SEAL_FUTURE_WRITE, F_SEAL_GROW, F_SEAL_SHRINK, Arena, checksum_of
from kvpool.transport.base import BlockRead, ReadResult
from protos.control import Source
from tandem.errors import TransportError

log = logging.getLogger(__name__)

SHM_VERSION = 1
ENDPOINT_PREFIX = "@tandem-"
MAX_ARENA_BYTES = 1 << 46
COPY_BYTES_PER_POLL = 16 * 1024 * 1024
"""A poll stops after so many bytes, so that its thread goes on heartbeating: a few milliseconds of copying."""

_HEADER = struct.Struct(">4sH8sQQ")
_MAGIC = b"TKVA"
_NEEDED_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE
_BACKLOG = 256
_MAX_CONNECTIONS = 4096


def peer_uid(connection: socket.socket) -> int:
    """The user that the other end of a Unix socket ran under when it connected or listened."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class ShmListener:
    """Hands out one arena's memfd. One descriptor to poll (`fileno`); `handle` when it is readable."""

    def __init__(self, arena: Arena, epoch: bytes) -> None:
        self._arena = arena
        self._header = _HEADER.pack(_MAGIC, SHM_VERSION, epoch, arena.num_blocks, arena.slab_bytes)
        self.endpoint = f"{ENDPOINT_PREFIX}{secrets.token_hex(16)}"
        self._connections: dict[int, socket.socket] = {}
        self.num_refused = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind("\0" + self.endpoint[1:])
        self._socket.listen(_BACKLOG)
        self._epoll = select.epoll()
        self._epoll.register(self._socket.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def num_connections(self) -> int:
        """Readers that may have the arena mapped right now."""
        return len(self._connections)

    def handle(self) -> None:
        """Lets new readers in and forgets those that are gone."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._socket.fileno():
                self._accept()
            else:  # a reader has nothing to say: it left, or it breaks the contract
                self._epoll.unregister(fd)
                self._connections.pop(fd).close()
                self._epoll.modify(self._socket.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """Ends every connection, by which readers drop their mappings. Idempotent."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self._socket.close()
        self._epoll.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The connection stays in the queue and would wake us for ever: nobody new until somebody leaves.
                log.error(
                    "no descriptor is left for another reader of the arena; %d are connected", len(self._connections)
                )
                self._epoll.modify(self._socket.fileno(), 0)
            return
        connection.setblocking(False)
        try:
            if peer_uid(connection) != os.geteuid() or len(self._connections) >= _MAX_CONNECTIONS:
                raise PermissionError("not our user, or too many connections")
            socket.send_fds(connection, [self._header], [self._arena.fd])
        except OSError:
            self.num_refused += 1
            connection.close()
            return
        self._connections[connection.fileno()] = connection
        self._epoll.register(connection.fileno(), select.EPOLLIN)


@dataclass(slots=True)
class _Read:
    read_id: int
    blocks: Sequence[BlockRead]
    checksums: list[bytes]


class ShmChannel:
    """One source's arena, mapped read-only. Keeps the `Channel` contract."""

    def __init__(self, source: Source, slab_bytes: int) -> None:
        self._epoch = source.epoch
        self._slab_bytes = slab_bytes
        self._map: mmap.mmap | None = None
        self._num_blocks = 0
        self._queue: deque[_Read] = deque()
        self._failed: list[ReadResult] = []
        self._closed_because = ""
        endpoint = source.endpoints.shm
        if not endpoint.startswith(ENDPOINT_PREFIX):
            raise TransportError(
                f"{source.process}: shm endpoint {endpoint[:40]!r} does not begin with {ENDPOINT_PREFIX!r}"
            )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect("\0" + endpoint[1:])
            uid = peer_uid(self._socket)
        except (OSError, ValueError) as error:
            self._socket.close()
            raise TransportError(f"{source.process}: can't connect to {endpoint[:40]}: {error}") from error
        if uid != os.geteuid():
            self._socket.close()
            raise TransportError(f"{source.process} runs under user {uid}, we are {os.geteuid()}")

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        return bool(self._closed_because)

    @property
    def closed_because(self) -> str:
        """Why the channel closed; empty while it is open."""
        return self._closed_because

    @property
    def busy(self) -> bool:
        return bool(self._failed or (self._queue and self._map is not None))

    def start_read(self, read_id: int, blocks: Sequence[BlockRead]) -> None:
        for block in blocks:
            assert block.destination.nbytes == self._slab_bytes, f"a destination of {block.destination.nbytes} bytes"
        if self.closed:
            self._failed.append(ReadResult(read_id, None, self._closed_because))
        else:
            self._queue.append(_Read(read_id, blocks, []))

    def poll(self) -> list[ReadResult]:
        while not self.closed and self._hear():
            pass
        results, self._failed = self._failed, []
        if self._map is None:
            return results
        arena = np.frombuffer(self._map, dtype=np.uint8).reshape(self._num_blocks, self._slab_bytes)
        budget = COPY_BYTES_PER_POLL
        while self._queue and budget > 0:
            read = self._queue[0]
            outside = [block.location for block in read.blocks if not 0 <= block.location < self._num_blocks]
            if outside:
                self._queue.popleft()
                error = f"location {outside[0]} is not in an arena of {self._num_blocks} blocks"
                results.append(ReadResult(read.read_id, None, error))
                continue
            budget -= self._copy(read, arena, budget)
            if len(read.checksums) == len(read.blocks):
                self._queue.popleft()
                results.append(ReadResult(read.read_id, tuple(read.checksums)))
        return results

    def abort(self, read_id: int) -> bool:
        self._queue = deque(read for read in self._queue if read.read_id != read_id)
        self._failed = [result for result in self._failed if result.read_id != read_id]
        return True  # copies run inside `poll` alone

    def close(self) -> None:
        self._close("closed by us")

    def _copy(self, read: _Read, arena: NDArray[np.uint8], budget: int) -> int:
        copied = 0
        while len(read.checksums) < len(read.blocks) and copied < budget:
            block = read.blocks[len(read.checksums)]
            np.copyto(np.frombuffer(block.destination, dtype=np.uint8), arena[block.location])
            read.checksums.append(checksum_of(block.destination))
            copied += self._slab_bytes
        return copied

    def _hear(self) -> bool:
        """Takes in the header, or learns that the peer is gone. False if it said nothing new."""
        try:
            data, fds, flags, _ = socket.recv_fds(self._socket, _HEADER.size + 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError as error:
            self._close(f"the connection broke: {errno.errorcode.get(error.errno or 0, error)}")
            return True
        try:
            if not data:
                self._close("the peer is gone")
            elif self._map is not None:
                self._close("the peer sent more than its header")
            else:
                self._take(data, fds, flags)
        except (OSError, ValueError, TransportError) as error:
            self._close(str(error))
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _take(self, data: bytes, fds: list[int], flags: int) -> None:
        if len(data) != _HEADER.size or len(fds) != 1 or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise TransportError(f"header of {len(data)} bytes with {len(fds)} descriptors, not {_HEADER.size} with 1")
        magic, version, epoch, num_blocks, slab_bytes = _HEADER.unpack(data)
        if magic != _MAGIC or version != SHM_VERSION:
            raise TransportError(f"magic {magic!r} version {version}, ours is {_MAGIC!r} version {SHM_VERSION}")
        if epoch != self._epoch:
            raise TransportError(f"epoch {epoch.hex()}, expected {self._epoch.hex()}")
        if slab_bytes != self._slab_bytes:
            raise TransportError(f"slabs of {slab_bytes} bytes, ours have {self._slab_bytes}")
        num_bytes = num_blocks * slab_bytes
        if not 0 < num_bytes <= MAX_ARENA_BYTES:
            raise TransportError(f"an arena of {num_bytes} bytes, the limit is {MAX_ARENA_BYTES}")
        try:
            seals = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)
        except OSError as error:
            raise TransportError(f"the descriptor is not a memfd: {error}") from error
        if seals & _NEEDED_SEALS != _NEEDED_SEALS:
            raise TransportError(f"seals {seals:#x} lack some of {_NEEDED_SEALS:#x}")
        size = os.fstat(fds[0]).st_size
        if size < num_bytes:
            raise TransportError(f"a memfd of {size} bytes for an arena of {num_bytes}")
        self._map = mmap.mmap(fds[0], num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._num_blocks = num_blocks

    def _close(self, because: str) -> None:
        if self.closed:
            return
        self._closed_because = because
        self._socket.close()
        if self._map is not None:
            self._map.close()
            self._map = None
        self._failed.extend(ReadResult(read.read_id, None, because) for read in self._queue)
        self._queue.clear()


class ShmTransport:
    """Reaches sources on this machine whose slabs are as large as ours."""

    name = "shm"

    def __init__(self, machine_id: str, slab_bytes: int) -> None:
        self._machine_id = machine_id
        self._slab_bytes = slab_bytes

    def reaches(self, source: Source) -> bool:
        return bool(source.endpoints.shm) and source.endpoints.machine_id == self._machine_id

    def connect(self, source: Source) -> ShmChannel:
        return ShmChannel(source, self._slab_bytes)
