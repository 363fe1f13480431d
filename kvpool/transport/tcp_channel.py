"""The sink's end of a tcp connection: the way to one source's arena.

Owns the reads of one source from their beginning to their end, and receives straight into our arena. A read that is given
up after it was asked for is received all the same, into a scratch block that nobody reads; how much that can be is bounded by
what a channel asks for ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.block_copy import Blocks
from kernels.cpu import Native
from kernels.socket_io import Receiving
from kvpool.arena import Arena
from kvpool.transport.base import ReadResult
from kvpool.transport.tcp_connection import Connection, Watch
from kvpool.transport.tcp_frames import (
    ANSWER_BYTES,
    MAX_LOCATIONS,
    MAX_REQUESTS,
    OK,
    OUTSIDE,
    TCP_VERSION,
    WELCOME_BYTES,
    Answer,
    Hello,
    Welcome,
    pack_request,
)
from kvpool.transport.tcp_stream import Stream
from tandem.errors import TransportError

ASK_AHEAD_BYTES = 64 * 1024 * 1024
"""A channel asks for another read while so much is still to come."""


@dataclass(slots=True)
class _Read:
    read_id: int
    locations: NDArray[np.uint64]
    receiving: Receiving
    given_up: bool = False


class TcpChannel(Connection):
    """Keeps the `Channel` contract. Results go to `ended`, which the transport hands out and empties."""

    def __init__(
        self, stream: Stream, watch: Watch, left: Callable[[Connection], None], *,
        arena: Arena, scratch: Blocks, native: Native | None, epoch: bytes, secret: bytes, ended: list[ReadResult],
    ) -> None:  # fmt: skip
        self._arena = arena
        self._scratch = scratch
        self._native = native
        self._epoch = epoch
        self._ended = ended
        self._output = bytearray(Hello(secret, epoch, arena.slab_bytes).pack())
        self._head = memoryview(bytearray(max(WELCOME_BYTES, ANSWER_BYTES)))
        self._head_filled = 0
        self._welcome: Welcome | None = None
        self._waiting: deque[_Read] = deque()
        self._asked: deque[_Read] = deque()
        self._asked_blocks = 0
        self._num_asked = 0
        self._receiving = False
        super().__init__(stream, watch, left)

    def start_read(self, read_id: int, locations: Sequence[int], block_ids: Sequence[int]) -> None:
        assert len(locations) == len(block_ids), f"{len(locations)} locations for {len(block_ids)} blocks"
        if self._closed_because:
            self._fail(read_id, self._closed_because)
            return
        if len(locations) > MAX_LOCATIONS:
            self._fail(read_id, f"a read of {len(locations)} blocks, the limit is {MAX_LOCATIONS}")
            return
        try:
            asked = np.array(locations, dtype=np.uint64)
        except OverflowError:
            self._fail(read_id, "a location is not a number of 64 bits")
            return
        self._waiting.append(_Read(read_id, asked, Receiving(self._native, self._arena.array, block_ids)))
        self._ask()
        self._wait()

    def abort(self, read_id: int) -> bool:
        self._ended[:] = [result for result in self._ended if result.read_id != read_id]
        self._waiting = deque(read for read in self._waiting if read.read_id != read_id)
        for read in self._asked:
            if read.read_id == read_id and not read.given_up:
                read.given_up = True
                read.receiving = Receiving(
                    self._native, self._scratch, np.zeros(len(read.locations), dtype=np.int64), read.receiving.position
                )
        return True  # bytes are received inside `poll` alone

    def _has_output(self) -> bool:
        return bool(self._output)

    def _peer_is_gone(self) -> str:
        if self._welcome is None:
            return f"the peer closed the connection on our hello: it is gone, or another secret or version than {TCP_VERSION}"
        return "the peer is gone"

    def _go_on(self, limit_bytes: int) -> None:
        while limit_bytes > 0:
            if self._receiving:
                receiving = self._asked[0].receiving
                limit_bytes -= self._stream.receive_blocks(receiving, limit_bytes)
                if receiving.left_bytes:
                    break
                self._finish("")
            elif not self._receive_head(ANSWER_BYTES if self._welcome else WELCOME_BYTES):
                break
            elif self._welcome is None:
                self._greet(Welcome.unpack(self._head[:WELCOME_BYTES]))
            else:
                self._begin(Answer.unpack(self._head[:ANSWER_BYTES]), self._welcome)
        while self._output:
            with memoryview(self._output) as view:
                sent = self._stream.send(view)
            if not sent:
                break
            del self._output[:sent]

    def _receive_head(self, num_bytes: int) -> bool:
        """Whether the head is complete, which begins the next one."""
        self._head_filled += self._stream.receive(self._head[self._head_filled : num_bytes])
        if self._head_filled < num_bytes:
            return False
        self._head_filled = 0
        return True

    def _greet(self, welcome: Welcome) -> None:
        if welcome.epoch != self._epoch:
            raise TransportError(f"epoch {welcome.epoch.hex()}, expected {self._epoch.hex()}")
        if welcome.slab_bytes != self._arena.slab_bytes:
            raise TransportError(f"slabs of {welcome.slab_bytes} bytes, ours have {self._arena.slab_bytes}")
        self._welcome = welcome
        self._ask()

    def _ask(self) -> None:
        while self._welcome and self._waiting:
            num = len(self._waiting[0].locations)
            if self._asked and (
                len(self._asked) >= MAX_REQUESTS
                or self._asked_blocks + num > MAX_LOCATIONS
                or self._asked_blocks * self._arena.slab_bytes >= ASK_AHEAD_BYTES
            ):
                return
            read = self._waiting.popleft()
            self._asked.append(read)
            self._asked_blocks += num
            self._output += pack_request(self._num_asked, read.locations)
            self._num_asked += 1

    def _begin(self, answer: Answer, welcome: Welcome) -> None:
        serial = self._num_asked - len(self._asked)
        if not self._asked or answer.serial != serial:
            raise TransportError(f"an answer to request {answer.serial}, expected {serial} of {self._num_asked}")
        num = len(self._asked[0].locations)
        if answer.status == OUTSIDE and answer.num == 0:
            self._finish(f"location {answer.detail} is not in an arena of {welcome.num_blocks} blocks")
        elif answer.status != OK or answer.num != num:
            raise TransportError(f"an answer of status {answer.status} with {answer.num} blocks, expected {num}")
        elif num:
            self._receiving = True
        else:
            self._finish("")

    def _finish(self, error: str) -> None:
        self._receiving = False
        read = self._asked.popleft()
        self._asked_blocks -= len(read.locations)
        if not read.given_up:
            self._ended.append(ReadResult(read.read_id, None if error else read.receiving.checksums, error))
        self._ask()

    def _fail(self, read_id: int, error: str) -> None:
        self._ended.append(ReadResult(read_id, None, error))

    def close(self, because: str = "closed by us") -> None:
        if self._closed_because:
            return
        super().close(because)
        for read in (*self._asked, *self._waiting):
            if not read.given_up:
                self._fail(read.read_id, because)
        self._asked.clear()
        self._waiting.clear()
