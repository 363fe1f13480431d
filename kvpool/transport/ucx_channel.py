"""The sink's side of the ucx transport: one channel, from its first frame to the proof that it is over.

Owns the channel's UCX worker and endpoint, and which messages are on their way into which slots of the bounce region. Writes
into the arena only from `work`, and only blocks of reads that were not given up.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kernels.block_copy import copy_blocks
from kvpool.transport import ucx_frames as frames
from kvpool.transport.base import ReadResult
from kvpool.transport.ucx_library import comes_soon
from protos.control import Source

if TYPE_CHECKING:
    from kvpool.transport.ucx import UcxTransport

log = logging.getLogger(__name__)

CONNECT_S = 5.0
"""A source that has not let us in by then never will: UCX does not report every handshake that breaks off."""

_WORK_BYTES = 4 * 1024 * 1024
"""Of one channel, before the others get their turn."""
_PROGRESS = 256
_QUIET = 64
_CLOSING_S = 0.02
"""A closed endpoint's queues are empty when UCX had nothing to do for `_QUIET` calls; on a broken device, after this long."""


class _Read:
    """One read: its blocks are asked for and land in order."""

    __slots__ = ("block_ids", "checksums", "locations", "num_asked", "num_landed", "read_id")

    def __init__(self, read_id: int, locations: Sequence[int], block_ids: NDArray[np.int64]) -> None:
        self.read_id = read_id
        self.locations = locations
        self.block_ids = block_ids
        self.checksums: NDArray[np.uint64] = np.zeros(len(locations), dtype=np.uint64)
        self.num_asked = 0
        self.num_landed = 0


class _Message:
    """A message on its way into a bounce slot; `read` is None when that read was given up."""

    __slots__ = ("first", "num", "read", "request", "slot")

    def __init__(self, request: Any, slot: int, read: _Read, first: int, num: int) -> None:
        self.request = request
        self.slot = slot
        self.read: _Read | None = read
        self.first = first
        self.num = num


class UcxChannel:
    """The way to one source. Keeps the `Channel` contract; `UcxTransport` gives it its turns."""

    def __init__(self, transport: UcxTransport, source: Source, host: str, port: int, secret: bytes) -> None:
        self._transport = transport
        self._ucx = transport.ucx
        self._hello = frames.Hello(secret, source.epoch, transport.arena.slab_bytes, secrets.randbits(32))
        self._num_blocks = 0
        self._next_seq = 0
        self._queue: deque[_Read] = deque()
        self._messages: deque[_Message] = deque()
        self._num_quarantined = 0
        self._sends: deque[tuple[Any, Any]] = deque()
        self._closed_because = ""
        self._broken = ""
        self._deadline = time.monotonic() + CONNECT_S
        self._worker = self._ucx.api.UCXWorker(transport.context)
        self._worker.init_blocking_progress_mode()
        self.fd: int = self._worker.epoll_file_descriptor
        self._frame = np.zeros(frames.REPLY_BYTES, dtype=np.uint8)
        self._greeted = False
        self._receive: Any = self._receive_frame(frames.GREETING_TAG)
        self._endpoint = self._worker.create_endpoint_from_hostname(host, port, True)

    @property
    def closed_because(self) -> str:
        return self._closed_because

    @property
    def num_quarantined(self) -> int:
        """Bounce slots into which messages of aborted reads may still come."""
        return self._num_quarantined

    @property
    def active(self) -> bool:
        """Whether it has blocks to wait for."""
        return bool(self._queue or self._messages)

    @property
    def overdue(self) -> bool:
        """Whether the source should have let us in by now."""
        return not (self._num_blocks or self._closed_because) and time.monotonic() > self._deadline

    @property
    def wants_slots(self) -> bool:
        """Whether there is something to ask for and a right to ask for it."""
        open_now = self._num_blocks and not self._closed_because
        return bool(open_now and self._queue and len(self._messages) < self._transport.share)

    def start_read(self, read_id: int, locations: Sequence[int], block_ids: Sequence[int]) -> None:
        targets = np.asarray(block_ids, dtype=np.int64)
        arena = self._transport.arena
        assert len(locations) == len(targets), f"{len(locations)} locations for {len(targets)} blocks"
        assert not len(targets) or (targets.min() >= 0 and targets.max() < arena.num_blocks), f"blocks {block_ids}"
        if self._closed_because:
            self._transport.end(ReadResult(read_id, None, self._closed_because))
            return
        self._queue.append(_Read(read_id, locations, targets))
        self._transport.wake(self.fd)

    def abort(self, read_id: int) -> bool:
        self._transport.forget(read_id)
        self._queue = deque(read for read in self._queue if read.read_id != read_id)
        self._give_up(read_id)
        self._transport.contain(self)
        return True  # nothing but a poll writes into the arena

    def close(self) -> None:
        self.close_because("closed by us")

    def work(self) -> int | None:
        """Goes on for a bounded time; the bytes that landed, or None if nothing at all happened. `broken` says whether the
        channel has to be closed: by the caller, since what runs here holds requests."""
        moved, num_bytes = False, 0
        for _ in range(_PROGRESS):
            progressed = self._worker.progress_once()
            landed = self._land()
            num_bytes += landed
            if not progressed and not landed:
                break
            moved = True
            if num_bytes >= _WORK_BYTES:
                break
        while self._sends and self._sends[0][0].completed:
            self._sends.popleft()
        if self._receive.completed:
            moved = True
            self._hear()
        if not self._broken and not self._endpoint.alive:
            self._broken = "the peer is gone, or was never there"
        if self.wants_slots:
            moved = self.ask() or moved
        return num_bytes if moved else None

    @property
    def broken(self) -> str:
        return self._broken

    def lingers(self) -> bool:
        """Whether something more came within a moment; False at once if nothing is on its way."""
        return bool(self._messages) and comes_soon(self._worker)

    def arm(self) -> bool:
        """Makes `fd` readable at the next event. False if there is something already."""
        return bool(self._worker.arm())

    def ask(self) -> bool:
        """Asks for as much as its share of the bounce region takes; whether that was anything."""
        asked = False
        while self.wants_slots:
            read = self._queue[0]
            if not read.num_asked and not self._fits(read):
                self._queue.popleft()
                continue
            slot = self._transport.take_slot(self)
            if slot is None:
                break
            self._ask(read, slot)
            asked = True
            if read.num_asked == len(read.locations):
                self._queue.popleft()
        return asked

    def close_because(self, why: str) -> None:
        """Ends every read, the endpoint and the worker; the slots are free again if the worker is gone then."""
        if self._closed_because:
            return
        self._closed_because = why
        reads = [message.read for message in self._messages] + list(self._queue)
        for read in dict.fromkeys(read for read in reads if read is not None):
            self._transport.end(ReadResult(read.read_id, None, why))
        self._queue.clear()
        slots = [message.slot for message in self._messages]
        self._num_quarantined = 0
        try:
            self._end_worker()
        except Exception as error:
            log.error("an endpoint could not be closed: %s", error)
        self._transport.closed(self, slots)

    def _end_worker(self) -> None:
        self._endpoint.close_blocking()  # by force: neither waits for the peer nor sends what is left
        # A receive that no message was matched to ends with its request; one that a message was writing into ends when UCX
        # has thrown the connection away, and then the worker can end too.
        self._messages.clear()
        self._receive = None
        deadline, quiet = time.monotonic() + _CLOSING_S, 0
        while quiet < _QUIET and time.monotonic() < deadline:
            quiet = 0 if self._worker.progress_once() else quiet + 1
        self._worker.progress()
        self._sends.clear()
        self._endpoint = None
        self._worker = None

    def _fits(self, read: _Read) -> bool:
        """False if the read ended already: it is empty, or names what the source hasn't got."""
        outside = [location for location in read.locations if not 0 <= location < self._num_blocks]
        if outside:
            error = f"location {outside[0]} is not in an arena of {self._num_blocks} blocks"
            self._transport.end(ReadResult(read.read_id, None, error))
        elif not len(read.locations):
            self._transport.end(ReadResult(read.read_id, read.checksums))
        return bool(len(read.locations)) and not outside

    def _ask(self, read: _Read, slot: int) -> None:
        first, slots = read.num_asked, self._transport.slots
        locations = read.locations[first : first + slots.blocks_per_slot]
        num, seq = len(locations), self._next_seq
        self._next_seq = (seq + 1) % frames.REPLY_SEQ
        read.num_asked += num
        tag = self._ucx.api.UCXXTag(frames.tag_of(self._hello.tag_base, seq))
        # Posted before it is asked for: a block never has to be kept anywhere else.
        request = self._worker.tag_recv(slots.buffer(slot, num), tag)
        self._messages.append(_Message(request, slot, read, first, num))
        self._send(frames.pack_ask(seq, locations))

    def _land(self) -> int:
        """Copies on what has landed, in the order asked for; the bytes."""
        num_bytes, slots = 0, self._transport.slots
        while self._messages and self._messages[0].request.completed:
            message = self._messages[0]
            message.request.check_error()
            read = message.read
            if read is None:
                self._num_quarantined -= 1
            else:
                end = message.first + message.num
                copy_blocks(
                    self._transport.native,
                    slots.blocks[message.slot],
                    slots.indices[: message.num],
                    self._transport.arena.array,
                    read.block_ids[message.first : end],
                    read.checksums[message.first : end],
                )
                read.num_landed = end
                if end == len(read.locations):
                    self._transport.end(ReadResult(read.read_id, read.checksums))
            self._messages.popleft()
            slots.give(message.slot)
            num_bytes += message.num * self._transport.arena.slab_bytes
            if self.wants_slots:
                self.ask()
        return num_bytes

    def _hear(self) -> None:
        self._receive.check_error()
        if not self._greeted:
            self._greeted = True
            self._reader_tag = self._ucx.api.UCXXTag(frames.unpack_greeting(self._frame))
            self._receive = self._receive_frame(frames.tag_of(self._hello.tag_base, frames.REPLY_SEQ))
            self._send(frames.pack_hello(self._hello))
            return
        reply = frames.unpack_reply(self._frame)
        if reply.refused or not reply.num_blocks:
            self._broken = f"refused: {reply.refused or 'an arena without blocks'}"
            return
        self._num_blocks = reply.num_blocks
        self._receive = self._receive_frame(frames.tag_of(self._hello.tag_base, frames.REPLY_SEQ))

    def _give_up(self, read_id: int) -> None:
        for message in self._messages:
            if message.read is not None and message.read.read_id == read_id:
                message.read = None
                self._num_quarantined += 1

    def _receive_frame(self, tag: int) -> Any:
        return self._worker.tag_recv(self._ucx.array(self._frame), self._ucx.api.UCXXTag(tag))

    def _send(self, frame: frames.Frame) -> None:
        buffer = self._ucx.array(frame)
        self._sends.append((self._endpoint.tag_send(buffer, self._reader_tag), buffer))
