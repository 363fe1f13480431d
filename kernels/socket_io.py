"""Blocks on their way through a stream socket: straight from an arena, and straight into one, with their checksums.

Owns where such a transfer stands, and the check of every bound: the native calls (cpu/socket_io.cpp) trust their arguments. Never
waits, and never decides what a failure means. Memory is `[num_blocks, slab_bytes]` uint8, each block contiguous; blocks may lie
further apart than they are long. Checksums are xxh3-64.

Who has another way through a socket (TLS) takes the next `piece`, moves some of it and says so with `advance`.
"""

from __future__ import annotations

import os

import numpy as np
import xxhash

from kernels.block_copy import BlockIds, Blocks, Checksums
from kernels.cpu import Native

_SHORTEST = 241
"""XXH3 hashes fewer bytes in another way, which native code leaves to the library."""
_PIECES = 64
"""Blocks that one system call of the reference sends."""
_ENDED = -(2**63)


class Transfer:
    """The blocks `ids` of `memory`, in order, after `head_bytes` others: `position` of `num_bytes` have been moved.

    Raises, when it is made, IndexError for an id out of range and ValueError for memory of another shape.
    """

    __slots__ = ("_address", "_head_bytes", "_ids", "_ids_address", "_memory", "_native", "num_bytes", "position")
    num_bytes: int
    position: int

    def __init__(self, native: Native | None, memory: Blocks, ids: BlockIds, head_bytes: int = 0) -> None:
        if memory.ndim != 2 or memory.dtype != np.uint8 or not memory.shape[1]:
            raise ValueError(
                f"memory is {memory.dtype} of shape {memory.shape}, must be uint8 [num_blocks, slab_bytes]"
            )
        if memory.strides[1] != 1 or memory.strides[0] < memory.shape[1]:
            raise ValueError(f"blocks of {memory.shape[1]} bytes with strides {memory.strides} are not contiguous")
        found = np.ascontiguousarray(ids, dtype=np.int64)
        if found.ndim != 1:
            raise ValueError(f"block ids of shape {found.shape}, must be a list")
        if len(found) and (found.min() < 0 or found.max() >= len(memory)):
            raise IndexError(f"blocks {found.min()} to {found.max()}, must be within 0 to {len(memory) - 1}")
        self._native = native if memory.shape[1] >= _SHORTEST else None
        self._memory = memory
        self._ids = found
        self._head_bytes = head_bytes
        self._address = memory.ctypes.data
        self._ids_address = found.ctypes.data
        self.num_bytes = head_bytes + len(found) * memory.shape[1]
        self.position = 0

    @property
    def num_blocks(self) -> int:
        return len(self._ids)

    @property
    def left_bytes(self) -> int:
        return self.num_bytes - self.position

    def _block_piece(self, position: int) -> memoryview:
        index, offset = divmod(position - self._head_bytes, self._memory.shape[1])
        piece: memoryview = self._memory[self._ids[index], offset:].data
        return piece


class Sending(Transfer):
    """`head`, then blocks, on their way out."""

    __slots__ = ("_head",)

    def __init__(self, native: Native | None, memory: Blocks, ids: BlockIds, head: bytes = b"") -> None:
        super().__init__(native, memory, ids, len(head))
        self._head = head

    def piece(self) -> memoryview:
        """The next bytes to send that lie side by side; the same until `advance`. Something must be left."""
        if self.position < self._head_bytes:
            return memoryview(self._head)[self.position :]
        return self._block_piece(self.position)

    def advance(self, num_bytes: int) -> None:
        self.position += num_bytes

    def send(self, fd: int, limit_bytes: int) -> int:
        """Sends up to `limit_bytes` (at least 1). Returns how many went, 0 if the socket takes none now. Raises OSError."""
        if self._native is None:
            return self._send_ref(fd, limit_bytes)
        sent: int = self._native.library.tandem_send_blocks(
            fd,
            self._head,
            self._head_bytes,
            self._address,
            self._memory.strides[0],
            self._ids_address,
            len(self._ids),
            self._memory.shape[1],
            self.position,
            limit_bytes,
        )
        if sent < 0:
            raise OSError(-sent, os.strerror(-sent))
        self.position += sent
        return sent

    def _send_ref(self, fd: int, limit_bytes: int) -> int:
        begin, end = self.position, min(self.num_bytes, self.position + limit_bytes)
        while self.position < end:
            pieces: list[memoryview] = []
            next_position = self.position
            while next_position < end and len(pieces) < _PIECES:
                head_left = self._head_bytes - next_position
                piece = self.piece() if head_left > 0 else self._block_piece(next_position)
                pieces.append(piece[: end - next_position])
                next_position += len(pieces[-1])
            try:
                self.advance(os.writev(fd, pieces))
            except BlockingIOError:
                break
        return self.position - begin


class Receiving(Transfer):
    """Blocks on their way in. `checksums` ([num_blocks] uint64) are of those blocks that are complete. Memory must be
    writable; a block that comes twice is written twice."""

    __slots__ = ("_checksums_address", "checksums")

    def __init__(self, native: Native | None, memory: Blocks, ids: BlockIds, position: int = 0) -> None:
        super().__init__(native, memory, ids)
        if not memory.flags.writeable:
            raise ValueError("the memory is read-only")
        if not 0 <= position <= self.num_bytes:
            raise ValueError(f"position {position} of {self.num_bytes} bytes")
        self.position = position
        self.checksums: Checksums = np.zeros(len(self._ids), dtype=np.uint64)
        self._checksums_address = self.checksums.ctypes.data

    def piece(self) -> memoryview:
        """Where the next bytes go, up to the end of their block. Something must be left."""
        return self._block_piece(self.position)

    def advance(self, num_bytes: int) -> None:
        """Says that so many bytes of `piece` are there."""
        self.position += num_bytes
        index, offset = divmod(self.position, self._memory.shape[1])
        if not offset:
            self.checksums[index - 1] = xxhash.xxh3_64_intdigest(self._memory[self._ids[index - 1]].data)

    def receive(self, fd: int, limit_bytes: int) -> int:
        """Receives up to `limit_bytes` (at least 1). Returns how many came, 0 if none is there now. Raises EOFError at the
        stream's end, and OSError."""
        if self._native is None:
            return self._receive_ref(fd, limit_bytes)
        got: int = self._native.library.tandem_receive_blocks(
            fd,
            self._address,
            self._memory.strides[0],
            self._ids_address,
            len(self._ids),
            self._memory.shape[1],
            self.position,
            limit_bytes,
            self._checksums_address,
        )
        if got == _ENDED:
            raise EOFError
        if got < 0:
            raise OSError(-got, os.strerror(-got))
        self.position += got
        return got

    def _receive_ref(self, fd: int, limit_bytes: int) -> int:
        begin, end = self.position, min(self.num_bytes, self.position + limit_bytes)
        while self.position < end:
            try:
                got = os.readv(fd, [self.piece()[: end - self.position]])
            except BlockingIOError:
                break
            if not got:
                if self.position == begin:
                    raise EOFError
                break
            self.advance(got)
        return self.position - begin
