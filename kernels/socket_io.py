"""Blocks on their way through a stream socket: straight from an arena, and straight into one, with their checksums.

Owns where such a transfer stands, and the check of every bound: the native calls (cpu/socket_io.cpp) trust their arguments. Never
waits, and never decides what a failure means. Memory is `[num_blocks, slab_bytes]` uint8, each block contiguous; blocks may lie
further apart than they are long. Checksums are xxh3-64.

Who has another way through a socket (TLS) takes the next `piece`, moves some of it and says so with `advance`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import xxhash

from kernels.block_copy import SHORTEST, BlockIds, Blocks, Checksums, check_ids, check_memory
from kernels.cpu import Native

_ENDED = -(2**63)


class Transfer:
    """The blocks `ids` of `memory`, in order, after `head_bytes` others: `position` of `num_bytes` have been moved.

    Raises, when it is made, IndexError for an id out of range and ValueError for memory of another shape.
    """

    __slots__ = ("_arguments", "_head_bytes", "_ids", "_memory", "_native", "num_bytes", "position")
    num_bytes: int
    position: int

    def __init__(self, native: Native | None, memory: Blocks, ids: BlockIds, head_bytes: int = 0) -> None:
        check_memory("memory", memory)
        slab_bytes = memory.shape[1]
        if not slab_bytes:
            raise ValueError("blocks of 0 bytes")
        found = np.ascontiguousarray(ids, dtype=np.int64)
        check_ids("memory", memory, found)
        self._native = native if slab_bytes >= SHORTEST else None
        self._memory = memory
        self._ids = found
        self._head_bytes = head_bytes
        # What both native calls are told of the blocks.
        self._arguments = (memory.ctypes.data, memory.strides[0], found.ctypes.data, len(found), slab_bytes)
        self.num_bytes = head_bytes + len(found) * slab_bytes
        self.position = 0

    @property
    def num_blocks(self) -> int:
        return len(self._ids)

    @property
    def left_bytes(self) -> int:
        return self.num_bytes - self.position

    def piece(self) -> memoryview:
        """The next bytes to move that lie side by side; the same until `advance`. Something must be left."""
        index, offset = divmod(self.position - self._head_bytes, self._memory.shape[1])
        piece: memoryview = self._memory[self._ids[index], offset:].data
        return piece

    def advance(self, num_bytes: int) -> None:
        """Says that so many bytes of `piece` have been moved."""
        self.position += num_bytes

    def _moved(self, num_bytes: int) -> int:
        """Takes in what a native call returned."""
        if num_bytes == _ENDED:
            raise EOFError
        if num_bytes < 0:
            raise OSError(-num_bytes, os.strerror(-num_bytes))
        self.position += num_bytes
        return num_bytes

    def _move_ref(self, move: Callable[[int, list[memoryview]], int], fd: int, limit_bytes: int) -> int:
        """What the native calls do, a piece at a time, by `move`: os.readv or os.writev."""
        begin, end = self.position, min(self.num_bytes, self.position + limit_bytes)
        while self.position < end:
            try:
                num_bytes = move(fd, [self.piece()[: end - self.position]])
            except BlockingIOError:
                break
            if not num_bytes:
                if self.position == begin:
                    raise EOFError
                break  # the end comes again
            self.advance(num_bytes)
        return self.position - begin


class Sending(Transfer):
    """`head`, then blocks, on their way out."""

    __slots__ = ("_head",)

    def __init__(self, native: Native | None, memory: Blocks, ids: BlockIds, head: bytes = b"") -> None:
        super().__init__(native, memory, ids, len(head))
        self._head = head

    def piece(self) -> memoryview:
        if self.position < self._head_bytes:
            return memoryview(self._head)[self.position :]
        return super().piece()

    def send(self, fd: int, limit_bytes: int) -> int:
        """Sends up to `limit_bytes` (at least 1). Returns how many went, 0 if the socket takes none now. Raises OSError."""
        if self._native is None:
            return self._move_ref(os.writev, fd, limit_bytes)
        send = self._native.library.tandem_send_blocks
        return self._moved(send(fd, self._head, self._head_bytes, *self._arguments, self.position, limit_bytes))


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

    def advance(self, num_bytes: int) -> None:
        super().advance(num_bytes)
        index, offset = divmod(self.position, self._memory.shape[1])
        if not offset:
            self.checksums[index - 1] = xxhash.xxh3_64_intdigest(self._memory[self._ids[index - 1]].data)

    def receive(self, fd: int, limit_bytes: int) -> int:
        """Receives up to `limit_bytes` (at least 1). Returns how many came, 0 if none is there now. Raises EOFError at the
        stream's end, and OSError."""
        if self._native is None:
            return self._move_ref(os.readv, fd, limit_bytes)
        receive = self._native.library.tandem_receive_blocks
        return self._moved(receive(fd, *self._arguments, self.position, limit_bytes, self._checksums_address))
