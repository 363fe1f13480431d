"""The source's end of a tcp connection: somebody who reads our arena.

Owns the handshake and the queue of what the reader asked for; sends straight from the arena. A reader that takes its answers
slowly costs its queue and nothing more.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import Native
from kernels.socket_io import Sending
from kvpool.arena import Arena
from kvpool.transport.tcp_connection import Connection, Watch
from kvpool.transport.tcp_frames import (
    HELLO_BYTES,
    MAX_LOCATIONS,
    MAX_REQUESTS,
    OK,
    OUTSIDE,
    Answer,
    Hello,
    RequestReader,
    Welcome,
)
from kvpool.transport.tcp_stream import Stream
from tandem.errors import TransportError

HEAR_BYTES = 64 * 1024
"""Of requests that a reader's poll takes in."""
_NOTHING: list[int] = []


class Reader(Connection):
    """Closes on whatever is not the protocol. `welcomed` once the reader has shown secret, epoch and slab size. `heard`
    ([HEAR_BYTES]) is where it takes bytes in; nothing stays there between polls, so all readers may share it."""

    def __init__(
        self, stream: Stream, watch: Watch, left: Callable[[Connection], None], *,
        arena: Arena, native: Native | None, epoch: bytes, secret: bytes, heard: memoryview,
    ) -> None:  # fmt: skip
        self._arena = arena
        self._native = native
        self._epoch = epoch
        self._secret = secret
        self._hello = bytearray()
        self._requests = RequestReader()
        self._answers: deque[Sending] = deque()
        self._unanswered_blocks = 0
        self._refused = ""
        self._heard = heard
        self.welcomed = False
        super().__init__(stream, watch, left)

    def _has_output(self) -> bool:
        return bool(self._answers)

    def _go_on(self, limit_bytes: int) -> None:
        if not self._refused:
            if self.welcomed:
                self._hear_requests()
            else:
                self._hear_hello()
        self._answer(limit_bytes)
        if self._refused and not self._answers:
            raise TransportError(self._refused)

    def _hear_hello(self) -> None:
        heard = self._stream.receive(self._heard[: HELLO_BYTES - len(self._hello)])
        self._hello += self._heard[:heard]
        if len(self._hello) < HELLO_BYTES:
            return
        hello = Hello.unpack(self._hello)
        if not hmac.compare_digest(hello.secret, self._secret):
            raise TransportError("a secret that is not ours")
        if hello.epoch != self._epoch:
            self._refused = f"epoch {hello.epoch.hex()}, ours is {self._epoch.hex()}"
        elif hello.slab_bytes != self._arena.slab_bytes:
            self._refused = f"slabs of {hello.slab_bytes} bytes, ours have {self._arena.slab_bytes}"
        else:
            self.welcomed = True
        self._say(_NOTHING, Welcome(self._epoch, self._arena.num_blocks, self._arena.slab_bytes).pack())

    def _hear_requests(self) -> None:
        heard = self._stream.receive(self._heard)
        for serial, locations in self._requests.feed(self._heard[:heard]):
            self._take(serial, locations)

    def _take(self, serial: int, locations: NDArray[np.uint64]) -> None:
        num, waiting = len(locations), len(self._answers)
        if waiting >= MAX_REQUESTS or self._unanswered_blocks + num > MAX_LOCATIONS:
            raise TransportError(
                f"a request for {num} blocks while {waiting} for {self._unanswered_blocks} wait, the limit is "
                f"{MAX_REQUESTS} for {MAX_LOCATIONS}"
            )
        outside = locations[locations >= np.uint64(self._arena.num_blocks)]
        if len(outside):
            self._say(_NOTHING, Answer(serial, OUTSIDE, 0, int(outside[0])).pack())
        else:
            self._say(locations.astype(np.int64), Answer(serial, OK, num).pack())

    def _say(self, ids: list[int] | NDArray[np.int64], head: bytes) -> None:
        self._answers.append(Sending(self._native, self._arena.array, ids, head))
        self._unanswered_blocks += len(ids)

    def _answer(self, limit_bytes: int) -> None:
        while self._answers and limit_bytes > 0:
            sending = self._answers[0]
            limit_bytes -= self._stream.send_blocks(sending, limit_bytes)
            if sending.left_bytes:
                return
            self._answers.popleft()
            self._unanswered_blocks -= sending.num_blocks
