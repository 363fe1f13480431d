"""The shared-memory transport: a source's sealed arena, passed over a Unix socket and mapped read-only.

Owns the listener that hands out our arena's memfd and the channels that map others'. Never maps anything writable, and
never keeps a mapping of a process that is gone: the connection stays open for as long as the mapping, and its end drops
the mapping at once. The sink copies once, from the source's arena into its own, many blocks and their checksums in one
native call.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.block_copy import copy_blocks
from kernels.cpu import Native
from kvpool.arena import F_SEAL_FUTURE_WRITE, F_SEAL_GROW, F_SEAL_SHRINK, Arena
from kvpool.transport.base import POLL_BYTES, ReadResult
from protos.control import Source
from tandem.clock import now_s
from tandem.errors import TransportError

log = logging.getLogger(__name__)

SHM_VERSION = 1
ACCEPT_AGAIN_S = 1.0
ENDPOINT_PREFIX = "@tandem-"
MAX_ARENA_BYTES = 1 << 46

_HEADER = struct.Struct(">4sH8sQQ")
_MAGIC = b"TKVA"
_NEEDED_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE
_BACKLOG = 256
_MAX_PAGE_BYTES = 1 << 30
_MAX_READERS = 4096


def peer_uid(connection: socket.socket) -> int:
    """The user that the other end of a Unix socket ran under when it connected or listened."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class ShmTransport:
    """Hands out one arena's memfd, and reaches sources on this machine whose slabs are as large. Keeps the `Transport`
    contract."""

    name = "shm"

    def __init__(self, arena: Arena, epoch: bytes, machine_id: str, native: Native | None) -> None:
        self._arena = arena
        self._machine_id = machine_id
        self._native = native
        self._header = _HEADER.pack(_MAGIC, SHM_VERSION, epoch, arena.num_blocks, arena.slab_bytes)
        self.endpoint = f"{ENDPOINT_PREFIX}{secrets.token_hex(16)}"
        self._readers: dict[int, socket.socket] = {}
        self._channels: dict[int, ShmChannel] = {}
        self._failed: list[ReadResult] = []
        self.num_refused = 0
        self._accept_again_s: float | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind("\0" + self.endpoint[1:])
        self._socket.listen(_BACKLOG)
        self._epoll = select.epoll()
        self._epoll.register(self._socket.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def num_readers(self) -> int:
        return len(self._readers)

    @property
    def busy(self) -> bool:
        again = self._accept_again_s is not None and self._accept_again_s <= now_s()
        return bool(self._failed) or again or any(channel.can_copy for channel in self._channels.values())

    def reaches(self, source: Source) -> bool:
        return bool(source.endpoints.shm) and source.endpoints.machine_id == self._machine_id

    def connect(self, source: Source) -> ShmChannel:
        channel = ShmChannel(source, self._arena, self._native, self._forget, self._failed)
        self._channels[channel.fileno()] = channel
        self._epoll.register(channel.fileno(), select.EPOLLIN)
        return channel

    def poll(self) -> list[ReadResult]:
        if self._accept_again_s is not None and self._accept_again_s <= now_s():
            self._accept_again_s = None
            self._epoll.modify(self._socket.fileno(), select.EPOLLIN)
        for fd, _ in self._epoll.poll(0):
            if fd == self._socket.fileno():
                self._accept()
            elif fd in self._channels:
                self._channels[fd].hear()
            elif fd in self._readers:  # a reader has nothing to say: it left, or it breaks the contract
                self._epoll.unregister(fd)
                self._readers.pop(fd).close()
        results = []
        budget = POLL_BYTES
        for channel in list(self._channels.values()):
            while budget > 0 and channel.can_copy:
                result, num_bytes = channel.copy_next()
                results.append(result)
                budget -= num_bytes
        if self._channels:  # who had to wait comes first the next time
            first = next(iter(self._channels))
            self._channels[first] = self._channels.pop(first)
        results += self._failed
        self._failed.clear()
        return results

    def close(self) -> None:
        """Also ends every connection, by which readers drop their mappings."""
        for channel in list(self._channels.values()):
            channel.close()
        for connection in self._readers.values():
            connection.close()
        self._readers.clear()
        self._socket.close()
        self._epoll.close()

    def _forget(self, fd: int) -> None:
        del self._channels[fd]
        self._epoll.unregister(fd)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # Whoever waits stays in the queue and would wake us for ever.
                log.error("another reader of the arena can't be let in: %s; %d are", error, len(self._readers))
                self._accept_again_s = now_s() + ACCEPT_AGAIN_S
                self._epoll.modify(self._socket.fileno(), 0)
            return
        connection.setblocking(False)
        try:
            if peer_uid(connection) != os.geteuid() or len(self._readers) >= _MAX_READERS:
                raise PermissionError("not our user, or too many connections")
            socket.send_fds(connection, [self._header], [self._arena.fd])
        except OSError:
            self.num_refused += 1
            connection.close()
            return
        self._readers[connection.fileno()] = connection
        self._epoll.register(connection.fileno(), select.EPOLLIN)


@dataclass(frozen=True, slots=True)
class _Read:
    read_id: int
    locations: Sequence[int]
    block_ids: Sequence[int]


class ShmChannel:
    """One source's arena, mapped read-only. Keeps the `Channel` contract; `failed` takes the results of reads that ended
    without a copy, `forget` is told the descriptor when it is about to close."""

    def __init__(
        self,
        source: Source,
        arena: Arena,
        native: Native | None,
        forget: Callable[[int], None],
        failed: list[ReadResult],
    ) -> None:
        self._epoch = source.epoch
        self._ours = arena
        self._native = native
        self._forget = forget
        self._failed = failed
        self._map: mmap.mmap | None = None
        self._theirs: NDArray[np.uint8] | None = None
        self._queue: deque[_Read] = deque()
        self.closed_because = ""
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
    def can_copy(self) -> bool:
        """Whether a read is waiting and the arena is mapped."""
        return bool(self._queue) and self._theirs is not None

    def start_read(self, read_id: int, locations: Sequence[int], block_ids: Sequence[int]) -> None:
        if self.closed_because:
            self._failed.append(ReadResult(read_id, None, self.closed_because))
        else:
            self._queue.append(_Read(read_id, locations, block_ids))

    def abort(self, read_id: int) -> bool:
        self._queue = deque(read for read in self._queue if read.read_id != read_id)
        self._failed[:] = [result for result in self._failed if result.read_id != read_id]
        return True  # copies run inside `poll` alone

    def close(self) -> None:
        self._close("closed by us")

    def copy_next(self) -> tuple[ReadResult, int]:
        """Does the next read; its result, and the bytes it copied."""
        assert self._theirs is not None
        read = self._queue.popleft()
        num_blocks = len(self._theirs)
        outside = [location for location in read.locations if not 0 <= location < num_blocks]
        if outside:
            error = f"location {outside[0]} is not in an arena of {num_blocks} blocks"
            return ReadResult(read.read_id, None, error), 0
        checksums = np.empty(len(read.locations), dtype=np.uint64)
        copy_blocks(self._native, self._theirs, read.locations, self._ours.array, read.block_ids, checksums)
        return ReadResult(read.read_id, checksums), len(read.locations) * self._ours.slab_bytes

    def hear(self) -> None:
        """Takes in the header, or learns that the peer is gone."""
        while not self.closed_because and self._hear():
            pass

    def _hear(self) -> bool:
        """False if the peer said nothing new."""
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
        if slab_bytes != self._ours.slab_bytes:
            raise TransportError(f"slabs of {slab_bytes} bytes, ours have {self._ours.slab_bytes}")
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
        if not num_bytes <= size <= num_bytes + _MAX_PAGE_BYTES:
            raise TransportError(f"a memfd of {size} bytes for an arena of {num_bytes}")
        # Whole: of huge pages nothing less can be unmapped.
        self._map = mmap.mmap(fds[0], size, mmap.MAP_SHARED, mmap.PROT_READ)
        self._theirs = np.frombuffer(self._map, dtype=np.uint8, count=num_bytes).reshape(num_blocks, slab_bytes)

    def _close(self, because: str) -> None:
        if self.closed_because:
            return
        self.closed_because = because
        self._forget(self._socket.fileno())
        self._socket.close()
        self._theirs = None
        if self._map is not None:
            self._map.close()
            self._map = None
        self._failed.extend(ReadResult(read.read_id, None, because) for read in self._queue)
        self._queue.clear()
